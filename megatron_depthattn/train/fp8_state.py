"""What delayed FP8 scaling remembers between passes, and how a pass is taken out of it again.

Every pass leaves the largest entries that it met in its layers' histories, from which later scales come. What is no
part of the training must leave no trace there: an evaluation, a step that is not finite, weights that were replaced
before they were used. Under the other recipes layers remember nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor


class Fp8State:
    """Scales and histories of the TransformerEngine layers in ``models`` that are scaled with delay, if any."""

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        self._layers: list[Any] = [m for model in models for m in model.modules() if hasattr(m, "fp8_meta")]
        self._kept: list[list[Tensor]] = [[] for _ in self._layers]

    def keep(self) -> None:
        """Remember the state as it is now; a layer has none before its first pass."""
        live = [_tensors(layer) for layer in self._layers]
        if list(map(len, live)) == list(map(len, self._kept)):
            _copy(live, self._kept)
        else:
            self._kept = [[tensor.clone() for tensor in tensors] for tensors in live]

    def restore(self) -> None:
        """Bring back what `keep` found, in place: TransformerEngine refers to these tensors elsewhere as well."""
        live = [_tensors(layer) for layer in self._layers]
        for layer, now, before in zip(self._layers, live, self._kept, strict=True):
            if now and not before:
                layer.reset_fp8_meta_tensors()
        had_some = [index for index, before in enumerate(self._kept) if before]
        _copy([self._kept[index] for index in had_some], [live[index] for index in had_some])

    def reset(self) -> None:
        """Scales of one and empty histories, as before anything was cast."""
        for layer in self._layers:
            if _tensors(layer):
                layer.reset_fp8_meta_tensors()

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """A context whose passes leave no trace."""
        self.keep()
        yield
        self.restore()


def _tensors(layer: Any) -> list[Tensor]:
    states = [layer.fp8_meta.get(way) for way in ("scaling_fwd", "scaling_bwd")]
    return [x for state in states if hasattr(state, "amax_history") for x in (state.scale, state.amax_history)]


@torch.no_grad()
def _copy(sources: Sequence[list[Tensor]], targets: Sequence[list[Tensor]]) -> None:
    """One launch for hundreds of small tensors."""
    if any(sources):
        torch._foreach_copy_(list(chain.from_iterable(targets)), list(chain.from_iterable(sources)))
