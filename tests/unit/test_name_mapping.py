"""The table between Megatron's and Hugging Face's names: each name once, shapes right, numbers where they belong."""

from collections import Counter
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_depthattn.config import DepthConfig, load_config, to_dict
from megatron_depthattn.hf.configuration_depthattn import CHOICES
from megatron_depthattn.hf.model_config import WORDS, to_hf_config, to_model_section
from megatron_depthattn.hf.name_mapping import ModelShape, WeightGroup, weight_groups
from megatron_depthattn.switches import MODEL_SWITCHES
from tests.checkpoints import model_section


def groups_of(**changes) -> list[WeightGroup]:
    return weight_groups(ModelShape.from_model_section(model_section(**changes)))


@pytest.mark.parametrize("tied", [False, True])
def test_every_name_stands_for_one_tensor_of_transformers_qwen3(tied: bool):
    section = model_section(tie_embeddings=tied, depth_attention={"enabled": False})
    config = to_hf_config(section, dtype="float32", special_tokens={})
    with torch.device("meta"):
        parameters = dict(Qwen3ForCausalLM(Qwen3Config(**config)).named_parameters())
    ours = [item for group in groups_of(tie_embeddings=tied) for item in group.hf.items()]
    assert Counter(ours) == Counter((name, tuple(parameter.shape)) for name, parameter in parameters.items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_loops": 2},
        {"num_loops": 2, "depth_attention": {"loop_sources": "unrolled"}},
        {"tie_embeddings": True, "depth_attention": {"stride": 3, "recent_window": 0, "mixes": "key"}},
        {"depth_attention": {"enabled": False, "stride": None, "recent_window": 0}},
    ],
)
def test_config_survives_the_way_there_and_back(changes: dict):
    section = model_section(**changes)
    returned = to_model_section(to_hf_config(section, dtype="bfloat16", special_tokens={"eos_token_id": 0}))
    del section["spec"], section["depth_attention"]["op"]
    assert returned == section | {"method": "depth_attention"}


@pytest.mark.parametrize(("enabled", "rule"), [(True, "unrolled"), (False, "same_layer")])
def test_a_looped_folder_without_the_rule_is_older(enabled: bool, rule: str):
    """Without Depth-Attention it has no rule, and who trains on with it gets the default."""
    section = model_section(num_loops=2, depth_attention={"enabled": enabled, "stride": 4, "recent_window": 0})
    config = to_hf_config(section, dtype="float32", special_tokens={})
    del config["depth_attention_loop_sources"]
    assert to_model_section(config)["depth_attention"]["loop_sources"] == rule


@pytest.mark.parametrize(("rule", "stride"), [("same_layer", 4), ("unrolled", 12)])
def test_half_the_layers_that_are_counted_is_written_out(rule: str, stride: int):
    section = model_section(num_layers=8, num_loops=3, depth_attention={"stride": None, "loop_sources": rule})
    config = to_hf_config(section, dtype="float32", special_tokens={})
    assert (config["depth_attention_stride"], config["depth_attention_loop_sources"]) == (stride, rule)


def test_every_list_of_words_is_the_schemas():
    known = {f"depth_attention_{key}": set(get_args(hint)) for key, hint in get_type_hints(DepthConfig).items()}
    for key, words in WORDS.items():
        assert CHOICES == WORDS and known[key] == set(words)


RELEASED = {
    "model_type": "llama",
    "hidden_size": 2048,
    "head_dim": 64,
    "intermediate_size": 6912,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 50304,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "use_qk_norm": True,
    "use_depth_attention": True,
    "depth_attention_stride": 24,
    "depth_attention_recent_window": 0,
}


def test_released_3b_is_the_shipped_3b_config():
    shipped = to_dict(load_config(Path(__file__).parents[2] / "configs/3b.yaml"))["model"]
    imported = to_model_section(RELEASED | {"initializer_range": 0.01, "rope_theta": 10000.0})
    for key in ("spec", *MODEL_SWITCHES, "denseformer", "attnres", "mhc"):
        del shipped[key]
    del shipped["depth_attention"]["op"]
    shipped["depth_attention"]["stride"] = shipped["depth_attention"]["stride"] or 24
    assert imported == shipped


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' cannot be imported"),
        ({"use_qk_norm": False}, "Llama models without q and k norms"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=true"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"scale_embeds": True}, "scale_embeds=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"rms_norm_eps": None}, "does not say rms_norm_eps"),
    ],
)
def test_what_cannot_be_trained_is_rejected(change: dict, message: str):
    config = {key: value for key, value in (RELEASED | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        to_model_section(config)
