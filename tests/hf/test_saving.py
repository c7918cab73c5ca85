"""Folders written and read: every tensor, every setting, in the style of transformers 4 and of 5."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_depthattn.hf.configuration_depthattn import DepthAttnConfig
from megatron_depthattn.hf.modeling_depthattn import DepthAttnForCausalLM
from tests.hf.models import DENSE, MIXES_BOTH, ROPE_THETA, largest, make_config, make_model, make_tokens, make_vanilla


def load(folder, **options) -> DepthAttnForCausalLM:
    model, report = DepthAttnForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_every_tensor_survives(tied, dtype, tmp_path):
    model = make_model(dtype=dtype, **DENSE, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == dict(model.named_parameters()).keys()
    assert ("lm_head.weight" in stored) == (not tied)
    assert stored.keys() == dict(make_vanilla(tie_word_embeddings=tied).named_parameters()).keys()
    loaded = load(tmp_path, dtype="auto")
    for name, tensor in loaded.state_dict().items():
        file_name = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        assert tensor.dtype == dtype and torch.equal(tensor, stored[file_name]), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    tokens = make_tokens()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_loops": 3},  # in the file "unrolled" and the stride of that
        {"num_loops": 3, "depth_attention_loop_sources": "same_layer", "depth_attention_stride": 2},
        {"use_depth_attention": False},
        DENSE | MIXES_BOTH | {"num_loops": 2, "depth_attention_k_norm_after_rope": True},
    ],
    ids=["defaults", "loops", "same layer", "off", "all"],
)
def test_config_file_holds_every_setting(settings, tmp_path):
    config = make_config(**settings)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    keys = DepthAttnConfig.method_keys
    assert {key: written[key] for key in keys} == {key: getattr(config, key) for key in keys}
    assert written["depth_attention_stride"] == settings.get("depth_attention_stride", 2 * settings.get("num_loops", 1))
    assert written["model_type"] == "depthattn"
    again = DepthAttnConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() | {"transformers_version": again.to_dict()["transformers_version"]}


def test_config_file_of_all_defaults_holds_every_setting(tmp_path):
    DepthAttnConfig().save_pretrained(tmp_path)
    assert set(DepthAttnConfig.method_keys) <= json.loads((tmp_path / "config.json").read_text()).keys()


def rewrite_config(folder, drop=(), **changes) -> None:
    path = folder / "config.json"
    settings = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(settings | changes))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": ROPE_THETA, "rope_scaling": None},
        {"rope_theta": ROPE_THETA},
        {"rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA}, "rope_theta": ROPE_THETA},
        {"rope_parameters": {"rope_theta": ROPE_THETA}},
    ],
    ids=["4", "4_short", "5", "both", "5_short"],
)
@torch.no_grad()
def test_rope_settings_of_either_version(rope, tmp_path):
    model, tokens = make_model(**DENSE), make_tokens()
    model.save_pretrained(tmp_path)
    keys = ("rope_theta", "rope_scaling", "rope_parameters")
    rewrite_config(tmp_path, drop=keys, **rope)
    assert torch.equal(load(tmp_path)(tokens).logits, model(tokens).logits)
    # Control: the logits would show another base.
    rewrite_config(tmp_path, drop=keys)
    assert largest(load(tmp_path)(tokens).logits - model(tokens).logits) > 1e-3


@pytest.mark.parametrize("inside", [{"rope_theta": ROPE_THETA}, {}], ids=["theta_inside", "theta_outside"])
@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
@torch.no_grad()
def test_linear_rope_scaling_in_either_version(style, inside, tmp_path):
    """It stretches positions and scales nothing, so it is supported; the other version's style gives the same."""
    model, tokens = make_model(**DENSE), make_tokens()
    model.save_pretrained(tmp_path)
    rope = {"rope_scaling": None, "rope_theta": ROPE_THETA, style: {"rope_type": "linear", "factor": 2.0} | inside}
    rewrite_config(tmp_path, drop=("rope_parameters",), **rope)
    positions = torch.arange(tokens.shape[1])[None]
    every_second = model(tokens[:, ::2], position_ids=positions[:, : tokens[:, ::2].shape[1]]).logits
    stretched = load(tmp_path)(tokens[:, ::2], position_ids=positions[:, ::2]).logits
    assert largest(stretched - every_second) < 1e-5
    assert largest(load(tmp_path)(tokens).logits - model(tokens).logits) > 1e-3


@torch.no_grad()
def test_null_stride_is_half_the_effective_layers(tmp_path):
    model = make_model(num_loops=2)
    model.save_pretrained(tmp_path)
    rewrite_config(tmp_path, depth_attention_stride=None)
    loaded = load(tmp_path)
    assert loaded.config.depth_attention_stride == model.config.depth_attention_stride == 4
    rewrite_config(tmp_path, depth_attention_stride=3)
    tokens = make_tokens()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert largest(load(tmp_path)(tokens).logits - model(tokens).logits) > 1e-2
