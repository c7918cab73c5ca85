"""What a rank hands to collectives and to its pipeline neighbours in one step, beside what was estimated."""

from __future__ import annotations

import argparse
from typing import Any

from tools.benchmarks.result import Result
from tools.benchmarks.world import run_world

FULL = {"granularity": "full", "method": "uniform", "num_layers": 1}
CASES: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"parallel": {"tensor": 2}},
    "tp2, one KV head": {"parallel": {"tensor": 2}, "model": {"num_query_groups": 1}},
    "tp2+sp": {"parallel": {"tensor": 2, "sequence": True}},
    "tp2+sp, full recompute": {"parallel": {"tensor": 2, "sequence": True}, "recompute": FULL},
    "cp2": {"parallel": {"context": 2}},
    "cp2, selective recompute": {"parallel": {"context": 2}, "recompute": {"granularity": "selective"}},
    "pp2": {"parallel": {"pipeline": 2}},
    "pp2, tied embeddings": {"parallel": {"pipeline": 2}, "model": {"tie_embeddings": True}},
    "pp2xvpp2": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
}


def add_traffic(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("traffic", help="bytes of every axis in a step of two processes, beside the estimate")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="default: all")
    parser.set_defaults(measure=measure_traffic)


def measure_traffic(given: argparse.Namespace) -> Result:
    """Bytes of the tensors of one step's collectives, on rank 0, by axis and collective.

    Raises:
        ValueError: the processes failed.
    """
    result = Result(
        title="Bytes of one step's collectives on rank 0 of 2: counted below Megatron, and estimated",
        columns=["case", "axis", "collective", "counted", "estimated", "estimated / counted"],
        notes=["the whole tensor each time: what is reduced, gathered or scattered; scalars (loss, norms) left out"],
    )
    for case, found in count_traffic(given.cases).items():
        result.figures[case] = found
        for name, (counted, estimated) in found.items():
            ratio = f"{estimated / counted:.5f}" if counted else "-"
            result.rows.append([case, *name.split(" "), f"{counted:,}", f"{estimated:,}", ratio])
    return result


def count_traffic(cases: list[str]) -> dict[str, dict[str, list[int]]]:
    """By case, for every ``"axis collective"``: bytes counted and estimated.

    Raises:
        ValueError: the processes failed.
    """
    work = {name: CASES[name] for name in cases}
    return run_world("tools.benchmarks.traffic_worker", work, 2)  # type: ignore[no-any-return]
