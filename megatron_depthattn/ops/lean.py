"""Depth-Attention mixing that keeps nothing for backward but its own inputs.

Plain autograd on the formula (reference.py) keeps fp32 copies of the query mean and of every source's keys
and values: in bf16 training twice the memory of the sources themselves, in every layer. The inputs are
mostly alive anyway: the layer stack keeps the sources and, when the mix is called after RoPE, attention
keeps q and k. The scores cost 2 * n * G * d multiplications a token, so the backward pass computes scores
and weights again, and the gradients explicitly. With qsum the sum of a group's queries, so that the scores
are c_i = factor * qsum . k_i with factor = scale / (H / G), a the weights and g = dL/dvmix:

    dv_i  = a_i * g                     da_i = g . v_i
    dc_i  = a_i * (da_i - sum_j a_j da_j)
    dk_i  = factor * dc_i * qsum        dq_h = factor * sum_i dc_i * k_i    for each query head h of the group

Shapes and precision are those of reference.py. Sources are visited one at a time: besides results, the
largest temporaries are a few [..., G, d] tensors in fp32, whatever the number of sources. On a CPU the time
goes into reading and writing memory: one buffer takes all products, the group mean's division is left to the
scores, which are d times smaller, and scores [n + 1, ..., G] lie source by source, as softmax is fastest.
There are about 12 operations a source, forward and backward, so tensors that are hardly large enough for
threads run without: to start them would take longer than the operation (`_threads_that_pay`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_depthattn.ops.reference import compute_dtype

_T = TypeVar("_T")

_GRAIN_SIZE = 32768
"""Elements from which torch starts threads for an elementwise operation on a CPU (at::internal::GRAIN_SIZE)."""


def depth_mix_lean(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], k: Tensor, v: Tensor, scale: float
) -> Tensor:
    """Mix a layer's values with those of its source layers, saving only the given tensors for backward.

    Args:
        q: queries [..., H, d].
        keys: one key tensor [..., G, d] per source layer.
        values: one mixed value tensor [..., G, d] per source layer, in the order of `keys`.
        k: the layer's own keys [..., G, d].
        v: the layer's own values [..., G, d].
        scale: factor of the scores, normally 1 / sqrt(d).

    Returns:
        The mixed values [..., G, d] in v's dtype, a new tensor; without a source, `v` itself.

    Raises:
        RuntimeError: from autograd, when a second derivative is asked for, or when an input was changed in
            place between forward and backward.
    """
    if not keys:
        return v
    return cast(Tensor, _LeanDepthMix.apply(scale, q, *keys, k, *values, v))


class _LeanDepthMix(torch.autograd.Function):
    """`apply(scale, q, *keys, *values)`: here the layer itself is simply the last candidate of both lists."""

    @staticmethod
    def forward(ctx: Any, scale: float, q: Tensor, *candidates: Tensor) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(q, *candidates)
        keys, values = _split(candidates)
        v = values[-1]
        with _threads_that_pay(v):
            weights = _weights(_group_sum(q, like=v), keys, _score_factor(q, v, scale))
            return _weighted_sum(weights, values).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mixed: Tensor) -> tuple[Tensor | None, ...]:
        with _threads_that_pay(grad_mixed):
            return None, *_gradients(ctx.scale, ctx.saved_tensors, grad_mixed, ctx.needs_input_grad[1:])


def _gradients(
    scale: float, inputs: Sequence[Tensor], grad_mixed: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs q, *keys, *values; None where it is not needed."""
    q, *candidates = inputs
    keys, values = _split(candidates)
    needs_q, *needs_candidates = needed
    needs_key, needs_value = _split(needs_candidates)

    factor = _score_factor(q, values[-1], scale)
    qsum = _group_sum(q, like=values[-1])
    grad = grad_mixed.to(qsum.dtype)
    if not (needs_q or any(needs_key)):
        weights = _weights(qsum, keys, factor)
        return None, *(None for _ in keys), *_each_times(weights, grad, values, needs_value)

    grad_weights = _dot_each(grad, values)  # first, so that the two passes over the keys follow each other
    weights = _weights(qsum, keys, factor)
    grad_scores = torch._softmax_backward_data(grad_weights, weights, 0, weights.dtype)
    grad_dots = grad_scores.mul_(factor)
    grad_q = _to_every_head(_weighted_sum(grad_dots, keys), q) if needs_q else None
    grad_keys = _each_times(grad_dots, qsum, keys, needs_key)
    return grad_q, *grad_keys, *_each_times(weights, grad, values, needs_value)


