"""The Triton mix on a GPU: the cases that tests/unit/test_triton_mix.py interprets, what it allocates, and a model."""

import pytest
import torch
from torch import Tensor

from tests.gpu.mix_cases import CASES, FP32, Case, error_over_tolerance, errors, make_inputs, truth
from tests.gpu.mix_checks import CHECKS
from tests.gpu.mix_model import check_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; interpreted in tests/unit")
MIB = 2**20


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_fp64(name):
    found = errors(CASES[name], "cuda")
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("name", CHECKS)
def test_kernels(name):
    CHECKS[name]("cuda")


def peak_rise(run) -> int:
    """Bytes of GPU memory that a call needs beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("num_sources", [2, 8])
def test_allocates_results_and_nothing_else(num_sources):
    """Also where sources are parts of wider messages; a table takes one block of 512 bytes or a few."""
    case = Case(num_sources, layout="views", leading=(4096, 2), num_groups=8)
    inputs = make_inputs(case, "cuda")
    inputs.mix().sum().backward()  # compiled
    for x in inputs.named.values():
        x.grad = None
    kept: list[Tensor] = []
    forward = peak_rise(lambda: kept.append(inputs.mix()))
    grad = torch.randn_like(kept[0])
    backward = peak_rise(lambda: kept.append(torch.autograd.grad(kept[0], list(inputs.named.values()), grad)))
    own = inputs.v.numel() * 2
    assert own >= 8 * MIB
    assert own <= forward < own + MIB
    gradients = sum(2 * x.numel() for x in inputs.named.values())
    assert gradients <= backward < gradients + MIB


def test_one_compilation_serves_every_number_of_sources_in_a_table():
    from megatron_depthattn.ops import triton_kernels

    def compiled() -> int:
        return sum(len(cache[0]) for cache in triton_kernels.forward_kernel.device_caches.values())

    make_inputs(Case(4), "cuda").mix()
    before = compiled()
    for num_sources in (5, 15, 24):
        make_inputs(Case(num_sources), "cuda").mix()
    assert compiled() == before


def test_on_a_side_stream():
    """Table and kernel are on the caller's stream, and tables of many calls in a row do not overwrite each other."""
    case = Case(6, dtype=FP32, leading=(64, 2))
    given = [make_inputs(case, "cuda").map(lambda x, i=i: x + i) for i in range(32)]
    expected = [truth(inputs)["mixed"] for inputs in given]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        mixed = [inputs.mix() for inputs in given]
    torch.cuda.synchronize()
    assert max(map(error_over_tolerance, mixed, expected)) <= 1


def test_a_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert max(errors(Case(2, dtype=FP32), "cuda:1").values()) <= 1
    assert max(errors(Case(5, dtype=FP32), "cuda:1").values()) <= 1


@pytest.mark.usefixtures("megatron_world_of_one")
def test_a_model():
    check_model("cuda")
