"""What the layers of one rank publish to later layers for one micro-batch, beside the hidden state: named tensors.

Inside one autograd graph a later layer simply reads them. But a recomputed layer and a pipeline chunk each run
backward on their own, and run it from the hidden state alone. What outlives such a piece of the model is therefore
*detached for reuse*: later layers read a copy cut off from the graph (the same memory), the copy collects their
gradients, and the hidden state that leaves the piece passes through a function whose backward fetches what was
collected. Backward runs from the last layer to the first, so by then every reader has added its gradient. Each part is
kept once, whoever reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class MicrobatchState:
    """Named parts of one micro-batch on one rank; made anew for every micro-batch and shared by the rank's chunks."""

    def __init__(self) -> None:
        self._parts: dict[str, Tensor] = {}
        self._detached: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """The part ``name``.

        Raises:
            LookupError: no layer has published it.
        """
        part = self._parts.get(name, self._detached.get(name))
        if part is None:
            raise LookupError(
                f"{name} is read, but this micro-batch's state holds {sorted({*self._parts, *self._detached})}: with "
                "interleaved pipelining hand the same MicrobatchState to every chunk that runs the micro-batch."
            )
        return part

    def tensors(self) -> list[Tensor]:
        """Everything that is held at this moment."""
        return [*self._parts.values(), *self._detached.values()]

    def publish(self, parts: Mapping[str, Tensor]) -> None:
        """Publish ``parts`` to later layers of the same graph."""
        self._parts.update(parts)

    def detach_for_reuse(self, parts: Mapping[str, Tensor], hidden_states: Tensor) -> Tensor:
        """Publish ``parts`` to layers whose backward runs apart from this one, and earlier.

        A recomputed layer calls this twice, in its forward without gradients and again when it is recomputed.

        Args:
            parts: what later layers read; not to be used after this by layers that could read it here.
            hidden_states: what leaves this piece of the model.

        Returns:
            ``hidden_states``, to be used in its place: its backward brings the gradients of ``parts``.
        """
        for name, tensor in parts.items():
            if name not in self._detached:
                self._detached[name] = tensor.detach().requires_grad_()
        if not torch.is_grad_enabled():
            return hidden_states
        return _Collect.apply(self, tuple(parts), hidden_states, *parts.values())  # type: ignore[no-any-return]

    def keep_only(self, names: Iterable[str]) -> None:
        """Drop the parts that no later layer reads; a detached part stays until its gradient has been collected."""
        self._parts = {name: self._parts[name] for name in names if name in self._parts}

    def collect(self, name: str) -> Tensor:
        """The gradient of the detached part ``name``, which is dropped.

        Raises:
            RuntimeError: no reader's backward has run.
        """
        gradient = self._detached.pop(name).grad
        if gradient is None:
            raise RuntimeError(
                f"the backward pass that made {name} ran before that of any layer that reads it: run a micro-batch's "
                "chunks backward in the opposite order of their forward."
            )
        return gradient

    def assert_empty(self) -> None:
        """Raise ``RuntimeError`` if something is left; call when the micro-batch is done."""
        if left := [*self._parts, *self._detached]:
            raise RuntimeError(
                f"{', '.join(left)} were left over when their micro-batch was done: every chunk must run it once "
                "forward and once backward, or after model.eval() once without gradients."
            )


class _Collect(torch.autograd.Function):
    """The identity of the hidden state; its backward adds the gradients that detached parts have collected."""

    @staticmethod
    def forward(ctx: Any, state: MicrobatchState, names: tuple[str, ...], hidden_states: Tensor, *_: Tensor) -> Tensor:
        ctx.state, ctx.names = state, names
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, grad_hidden_states: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, grad_hidden_states, *(ctx.state.collect(name) for name in ctx.names)
