"""All that can be said of a config in a world before anything runs: as plain values, and printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from megatron_depthattn.cli.common import print_table
from megatron_depthattn.config import RunConfig, validate
from megatron_depthattn.estimate.counts import decoder_shape, forward_flops, stage_layers
from megatron_depthattn.estimate.hardware import ASSUMED, Hardware, resolve_for
from megatron_depthattn.estimate.layouts import (
    MEMORY_RESERVE,
    RECOMPUTE,
    Cut,
    Layout,
    LayoutEstimate,
    estimate,
    faster_cut,
    fullest_rank,
)
from megatron_depthattn.estimate.memory import RankMemory, rank_memory
from megatron_depthattn.estimate.step_time import MODEL, step_time, transfer_seconds
from megatron_depthattn.estimate.traffic import CrossLayer, hop_sizes, traffic
from megatron_depthattn.preflight.compare import size

PARTS = ("weights", "gradients", "optimizer", "activations", "sources", "payload_buffers", "working", "total")
MEMORY_LEGEND = (
    "sources: what layers keep for later ones; payload buffers: pipeline messages in transit; working: the largest "
    "temporary of backward (recomputed layers, or the output layer's)"
)
TIME_LEGEND = (
    "products: matrix products and attention; elementwise: memory-bound operations; mix: over depth; host: waiting for "
    "it to issue kernels; hops: inter-stage transfers; bubble: waiting for other stages"
)


@dataclass(frozen=True)
class Estimate:
    """One config in one world."""

    layout: LayoutEstimate
    world_size: int
    num_microbatches: int
    parameters: int
    flops: dict[str, int]
    """Of one token's forward pass, by line; a training step costs three times as much."""
    layers: list[list[int]]
    """Effective layers of every pipeline stage, chunk by chunk."""
    memory: list[RankMemory]
    """Of every pipeline stage."""
    memory_by_recompute: dict[str, RankMemory]
    """Of the fullest rank under each mode."""
    hops: list[int]
    """Bytes of one micro-batch over every pipeline edge, one way."""
    traffic: list[dict[str, Any]]
    """Of the busiest pipeline stage: each transfer with what is sent in a step and its predicted seconds."""
    fits: bool
    faster_cut: Cut | None
    """What the first and last stage should hold, if that makes a step shorter."""


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
    sent = [
        [
            {"axis": each.axis, "what": each.what, "collective": each.kind, "ranks": each.ranks, "times": each.count}
            | {"bytes_each": each.sent, "bytes": each.sent * each.count}
            | {"seconds": each.count * transfer_seconds(config, hardware, each, world_size)}
            for each in traffic(config, shared, sizes, stage)
        ]
        for stage in stages
    ]
    flops = forward_flops(config)
    return Estimate(
        layout=estimate(layout, time, fullest, world_size, hardware),
        world_size=world_size,
        num_microbatches=sizes.num_microbatches,
        parameters=decoder_shape(config).parameters,
        flops=asdict(flops) | {"total": flops.total},
        layers=[stage_layers(config, stage) for stage in stages],
        memory=memory,
        memory_by_recompute=_by_recompute(layout, world_size),
        hops=hop_sizes(config, shared),
        traffic=max(sent, key=lambda each: sum(line["bytes"] for line in each)),
        fits=fullest.total <= hardware.memory_gb * 1e9 * (1 - MEMORY_RESERVE),
        faster_cut=faster_cut(layout, time.total, world_size, hardware),
    )


def _by_recompute(layout: Layout, world_size: int) -> dict[str, RankMemory]:
    found = {}
    for name, mode in RECOMPUTE.items():
        config = dataclasses.replace(layout.config, recompute=dataclasses.replace(layout.config.recompute, **mode))
        try:
            validate(config, world_size, needs_data=False)
        except ValueError:  # a mode that this config does not support, such as selective with precision.fp8_attention
            continue
        found[name] = fullest_rank(dataclasses.replace(layout, config=config), world_size)
    return found


