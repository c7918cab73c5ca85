"""Cases of the Triton mix, for a GPU and for Triton's interpreter on CPU: what is given, and how far the result is off.

The truth is the formula in fp64 under autograd, on the CPU. Shapes: H query heads, G KV heads, d head size, n sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_depthattn.ops import depth_mix

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
    """The tensors of one mix, leaves that require a gradient unless asked otherwise."""

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
