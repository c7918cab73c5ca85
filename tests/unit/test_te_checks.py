"""The checks that tests/gpu runs with TransformerEngine's layers, here with local layers on CPU and emulated FP8."""

import pytest
import torch

from megatron_depthattn.model import layer_specs
from tests.document_attention import DocumentAttention
from tests.gpu import te_checks, te_engine_checks
from tests.gpu.te_models import FP32, Place

pytestmark = [
    pytest.mark.usefixtures("megatron_world_of_one"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: tests/gpu has these checks"),
]
CPU = Place("cpu", "local")


@pytest.mark.parametrize("mixing", te_checks.MIXING)
def test_bf16_parity(mixing, record_property):
    record_property("found", te_checks.check_bf16_parity(CPU, mixing))


def test_emulated_fp8_is_within_the_bounds_of_a_recipe(record_property):
    record_property("found", te_checks.check_recipe(CPU, "tensorwise", "stride 1"))


@pytest.mark.parametrize("recipe", [None, "tensorwise"])
def test_recompute(recipe, record_property):
    record_property("found", te_checks.check_recompute(CPU, recipe, bound=0.0))


def test_first_and_last_layers_in_bf16(record_property):
    record_property("found", te_checks.check_bf16_layers(CPU, "tensorwise"))


def test_packed_documents(monkeypatch, record_property):
    monkeypatch.setattr(layer_specs, "SDPAttention", DocumentAttention)
    record_property("found", te_checks.check_packed(CPU, [48, 64, 16], 1e-6, FP32))


def test_save_and_resume(tmp_path, record_property):
    record_property("found", te_engine_checks.check_resume(CPU, tmp_path, None, bound=0.0))


def test_the_optimizers_weights_are_those_drawn(record_property):
    record_property("found", te_engine_checks.check_masters(CPU, None))


@pytest.mark.parametrize("recompute", [False, True])
def test_memory(recompute, record_property):
    record_property("found", te_engine_checks.check_memory(CPU, 0.0, FP32, recompute=recompute))
