"""Everything that the model and its process groups reject, and that each error says what, why and what to do.

Megatron's fields come and go between versions, and its own checks come first: what a constructor does with a
field is pinned per field below, so that nothing passes unseen.
"""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_depthattn.model.core_attention import SDPAttention
from megatron_depthattn.model.gpt import build_gpt_model, qwen3_style_config
from megatron_depthattn.model.layer_specs import depth_attention_layer_spec
from megatron_depthattn.model.transformer_config import DepthAttentionConfig
from megatron_depthattn.model.unsupported import EVERY, MEGATRON_CHECKS, MIX, OTHERS
from megatron_depthattn.parallel import groups
from megatron_depthattn.parallel.launch_env import LaunchEnvironment, launch_environment

PIPELINED = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}
INTERLEAVED = PIPELINED | {
    "virtual_pipeline_model_parallel_size": 2,
    "overlap_p2p_comm": True,
    "batch_p2p_comm": False,
}
REFUSED_VALUES: dict[str, tuple[Any, dict[str, Any]]] = {
    # field: the value that is rejected, and what else it takes for that
    "fused_single_qkv_rope": (True, {}),
    "multi_latent_attention": (True, {}),
    "mtp_num_layers": (1, {}),
    "num_moe_experts": (4, {}),
    "overlap_moe_expert_parallel_comm": (True, {}),
    "experimental_attention_variant": ("gated_delta_net", {}),
    "attention_output_gate": (True, {}),
    "heterogeneous_block_specs": (True, {}),
    "softmax_scale": (0.25, {}),
    "yarn_rotary_scaling_factor": (4.0, {}),
    "fp8_multi_head_attention": (True, {}),
    "fp4": ("e2m1", {}),
    "overlap_p2p_comm_warmup_flush": (True, INTERLEAVED),
    "use_ring_exchange_p2p": (True, PIPELINED),
    "cuda_graph_impl": ("local", {}),
    "enable_cuda_graph": (True, {}),
    "external_cuda_graph": (True, {}),
    "cpu_offloading": (True, {}),
    "fine_grained_activation_offloading": (True, {}),
    "distribute_saved_activations": (True, {}),
    "fp32_residual_connection": (True, PIPELINED),
    "overlap_p2p_comm": (False, INTERLEAVED),
    "batch_p2p_comm": (True, INTERLEAVED),
}
OF_OTHER_METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp32_residual_connection": (True, {}),
    "inference_fuse_tp_communication": (True, {}),
    "fused_residual_rmsnorm": (True, {}),
}
NOT_IN_MEGATRON = {"yarn_rotary_scaling_factor"}
"""Fields that ``TransformerConfig`` has in none of the supported versions: set as an attribute, or by a subclass."""
CHECKS = [(re.findall(r"\w+", check.given)[0], check) for check in MEGATRON_CHECKS]
OF_DEPTH_ATTENTION = [(field, check) for field, check in CHECKS if check.section != OTHERS]


def config_of(**overrides: Any) -> DepthAttentionConfig:
    shape = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    return qwen3_style_config(**(shape | overrides))


def test_the_table_is_covered():
    assert {check.section for check in MEGATRON_CHECKS} == {EVERY, MIX, OTHERS}
    assert {field for field, _ in OF_DEPTH_ATTENTION} == set(REFUSED_VALUES)
    assert [field for field, check in CHECKS if check.section == OTHERS] == list(OF_OTHER_METHODS)
    fields = set(DepthAttentionConfig.__dataclass_fields__)
    missing = {field for field, _ in OF_DEPTH_ATTENTION} - fields
    assert missing == NOT_IN_MEGATRON, f"of {len(REFUSED_VALUES)} fields, this Megatron-Core lacks {sorted(missing)}"


