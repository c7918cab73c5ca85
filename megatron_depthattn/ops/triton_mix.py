"""Depth-Attention mixing on GPUs: the forward and the backward pass are one Triton kernel each, one pass over memory.

The mix is bound by memory: per element it reads it does a few operations. So each kernel reads every query, key,
value and incoming gradient once, from where it is (its own address and strides: a slice of a fused projection or of a
pipeline message is not copied), and writes each result once. Per token, in numbers: forward
H·d + 2(n+1)·G·d read and G·d written, backward H·d + (2n+3)·G·d read and H·d + 2(n+1)·G·d written. Nothing but the
inputs is kept for backward, as in lean.py, whose formulas these are. How one pass is enough:

- forward keeps a running softmax: the largest score so far, and the sums of weights and of weighted values relative
  to it;
- the gradients dk_i = scale·a_i·(da_i - D)·qbar and dv_i = a_i·g need of a candidate only two numbers per row, its
  score and da_i = g·v_i. Once all are known, so are the softmax and D = Σ_j a_j·da_j, and no k_i or v_i is read again;
- the query's gradient scale·Σ a_i·(da_i - D)·k_i is scale·(Σ a_i·da_i·k_i - D·Σ a_i·k_i): two running sums.

How the kernel learns of any number of tensors. A few (the released models mix three candidates at most) are arguments
of the launch, unrolled: nothing travels to the GPU first, and all loads can be under way at once, at the price of a
compilation for each number. More than `MAX_IN_ARGUMENTS` are a table of addresses and strides, copied to the GPU from
page-locked memory on the same stream: one kernel for all numbers, and a launch does not grow by ten arguments a
candidate. The copy does not wait, and needs no care afterwards: torch's allocators hand neither block of memory out
again before the stream is past it.

Precision is that of reference.py for bf16, fp16 and fp32; fp64 is unsupported. Numbers are added in another order.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
OLDEST_TRITON = (3, 3)
MAX_IN_ARGUMENTS = 4
"""Candidates (sources and the layer itself) that are passed as arguments; more go through a table."""
TILE = 2048
NUM_WARPS = 4
"""Numbers in a tile of a program, and its warps: 16 numbers a thread. Chosen so that ptxas for sm_90 spills nothing (at
most 128 registers with up to `MAX_IN_ARGUMENTS` candidates in bf16); not tuned on a GPU."""
_TABLES_OF_GRAPHS: list[Tensor] = []
"""Every replay of a CUDA graph copies its tables again from where they were when it was captured."""


def depth_mix_triton(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], k: Tensor, v: Tensor, scale: float
) -> Tensor:
    """Mix a layer's values with those of its source layers by one GPU kernel, saving only the given tensors.

    A tensor whose elements of one head are not next to each other is made contiguous first, it alone; so is one with
    more than two leading dimensions that do not fold into two. Others are read where they are, whatever their strides.

    Args:
        q: queries [..., H, d] in bf16, fp16 or fp32; d <= 256.
        keys: one key tensor [..., G, d] per source layer, in k's dtype.
        values: one mixed value tensor [..., G, d] per source layer, in v's dtype and the order of `keys`.
        k: the layer's own keys [..., G, d] in any of these dtypes.
        v: the layer's own values [..., G, d] in any of these dtypes.
        scale: factor of the scores, normally 1 / sqrt(d).

    Returns:
        The mixed values [..., G, d] in v's dtype, a new contiguous tensor; without a source, `v` itself.

    Raises:
        ValueError: not on a GPU, not all on the same one, without Triton 3.3 or later, for another dtype or a larger
            head.
        RuntimeError: from autograd, when a second derivative is asked for, or when an input was changed in
            place between forward and backward.
    """
    if reason := triton_unsupported(v.device):
        raise ValueError(f"the mix with op 'triton' {reason}")
    _check(q, keys, values, k, v)
    if not keys:
        return v
    return cast(Tensor, _TritonDepthMix.apply(scale, q, *keys, k, *values, v))


@cache
def triton_unsupported(device: torch.device) -> str | None:
    """What keeps the kernels from running on tensors of this device, and what to set; None: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed: pip install triton, or set the op to 'lean'"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return (
            f"passes tuples to its kernels, which Triton {triton.__version__} does not take: install Triton 3.3 or "
            "later (it comes with torch 2.7), or set the op to 'lean'"
        )
    if _kernels().ARE_INTERPRETED:  # with the addresses of a GPU it would read some other memory of the CPU
        return None if device.type == "cpu" else f"is interpreted on CPU, not on '{device}': unset TRITON_INTERPRET"
    if device.type != "cuda":
        return (
            f"needs a GPU, and was given device '{device.type}': set the op to 'lean' "
            "(TRITON_INTERPRET=1 interprets the kernels on CPU, to test them)"
        )
    return None


