"""Cases of the Triton mix, for a GPU and for Triton's interpreter on CPU: what is given, and how far the result is off.

The truth is the formula in fp64 under autograd, on the CPU. Shapes: H query heads, G KV heads, d head size, n sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_depthattn.ops import depth_mix, depth_mix_reference
from megatron_depthattn.ops import triton_mix as own

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One mix; the fields that most cases share have defaults."""

    num_sources: int
    gqa_ratio: int = 4
    head_dim: int = 64
    dtype: torch.dtype = BF16
    """Of k, v and the sources; of q as well without q_dtype."""
    q_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    leading: tuple[int, ...] = (7, 3)
    num_groups: int = 3

    @property
    def name(self) -> str:
        parts = [f"n{self.num_sources}", f"gqa{self.gqa_ratio}", f"d{self.head_dim}", str(self.dtype)[6:], self.layout]
        parts += [f"q_{str(self.q_dtype)[6:]}"] if self.q_dtype else []
        return "-".join([*parts, "x".join(map(str, self.leading))])


CASES = {
    case.name: case
    for case in (
        Case(0),
        Case(1),
        Case(1, gqa_ratio=1, head_dim=16, dtype=FP32),
        Case(2, dtype=FP32),
        Case(2, gqa_ratio=1),
        Case(2, head_dim=80, dtype=FP32),
        Case(2, gqa_ratio=1, head_dim=128),
        Case(2, head_dim=256, dtype=FP32, leading=(3, 1)),
        Case(2, gqa_ratio=2, head_dim=5, dtype=FP32),
        Case(3, head_dim=80),  # the most candidates that are arguments
        Case(3, gqa_ratio=8, head_dim=16, dtype=FP16),
        Case(5, dtype=FP32),
        Case(5, gqa_ratio=1, head_dim=128),
        Case(5, head_dim=80, dtype=FP16),
        Case(24, head_dim=16, num_groups=1, dtype=FP32),
        Case(24, gqa_ratio=1, num_groups=1),
        Case(2, q_dtype=FP32, gqa_ratio=1),  # the group mean, gathered in fp32 over tensor ranks
        Case(5, q_dtype=BF16, dtype=FP32),
        Case(2, layout="views"),
        Case(5, layout="views", dtype=FP32),
        Case(2, layout="unaligned views"),
        Case(2, layout="gaps", dtype=FP32),
        Case(2, layout="batch first", dtype=FP32),
        Case(2, leading=()),
        Case(2, leading=(37,), dtype=FP32),
        Case(2, leading=(2, 3, 5), layout="views", dtype=FP32),
        Case(2, leading=(0, 3)),
        Case(5, leading=(4, 0), dtype=FP32),
    )
}


@dataclass
class Inputs:
    """The tensors of one mix, leaves that require a gradient unless told otherwise."""

    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    k: Tensor
    v: Tensor

    @property
    def named(self) -> dict[str, Tensor]:
        sources = {f"keys[{i}]": x for i, x in enumerate(self.keys)}
        sources |= {f"values[{i}]": x for i, x in enumerate(self.values)}
        return {"q": self.q, "k": self.k, "v": self.v} | sources

    def mix(self, op: str = "triton") -> Tensor:
        scale = float(self.q.shape[-1]) ** -0.5
        return depth_mix(self.q, self.keys, self.values, self.k, self.v, scale, implementation=op)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """New leaves `change(x)` that require grad wherever x does."""
        new = {name: change(x.detach()).detach().requires_grad_(x.requires_grad) for name, x in self.named.items()}
        n = range(len(self.keys))
        return Inputs(new["q"], [new[f"keys[{i}]"] for i in n], [new[f"values[{i}]"] for i in n], new["k"], new["v"])