@contextmanager
def _threads_that_pay(x: Tensor) -> Iterator[None]:
    """Inside, operations on CPU tensors of x's size run without threads if each would get less than torch's own grain.

    Every operation waits for its slowest thread. The number of threads belongs to the calling thread; only a thread
    whose very first operation falls into the block would start, and stay, with one. Compiled code needs none of this.
    """
    is_small = not torch.compiler.is_compiling() and x.is_cpu and _GRAIN_SIZE <= x.numel() < 2 * _GRAIN_SIZE
    if not is_small or (num_threads := torch.get_num_threads()) == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _split(candidates: Sequence[_T]) -> tuple[Sequence[_T], Sequence[_T]]:
    """The first half belongs to the keys, the second half to the values."""
    num_candidates = len(candidates) // 2
    return candidates[:num_candidates], candidates[num_candidates:]


def _group_sum(q: Tensor, like: Tensor) -> Tensor:
    """Sum [..., G, d] of the queries of each KV group, in the computing dtype; q [..., H, d], `like` [..., G, d]."""
    first, *others = _by_group(q, like).unbind(dim=-2)
    return sum(others, start=first.to(compute_dtype(q, like)))


def _by_group(q: Tensor, like: Tensor) -> Tensor:
    """View [..., G, H / G, d] of q [..., H, d]; `like` is [..., G, d]."""
    num_groups, head_dim = like.shape[-2:]
    return q.view(*q.shape[:-2], num_groups, q.shape[-2] // num_groups, head_dim)


def _score_factor(q: Tensor, like: Tensor, scale: float) -> float:
    """What makes a score of the dot product with a group's sum: the scale over the number of heads in the group."""
    return scale * like.shape[-2] / q.shape[-2]


def _to_every_head(grad_qsum: Tensor, q: Tensor) -> Tensor:
    """Gradient of q [..., H, d] from that of the groups' sums [..., G, d]: the same for every head of a group."""
    heads_per_group = q.shape[-2] // grad_qsum.shape[-2]
    return torch.stack([grad_qsum.to(q.dtype)] * heads_per_group, dim=-2).view(q.shape)  # faster than to expand


def _weights(qsum: Tensor, keys: Sequence[Tensor], factor: float) -> Tensor:
    """Softmax weights [n + 1, ..., G] of the candidates with the given keys."""
    return _dot_each(qsum, keys).mul_(factor).softmax(dim=0)


def _dot_each(x: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Dot products over d of x [..., G, d] with each of n tensors [..., G, d]: [n, ..., G], in x's dtype."""
    dots = x.new_empty((len(others), *x.shape[:-1]))
    product = torch.empty_like(x)
    for dot, other in zip(dots.unbind(), others, strict=True):
        torch.sum(torch.mul(x, other, out=product), dim=-1, out=dot)
    return dots


def _weighted_sum(weights: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Sum over the n candidates of weights [n, ..., G] times n tensors [..., G, d]: [..., G, d]."""
    # From the last to the first: the last tensors may still be in a cache from the pass over all of them before.
    *others, last = weights.unsqueeze(-1).unbind()
    total = last * tensors[-1]
    for weight, tensor in zip(others[::-1], tensors[-2::-1], strict=True):
        total.addcmul_(weight, tensor)
    return total


def _each_times(weights: Tensor, x: Tensor, like: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """x [..., G, d] times each of n weights [n, ..., G], in the dtypes of `like`; None where it is not needed."""
    return [
        (weight * x).to(tensor.dtype) if needs else None
        for weight, tensor, needs in zip(weights.unsqueeze(-1).unbind(), like, needed, strict=True)
    ]
