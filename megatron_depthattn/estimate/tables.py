"""What `depthattn estimate` prints."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from megatron_depthattn.config import RunConfig
from megatron_depthattn.estimate.hardware import ASSUMED, Hardware
from megatron_depthattn.estimate.layouts import MEMORY_RESERVE, LayoutEstimate
from megatron_depthattn.estimate.memory import RankMemory
from megatron_depthattn.estimate.report import Estimate
from megatron_depthattn.estimate.step_time import MODEL
from megatron_depthattn.preflight.compare import size

CONSOLE = Console() if Console().is_terminal else Console(width=150)
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "sources": "sources",
    "payload_buffers": "payload buffers",
    "working": "working",
}
MEMORY_LEGEND = (
    "sources: what layers keep for later ones; payload buffers: pipeline messages in transit; working: the largest "
    "temporary of backward (recomputed layers, or the output layer's)"
)
TIME_LEGEND = (
    "products: matrix products and attention; elementwise: memory-bound operations; mix: over depth; host: waiting for "
    "it to issue kernels; hops: inter-stage transfers; bubble: waiting for other stages"
)


def show(config: RunConfig, found: Estimate, hardware: Hardware) -> None:
    """The config as it stands."""
    layout, train = found.layout, config.train
    print(f"{found.world_size} x {hardware.name}: {layout.name}, {found.num_microbatches} micro-batches a step")
    print(f"parameters: {found.parameters:,}")
    total = found.flops["total"]
    shares = ", ".join(f"{line} {n / 1e6:,.2f} M ({100 * n / total:.3f} %)" for line, n in found.flops.items())
    print(f"FLOPs of a token, forward: {shares}; a training step: 3 x, {3 * total / 1e6:,.2f} M")
    rows = [(f"stage {stage}", *_memory(memory)) for stage, memory in enumerate(found.memory)]
    rows = rows if len(rows) <= 4 else [*rows[:2], ("...", *[""] * (len(PARTS) + 1)), rows[-1]]
    table("memory of a rank", ["pipeline stage", *PARTS.values(), "total"], rows)
    modes = [(mode, *_memory(memory)) for mode, memory in found.memory_by_recompute.items()]
    table("the fullest rank under each recompute mode", ["recompute", *PARTS.values(), "total"], modes)
    print(MEMORY_LEGEND)
    room = f"{hardware.memory_gb * (1 - MEMORY_RESERVE):.1f} GB ({hardware.memory_gb:.0f} less {MEMORY_RESERVE:.0%})"
    print(f"as it stands it {'fits' if found.fits else 'DOES NOT FIT'} {room}\n")
    for hop, edges in groupby(range(len(found.hops)), key=found.hops.__getitem__):
        first, *more = edges
        upto = f" to {more[-1]} -> {more[-1] + 1}" if more else ""
        print(f"inter-stage transfer {first} -> {first + 1}{upto}: {hop:,} bytes ({size(hop)}) a micro-batch each way")
    lines = [
        (
            t["axis"],
            t["what"],
            t["collective"],
            str(t["ranks"]),
            str(t["times"]),
            size(t["bytes_each"]),
            size(t["bytes"]),
            f"{1e3 * t['seconds']:.2f}",
        )
        for t in found.traffic
    ]
    heads = ["axis", "what", "collective", "ranks", "times", "sent each", "sent a step", "ms a step"]
    table("what a rank of the busiest pipeline stage sends in a step", heads, lines)
    parts = ", ".join(f"{part} {value:.3g}" for part, value in vars(layout.breakdown).items() if value)
    tokens = train.global_batch_size * config.data.sequence_length
    print(
        f"predicted step: {layout.step_seconds:.3f} s for {tokens:,} tokens, "
        f"{layout.tokens_per_second:,.0f} a second, MFU {layout.mfu:.1%}; "
        f"{train.steps:,} steps: {layout.run_hours:,.1f} hours"
    )
    print(f"of which, in seconds: {parts}\n{TIME_LEGEND}\n")


def show_layouts(layouts: Sequence[LayoutEstimate], hardware: Hardware) -> None:
    """The ranking."""
    rows = [
        (
            str(place),
            each.name + "".join(f", vpp{n}" for n in each.other_chunks),
            f"{each.step_seconds:.3f}",
            f"{each.tokens_per_second:,.0f}",
            f"{each.mfu:.1%}",
            f"{each.run_hours:,.1f}",
            f"{each.memory.total / 1e9:.1f}",
            f"{each.breakdown.tensor + each.breakdown.context + each.breakdown.hops + each.breakdown.data:.3f}",
            f"{each.breakdown.bubble:.3f}",
            f"{each.breakdown.recompute:.3f}",
        )
        for place, each in enumerate(layouts, start=1)
    ]
    heads = ["", "layout", "step, s", "tokens/s", "MFU", "run, hours", "GB", "messages, s", "bubble, s", "recompute, s"]
    table(f"layouts that fit {hardware.name}, by predicted step time", heads, rows)
    best = layouts[0].overrides
    print("the first one: " + " ".join(f"{key}={_value(value)}" for key, value in best.items()))
    print("a comma before vppN: N chunks a rank also fit, slower by this prediction")
    print("predictions rank roughly: `depthattn benchmark layouts CONFIG --world N` runs the best five for ten steps\n")


def show_assumptions() -> None:
    """Where the time comes from."""
    for line in MODEL:
        print(f"model: {line}")
    for line in ASSUMED:
        print(f"assumed, not measured: {line}")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """On the console; the first column is text."""
    if not rows:
        return
    made = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if place < 2 and column in ("axis", "what", "layout") else "right")
    for row in rows:
        made.add_row(*row)
    CONSOLE.print(made)


def _memory(memory: RankMemory) -> list[str]:
    return [*(size(getattr(memory, part)) for part in PARTS), size(memory.total)]


def _value(value: object) -> str:
    return "null" if value is None else str(value).lower()