def show(config: RunConfig, found: Estimate, hardware: Hardware) -> None:
    """Print the config as it stands."""
    layout, train = found.layout, config.train
    print(f"{found.world_size} x {hardware.name}: {layout.name}, {found.num_microbatches} micro-batches a step")
    print(f"parameters: {found.parameters:,}")
    total = found.flops["total"]
    shares = ", ".join(f"{line} {n / 1e6:,.2f} M ({100 * n / total:.3f} %)" for line, n in found.flops.items())
    print(f"FLOPs of a token, forward: {shares}; a training step: 3 x, {3 * total / 1e6:,.2f} M")
    parts = [part.replace("_", " ") for part in PARTS]
    stages = [
        [f"stage {stage}", ranges(layers), *_memory(memory)]
        for stage, (layers, memory) in enumerate(zip(found.layers, found.memory, strict=True))
    ]
    stages = stages if len(stages) <= 4 else [*stages[:2], ["..."], stages[-1]]
    print_table(["pipeline stage", "layers", *parts], stages, title="memory of a rank")
    modes = [[mode, *_memory(memory)] for mode, memory in found.memory_by_recompute.items()]
    print_table(["recompute", *parts], modes, title="the fullest rank under each recompute mode")
    print(MEMORY_LEGEND)
    room = f"{hardware.memory_gb * (1 - MEMORY_RESERVE):.1f} GB ({hardware.memory_gb:.0f} less {MEMORY_RESERVE:.0%})"
    print(f"as it stands it {'fits' if found.fits else 'DOES NOT FIT'} {room}\n")
    for hop, edges in groupby(range(len(found.hops)), key=found.hops.__getitem__):
        first, *more = edges
        upto = f" to {more[-1]} -> {more[-1] + 1}" if more else ""
        print(f"inter-stage transfer {first} -> {first + 1}{upto}: {hop:,} bytes ({size(hop)}) a micro-batch each way")
    sent = [
        [str(each[key]) for key in ("axis", "what", "collective", "ranks", "times")]
        + [size(each["bytes_each"]), size(each["bytes"]), f"{1e3 * each['seconds']:.2f}"]
        for each in found.traffic
    ]
    heads = ["axis", "what", "collective", "ranks", "times", "sent each", "sent a step", "ms a step"]
    print_table(heads, sent, title="what a rank of the busiest pipeline stage sends in a step")
    seconds = ", ".join(f"{part} {value:.3g}" for part, value in vars(layout.breakdown).items() if value)
    tokens = train.global_batch_size * config.data.sequence_length
    print(
        f"predicted step: {layout.step_seconds:.3f} s for {tokens:,} tokens, "
        f"{layout.tokens_per_second:,.0f} a second, MFU {layout.mfu:.1%}; "
        f"{train.steps:,} steps: {layout.run_hours:,.1f} hours"
    )
    print(f"of which, in seconds: {seconds}\n{TIME_LEGEND}\n")
    if cut := found.faster_cut:
        print(
            f"stages of more equal time: parallel.first_stage_layers={cut.first_stage_layers} "
            f"parallel.last_stage_layers={cut.last_stage_layers}, predicted step {cut.step_seconds:.3f} s "
            f"({cut.step_seconds / layout.step_seconds - 1:+.1%})\n"
        )


def show_layouts(layouts: Sequence[LayoutEstimate], hardware: Hardware) -> None:
    """Print the ranking."""
    rows = []
    for place, each in enumerate(layouts, start=1):
        time = each.breakdown
        name = each.name + "".join(f", vpp{n}" for n in each.other_chunks)
        speed = [f"{each.step_seconds:.3f}", f"{each.tokens_per_second:,.0f}", f"{each.mfu:.1%}"]
        parts = (time.tensor + time.context + time.hops + time.data, time.bubble, time.recompute)
        cost = [f"{each.run_hours:,.1f}", f"{each.memory.total / 1e9:.1f}", *(f"{part:.3f}" for part in parts)]
        rows.append([str(place), name, *speed, *cost])
    heads = ["", "layout", "step, s", "tokens/s", "MFU", "run, hours", "GB", "messages, s", "bubble, s", "recompute, s"]
    print_table(heads, rows, title=f"layouts that fit {hardware.name}, by predicted step time")
    keys = {key: "null" if value is None else str(value).lower() for key, value in layouts[0].overrides.items()}
    print("the first one: " + " ".join(f"{key}={value}" for key, value in keys.items()))
    print("a comma before vppN: N chunks a rank also fit, slower by this prediction")
    print("predictions rank roughly: `depthattn benchmark layouts CONFIG --world N` runs the best five for ten steps\n")


def show_assumptions() -> None:
    """Print where the time comes from."""
    print("\n".join([*(f"model: {line}" for line in MODEL), *(f"assumed, not measured: {line}" for line in ASSUMED)]))


def ranges(layers: Sequence[int]) -> str:
    """Ascending numbers in a few letters: 0-2 8-10; none: -."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "-"


def _memory(memory: RankMemory) -> list[str]:
    return [size(getattr(memory, part)) for part in PARTS]
