"""The TransformerEngine layer spec without a GPU, against the local spec and the published names; see stand_in.py.

Here are the local spec, the converter and the comparisons; what needs TransformerEngine runs in worker.py.
"""

import itertools
from pathlib import Path

import pytest
import torch

from megatron_depthattn.config import load_config
from megatron_depthattn.config.hardware_checks import Accelerator, recipe_unsupported_on
from megatron_depthattn.config.precision import RECIPES
from megatron_depthattn.hf.name_mapping import ModelShape, weight_groups
from tests.te.small import FUSED_NORMS, assert_equal, restarted, small_config, under_te

ROOT = Path(__file__).parents[2]
SIZES = ("410m", "1.5b", "3b")
WORLDS = [world for world in itertools.product(SIZES, (1, 2, 8), (1, 4)) if world[:2] != ("1.5b", 8)]


def size_of(size: str):
    return load_config(ROOT / f"configs/{size}.yaml").model


# ---- names, shapes, shares


@pytest.mark.parametrize(("size", "tensor", "pipeline"), WORLDS)
def test_names_and_shapes_are_the_published_ones_under_every_layout(te, size, tensor, pipeline):
    """Every weight on exactly one stage, with its global shape; its parts lie where the local spec has them."""
    published = {
        group.megatron: list(group.megatron_shape)
        for group in weight_groups(ModelShape.from_model_section(vars(size_of(size))))
    }
    found: dict[str, list[int]] = {}
    for stage in range(pipeline):
        name = f"{size}-tp{tensor}-cp1-pp{pipeline}-stage{stage}"
        local, ours = te.local[name], te.te[name]
        assert ours["weights"] == local["weights"]
        assert ours["numel"] == local["numel"]
        assert not found.keys() & ours["weights"].keys()
        found |= {weight: facts["shape"] for weight, facts in ours["weights"].items()}
    assert found == published


def test_depth_attention_adds_no_weight(te):
    for stage in range(4):
        depth, vanilla = (te.te[f"410m{kind}-tp2-cp1-pp4-stage{stage}"] for kind in ("", "-vanilla"))
        assert depth["weights"] == vanilla["weights"]
        assert depth["objects"] == vanilla["objects"]


def test_control_the_specs_name_and_store_things_differently(te):
    """Parameters, and FP8 state of norms: what the checkpoint's names hide."""
    differing = {name for name in te.conversion["initial"].keys() ^ te.initial.keys() if ".0." in name}
    assert differing == {f"decoder.layers.0.{name}" for name in (*FUSED_NORMS, *FUSED_NORMS.values())}
    name = "3b-tp1-cp1-pp1-stage0"
    assert set(te.te[name]["objects"]) > set(te.local[name]["objects"])


def test_key_value_heads_that_cannot_be_split_are_rejected_by_both_specs(te):
    for spec in (te.local, te.te):
        assert "num_query_groups" in spec["error"]


# ---- modules

MEGATRON = "megatron.core.extensions.transformer_engine."
IDENTITY = "megatron.core.transformer.identity_op.IdentityOp"
NORM = "transformer_engine.pytorch.module.rmsnorm.RMSNorm"
CLASSES = {
    "self_attention.linear_qkv": MEGATRON + "TELayerNormColumnParallelLinear",
    "self_attention.core_attention": MEGATRON + "TEDotProductAttention",
    "self_attention.q_layernorm": NORM,
    "self_attention.k_layernorm": NORM,
    "self_attention.linear_proj": MEGATRON + "TERowParallelLinear",
    "mlp.linear_fc1": MEGATRON + "TELayerNormColumnParallelLinear",
    "mlp.linear_fc2": MEGATRON + "TERowParallelLinear",
    "input_layernorm": IDENTITY,
    "pre_mlp_layernorm": IDENTITY,
}
DEPTH = {
    "": "megatron_depthattn.model.layer.DepthAttentionLayer",
    "self_attention": "megatron_depthattn.model.attention.DepthSelfAttention",
}
PLAIN = {
    "": "megatron.core.transformer.transformer_layer.TransformerLayer",
    "self_attention": "megatron.core.transformer.attention.SelfAttention",
}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("410m-tp1-cp1-pp1-stage0", DEPTH),
        ("3b-tp8-cp1-pp4-stage3", DEPTH),
        ("410m-tp2-cp2-pp1-stage0", DEPTH),
        ("410m-vanilla-tp2-cp1-pp4-stage3", PLAIN),
    ],
)
def test_every_module_is_transformer_engines_but_layer_and_attention(te, name, own):
    classes = te.te[name]["classes"]
    for path, expected in (CLASSES | own).items():
        assert classes[f"decoder.layers.0.{path}".rstrip(".")] == expected, path
    assert classes["decoder.final_layernorm"] == NORM
    others = te.local[name]["classes"].values()
    assert not any(MEGATRON in other or other == NORM for other in others), "control: none of it in the local spec"


