"""DenseFormer, Attention Residuals and mHC under the TransformerEngine spec; see test_te_spec.py."""

from pathlib import Path

import pytest
import torch

from megatron_depthattn.config import to_dict
from megatron_depthattn.methods.definitions import method_of
from tests.te.small import METHODS, assert_equal, restarted, small_config, under_te

every_method = pytest.mark.parametrize("method", METHODS)


def model_section(method: str) -> dict:
    return to_dict(small_config("te", method=method))["model"]


def added_parameters(method: str) -> set[str]:
    """By their names in Megatron's model."""
    definition = method_of(model_section(method))
    last = definition.num_layers - 1
    layers = {f"decoder.layers.{i}.{name}" for i in range(last + 1) for name in definition.layer_parameters(i)}
    return layers | {f"decoder.layers.{last}.{name}" for name in definition.final_parameters()}


@every_method
def test_the_same_seed_gives_the_same_weights_and_decay(te, method):
    run, initial = te.runs[method]
    found = te.methods[method]
    assert_equal(found["initial"], under_te(initial))
    assert found["weight_decay"] == run.weight_decay()


@every_method
def test_a_local_checkpoint_comes_back_through_the_te_spec_bit_by_bit(te, method):
    """Weights, Adam's fp32 weights and moments; under FP8 the weights as well, the method's no FP8 tensors."""
    run, initial = te.runs[method]
    found = te.methods[method]
    assert_equal(found["loaded"], under_te(run.parameters()))
    assert_equal(found["loaded under FP8"], under_te(run.parameters()))
    added = added_parameters(method)
    assert all(type(found["loaded under FP8"][name]) is torch.Tensor for name in added)
    assert any(not torch.equal(initial[name], run.parameters()[name]) for name in added), "control"
    back = restarted(Path(found["saved"]), method=method)
    assert_equal(back.parameters(), run.parameters())
    for one, expected in zip(back.moments(), run.moments(), strict=True):
        assert_equal(one, expected)