def make_inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(case.num_sources + case.head_dim)

    def random(num_heads: int, dtype: torch.dtype) -> Tensor:
        shape = (*case.leading, num_heads, case.head_dim)
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
        return lay_out(values, case.layout).detach().requires_grad_()

    q_heads, groups = case.num_groups * case.gqa_ratio, case.num_groups
    return Inputs(
        q=random(q_heads, case.q_dtype or case.dtype),
        keys=[random(groups, case.dtype) for _ in range(case.num_sources)],
        values=[random(groups, case.dtype) for _ in range(case.num_sources)],
        k=random(groups, case.dtype),
        v=random(groups, case.dtype),
    )


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values, lying in memory as `layout` says; what is around them is NaN."""
    if layout == "contiguous":
        return x
    if layout == "batch first":  # stored as [batch, sequence, ...]
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    *leading, heads, head_dim = x.shape
    # as a part of a pipeline message or of a fused projection: 16 bytes are 8 numbers of 2 bytes
    before, after = {"views": (16, 8), "unaligned views": (3, 4), "gaps": (2, 1)}[layout]
    step = 2 if layout == "gaps" else 1
    message = torch.full(
        (*leading, before + heads * head_dim * step + after), torch.nan, dtype=x.dtype, device=x.device
    )
    part = message[..., before : before + heads * head_dim * step : step].unflatten(-1, (heads, head_dim))
    return part.copy_(x)


def output_gradient(mixed: Tensor) -> Tensor:
    """The same for every op, and a number of every dtype."""
    generator = torch.Generator().manual_seed(99)
    return torch.randn(mixed.shape, generator=generator).to(BF16).to(mixed)


def results(inputs: Inputs, op: str) -> dict[str, Tensor]:
    """The mix and the gradients of the inputs that require one."""
    mixed = inputs.mix(op)
    wanted = {name: x for name, x in inputs.named.items() if x.requires_grad}
    grads = torch.autograd.grad(mixed, list(wanted.values()), output_gradient(mixed), allow_unused=not inputs.keys)
    return {"mixed": mixed.detach()} | {
        name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None
    }


def truth(inputs: Inputs) -> dict[str, Tensor]:
    return results(inputs.map(lambda x: x.cpu().double()), "reference")


def error_over_tolerance(actual: Tensor, expected: Tensor) -> float:
    """Largest error in units of the tolerance: above 1 is a failure.

    One step of the tensor's own dtype, eps * |expected|: results are rounded once (Triton's interpreter rounds to bf16
    towards zero). And what sums in fp32 lose: rounding errors of a sum over d <= 256 terms add up like a random walk to
    sqrt(256) = 16 eps of the size of its terms, for which the largest expected value stands here.
    """
    if not expected.numel():
        return 0.0
    eps = torch.finfo(actual.dtype).eps
    actual, expected = actual.detach().cpu().double(), expected.double()
    tolerance = eps * expected.abs() + 16 * torch.finfo(FP32).eps * expected.abs().max()
    # NaN must count as a failure, and an exact match of an exact zero as none.
    error = (actual - expected).abs().nan_to_num(nan=torch.inf)
    return float((error / tolerance.clamp(min=torch.finfo(torch.float64).tiny)).max())


def errors(case: Case, device: str) -> dict[str, float]:
    """Error over tolerance of the mix and of every gradient, all in the dtype and shape that they must have."""
    inputs = make_inputs(case, device)
    found, expected = results(inputs, "triton"), truth(inputs)
    assert found.keys() == expected.keys()
    for name, x in {"mixed": inputs.v, **inputs.named}.items():
        if name in found:
            assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
    return {name: error_over_tolerance(found[name], expected[name]) for name in expected}


# --- Checks beside the numbers: functions of a device that fail by assertion ---


def check_what_is_left_out_shows(device: str) -> dict[str, float]:
    """Controls: wrong variants exceed the tolerance by far. Returns by how much."""
    inputs = make_inputs(Case(2, dtype=FP32), device)
    expected = truth(inputs)
    found = {}
    dropped = Inputs(inputs.q, inputs.keys[1:], inputs.values[1:], inputs.k, inputs.v)
    found["a source dropped, mix"] = error_over_tolerance(dropped.mix(), expected["mixed"])
    swapped = Inputs(inputs.q, inputs.keys[::-1], inputs.values, inputs.k, inputs.v)
    found["keys of two sources swapped, mix"] = error_over_tolerance(swapped.mix(), expected["mixed"])
    mixed = inputs.map(lambda x: x)
    mixed.v.requires_grad_(False)
    no_mean = depth_mix_reference_without_mean(mixed)
    for name in ("q", "keys[0]"):
        found[f"the softmax's mean left out, gradient of {name}"] = error_over_tolerance(no_mean[name], expected[name])
    first_head = inputs.map(lambda x: x)
    first_head.q = inputs.q.detach()[..., ::4, :].requires_grad_()  # heads 0, 4, 8: no mean over the group
    found["one query head of each group, mix"] = error_over_tolerance(first_head.mix(), expected["mixed"])
    assert min(found.values()) > 1000, found
    return found


def depth_mix_reference_without_mean(inputs: Inputs) -> dict[str, Tensor]:
    """Gradients of q and keys with da_i in place of da_i - D."""
    exact = inputs.map(lambda x: x.cpu().double())
    d, groups = exact.q.shape[-1], exact.k.shape[-2]
    _, weights = depth_mix_reference(exact.q, exact.keys, exact.values, exact.k, exact.v, d**-0.5, return_weights=True)
    grad = output_gradient(exact.v)
    qbar = exact.q.unflatten(-2, (groups, -1)).mean(dim=-2)
    pulls = [weights[..., i] * (grad * value).sum(-1) * d**-0.5 for i, value in enumerate([*exact.values, exact.v])]
    grad_qbar = sum(pull[..., None] * key for pull, key in zip(pulls, [*exact.keys, exact.k], strict=True))
    per_head = exact.q.shape[-2] // groups
    return {"q": (grad_qbar / per_head).repeat_interleave(per_head, dim=-2), "keys[0]": pulls[0][..., None] * qbar}


def check_nothing_is_copied(device: str) -> None:
    """The kernels are given the very addresses of views; only a tensor with gaps inside its heads is copied."""
    for layout, is_copied in (("views", False), ("unaligned views", False), ("batch first", False), ("gaps", True)):
        inputs = make_inputs(Case(2, layout=layout), device)
        with launches() as seen:
            inputs.mix().backward(output_gradient(inputs.v))
        assert len(seen) == 2
        for strided, candidates, is_aligned in seen:
            assert is_aligned == (layout != "unaligned views"), layout
            for x, given in zip((strided[0], candidates[0]), (inputs.q, inputs.keys[0]), strict=True):
                assert (x.data_ptr() != given.data_ptr()) == is_copied, layout


@contextmanager
def launches() -> Iterator[list[tuple[list[Tensor], list[Tensor], bool]]]:
    """Tensors that the kernels are told of, (strided, candidates, are their rows aligned) for each launch."""
    seen: list[tuple[list[Tensor], list[Tensor], bool]] = []
    four_dimensional, describe = own._four_dimensional, own._describe
    made: list[Tensor] = []

    def noted(x: Tensor) -> Tensor:
        made.append(four_dimensional(x))
        return made[-1]

    def described(candidates, grads):
        entries, num_fields, is_aligned = describe(candidates, grads)
        seen.append((made[: len(made) - len(candidates)], list(candidates), is_aligned))
        made.clear()
        return entries, num_fields, is_aligned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "_four_dimensional", noted)
        patch.setattr(own, "_describe", described)
        yield seen


def check_saves_only_its_inputs(device: str) -> None:
    inputs = make_inputs(Case(2, layout="views"), device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        inputs.mix()
    assert sorted(x.data_ptr() for x in saved) == sorted(x.data_ptr() for x in inputs.named.values())


def check_gradients_only_where_required(device: str) -> None:
    """Of each input alone, and of none: what the function itself returns, and that it is right."""
    for case in (Case(2, dtype=FP32, head_dim=16), Case(4, dtype=FP32, head_dim=16)):
        whole = make_inputs(case, device)
        expected = truth(whole)
        n = case.num_sources
        order = ["q", *(f"keys[{i}]" for i in range(n)), "k", *(f"values[{i}]" for i in range(n)), "v"]
        for wanted in ("q", "k", "keys[1]", "values[0]", "v"):
            inputs = whole.map(lambda x: x)
            for name, x in inputs.named.items():
                x.requires_grad_(name == wanted)
            mixed = inputs.mix()
            grads = dict(zip(order, mixed.grad_fn.apply(output_gradient(mixed))[1:], strict=True))
            assert [name for name, grad in grads.items() if grad is not None] == [wanted]
            assert error_over_tolerance(grads[wanted], expected[wanted]) <= 1
        with torch.no_grad():
            assert error_over_tolerance(whole.mix(), expected["mixed"]) <= 1
            assert whole.mix().grad_fn is None


def check_recompute_and_autocast_change_nothing(device: str) -> None:
    inputs = make_inputs(Case(2), device)
    names, tensors = list(inputs.named), list(inputs.named.values())
    expected = results(inputs, "triton")

    def mix(q: Tensor, k: Tensor, v: Tensor, *sources: Tensor) -> Tensor:
        return Inputs(q, list(sources[:2]), list(sources[2:]), k, v).mix()

    for use_reentrant in (False, True):
        mixed = checkpoint(mix, *tensors, use_reentrant=use_reentrant)
        grads = torch.autograd.grad(mixed, tensors, output_gradient(mixed)) if not use_reentrant else None
        if grads is None:  # reentrant recompute knows .backward() alone
            mixed.backward(output_gradient(mixed))
            grads = [x.grad for x in tensors]
        assert torch.equal(mixed, expected["mixed"])
        assert all(torch.equal(grad, expected[name]) for name, grad in zip(names, grads, strict=True))
    with torch.autocast(device, dtype=BF16):
        full = make_inputs(Case(2, dtype=FP32), device)
        assert full.mix().dtype == FP32
        assert error_over_tolerance(full.mix(), truth(full)["mixed"]) <= 1


def check_an_expanded_gradient(device: str) -> None:
    """As .sum() gives: every stride of it is 0."""
    inputs = make_inputs(Case(2, dtype=FP32), device)
    inputs.mix().sum().backward()
    exact = inputs.map(lambda x: x.cpu().double())
    exact.mix("reference").sum().backward()
    for name, x in inputs.named.items():
        assert error_over_tolerance(x.grad, exact.named[name].grad) <= 1, name


def check_views_of_one_projection(device: str) -> None:
    """q, k and v as Megatron splits them from one [s, b, G, (H/G + 2) * d]; v is read inside it."""
    inputs = make_inputs(Case(2, dtype=FP32), device)
    s, b, num_groups, d = inputs.k.shape
    q = inputs.q.detach().reshape(s, b, num_groups, 4 * d)
    fused = torch.cat([q, inputs.k.detach(), inputs.v.detach()], dim=-1).requires_grad_()
    q, k, v = fused.split([4 * d, d, d], dim=-1)
    mixed = Inputs(q.reshape(s, b, 4 * num_groups, d), inputs.keys, inputs.values, k, v).mix()
    (grad,) = torch.autograd.grad(mixed, fused, output_gradient(mixed))
    expected = truth(inputs)
    grad_q = expected["q"].reshape(s, b, num_groups, 4 * d)
    assert error_over_tolerance(mixed, expected["mixed"]) <= 1
    assert error_over_tolerance(grad, torch.cat([grad_q, expected["k"], expected["v"]], dim=-1)) <= 1


def check_extreme_scores(device: str) -> None:
    """Scores of thousands: one weight is 1 and the others 0, to the bit; and what is not finite stays so."""
    inputs = make_inputs(Case(2, dtype=FP32), device)
    sharp = inputs.map(lambda x: x)
    sharp.keys[1] = (1e4 * inputs.q.detach().unflatten(-2, (3, 4)).mean(-2)).requires_grad_()
    found = results(sharp, "triton")
    assert torch.equal(found["mixed"], sharp.values[1])
    assert torch.equal(found["values[1]"], output_gradient(found["mixed"]))
    assert not found["values[0]"].any() and all(x.isfinite().all() for x in found.values())
    for bad in (torch.nan, torch.inf):
        spoilt = inputs.map(torch.clone)
        spoilt.keys[0].data[0, 0, 0, 0] = bad
        mixed = results(spoilt, "triton")["mixed"]
        assert not mixed[0, 0, 0].isfinite().any() and mixed[1:].isfinite().all()


def check_refusals(device: str) -> None:
    def refused(message: str, inputs: Inputs) -> None:
        with pytest.raises(ValueError, match=message):
            inputs.mix()

    good = make_inputs(Case(1), device)
    refused(r"q is torch.float64: .* or set the op to 'lean', which computes fp64", good.map(Tensor.double))
    refused("at most 256 numbers, but got heads of 257", make_inputs(Case(1, head_dim=257), device))
    other = make_inputs(Case(1, dtype=FP32), device)
    mixed_keys = Inputs(good.q, other.keys, good.values, good.k, good.v)
    refused("keys are torch.float32 for a source and torch.bfloat16 for the layer; pass one dtype", mixed_keys)
    (grad,) = torch.autograd.grad(good.mix().square().sum(), good.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    mixed = good.mix()
    good.values[0].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mixed.sum().backward()


CHECKS: dict[str, Callable[[str], object]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
