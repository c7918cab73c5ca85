"""All that can be said of a config in a world before anything runs, as plain values; `tables.py` shows it."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

from megatron_depthattn.config import RunConfig, validate
from megatron_depthattn.estimate.counts import decoder_shape, forward_flops
from megatron_depthattn.estimate.hardware import Hardware, resolve_for
from megatron_depthattn.estimate.layouts import (
    MEMORY_RESERVE,
    RECOMPUTE,
    Layout,
    LayoutEstimate,
    estimate,
    fullest_rank,
)
from megatron_depthattn.estimate.memory import RankMemory, rank_memory
from megatron_depthattn.estimate.step_time import step_time, transfer_seconds
from megatron_depthattn.estimate.traffic import CrossLayer, hop_sizes, traffic


@dataclass(frozen=True)
class Estimate:
    """One config in one world."""

    layout: LayoutEstimate
    world_size: int
    num_microbatches: int
    parameters: int
    flops: dict[str, int]
    """Of one token's forward pass, by line; a training step costs three times as much."""
    memory: list[RankMemory]
    """Of every pipeline stage."""
    memory_by_recompute: dict[str, RankMemory]
    """Of the fullest rank under each mode."""
    hops: list[int]
    """Bytes of one micro-batch over every pipeline edge, one way."""
    traffic: list[dict[str, Any]]
    """Of the busiest pipeline stage: each transfer with what is sent in a step and its predicted seconds."""
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def estimate_config(config: RunConfig, world_size: int, hardware: Hardware) -> Estimate:
    """As the config stands.

    Raises:
        ValueError: it cannot run on so many ranks.
    """
    config = resolve_for(hardware, config).config
    sizes = validate(config, world_size, needs_data=False)
    shared = CrossLayer.of(config)
    stages = range(config.parallel.pipeline)
    memory = [rank_memory(config, world_size, pipeline_rank=stage) for stage in stages]
    fullest = max(memory, key=lambda each: each.total)
    layout = Layout(config, shared, sizes)
    time = step_time(config, shared, sizes, hardware)
    found = estimate(layout, time, fullest, world_size, hardware)
    sent = [_sent(config, shared, sizes, stage, hardware, world_size) for stage in stages]
    room = hardware.memory_gb * 1e9 * (1 - MEMORY_RESERVE)
    flops = forward_flops(config)
    return Estimate(
        layout=found,
        world_size=world_size,
        num_microbatches=sizes.num_microbatches,
        parameters=decoder_shape(config).parameters,
        flops=asdict(flops) | {"total": flops.total},
        memory=memory,
        memory_by_recompute=_by_recompute(layout, world_size),
        hops=hop_sizes(config, shared),
        traffic=max(sent, key=lambda each: sum(line["bytes"] for line in each)),
        fits=fullest.total <= room,
    )


def _by_recompute(layout: Layout, world_size: int) -> dict[str, RankMemory]:
    found = {}
    for name, mode in RECOMPUTE.items():
        config = dataclasses.replace(layout.config, recompute=dataclasses.replace(layout.config.recompute, **mode))
        try:
            validate(config, world_size, needs_data=False)
        except ValueError:  # a mode that this config refuses, such as selective with precision.fp8_attention
            continue
        found[name] = fullest_rank(dataclasses.replace(layout, config=config), world_size)
    return found


def _sent(
    config: RunConfig, shared: CrossLayer, sizes: Any, stage: int, hardware: Hardware, world_size: int
) -> list[dict[str, Any]]:
    return [
        {
            "axis": each.axis,
            "what": each.what,
            "collective": each.kind,
            "ranks": each.ranks,
            "times": each.count,
            "bytes_each": each.sent,
            "bytes": each.sent * each.count,
            "seconds": each.count * transfer_seconds(config, hardware, each, world_size),
        }
        for each in traffic(config, shared, sizes, stage)
    ]
