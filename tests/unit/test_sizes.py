"""The shipped sizes are the paper's: shapes, recipe, exact counts, what transformers makes of them, and their layouts.

Every expected number is written down from the paper's tables or by hand; none comes from the configs.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_depthattn.config import load_config, to_dict, validate
from megatron_depthattn.convert.hf_writer import copy_files, model_files, write_json
from megatron_depthattn.estimate.counts import decoder_shape, forward_flops
from megatron_depthattn.hf.model_config import to_hf_config
from megatron_depthattn.train.build import transformer_config

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPE = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "init_std": "initializer_range",
}
PAPER = {
    # name: shape in SHAPE's order, stride, learning rate, parameters
    "360m": ((24, 960, 2540, 15, 15, 0.02), 12, 1.5e-3, 360_672_192),
    "500m": ((24, 1152, 3072, 18, 18, 0.02), 12, 1e-3, 498_165_888),
    "710m": ((32, 1280, 3072, 20, 20, 0.02), 16, 1e-3, 716_068_096),
    "1.5b": ((48, 1536, 4096, 24, 6, 0.01), 24, 1e-3, 1_343_774_208),
    "3b": ((48, 2048, 6912, 32, 8, 0.01), 24, 1e-3, 2_747_998_208),
}
COMPANION = {"410m": ((32, 1024, 2816, 16, 4, 0.02), 16, 3e-4, 426_316_800)}
SIZES = PAPER | COMPANION
TENSOR = {
    "360m": [1],  # 15 heads, FFN 4 x 5 x 127
    "500m": [1, 2, 3, 6],  # 18 heads; 9 does not divide an FFN of 3 x 1024
    "710m": [1, 2, 4],  # 20 heads; 5 does not divide the FFN
    "1.5b": [1, 2],  # 6 key/value heads; 3 does not divide an FFN of 4096
    "3b": [1, 2, 4, 8, 16, 32],
    "410m": [1, 2, 4, 8, 16],
}


@pytest.mark.parametrize("name", SIZES)
def test_shapes_and_recipes(name):
    config, (shape, stride, rate, _) = load_config(CONFIGS / f"{name}.yaml"), SIZES[name]
    model, train, optimizer = config.model, config.train, config.optimizer
    assert tuple(getattr(model, key) for key in SHAPE) == shape
    assert (model.depth_attention.stride, model.kv_channels, model.tie_embeddings) == (stride, 64, False)
    assert (model.max_position_embeddings, config.data.sequence_length, config.precision.dtype) == (2048, 2048, "bf16")
    assert (optimizer.lr, optimizer.min_lr_ratio, optimizer.warmup_ratio) == (rate, 0.1, 0.02)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    of_the_paper = (15_625, 1024, 50_304, 1e-5)
    own = (train.steps, train.global_batch_size, model.vocab_size, model.norm_epsilon)
    assert own == (of_the_paper if name in PAPER else (50_000, 512, 32_000, 1e-6))
    assert config.run.dir == f"runs/{name}"
    assert (model.denseformer.period, model.denseformer.dilation) == (1, 1)
    assert (model.attnres.block_size, model.mhc.num_streams) == (12, 4)


@pytest.fixture(scope="module")
def model_code(tmp_path_factory) -> Path:
    """A folder with an export's model files; transformers keeps its copy of them below it."""
    folder = tmp_path_factory.mktemp("export")
    copy_files(model_files("depthattn"), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        yield folder


@pytest.mark.parametrize("name", SIZES)
def test_counts_are_the_papers_here_and_in_transformers(name, model_code):
    """The vanilla model is transformers' own Qwen3; Depth-Attention adds no weight to it."""
    config, (shape, stride, _, parameters) = load_config(CONFIGS / f"{name}.yaml"), SIZES[name]
    assert decoder_shape(config).parameters == parameters
    section = to_dict(config)["model"]
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    vanilla, depth = (
        to_hf_config(section | {"method": method}, dtype="bfloat16", special_tokens=tokens)
        for method in ("vanilla", "depth_attention")
    )
    write_json(model_code / "config.json", depth)
    exported = AutoConfig.from_pretrained(model_code, trust_remote_code=True)
    assert tuple(getattr(exported, key) for key in SHAPE.values()) == shape
    assert (exported.depth_attention_stride, exported.head_dim) == (stride, 64)
    assert exported.vocab_size == section["vocab_size"]
    assert (exported.rms_norm_eps, exported.use_depth_attention) == (section["norm_epsilon"], True)
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (0, 0, 1)
    with torch.device("meta"):
        models = (
            Qwen3ForCausalLM(Qwen3Config(**vanilla)),
            AutoModelForCausalLM.from_config(exported, trust_remote_code=True),
        )
    assert type(models[1]).__name__ == "DepthAttnForCausalLM"
    assert [sum(weight.numel() for weight in model.parameters()) for model in models] == [parameters] * 2


@pytest.mark.parametrize("name", SIZES)
def test_tensor_parallel_sizes_are_those_that_divide_and_the_error_lists_them(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    for tensor in range(1, 41):
        split = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, tensor=tensor))
        if tensor in TENSOR[name]:
            validate(split, tensor, needs_data=False)
            product = dataclasses.replace(split.parallel, pipeline=2, context=2)
            validate(dataclasses.replace(split, parallel=product), tensor * 4, needs_data=False)
            transformer_config(split, only_counted=True)  # Megatron takes it too
        else:
            with pytest.raises(ValueError) as raised:
                validate(split, tensor, needs_data=False)
            assert str(raised.value).endswith(f"to what this model allows: {', '.join(map(str, TENSOR[name]))}")


@pytest.mark.parametrize(
    ("name", "fp8", "allowed"),
    [
        ("360m", "tensorwise", "none"),
        ("360m", "mxfp8", "none"),
        ("500m", "mxfp8", "1, 2, 3, 6"),
        ("3b", "tensorwise", "1, 2, 4, 8, 16"),  # 6912 / 32 = 216
        ("3b", "mxfp8", "1, 2, 4, 8"),  # 6912 / 16 = 432
    ],
)
def test_fp8_is_allowed_where_every_dimension_is_a_multiple_of_16_or_32(name, fp8, allowed):
    for tensor in TENSOR[name]:
        config = load_config(CONFIGS / f"{name}.yaml", [f"precision.fp8={fp8}", f"parallel.tensor={tensor}"])
        if str(tensor) in allowed.split(", "):
            validate(config, tensor, needs_data=False)
        else:
            with pytest.raises(ValueError, match=rf"allows with it: {allowed}$"):
                validate(config, tensor, needs_data=False)


def test_the_mix_is_hardly_any_arithmetic():
    """The most where every head has keys and values of its own."""
    shares = {name: forward_flops(load_config(CONFIGS / f"{name}.yaml")) for name in SIZES}
    assert {name for name, flops in shares.items() if flops.mix > 2e-4 * flops.total} == {"360m", "500m", "710m"}
    assert all(flops.mix < 4e-4 * flops.total for flops in shares.values())
