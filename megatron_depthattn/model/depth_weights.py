"""What Depth-Attention's layers report of their weights over depth while a recorder is active.

Recording takes nothing from a step and gives nothing back: a recorder reads what the mix reads, without gradients, and
keeps sums. It reaches the layers as a context variable, not through Megatron's calls: engines, schedules and kinds of
recompute take different ways to a layer, and nothing is to be left on a module between calls.

Shape suffixes: S positions, B micro-batch, H query heads and G key/value heads of this rank, D head size, n sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

COLUMNS_BEFORE_WEIGHTS = 3
"""Of a layer's sums: tokens, entropy and largest weight come before the weights."""


class DepthRecorder:
    """Sums of the weights of each layer's first forward pass under `recording`: of the first micro-batch, and of full
    recompute the first of its two.

    Args:
        position_stride: every so many positions one is looked at.
    """

    def __init__(self, position_stride: int) -> None:
        self.sums: dict[int, Tensor] = {}
        """By layer, fp64 ``[G, 3 + n + 1]``: how many tokens, and sums over them of the entropy in nats, of the largest
        weight, and of the weights on each source in order and, last, on the layer itself."""
        self._position_stride = position_stride

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A context whose forward passes on this thread are recorded."""
        token = _RECORDER.set(self)
        try:
            yield
        finally:
            _RECORDER.reset(token)

    @torch.no_grad()
    def record(self, layer: int, query: Tensor, keys: Sequence[Tensor], key: Tensor, scale: float) -> None:
        """Add up the weights of ``layer``, counted from 0.

        Args:
            query: ``[S, B, H, D]``, the heads whose mean scores each key/value head.
            keys: of every source ``[S, B, G, D]``.
            key: the layer's own, ``[S, B, G, D]``.
            scale: factor of the scores.
        """
        if layer in self.sums:
            return
        looked_at = slice(None, None, self._position_stride)
        precise = torch.promote_types(query.dtype, torch.float32)
        mean = query[looked_at].unflatten(2, (key.shape[2], -1)).to(precise).mean(dim=3)
        # One source at a time: all keys at once would be many times a layer's activations.
        scores = [(mean * k[looked_at].to(precise)).sum(dim=-1) for k in (*keys, key)]
        weights = (scale * torch.stack(scores, dim=-1)).softmax(dim=-1)
        entropy = torch.special.entr(weights).sum(dim=-1)
        columns = (torch.ones_like(entropy), entropy, weights.amax(dim=-1), *weights.unbind(dim=-1))
        self.sums[layer] = torch.stack(columns, dim=-1).sum(dim=(0, 1), dtype=torch.float64)


_RECORDER: ContextVar[DepthRecorder | None] = ContextVar("depth_recorder", default=None)


def recorder() -> DepthRecorder | None:
    """The recorder that is active on this thread; mostly none."""
    return _RECORDER.get()
