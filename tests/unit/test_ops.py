"""Depth-Attention mixing: the implementations against the formula, and the properties the method promises.

Shapes: s tokens, b batch, H query heads, G KV heads, d head size, n sources.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_depthattn.ops import (
    DEPTH_MIX_IMPLEMENTATIONS,
    depth_mix,
    depth_mix_lean,
    depth_mix_reference,
    uniform_mix,
)
from tests.gpu.mix_cases import Case, Inputs, lay_out, output_gradient
from tests.gpu.mix_cases import make_inputs as of_case

# triton needs a GPU or a process of its own: tests/unit/test_triton_mix.py, tests/gpu/test_triton_mix.py
IMPLEMENTATIONS = sorted(DEPTH_MIX_IMPLEMENTATIONS.keys() - {"triton"})
GQA_RATIOS = [1, 4, 8]


def make_inputs(
    num_sources: int, gqa_ratio: int = 4, *, head_dim: int = 32, dtype: torch.dtype = torch.float32, **sizes: Any
) -> Inputs:
    return of_case(Case(num_sources, gqa_ratio, head_dim, dtype, **sizes), "cpu")


def leaves(inputs: Inputs) -> list[Tensor]:
    """In the order in which gradients are compared."""
    return [*inputs.named.values()]


def given(inputs: Inputs) -> tuple[Any, ...]:
    """As the implementations take them."""
    return inputs.q, inputs.keys, inputs.values, inputs.k, inputs.v, float(inputs.q.shape[-1]) ** -0.5


def error_over_tolerance(actual: Tensor, expected: Tensor) -> float:
    """Largest error in units of the tolerance, the same for all comparisons: above 1 is a failure.

    One rounding step of the tensor's own dtype, eps * |expected|, plus what sums in the computing dtype lose:
    rounding errors of a sum over d <= 64 terms, in any order, add up like a random walk to sqrt(64) = 8 eps
    of the size of its terms, for which the largest expected value stands here.
    """
    compute = torch.promote_types(actual.dtype, torch.float32)
    eps = torch.finfo(actual.dtype).eps
    actual, expected = actual.detach().double(), expected.detach().double()
    tolerance = eps * expected.abs() + 8 * torch.finfo(compute).eps * expected.abs().max()
    # NaN must count as a failure, and an exact match of an exact zero as none.
    error = (actual - expected).abs().nan_to_num(nan=torch.inf)
    return float((error / tolerance.clamp(min=torch.finfo(torch.float64).tiny)).max())


def assert_close(actual: Tensor | None, expected: Tensor | None, name: str) -> None:
    assert actual is not None, f"{name}: missing"
    assert expected is not None, f"{name}: missing in the reference"
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
    ratio = error_over_tolerance(actual, expected)
    assert ratio <= 1, f"{name}: error is {ratio:.2f} times the tolerance"


def output_and_gradients(inputs: Inputs, implementation: str) -> dict[str, Tensor]:
    """The mix and the gradient of every input, for an output gradient that every dtype can hold exactly."""
    mixed = inputs.mix(implementation)
    grads = torch.autograd.grad(mixed, leaves(inputs), output_gradient(mixed))
    return {"mixed": mixed.detach(), **dict(zip(inputs.named, grads, strict=True))}


def assert_same_results(actual: Inputs, expected: Inputs) -> None:
    """Lean on `actual` against the reference on `expected`."""
    lean, reference = output_and_gradients(actual, "lean"), output_and_gradients(expected, "reference")
    for name, value in reference.items():
        assert_close(lean[name], value, name)


# --- Gradients and agreement with the formula ---


@pytest.mark.parametrize("gqa_ratio", GQA_RATIOS)
@pytest.mark.parametrize("num_sources", [1, 3])
def test_lean_gradcheck(num_sources: int, gqa_ratio: int) -> None:
    inputs = make_inputs(num_sources, gqa_ratio, leading=(3, 1), num_groups=2, head_dim=5, dtype=torch.float64)

    def mix(q: Tensor, k: Tensor, v: Tensor, *sources: Tensor) -> Tensor:
        keys, values = sources[:num_sources], sources[num_sources:]
        return depth_mix_lean(q, keys, values, k, v, given(inputs)[-1])

    assert torch.autograd.gradcheck(mix, leaves(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("gqa_ratio", GQA_RATIOS)
@pytest.mark.parametrize("num_sources", [1, 2, 12])
def test_lean_matches_reference(num_sources: int, gqa_ratio: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(num_sources, gqa_ratio, dtype=dtype)
    assert_same_results(inputs, inputs)


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3, 5)], ids=str)
def test_any_leading_shape(leading: tuple[int, ...]) -> None:
    inputs = make_inputs(2, leading=leading, head_dim=17)
    assert_same_results(inputs, inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("leading", [(0,), (0, 3), (7, 0)], ids=str)
def test_no_tokens(leading: tuple[int, ...], implementation: str) -> None:
    inputs = make_inputs(2, leading=leading)
    results = output_and_gradients(inputs, implementation)
    assert [x.shape for x in results.values()] == [inputs.v.shape, *(x.shape for x in leaves(inputs))]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_precision_inputs_are_rounded_only_once(implementation: str) -> None:
    inputs = make_inputs(12, dtype=torch.bfloat16)
    exact = output_and_gradients(inputs.map(Tensor.double), "reference")
    for name, value in output_and_gradients(inputs, implementation).items():
        assert value.dtype == torch.bfloat16
        ratio = error_over_tolerance(value, exact[name])
        assert ratio <= 1, f"{name}: error is {ratio:.2f} times the tolerance"


def test_reference_is_the_formula_spelled_out() -> None:
    """Loops over tokens and heads: which query head goes with which KV head, and the order of the weights."""
    inputs = make_inputs(2, 4, leading=(3,), num_groups=2, head_dim=4, dtype=torch.float64)
    mixed, weights = depth_mix_reference(*given(inputs), return_weights=True)
    for token in range(3):
        for group in range(2):
            qbar = sum(inputs.q[token, 4 * group + h] for h in range(4)) / 4
            scores = [given(inputs)[-1] * qbar.dot(key[token, group]) for key in (*inputs.keys, inputs.k)]
            total = sum(score.exp() for score in scores)
            expected_weights = torch.stack([score.exp() / total for score in scores])
            values = torch.stack([value[token, group] for value in (*inputs.values, inputs.v)])
            torch.testing.assert_close(weights[token, group], expected_weights)
            torch.testing.assert_close(mixed[token, group], expected_weights @ values)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_group_mean_can_be_passed_in_place_of_the_heads(implementation: str) -> None:
    """Tensor parallelism with fewer KV heads than ranks: qbar comes ready, H == G."""
    inputs = make_inputs(2, 8, dtype=torch.float64)
    qbar = inputs.q.unflatten(-2, (3, 8)).mean(dim=-2)
    from_mean = depth_mix(
        qbar, inputs.keys, inputs.values, inputs.k, inputs.v, given(inputs)[-1], implementation=implementation
    )
    assert_close(from_mean, inputs.mix(implementation), "mixed")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_are_mixed_like_values(implementation: str) -> None:
    """The layer's key scores and is mixed: its gradient is the sum of both."""
    inputs = make_inputs(2, dtype=torch.float64)
    inputs.v = inputs.k.detach().clone().requires_grad_()
    expected = output_and_gradients(inputs, "reference")
    expected["k"] = expected["k"] + expected.pop("v")
    inputs.v = inputs.k
    computed = output_and_gradients(inputs, implementation)
    for name, value in expected.items():
        assert_close(computed[name], value, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_sources", [0, 1, 12])
def test_uniform_mix_is_the_mean(num_sources: int, dtype: torch.dtype) -> None:
    """Rounded once, and nothing is kept for backward."""
    inputs, saved = make_inputs(num_sources, dtype=dtype), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        mixed = uniform_mix(inputs.values, inputs.v)
    assert saved == []
    exact = sum(x.detach().double() for x in (*inputs.values, inputs.v)) / (num_sources + 1)
    assert_close(mixed, exact.to(dtype), "mixed")
    if dtype == torch.bfloat16:
        assert (mixed != exact.to(dtype)).sum() <= 1  # the nearest, but for a tie
        control = sum(inputs.values, start=inputs.v) / (num_sources + 1)
        assert (control != exact.to(dtype)).any() == (num_sources > 1)
    grad = output_gradient(mixed)
    for found in torch.autograd.grad(mixed, [*inputs.values, inputs.v], grad):
        assert_close(found, (grad.double() / (num_sources + 1)).to(dtype), "gradient")


# --- Memory layout and uninitialised memory ---


def in_nan_buffer(x: Tensor) -> Tensor:
    """The same values as a non-contiguous view into a buffer that is NaN everywhere else."""
    return lay_out(x, "gaps")


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Make torch.empty and the like return NaN instead of whatever was there."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_sources", [1, 3])
def test_reads_nothing_but_its_inputs(num_sources: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(num_sources, dtype=dtype)
    poisoned = inputs.map(in_nan_buffer)
    assert not any(x.is_contiguous() for x in leaves(poisoned))
    assert_same_results(poisoned, inputs)


def test_views_of_a_fused_projection_and_of_batch_first_tensors() -> None:
    """q, k, v as Megatron splits them from one [s, b, G, (H/G + 2) * d]; sources stored as [b, s, G, d]."""
    inputs = make_inputs(2, 4)
    s, b, num_groups, head_dim = inputs.k.shape
    q = inputs.q.detach().reshape(s, b, num_groups, 4 * head_dim)
    fused = torch.cat([q, inputs.k.detach(), inputs.v.detach()], dim=-1).requires_grad_()
    q, k, v = fused.split([4 * head_dim, head_dim, head_dim], dim=-1)
    keys = [key.transpose(0, 1).contiguous().transpose(0, 1) for key in inputs.keys]
    values = [value.transpose(0, 1).contiguous().transpose(0, 1) for value in inputs.values]
    mixed = depth_mix(q.reshape(s, b, 4 * num_groups, head_dim), keys, values, k, v, given(inputs)[-1])

    expected = inputs.mix("reference")
    assert_close(mixed, expected, "mixed")
    # An expanded gradient, as .sum() gives, is the least contiguous one.
    (grad_fused,) = torch.autograd.grad(mixed.sum(), fused)
    grad_q, grad_k, grad_v = torch.autograd.grad(expected.sum(), [inputs.q, inputs.k, inputs.v])
    assert_close(grad_fused, torch.cat([grad_q.reshape(s, b, num_groups, -1), grad_k, grad_v], dim=-1), "fused")


def test_lean_result_is_a_new_tensor() -> None:
    inputs = make_inputs(1)
    mixed = inputs.mix("lean")
    storages = {x.untyped_storage().data_ptr() for x in leaves(inputs)}
    assert mixed.untyped_storage().data_ptr() not in storages
    assert not mixed._is_view()


# --- What the method promises ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_source_is_the_layer_itself(implementation: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(0, dtype=dtype)
    mixed = inputs.mix(implementation)
    assert torch.equal(mixed, inputs.v)
    grad = torch.randn_like(mixed)
    (grad_v,) = torch.autograd.grad(mixed, inputs.v, grad)
    assert torch.equal(grad_v, grad)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Plain RoPE of x [s, b, heads, d]: pair (i, i + d/2) is turned by positions[s] * 10000^(-2i/d)."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = positions.to(x.dtype)[:, None, None, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


# --- Memory and autograd contract ---


def saved_for_backward(inputs: Inputs, implementation: str) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        inputs.mix(implementation)
    return saved


def is_one_of(x: Tensor, tensors: list[Tensor]) -> bool:
    """Whether x is exactly one of the tensors: same memory, dtype, shape and strides."""
    return any(
        x.data_ptr() == y.data_ptr() and x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()
        for y in tensors
    )


@pytest.mark.parametrize("num_sources", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lean_saves_only_its_inputs(dtype: torch.dtype, num_sources: int) -> None:
    inputs = make_inputs(num_sources, dtype=dtype).map(in_nan_buffer)
    saved = saved_for_backward(inputs, "lean")
    assert len(saved) == len(leaves(inputs))
    assert all(is_one_of(x, leaves(inputs)) for x in saved)
    # Control: the formula under autograd saves more, in fp32 also for bf16 inputs.
    extra = [x for x in saved_for_backward(inputs, "reference") if not is_one_of(x, leaves(inputs))]
    assert any(x.dtype == torch.float32 and x.numel() >= inputs.k.numel() for x in extra)


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = (x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
        self.num_elements = max(self.num_elements, *sizes, 0)
        return result


def test_lean_never_holds_all_sources_in_one_tensor() -> None:
    inputs = make_inputs(12)
    with LargestResult() as forward:
        mixed = inputs.mix("lean")
    with LargestResult() as backward:
        mixed.grad_fn.apply(output_gradient(mixed))
    assert (forward.num_elements, backward.num_elements) == (inputs.q.numel(), inputs.q.numel())
    with LargestResult() as control:
        inputs.mix("reference")
    assert control.num_elements == 13 * inputs.k.numel()


@pytest.mark.parametrize("wanted", ["q", "k", "v", "keys[1]", "values[0]"])
def test_gradients_only_for_inputs_that_require_them(wanted: str) -> None:
    inputs = make_inputs(2)
    expected = output_and_gradients(inputs, "reference")[wanted]
    for name, x in inputs.named.items():
        x.requires_grad_(name == wanted)
    mixed = inputs.mix("lean")
    # What the function itself returns, as autograd would drop a gradient that nobody asked for.
    grads = mixed.grad_fn.apply(output_gradient(mixed))
    order = ["scale", "q", "keys[0]", "keys[1]", "k", "values[0]", "values[1]", "v"]
    computed = {name: grad for name, grad in zip(order, grads, strict=True) if grad is not None}
    assert list(computed) == [wanted]
    assert_close(computed[wanted], expected, wanted)


def test_lean_rejects_a_second_derivative() -> None:
    inputs = make_inputs(1)
    loss = inputs.mix("lean").square().sum()
    (grad,) = torch.autograd.grad(loss, inputs.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_lean_notices_a_source_changed_in_place() -> None:
    inputs = make_inputs(1)
    mixed = inputs.mix("lean")
    inputs.values[0].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mixed.sum().backward()


class NumThreads(TorchDispatchMode):
    """The numbers of threads that operations could use."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(torch.get_num_threads())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("tokens", "allowed"), [(256, 2), (512, 1), (1024, 2)])
def test_threads_are_left_out_where_each_would_get_less_than_a_grain(tokens: int, allowed: int) -> None:
    """A key of 3 heads of 32: 24,576, 49,152 and 98,304 elements; torch starts threads from 32,768 on."""
    inputs = make_inputs(2, leading=(tokens, 1))
    with NumThreads() as forward:
        mixed = inputs.mix("lean")
    assert (forward.seen, torch.get_num_threads()) == ({allowed}, 2)
    grad = output_gradient(mixed)
    with NumThreads() as backward:
        grads = mixed.grad_fn.apply(grad)
    assert (backward.seen, torch.get_num_threads()) == ({allowed}, 2)

    torch.set_num_threads(1)
    mixed_alone = inputs.mix("lean")
    assert torch.equal(mixed, mixed_alone)
    grads_alone = mixed_alone.grad_fn.apply(grad)
    assert all(torch.equal(x, y) for x, y in zip(grads[1:], grads_alone[1:], strict=True))


@pytest.mark.usefixtures("two_threads")
def test_threads_are_given_back_after_an_error() -> None:
    inputs = make_inputs(1, leading=(512, 1))
    with pytest.raises(RuntimeError, match="meta"):
        depth_mix_lean(inputs.q, [inputs.keys[0].to("meta")], inputs.values, inputs.k, inputs.v, given(inputs)[-1])
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_does_not_lower_the_precision(implementation: str) -> None:
    inputs = make_inputs(2)
    expected = inputs.mix(implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inputs.mix(implementation), expected)


# --- Errors ---


def test_unknown_implementation_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"'fast' is unknown; set one of \['lean', 'reference', 'triton'\]"):
        make_inputs(1).mix("fast")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": []}, "0 source keys but 1 source values"),
        ({"q": torch.zeros(7, 3, 4, 32)}, "q has 4 heads, which is not a multiple of k's 3"),
        ({"q": torch.zeros(7, 3, 12, 16)}, "may differ only in the number of heads"),
        ({"q": torch.zeros(7, 1, 12, 32)}, "may differ only in the number of heads"),
        ({"q": torch.zeros(3, 12, 32)}, "may differ only in the number of heads"),
        ({"v": torch.zeros(7, 3, 1, 32)}, r"v has shape \[7, 3, 1, 32\] but k has \[7, 3, 3, 32\]"),
        ({"keys": [torch.zeros(7, 1, 3, 32)]}, r"keys\[0\] has shape \[7, 1, 3, 32\]"),
        ({"values": [torch.zeros(5, 3, 3, 32)]}, r"values\[0\] has shape \[5, 3, 3, 32\]"),
    ],
)
def test_shapes_that_do_not_fit_are_rejected(changes: dict[str, Tensor | list[Tensor]], message: str) -> None:
    inputs = make_inputs(1)
    given = {"q": inputs.q, "keys": inputs.keys, "values": inputs.values, "k": inputs.k, "v": inputs.v}
    with pytest.raises(ValueError, match=message):
        depth_mix(**{**given, **changes}, scale=1.0)
