"""DenseFormer's shape: which earlier hidden states each average reads.

``H_0`` is the embedding, ``H_t`` the output of block ``t``. Before block ``t + 1``, and behind the last block, comes
``Z_t``, a weighted sum over some of ``H_0 .. H_t``. ``H_l`` is the input of layer ``l``: that layer averages it with
its sources. The last layer also holds the average behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_depthattn.methods.definition import CrossLayerMethod, Parameters


@dataclass(frozen=True, kw_only=True)
class DenseFormer(CrossLayerMethod):
    """DenseFormer with ``period`` P and ``dilation`` d: every P-th block is followed by an average over each d-th
    earlier state, counted back from its own. 1 and 1: after every block, over all of them."""

    title: ClassVar[str] = "DenseFormer"

    period: int = 1
    dilation: int = 1

    def __post_init__(self) -> None:
        for key in ("period", "dilation"):
            if (value := getattr(self, key)) < 1:
                raise ValueError(f"model.denseformer.{key} is {value}; it counts blocks: set 1 or more.")

    def averaged(self, state: int) -> tuple[int, ...]:
        """The states ``H_k`` of which ``Z_state`` is made, ascending, its own last; none: it is ``H_state``."""
        if state == 0 or state % self.period:
            return ()
        return tuple(range(state % self.dilation, state + 1, self.dilation))

    def sources(self, layer: int) -> tuple[int, ...]:
        states = set(self.averaged(layer)[:-1])
        if self.is_last(layer):  # which makes H_L, and Z_L of it
            states |= set(self.averaged(layer + 1)[:-1]) - {layer}
        return tuple(sorted(states))

    def layer_parameters(self, layer: int) -> Parameters:
        states = self.averaged(layer)
        return {"depth_average.weight": (len(states),)} if states else {}

    def final_parameters(self) -> Parameters:
        states = self.averaged(self.num_layers)
        return {"final_depth_average.weight": (len(states),)} if states else {}

    def flops(self, layer: int) -> int:
        terms = len(self.averaged(layer))
        if self.is_last(layer):
            terms += len(self.averaged(layer + 1))
        return 2 * self.hidden_size * terms