@pytest.mark.parametrize("size", SIZES)
def test_every_norm_has_the_configs_epsilon(te, size):
    found = te.te[f"{size}-tp1-cp1-pp1-stage0"]["epsilons"]
    norms = ("self_attention.linear_qkv", "self_attention.q_layernorm", "self_attention.k_layernorm", "mlp.linear_fc1")
    expected = {*(f"decoder.layers.0.{path}" for path in norms), "decoder.final_layernorm"}
    assert found == dict.fromkeys(expected, size_of(size).norm_epsilon)


def test_core_attention_knows_heads_and_context_ranks(te):
    """Key/value heads of this rank, one at the least, and the ranks that share a sequence."""
    for size, tensor in {world[:2] for world in WORLDS}:
        heads, _ = te.te[f"{size}-tp{tensor}-cp1-pp1-stage0"]["attention"]
        assert heads == max(1, size_of(size).num_query_groups // tensor)
    assert te.te["410m-tp2-cp2-pp1-stage0"]["attention"] == [2, [1, 3]]


def test_rope_is_fused_where_that_leaves_the_value_alone(te):
    name = "410m-tp1-cp1-pp1-stage0"
    assert te.te[name]["fused RoPE"] == [True, False]
    assert te.local[name]["fused RoPE"] == [False, False]


# ---- weights of a run


def test_the_same_seed_gives_the_same_weights(te):
    assert_equal(te.conversion["initial"], under_te(te.initial))


def test_the_value_is_copied_where_the_norm_of_k_does_not_keep_the_projection(te):
    """(what attention goes by, what autograd saves) in fp32."""
    assert te.local["keeps projection"] == (True, True)
    assert te.te["keeps projection"] == (False, False)


def test_weight_decay_spares_the_norms(te):
    """Numbers of elements, by the factor of weight decay."""
    norms = sum(value.numel() for name, value in te.initial.items() if value.dim() == 1)
    matrices = sum(value.numel() for value in te.initial.values()) - norms
    assert te.conversion["weight_decay"] == te.run.weight_decay() == {1.0: matrices, 0.0: norms}


# ---- checkpoints


def test_a_local_checkpoint_comes_back_through_the_te_spec_bit_by_bit(te):
    """Weights, Adam's fp32 weights and moments, its step."""
    assert_equal(te.conversion["local"]["parameters"], under_te(te.run.parameters()))
    assert all(type(step) is int for step in te.conversion["local"]["groups"]), (
        "TransformerEngine's Adam takes no float"
    )
    back = restarted(Path(te.conversion["te"]))
    assert_equal(back.parameters(), te.run.parameters())
    for found, expected in zip(back.moments(), te.run.moments(), strict=True):
        assert_equal(found, expected)
    assert any(not torch.equal(te.initial[name], value) for name, value in back.parameters().items()), "control"


@pytest.mark.parametrize("spec", ["te", "fp8"])
def test_both_specs_export_the_same_bytes(te, spec):
    from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
    from megatron_depthattn.convert.to_hf import export

    found = te.conversion[spec]
    output = te.folder / f"hf-{spec}"
    export(MegatronCheckpoint(Path(found if spec == "te" else found["folder"])), output)
    for file in ("model.safetensors", "config.json"):
        assert (output / file).read_bytes() == (te.folder / "hf" / file).read_bytes()


def test_an_imported_model_starts_under_the_te_spec(te):
    imported = te.conversion["imported"]
    assert imported["step"] == 0
    assert_equal(imported["parameters"], under_te(te.run.parameters()))


def test_fp8_scaling_state_comes_back_and_nobody_else_minds_it(te):
    """Scales and amax histories of every linear layer; core attention's are not stored by Megatron."""
    from torch.distributed.checkpoint import FileSystemReader

    fp8 = te.conversion["fp8"]
    stored = {name: value for name, value in fp8["saved"].items() if "core_attention" not in name}
    assert len(stored) == 4 * 4 * 4  # layers, linear layers of each, tensors of each
    assert_equal(fp8["loaded"], stored)
    assert fp8["loaded without FP8"] == {}
    assert_equal(fp8["parameters"], under_te(te.run.parameters()))
    assert_equal(restarted(Path(fp8["folder"])).parameters(), te.run.parameters())
    entries = FileSystemReader(fp8["folder"]).read_metadata().state_dict_metadata
    assert any("_extra_state" in name for name in entries), "control: there was state to mind"


def test_control_a_missing_weight_is_an_error_under_both_specs(te):
    from megatron.core.utils import unwrap_model
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_depthattn.train.build import build_chunk, transformer_config
    from megatron_depthattn.train.checkpoint import load_weights
    from megatron_depthattn.train.megatron_state import set_weights

    assert "decoder.layers.4." in te.conversion["missing weight"]
    config = small_config("local", num_layers=5)
    with pytest.raises(CheckpointException, match=r"decoder\.layers\.4\."):
        load_weights(Path(te.conversion["fp8"]["folder"]), [build_chunk(config, transformer_config(config))])
    models = unwrap_model(te.run.chunks)
    loaded = models[0].state_dict()
    del loaded["output_layer.weight"]
    with pytest.raises(AssertionError, match=r"output_layer\.weight"):
        set_weights(models, {"model0": loaded})


def test_the_local_spec_computes_the_same_where_transformer_engine_is_there(te):
    """Megatron-Core takes some of its functions then, in local layers too."""
    from tests.unit.test_recompute import build, loss_and_gradients

    loss, gradients = loss_and_gradients(build(depth_attention_stride=1))
    found, its_gradients = te.local_layers
    assert torch.equal(found, loss)
    assert_equal(its_gradients, gradients)


# ---- recipes, switches


STRICTER_HERE = {
    # Where TransformerEngine does not ask: no CUDA before 12.8 knows these GPUs.
    *(("mxfp8", capability, "12.1") for capability in ((10, 0), (10, 3))),
    # Where it emulates blocks by mxfp8, which it rejects on this GPU.
    *(("blockwise", (12, 0), cuda) for cuda in ("12.9", "13.0")),
}


def test_a_recipe_is_rejected_where_transformer_engine_rejects_it(te):
    rejected = {
        key for key in te.support if recipe_unsupported_on(key[0], Accelerator("a GPU", key[1], key[2], "2.20.2"))
    }
    assert rejected - STRICTER_HERE == {key for key, runs in te.support.items() if not runs}
    assert {key[0] for key in te.support.keys() - rejected} == {"delayed", "tensorwise", "blockwise", "mxfp8"}


def test_fp8_attention_is_rejected_where_megatron_has_no_switch_for_it(te):
    """And for mxfp8, for which Megatron-Core has one as of 0.19 only."""
    has_switch = {name for name, passed in vars(te)["fp8 attention"].items() if passed}
    newer = tuple(map(int, te.versions["megatron-core"].split(".")[:2])) >= (0, 19)
    assert has_switch == {"delayed", "tensorwise"} | ({"mxfp8"} if newer else set())
    assert {name for name, recipe in RECIPES.items() if recipe.attention_gpus} == {"delayed", "tensorwise"}


def test_userbuffers_are_of_the_size_of_a_microbatch(te):
    asked, layers = te.userbuffers["asked"], te.userbuffers["layers"]
    config = small_config("te", tensor=2, sequence=True)
    tokens = config.train.micro_batch_size * config.data.sequence_length
    assert asked["shape"] == [tokens, config.model.hidden_size]
    assert asked["tp_size"] == 2
    assert asked["quantization_modes"] == ["none"]
    column, row = ["ub_overlap_ag_fprop", "ub_bulk_dgrad", "ub_bulk_wgrad"], ["ub_overlap_rs_fprop"]
    assert layers == {
        "self_attention.linear_qkv": ("qkv", column),
        "self_attention.linear_proj": ("proj", row),
        "mlp.linear_fc1": ("fc1", column),
        "mlp.linear_fc2": ("fc2", row),
    }