@pytest.mark.parametrize("method", ["depth_attention", "denseformer", "attnres", "mhc"])
def test_every_check(method):
    """Set on a config that is fine without it, past Megatron's own checks; not what other methods do not support."""
    titles = {"denseformer": "DenseFormer", "attnres": "Attention Residuals", "mhc": "mHC"}
    title = titles.get(method, "Depth-Attention")
    for field, check in CHECKS:
        if check.section == (MIX if method in titles else OTHERS):
            continue
        if method in titles and field in OF_OTHER_METHODS and check.section == EVERY:
            continue  # unsupported without a pipeline, too
        value, others = (OF_OTHER_METHODS if check.section == OTHERS else REFUSED_VALUES)[field]
        config = config_of(method=method, **others)
        config.validate()
        setattr(config, field, value)
        with pytest.raises(ValueError) as error:
            config.validate()
        assert str(error.value).startswith(f"{title} does not support {field}={value!r}")
        assert str(error.value).endswith(f": {check.why}; {check.remedy}")
    if method in titles:
        config_of(method=method, softmax_scale=0.25)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "mhc", "method_settings": {"streams": 2}}, "model.mhc has no setting streams: mHC has num_streams"),
        ({"method": "dense"}, "method is 'dense'; the methods are ['depth_attention', 'vanilla', 'denseformer',"),
        ({"method": "mhc", "method_settings": {"num_streams": 1}}, "model.mhc.num_streams is 1; with one stream"),
    ],
)
def test_settings_of_methods(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(**given)


def test_a_changed_copy_is_what_was_asked_for():
    """`dataclasses.replace` sees what was given, not what was made of it."""
    off, other = config_of(depth_attention=False), config_of(method="mhc", method_settings={"num_streams": 2})
    assert off.effective_method == "vanilla" and other.effective_method == "mhc"
    assert dataclasses.replace(off, depth_attention=True).attends_over_depth
    assert dataclasses.replace(other, method="depth_attention", method_settings={}).attends_over_depth
    assert not dataclasses.replace(other, method="vanilla", method_settings={}).shares_over_layers


REFUSED_BY_MEGATRON_FIRST = {
    "overlap_moe_expert_parallel_comm",
    "experimental_attention_variant",
    "fine_grained_activation_offloading",
}
"""Alone, these trip one of Megatron's own assertions about what else they need."""
TRANSLATED_BY_MEGATRON = {"enable_cuda_graph": "cuda_graph_impl", "external_cuda_graph": "cuda_graph_impl"}
"""Old names of another field: the constructor's message names the new one."""


@pytest.mark.parametrize("field", REFUSED_VALUES)
def test_the_constructor_never_accepts_an_unsupported_field(field):
    value, others = REFUSED_VALUES[field]
    named = TRANSLATED_BY_MEGATRON.get(field, field)
    kind, message = ValueError, f"Depth-Attention does not support {named}="
    if field in NOT_IN_MEGATRON:
        kind, message = TypeError, f"unexpected keyword argument '{field}'"
    elif field in REFUSED_BY_MEGATRON_FIRST:
        kind, message = AssertionError, ""
    with pytest.raises(kind, match=message):
        config_of(**(others | {field: value}))


def test_enclosing_conditions_are_needed():
    """What is rejected only in company is fine alone."""
    config_of(fp32_residual_connection=True)
    config_of(overlap_p2p_comm=False, batch_p2p_comm=True)
    config_of(**PIPELINED, overlap_p2p_comm=False, batch_p2p_comm=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"softmax_scale": 0.25},
        {"attention_output_gate": True},
        {"heterogeneous_block_specs": True},
        {"fp32_residual_connection": True, **PIPELINED},
        INTERLEAVED | {"overlap_p2p_comm": False, "batch_p2p_comm": True},
        {"depth_attention_op": "no such op"},
        {"depth_attention_stride": 0},
        {"depth_attention_recent_window": -1},
    ],
    ids=str,
)
def test_a_vanilla_config_is_rejected_nothing(fields):
    assert not config_of(depth_attention=False, **fields).variable_seq_lengths
    with pytest.raises(ValueError):
        config_of(depth_attention=True, **fields)


def test_unknown_op():
    with pytest.raises(ValueError, match=re.escape("depth_attention_op is 'fast'; set one of ['lean', ")):
        config_of(depth_attention_op="fast")


