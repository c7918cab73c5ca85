"""What switches that are null stand for, and what a machine must have."""

import pytest

from megatron_depthattn.config import RunConfig, from_dict
from megatron_depthattn.config.hardware_checks import unsupported_kernels
from megatron_depthattn.switches import Kernels, resolved_switches

GPU, CPU = Kernels(True, None, adds_gradients=False), Kernels(False, None, adds_gradients=True)
KEYS = {
    "model": ("fused_swiglu", "fused_cross_entropy", "fused_gradient_accumulation"),
    "parallel": ("overlap_grad_reduce", "overlap_param_gather"),
}
LENT = {"model": {"num_loops": 2}, "parallel": {"pipeline": 2, "virtual_pipeline": 2}}


def config_of(**sections: dict) -> RunConfig:
    return from_dict(sections, "the test")


def switches(config: RunConfig) -> list[bool | None]:
    return [getattr(getattr(config, section), key) for section, keys in KEYS.items() for key in keys]


@pytest.mark.parametrize(
    ("given", "same_weights", "kernels", "expected"),
    [
        ({}, 4, CPU, [False, False, True, False, False]),
        ({}, 4, GPU, [True, False, False, True, True]),
        ({}, 1, GPU, [True, False, False, False, False]),
        ({"precision": {"dtype": "bf16"}}, 4, GPU, [True, True, False, True, True]),
        ({"model": {"spec": "te"}}, 4, GPU, [True, False, True, True, True]),
        ({"model": {"spec": "te", "num_loops": 2}}, 4, GPU, [True, False, False, True, True]),
        ({}, 4, Kernels(True, "Triton", adds_gradients=True), [False, False, True, True, True]),
        (LENT, 4, GPU, [True, False, False, False, False]),
        ({"engine": {"name": "deepspeed"}}, 4, GPU, [True, False, None, None, None]),
        ({"parallel": {"overlap_grad_reduce": True}}, 4, CPU, [False, False, True, True, False]),
        ({"parallel": {"overlap_param_gather": True}}, 4, CPU, [False, False, True, True, True]),
        ({"parallel": {"overlap_grad_reduce": False}}, 4, GPU, [True, False, False, False, False]),
        ({"model": {"compile": True}}, 4, CPU, [True, False, True, False, False]),
        ({"model": {"fused_swiglu": False}}, 1, GPU, [False, False, False, False, False]),
    ],
)
def test_null_stands_for_what_helps(given, same_weights, kernels, expected):
    resolved = resolved_switches(config_of(**given), same_weights, kernels)
    assert switches(resolved) == expected
    assert resolved_switches(resolved, same_weights, CPU) == resolved  # nothing is left to resolve


@pytest.mark.parametrize(
    ("key", "kernels", "message"),
    [
        ("fused_swiglu", Kernels(False, "g++", adds_gradients=False), "which needs g++; install it, or set"),
        ("compile", Kernels(False, "g++", adds_gradients=False), "model.compile=true builds a kernel at first use"),
        ("fused_cross_entropy", Kernels(True, "Triton", adds_gradients=False), "model.fused_cross_entropy=false"),
        ("fused_gradient_accumulation", GPU, "install Apex with --cpp_ext and --cuda_ext, or set"),
    ],
)
def test_what_the_machine_lacks(key, kernels, message):
    assert message in str(unsupported_kernels(config_of(model={key: True}), kernels))
    assert unsupported_kernels(config_of(), kernels) is None
    assert unsupported_kernels(config_of(model={key: True}), Kernels(True, None, adds_gradients=True)) is None