class _TritonDepthMix(torch.autograd.Function):
    """`apply(scale, q, *keys, *values)`: here the layer itself is simply the last candidate of both lists."""

    @staticmethod
    def forward(ctx: Any, scale: float, q: Tensor, *candidates: Tensor) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(q, *candidates)
        mixed = _empty_like(candidates[-1])
        _launch("forward_kernel", scale, [q], mixed, candidates)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mixed: Tensor) -> tuple[Tensor | None, ...]:
        q, *candidates = ctx.saved_tensors
        _, needs_q, *needs = ctx.needs_input_grad
        grad_q = _empty_like(q) if needs_q else None
        grads = [_empty_like(x) if needed else None for x, needed in zip(candidates, needs, strict=True)]
        _launch(
            "backward_kernel",
            ctx.scale,
            [q, grad_mixed],
            q if grad_q is None else grad_q,  # without NEEDS_Q nothing is written there
            candidates,
            grads,
            NEEDS_Q=needs_q,
            SLOTS=_power_of_two(len(candidates) // 2),
        )
        return None, grad_q, *grads


def _empty_like(x: Tensor) -> Tensor:
    """Memory for a result of x's shape and dtype, contiguous whatever x is."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch(
    name: str,
    scale: float,
    strided: Sequence[Tensor],
    result: Tensor,
    candidates: Sequence[Tensor],
    grads: Sequence[Tensor | None] | None = None,
    **constants: Any,
) -> None:
    """Start a kernel on the current stream, or none if there is nothing to compute.

    Args:
        name: of the kernel.
        strided: its first arguments, with any strides: q, and in backward the gradient of the result.
        result: its next argument, contiguous.
        candidates: keys, then values, each [..., G, d].
        grads: where their gradients go, contiguous and in the same order, None where none is wanted.
        constants: of the compilation, beside those that both kernels have.
    """
    if not result.numel():
        return
    strided = [_four_dimensional(x) for x in strided]
    candidates = [_four_dimensional(x) for x in candidates]  # a copy, if it is one, must be there until the launch
    entries, num_fields, is_aligned = _describe(candidates, grads)
    num_candidates = len(candidates) // 2
    is_in_arguments = num_candidates <= MAX_IN_ARGUMENTS
    first, second, num_groups, head_dim = candidates[0].shape
    num_rows = first * second * num_groups
    assert num_rows < 2**31 - TILE, "the kernels count rows in 32 bits"
    width = _power_of_two(head_dim)
    rows = max(1, TILE // max(width, constants.get("SLOTS", 1)))
    kernels = _kernels()
    with _on_device_of(result):
        getattr(kernels, name)[(-(-num_rows // rows),)](
            *strided,
            result,
            tuple(entries) if is_in_arguments else _table(entries, result.device),
            scale,
            num_rows,
            num_candidates,
            second,
            *(stride for x in strided for stride in x.stride()[:3]),
            FIELDS=num_fields,
            IN_ARGUMENTS=num_candidates if is_in_arguments else 0,
            IS_ALIGNED=is_aligned,
            KEY_DTYPE=kernels.DTYPES[candidates[0].dtype],
            VALUE_DTYPE=kernels.DTYPES[candidates[-1].dtype],
            NUM_GROUPS=num_groups,
            HEADS_PER_GROUP=strided[0].shape[2] // num_groups,
            HEAD_DIM=head_dim,
            WIDTH=width,
            ROWS=rows,
            **constants,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,  # a·b + c rounded once; later versions of Triton have another default
        )


def _four_dimensional(x: Tensor) -> Tensor:
    """x [..., heads, d] as [first, second, heads, d], without a gap between the elements of a head."""
    if x.ndim != 4:
        leading = x.shape[:-2] or (1,)
        x = x.reshape(math.prod(leading[:-1]), leading[-1], x.shape[-2], x.shape[-1])
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _describe(candidates: Sequence[Tensor], grads: Sequence[Tensor | None] | None) -> tuple[list[int], int, bool]:
    """The integers that a kernel reads about the candidates, how many there are for each, and whether every row of
    every tensor begins at a multiple of 16 bytes."""
    num_candidates = len(candidates) // 2
    key, value = candidates[0], candidates[-1]
    head_dim, key_size, value_size = key.shape[3], key.element_size(), value.element_size()
    entries: list[int] = []
    bits = head_dim * (key_size | value_size)
    for i in range(num_candidates):
        for x, size in ((candidates[i], key_size), (candidates[num_candidates + i], value_size)):
            address, (first, second, head, _) = x.data_ptr(), x.stride()
            bits |= address | size * (first | second | head)
            entries += (address, first, second, head)
        if grads is not None:
            for grad in (grads[i], grads[num_candidates + i]):
                entries.append(0 if grad is None else grad.data_ptr())
    return entries, len(entries) // num_candidates, bits % 16 == 0


def _table(entries: Sequence[int], device: torch.device) -> Tensor:
    """The entries in the device's memory once the current stream gets there; does not wait for it."""
    if device.type == "cpu":
        return torch.tensor(entries, dtype=torch.int64)
    table = torch.tensor(entries, dtype=torch.int64, pin_memory=True)
    if torch.cuda.is_current_stream_capturing():
        _TABLES_OF_GRAPHS.append(table)
    return table.to(device, non_blocking=True)


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _power_of_two(number: int) -> int:
    """The least power of two that is not below the number."""
    return 1 << (number - 1).bit_length()


@cache
def _kernels() -> ModuleType:
    """The kernels; imported at the first use, so that the package works without Triton."""
    from megatron_depthattn.ops import triton_kernels

    return triton_kernels


def _check(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], k: Tensor, v: Tensor) -> None:
    """Raise for what the kernels would read wrongly: they take one dtype for the keys and one for the values."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise ValueError(
                f"the mix with op 'triton' computes in fp32, but {name} is {x.dtype}: pass one of "
                f"{', '.join(map(str, DTYPES))}, or set the op to 'lean', which computes fp64 in fp64"
            )
    if k.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"the mix with op 'triton' holds a head in registers, at most {MAX_HEAD_DIM} numbers, but got heads of "
            f"{k.shape[-1]}: set the op to 'lean'"
        )
    for name, own, others in (("q", v, (q, k)), ("keys", k, keys), ("values", v, values)):
        for x in others:
            if x.device != v.device:
                raise ValueError(f"{name} are on device '{x.device}' and v on '{v.device}'; move them to one")
            if x.dtype != own.dtype and name != "q":
                raise ValueError(f"{name} are {x.dtype} for a source and {own.dtype} for the layer; pass one dtype")
