"""Weights over depth on record: what the layers of all ranks report in a step, as numbers of metrics.jsonl.

Off the hot path: on steps that are not due nothing is computed and nothing is sent; on due ones each rank looks at a
sample of its tokens, and one small collective adds up what all have seen.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_depthattn.config import TrainConfig
from megatron_depthattn.model.depth_weights import COLUMNS_BEFORE_WEIGHTS, DepthRecorder
from megatron_depthattn.model.transformer_config import DepthAttentionConfig

MAX_POSITIONS = 256
"""Positions looked at of each sequence of a replica's first micro-batch, evenly spaced."""
COLLAPSED = 0.95
"""A key/value head has collapsed if the largest of its weights is at least this, in the mean over the tokens."""
DIGITS = 6
"""Decimals on record."""


class DepthRecord:
    """What is on record of the weights over depth; every method is called on all ranks, in every step.

    Due are the run's first step, its last, and every ``train.depth_interval``-th; never without Depth-Attention.

    Args:
        train: the run's section; which steps are due.
        megatron: the model's config; for its source plan and heads.
        sequence_length: tokens of a sample.
    """

    def __init__(self, train: TrainConfig, megatron: DepthAttentionConfig, sequence_length: int) -> None:
        self._plan = megatron.source_plan if megatron.attends_over_depth else None
        self._num_heads: int = megatron.num_query_groups
        self._interval, self._last_step = train.depth_interval, train.steps
        self._position_stride = -(-sequence_length // MAX_POSITIONS)
        self._recorder: DepthRecorder | None = None

    def recording(self, step: int) -> AbstractContextManager[None]:
        """Around the forward passes of ``step``, counted from 1."""
        is_due = self._interval is not None and (step in (1, self._last_step) or step % self._interval == 0)
        self._recorder = DepthRecorder(self._position_stride) if is_due and self._plan else None
        return self._recorder.recording() if self._recorder else nullcontext()

    def collect(self) -> dict[str, Any] | None:
        """What was recorded in the step, the mean over all data-parallel replicas, on every rank.

        Returns:
            ``tokens`` that were looked at and, by layer that has sources, means over tokens and key/value heads of the
            ``weights`` on its ``sources`` and, last, on itself, the mean ``entropy`` in nats, and the share of heads
            that have ``collapsed``. None on steps that are not due, and where a weight is not finite.
        """
        if self._recorder is None or self._plan is None:
            return None
        mixing = {i: sources for i in range(self._plan.num_layers) if (sources := self._plan.sources(i))}
        totals = self._over_all_ranks(self._recorder, max(map(len, mixing.values()), default=0) + 1)
        self._recorder = None
        if not totals.isfinite().all():
            return None
        layers: dict[str, dict[str, Any]] = {}
        for layer, sources in mixing.items():
            means = totals[layer, :, 1:] / totals[layer, :, :1]
            entropy, *weights = means[:, [0, *range(2, 3 + len(sources))]].mean(dim=0).tolist()
            layers[str(layer)] = {
                "sources": list(sources),
                "weights": [round(weight, DIGITS) for weight in weights],
                "entropy": round(entropy, DIGITS),
                "collapsed": round(float((means[:, 1] >= COLLAPSED).double().mean()), DIGITS),
            }
        # Ranks that share a key/value head have seen the same tokens.
        copies = max(1, parallel_state.get_tensor_model_parallel_world_size() // self._num_heads)
        return {"tokens": round(float(totals[:, 0, 0].max())) // copies, "layers": layers}

    def _over_all_ranks(self, recorded: DepthRecorder, num_weights: int) -> Tensor:
        """`DepthRecorder.sums` of all layers and heads, ``[layers, heads, 3 + weights]``, summed over all ranks."""
        assert self._plan is not None
        shape = (self._plan.num_layers, self._num_heads, COLUMNS_BEFORE_WEIGHTS + num_weights)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        totals = torch.zeros(shape, dtype=torch.float64, device=device)
        size = parallel_state.get_tensor_model_parallel_world_size()
        first = parallel_state.get_tensor_model_parallel_rank() * self._num_heads // size
        for layer, sums in recorded.sums.items():
            totals[layer, first : first + sums.shape[0], : sums.shape[1]] = sums
        dist.all_reduce(totals)
        return totals.cpu()


def depth_curves(depth: dict[str, Any] | None) -> dict[str, float]:
    """A record's numbers by the names of their curves."""
    curves: dict[str, float] = {}
    for layer, layer_record in (depth or {"layers": {}})["layers"].items():
        folder = f"depth/layer_{int(layer):03d}"
        names = [*(f"source_{source:03d}" for source in layer_record["sources"]), "self"]
        curves |= {f"{folder}/{name}": weight for name, weight in zip(names, layer_record["weights"], strict=True)}
        curves |= {f"{folder}/{name}": layer_record[name] for name in ("entropy", "collapsed")}
    return curves
