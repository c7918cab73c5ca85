"""What each precision needs: every check has a case and a row in docs/support.md; Megatron takes the keys."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_depthattn.config import ModelConfig, RunConfig, load_config, validate
from megatron_depthattn.config.check import first_unsupported
from megatron_depthattn.config.hardware_checks import ACCELERATOR_CHECKS, Accelerator, unsupported_on
from megatron_depthattn.config.layout_checks import PRECISION
from megatron_depthattn.config.precision import RECIPES
from megatron_depthattn.config.tables import PAGE, page

ROOT = Path(__file__).parents[2]
FP8 = ("model.spec=te", "precision.dtype=bf16")
H100 = Accelerator("H100", (9, 0), "13.0", "2.20.2")
B200 = Accelerator("B200", (10, 0), "13.0", "2.20.2")
CPU = Accelerator(None, (), "13.0", None, "ImportError: no transformer_engine")

CASES = [
    ("precision.fp8_params=true", "to one of delayed, tensorwise, blockwise, mxfp8, or precision.fp8_params=false"),
    ("precision.bf16_last_layers=2", "or precision.bf16_last_layers=0"),
    ("precision.fp8=delayed precision.dtype=fp32", "set precision.dtype=bf16"),
    ("precision.fp8=delayed model.spec=local", "(needs TransformerEngine and an NVIDIA GPU), or precision.fp8=null"),
    ("precision.fp8=delayed engine.name=deepspeed engine.zero_stage=1", "engine.name=megatron, or precision.fp8=null"),
    ("precision.fp8=delayed precision.bf16_first_layers=1", "set both to 0, or precision.fp8=tensorwise"),
    (
        "precision.fp8=tensorwise precision.bf16_first_layers=5 precision.bf16_last_layers=3",
        "leave none of 8 layers in FP8",
    ),
    ("precision.fp8=tensorwise precision.bf16_last_layers=5 parallel.pipeline=2", "set precision.bf16_last_layers=4"),
    ("precision.fp8=mxfp8 precision.fp8_params=true", "set precision.fp8_params=false"),
    ("precision.fp8=blockwise precision.fp8_attention=true", "precision.fp8_attention=false, or precision.fp8=delayed"),
    ("precision.fp8=delayed precision.fp8_attention=true data.document_mask=true", "or data.document_mask=false"),
    ("precision.fp8=mxfp8 precision.fp8_attention=true", "for mxfp8 as of 0.19 only, so core attention may"),
    (
        "precision.fp8=delayed precision.fp8_attention=true recompute.granularity=selective",
        "set recompute.granularity=full or null, or precision.fp8_attention=false",
    ),
    (
        "precision.fp8=delayed model.ffn_hidden_size=520",
        "which is 520 and not a multiple of 16 (mxfp8 32, others 16): FP8",
    ),
    ("precision.fp8=mxfp8 model.ffn_hidden_size=528", "which is 528 and not a multiple of 32 (mxfp8 32, others 16)"),
    ("precision.fp8=delayed data.sequence_length=250", "over parallel.context), not a multiple of 16"),
    (
        "precision.fp8=delayed parallel.tensor=4 model.num_attention_heads=4 model.num_query_groups=1 "
        "model.kv_channels=48",
        "the rows of the QKV projection, over parallel.tensor, which is 72",
    ),
]
MACHINE_CASES = [
    ("precision.fp8=null", CPU, "install --no-build-isolation 'transformer-engine[pytorch]', or set model.spec=local"),
    ("precision.fp8=null", dataclasses.replace(CPU, transformer_engine="2.20.2"), "CPU kernels; set model.spec=local"),
    (
        "precision.fp8=blockwise",
        dataclasses.replace(H100, transformer_engine="2.2.0+abc"),
        "needs TransformerEngine 2.3 or later and this is 2.2.0+abc; upgrade it, or set precision.fp8 to one of "
        "delayed, tensorwise, null",
    ),
    ("precision.fp8=blockwise", dataclasses.replace(H100, cuda="12.8"), "to one of delayed, tensorwise, null"),
    ("precision.fp8=mxfp8", H100, "and H100 has 9.0; set precision.fp8 to one of delayed, tensorwise, blockwise, null"),
    ("precision.fp8=tensorwise precision.fp8_attention=true", H100, "H100 has 9.0; set precision.fp8_attention=false"),
    ("precision.fp8=delayed precision.fp8_attention=true model.kv_channels=64", H100, "precision.fp8_attention=false"),
]


def config_of(keys: str = "") -> RunConfig:
    return load_config(ROOT / "configs" / "quickstart.yaml", ["parallel.pipeline=1", *FP8, *keys.split()])


@pytest.mark.parametrize(("keys", "message"), CASES)
def test_an_unsupported_config_is_an_error_before_anything_is_built(keys, message):
    config = config_of(keys)
    with pytest.raises(ValueError) as raised:
        validate(config, config.parallel.tensor * config.parallel.pipeline)
    assert message in str(raised.value) and "; " in str(raised.value)
    assert first_unsupported(PRECISION, config) == str(raised.value)


@pytest.mark.parametrize(("keys", "machine", "message"), MACHINE_CASES)
def test_what_a_machine_lacks_is_reported(keys, machine, message):
    config = config_of(keys)
    assert first_unsupported(PRECISION, config) is None
    assert message in str(unsupported_on(config, machine))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_this_machine_rejects_transformer_engines_layers():
    """tests/e2e/test_train_command.py does so with the whole command."""
    from megatron_depthattn.train.hardware import require_hardware

    with pytest.raises(ValueError, match=r"model\.spec=te needs"):
        require_hardware(config_of())
    assert require_hardware(config_of("model.spec=local")).config.model.spec == "local"


def test_every_check_has_a_case():
    found = {next(check for check in PRECISION if check.message(config_of(keys))) for keys, _ in CASES}
    assert {check.given for check in PRECISION} - {check.given for check in found} == {
        "{precision.bf16_first_layers is}, but a pipeline stage holds {layers} layers"  # as of the last layers
    }
    on_machines = [
        next(check for check in ACCELERATOR_CHECKS if check.message(config_of(keys), machine))
        for keys, machine, _ in MACHINE_CASES
    ]
    assert on_machines == list(ACCELERATOR_CHECKS)


def test_the_tables_of_the_docs_are_those_of_the_checks():
    text = PAGE.read_text("utf-8")
    assert page(text) == text, "python -m megatron_depthattn.config.tables writes the tables anew"
    assert "{" not in text and "<precision" not in text


GOOD = [("delayed", H100), ("tensorwise", H100), ("blockwise", H100), ("mxfp8", B200)]


@pytest.mark.parametrize(("fp8", "machine"), GOOD)
def test_what_is_rejected_in_one_place_runs_in_another(fp8, machine):
    """Control: each recipe with all that it can do passes every check."""
    keys = f"precision.fp8={fp8}"
    keys += " precision.bf16_first_layers=1 precision.bf16_last_layers=2" if fp8 != "delayed" else ""
    keys += " precision.fp8_params=true" if fp8 != "mxfp8" else ""
    keys += " precision.fp8_attention=true model.kv_channels=128" if fp8 == "delayed" else ""
    config = config_of(keys)
    validate(config, 1)
    assert unsupported_on(config, machine) is None


@pytest.mark.parametrize("fp8", RECIPES)
def test_megatron_takes_the_fields(fp8):
    from megatron_depthattn.train.build import transformer_config

    keys = f"precision.fp8={fp8}" + (" precision.bf16_first_layers=1" if fp8 == "tensorwise" else "")
    # Local layers have no fused RoPE to ask for.
    config = dataclasses.replace(config_of(keys), model=ModelConfig(spec="local"))
    megatron = transformer_config(config)
    assert megatron.fp8_recipe == fp8 and megatron.fp8 in ("hybrid", "e4m3")
    assert not megatron.fp8_multi_head_attention and not megatron.fp8_param
    if fp8 == "tensorwise":
        assert (megatron.first_last_layers_bf16, megatron.num_layers_at_start_in_bf16) == (True, 1)
        assert megatron.num_layers_at_end_in_bf16 == 0
    if fp8 == "delayed":
        assert (megatron.fp8_amax_history_len, megatron.fp8_amax_compute_algo) == (1024, "max")


def test_local_layers_have_no_fp8():
    """They would compute in bf16 and not say so."""
    from megatron_depthattn.model.gpt import qwen3_style_config
    from megatron_depthattn.model.layer_specs import depth_attention_layer_spec

    config = qwen3_style_config(num_layers=2, hidden_size=32, num_attention_heads=2, fp8="hybrid", bf16=True)
    with pytest.raises(ValueError, match="the local layer spec has no FP8 layers"):
        depth_attention_layer_spec(config, "local")
