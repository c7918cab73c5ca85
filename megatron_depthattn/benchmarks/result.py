"""What a measurement hands back, and how it is written down."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from megatron_depthattn.durable import write_durably
from megatron_depthattn.preflight import machine


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
    failures: dict[str, str] = field(default_factory=dict)
    """Tracebacks of what did not run, by its name in the table."""
    until: str = ""
    """How far the measurement was when this was written; empty: it is whole."""


def machine_facts() -> dict[str, Any]:
    """Processor, cores, GPU, versions of what is installed, and the time: what a figure is worth nothing without."""
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "gpu": gpu_name(),
        "cpu": cpu[1].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        **machine.versions(),
    }


def write_json(file: Path, result: Result) -> None:
    """The result with the facts of this machine; a reader sees the file before or after, never a part."""
    write_durably(file, json.dumps(asdict(result) | {"machine": machine_facts()}, indent=2) + "\n")


def progress(given: argparse.Namespace, said: str, so_far: Callable[[], Result] | None = None) -> None:
    """Print how far a measurement is, and write what there is so far where ``--json`` says."""
    print(said, file=sys.stderr, flush=True)
    if so_far is not None and given.json:
        result = so_far()
        result.until = said
        write_json(given.json, result)


class Failure(NamedTuple):
    """Of an error: type and message in at most some 100 characters, and the traceback."""

    said: str
    traceback: str


def failed(error: Exception) -> Failure:
    """The traceback is also printed: on the machine at hand nobody may have seen this error before."""
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr, flush=True)
    return Failure(f"{type(error).__name__}: {' '.join(str(error).split())[:100]}", text)


def gpu_name() -> str | None:
    """The first GPU that torch sees; None without torch or a GPU."""
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up on a console too; columns after the first are aligned to the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine_line(facts: dict[str, Any]) -> str:
    """The machine in one line, without what is not there."""
    versions = [f"{name} {facts[name]}" for name in ("python", *machine.PACKAGES) if facts.get(name)]
    return ", ".join([*filter(None, [facts["gpu"]]), f"{facts['cpu']}, {facts['cores']} cores", *versions])


def markdown(result: Result, facts: dict[str, Any], command: Sequence[str]) -> str:
    """Title, table, notes, and how and where it was measured."""
    notes = "".join(f"- {note}\n" for note in result.notes) + ("\n" if result.notes else "")
    line = f"`{shlex.join(command)}`\n{facts['date']}; {machine_line(facts)}\n"
    title = result.title + (f" (so far: {result.until})" if result.until else "")
    return f"### {title}\n\n{table(result.columns, result.rows)}\n{notes}{line}"