def test_unknown_backend():
    with pytest.raises(ValueError, match=re.escape("backend is 'cuda'; the layer specs are 'local' and 'te'.")):
        depth_attention_layer_spec(config_of(), "cuda")


@pytest.mark.parametrize("depth_attention", [True, False])
def test_local_backend_has_rms_norm_only(depth_attention):
    config = config_of(normalization="LayerNorm", depth_attention=depth_attention)
    with pytest.raises(
        ValueError, match="normalization is 'LayerNorm': the local layer spec has RMSNorm only"
    ) as error:
        depth_attention_layer_spec(config)
    assert "Set normalization='RMSNorm'" in str(error.value)


def test_tensor_parallel_must_divide_the_padded_vocabulary():
    config = config_of(hidden_size=48, num_attention_heads=6, num_query_groups=3, tensor_model_parallel_size=3)
    with pytest.raises(
        ValueError, match=r"tensor_model_parallel_size=3 does not divide the padded vocabulary of 128 rows"
    ) as error:
        build_gpt_model(config, vocab_size=100, max_sequence_length=8)
    assert "vocab_size=100" in str(error.value) and "power of two" in str(error.value)


def test_attention_mask_under_context_parallel(megatron_world_of_one):
    model = build_gpt_model(config_of(), vocab_size=100, max_sequence_length=8)
    attention = model.decoder.layers[0].self_attention.core_attention
    assert isinstance(attention, SDPAttention)
    query, key = torch.zeros(4, 1, 4, 8), torch.zeros(4, 1, 2, 8)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    attention(query, key, key, mask)  # alone, a mask is fine
    attention.cp_group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    with pytest.raises(ValueError, match="an attention mask was given under context parallel") as error:
        attention(query, key, key, mask)
    assert "Pass attention_mask=None." in str(error.value)


def test_pipelined_inference(megatron_world_of_one):
    model = build_gpt_model(config_of(), vocab_size=100, max_sequence_length=8).eval()
    layer = model.decoder.layers[0]
    layer.config.pipeline_model_parallel_size = 2
    with pytest.raises(ValueError, match="inference with pipeline_model_parallel_size=2") as error:
        layer(torch.zeros(4, 1, 32), inference_context=object())
    assert "one pipeline stage" in str(error.value)


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("missing", list(TORCHRUN))
def test_partial_torchrun_environment(missing, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"some of torchrun's variables but not {missing}: start the program") as error:
        launch_environment()
    assert "or unset RANK" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        *(("RANK", value, "from 0 to 7") for value in ("x", "8", "-1", "", "1.0", "٣", "9" * 5000)),
        *(("WORLD_SIZE", value, "from 1 to") for value in ("0", "eight")),
        ("LOCAL_RANK", "8", "from 0 to 7"),
        *(("MASTER_PORT", value, "from 1 to 65535") for value in ("abc", "0", "65536")),
    ],
)
def test_a_torchrun_variable_that_is_no_such_number(name, value, limits, monkeypatch):
    for each, usual in TORCHRUN.items():
        monkeypatch.setenv(each, usual)
    monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=f"^{name}={value[:40]} is not a whole number {limits}.*; it says .*set {name}"
    ) as error:
        launch_environment()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_whole_and_absent_torchrun_environments(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert launch_environment() == LaunchEnvironment(rank=3, world_size=8, local_rank=1, launched=True)
    for name in TORCHRUN:
        monkeypatch.delenv(name)
    assert launch_environment() == LaunchEnvironment(rank=0, world_size=1, local_rank=0, launched=False)


def test_ranks_that_disagree(megatron_world_of_one, monkeypatch):
    groups.check_same_on_all_ranks("source plans", "abc")

    def all_gather_object(received: list[str], own: str) -> None:
        received[:] = [own, own, "other"]

    monkeypatch.setattr(groups.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(groups.dist, "all_gather_object", all_gather_object)
    with pytest.raises(ValueError, match=r"ranks hold different source plans: rank 0 has abc, but \{2: 'other'\}"):
        groups.check_same_on_all_ranks("source plans", "abc")
