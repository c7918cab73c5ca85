"""The shape of manifold-constrained hyper-connections: ``num_streams`` residual streams flow from layer to layer.

Nothing is read from farther back, so there are no sources; every pipeline edge carries all streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_depthattn.methods.definition import CrossLayerMethod, Parameters

SUBLAYERS = ("attention_connector", "mlp_connector")
FINAL = "stream_readout"
SINKHORN_ITERATIONS = 20


@dataclass(frozen=True, kw_only=True)
class HyperConnections(CrossLayerMethod):
    """``num_streams``: residual streams n."""

    title: ClassVar[str] = "mHC"

    num_streams: int = 4

    def __post_init__(self) -> None:
        if self.num_streams < 2:
            raise ValueError(
                f"model.mhc.num_streams is {self.num_streams}; with one stream nothing is connected: set 2 or more, "
                "or model.method=vanilla."
            )

    def layer_parameters(self, layer: int) -> Parameters:
        return {f"{name}.{part}": shape for name in SUBLAYERS for part, shape in self._connector().items()}

    def final_parameters(self) -> Parameters:
        return {f"{FINAL}.weight": (self.num_streams,)}

    def _connector(self) -> Parameters:
        n, wide = self.num_streams, self.num_streams * self.hidden_size
        return {
            "norm_weight": (wide,),
            "projection": (n * n + 2 * n, wide),
            "pre_bias": (n,),
            "post_bias": (n,),
            "residual_bias": (n * n,),  # row major; flat, because one-dimensional weights are never decayed
            "pre_scale": (1,),
            "post_scale": (1,),
            "residual_scale": (1,),
        }

    def flops(self, layer: int) -> int:
        n, wide = self.num_streams, self.num_streams * self.hidden_size
        projection = 2 * (n * n + 2 * n) * wide
        sinkhorn = SINKHORN_ITERATIONS * 4 * n * n  # sums and divisions, of rows and of columns
        streams = 2 * wide + 2 * n * wide + 2 * wide  # read, mix, write
        readout = 2 * wide if self.is_last(layer) else 0
        return len(SUBLAYERS) * (projection + sinkhorn + streams) + readout
