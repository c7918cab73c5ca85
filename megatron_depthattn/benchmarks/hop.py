"""What a pipeline sends, against the bound of the source plan, and what that costs a step; several processes."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.world import run_world

LAYOUTS = {"pp2": (2, 1), "pp4": (4, 1), "pp2xvpp2": (2, 2), "pp4xvpp2": (4, 2)}
"""Pipeline ranks and chunks a rank."""
METHODS = ("vanilla", "depth_attention", "denseformer", "attnres", "mhc")


def add_hop(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("hop", help="bytes sent by a pipeline and time of a step, against the bound")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME")
    parser.add_argument("--strides", nargs="+", type=int, metavar="N", help="default: 1, 2 and half the layers")
    parser.add_argument("--windows", nargs="+", type=int, default=[0, 1], metavar="N", help="default: 0 1")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="NAME", help="these in place of strides and windows"
    )
    parser.add_argument("--layers", type=int, default=16, metavar="N", help="default 16")
    parser.add_argument("--hidden", type=int, default=256, metavar="N", help="hidden size (default 256), heads of 64")
    parser.add_argument("--sequence-length", type=int, default=256, metavar="N", help="default 256")
    parser.add_argument("--microbatches", type=int, default=8, metavar="N", help="of a step (default 8)")
    parser.add_argument("--runs", type=int, default=9, metavar="N", help="steps of each kind, taking turns (default 9)")
    parser.set_defaults(measure=measure_hop)


def measure_hop(given: argparse.Namespace) -> Result:
    """For every layout and source plan, or method: bytes of one step sent and least possible, and the step's time.

    Times are medians of forward and backward without the optimizer; the vanilla model of the same layout takes turns.

    Raises:
        ValueError: a world of processes failed.
    """
    variants = _variants(given)
    result = Result(
        title=f"Sent in one step by a pipeline: {given.layers} layers, hidden {given.hidden}, {given.sequence_length} "
        f"tokens, {given.microbatches} microbatches, {given.runs} runs",
        columns=[
            *("layout", *variants[0]["columns"], "sent, MiB", "bound, MiB", "/ vanilla", "messages"),
            "time / vanilla",
        ],
        notes=[
            "sent: hidden states, sources and gradients over all boundaries between ranks, counted below Megatron",
            "bound: hidden states, and each source over every boundary on its way to its farthest reader once",
            "time: forward and backward, median of the ratios of neighbouring runs",
        ],
    )
    for layout in given.layouts:
        pipeline, virtual = LAYOUTS[layout]
        for variant, figures in zip(variants, _run_world(given, pipeline, virtual, variants), strict=True):
            seconds = figures["seconds"]
            pairs = zip(seconds["planned"], seconds["vanilla"], strict=True)
            ratio = statistics.median(own / vanilla for own, vanilla in pairs)
            result.rows.append(
                [
                    layout,
                    *variant["columns"].values(),
                    f"{figures['sent'] / 2**20:.3f}",
                    f"{figures['bound'] / 2**20:.3f}",
                    f"{figures['sent'] / figures['vanilla_sent']:.2f}",
                    f"{figures['messages']} of {figures['least_messages']}",
                    f"{ratio:.3f}",
                ]
            )
            name = " ".join(f"{key} {value}" for key, value in variant["columns"].items())
            result.figures[f"{layout} {name}"] = figures | {"ratio": ratio}
    return result


def _variants(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The models to measure: what the table says of each, and its keys of the ``model`` section."""
    if given.methods:
        return [{"columns": {"method": name}, "model": {"method": name}} for name in given.methods]
    strides = given.strides or [1, 2, given.layers // 2]
    return [
        {
            "columns": {"stride": str(stride), "window": str(window)},
            "model": {"depth_attention": {"stride": stride, "recent_window": window}},
        }
        for stride in strides
        for window in given.windows
    ]


def _run_world(
    given: argparse.Namespace, pipeline: int, virtual: int, variants: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    more = {"pipeline": pipeline, "virtual": virtual, "models": [variant["model"] for variant in variants]}
    kept = ("layers", "hidden", "sequence_length", "microbatches", "runs")
    work = {key: getattr(given, key) for key in kept} | more
    return run_world("megatron_depthattn.benchmarks.hop_worker", work, pipeline)  # type: ignore[no-any-return]
