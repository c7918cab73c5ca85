"""What a measurement hands back, and how it is written down."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", "transformers", "tokenizers", "mosaicml-streaming"),
    "pyarrow",
)


@dataclass
class Result:
    """A table, what it says below the table, and the figures behind it."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_over: bool = False
    """Whether something measured is over a bound that was stated: the exit code says so."""
    machine: dict[str, Any] = field(default_factory=dict)
    """Where it was measured, if not in this process; see `machine_facts`."""


def machine_facts() -> dict[str, Any]:
    """Processor, cores, GPU, versions of what is installed, and the time: what a figure is worth nothing without."""
    facts: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "gpu": gpu_name(), "cpu": _cpu_name()}
    facts |= {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    return facts


def gpu_name() -> str | None:
    """The first GPU that torch sees; None without torch or a GPU."""
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up on a console too; columns after the first are aligned to the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(columns))]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    rule = "| " + " | ".join(["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "".join(f"{line} |\n" for line in (lines[0], rule, *lines[1:]))


def machine_line(facts: dict[str, Any]) -> str:
    """The machine in one line, without what is not there."""
    device = [f"{facts['gpu']}"] if facts["gpu"] else []
    packages = [f"{name} {facts[name]}" for name in ("python", *PACKAGES) if facts[name]]
    return ", ".join([*device, f"{facts['cpu']}, {facts['cores']} cores", *packages])


def markdown(result: Result, facts: dict[str, Any], command: Sequence[str] | None = None) -> str:
    """Title, table, notes, and how and where it was measured; ``command`` defaults to this process's."""
    line = shlex.join(["python", *(sys.argv if command is None else command)])
    notes = "".join(f"- {note}\n" for note in result.notes)
    return (
        f"### {result.title}\n\n{table(result.columns, result.rows)}\n{notes}{chr(10) if notes else ''}"
        f"`{line}`\n{facts['date']}; {machine_line(facts)}\n"
    )
