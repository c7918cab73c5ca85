"""On a machine with one NVIDIA GPU: the op's tests and the benchmarks, in under nine minutes; `make gpu`.

Runs with whatever Python starts it and installs nothing: a part whose package is not there is skipped, with the
reason, and counted. Writes one page and one JSON file named after the GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from tools.benchmarks.result import gpu_name, machine_facts, machine_line, table

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 530.0
LEAST_SECONDS = 15.0
"""A part is not started with less than this left."""

OP = ("torch", "numpy", "yaml", "pytest")
MODEL = (*OP, "megatron.core", "omegaconf")
STEP = (*MODEL, "xxhash")
TE = "transformer_engine"
DATA = ("torch", "numpy", "streaming", "zstandard", "xxhash")


@dataclass(frozen=True)
class Part:
    """One thing to run: pytest's arguments, or those of `tools/benchmark.py`."""

    name: str
    needs: tuple[str, ...]
    """Modules that it imports."""
    arguments: tuple[str, ...]
    seconds: float
    """Its own limit."""
    is_tests: bool = False


def _step(shape: str, *more: str) -> tuple[str, ...]:
    return ("step", "--shape", shape, "--rounds", "12", "--warm-up", "2", *more)


# Depth and micro-batch are those with which all models fit side by side into 80 GB.
PARTS = (
    Part("tests", ("torch", "pytest"), ("tests/unit/test_ops.py", "tests/gpu"), 120, is_tests=True),
    Part("op", OP, ("op", "--device", "cuda", "--runs", "20"), 150),
    Part("step-360m", STEP, _step("360m", "--strides", "16"), 90),
    Part("step-360m-stride-1", STEP, _step("360m", "--strides", "1", "--micro-batch", "4"), 90),
    Part("step-360m-te", (*STEP, TE), _step("360m", "--set", "model.spec=te", "recompute.granularity=null"), 90),
    Part("step-3b", STEP, _step("3b", "--layers", "12", "--micro-batch", "2", "--no-optimizer"), 90),
    Part("memory-360m", MODEL, ("memory", "--shape", "360m", "--micro-batch", "1"), 60),
    Part(
        "memory-360m-te",
        (*MODEL, TE),
        ("memory", "--shape", "360m", "--micro-batch", "1", "--set", "model.spec=te"),
        60,
    ),
    Part("memory-3b", MODEL, ("memory", "--shape", "3b", "--layers", "12", "--micro-batch", "1"), 60),
    Part("data", DATA, ("data", "--runs", "3", "--steps", "50"), 45),
)


@dataclass
class Outcome:
    """What became of a part."""

    part: str
    state: str
    """ran, failed or skipped."""
    said: str
    seconds: float = 0.0
    page: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def reason_to_skip(
    part: Part, *, gpu: str | None, seconds_left: float, is_installed: Callable[[str], bool]
) -> str | None:
    """Why this part cannot run here, if it cannot."""
    missing = [module for module in part.needs if not is_installed(module)]
    reasons = [f"not installed: {', '.join(missing)}"] if missing else []
    if gpu is None:
        reasons.append("torch sees no NVIDIA GPU")
    if seconds_left < LEAST_SECONDS:
        reasons.append(f"{max(seconds_left, 0):.0f} s left of {TOTAL_SECONDS:.0f}")
    return "; ".join(reasons) or None


def is_installed(module: str) -> bool:
    """Whether the module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def run_part(part: Part, seconds: float, work: Path) -> Outcome:
    """Run it in a process of its own, in ``work`` leave its figures."""
    base = work / part.name
    if part.is_tests:
        paths = [path for path in part.arguments if (ROOT / path).exists()]
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    else:
        files = ["--json", f"{base}.json", "--markdown", f"{base}.md"]
        command = ["tools/benchmark.py", *files, *part.arguments]
        step = work / "step-360m.json"
        if part.name == "data" and step.exists():
            command += ["--step-json", str(step)]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(part.name, "failed", f"not done after {seconds:.0f} s", seconds)
    took = time.perf_counter() - started
    if done.returncode != 0:
        output = done.stdout if part.is_tests else done.stderr
        said = (output.strip() or done.stderr.strip() or "no output").splitlines()[-1]
        return Outcome(part.name, "failed", f"exit code {done.returncode}: {said}", took)
    if part.is_tests:
        return Outcome(part.name, "ran", done.stdout.strip().splitlines()[-1].strip("= "), took)
    page, figures = Path(f"{base}.md").read_text(), json.loads(Path(f"{base}.json").read_text())
    return Outcome(part.name, "ran", "see below", took, page, figures)


def page(outcomes: Sequence[Outcome], facts: dict[str, Any], seconds: float) -> str:
    """The Markdown page: what ran and what did not, then every table."""
    counts = Counter(outcome.state for outcome in outcomes)
    counted = ", ".join(f"{counts[state]} {state}" for state in ("ran", "failed", "skipped"))
    rows = [[o.part, o.state, f"{o.seconds:.0f}" if o.seconds else "", o.said] for o in outcomes]
    tables = "".join(f"\n{outcome.page}" for outcome in outcomes if outcome.page)
    return (
        f"# {facts['gpu'] or 'No GPU'}\n\n`make gpu` on {facts['date']}, {seconds:.0f} s: {counted}.\n"
        f"{machine_line(facts)}\n\n{table(['part', 'state', 'seconds', 'said'], rows)}{tables}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if nothing failed; what was skipped does not count as failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu", help="folder (default docs/gpu)")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="default: all")
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    gpu, outcomes = gpu_name(), []
    with tempfile.TemporaryDirectory() as work:
        for part in PARTS:
            if given.parts and part.name not in given.parts:
                continue
            left = TOTAL_SECONDS - (time.perf_counter() - started)
            reason = reason_to_skip(part, gpu=gpu, seconds_left=left, is_installed=is_installed)
            if reason:
                outcomes.append(Outcome(part.name, "skipped", reason))
            else:
                outcomes.append(run_part(part, min(part.seconds, left), Path(work)))
            last = outcomes[-1]
            print(f"{last.part}: {last.state}, {last.said} ({last.seconds:.0f} s)", flush=True)
    facts, seconds = machine_facts(), time.perf_counter() - started
    name = re.sub(r"[^a-z0-9]+", "-", (gpu or "no GPU").lower()).strip("-")
    given.output.mkdir(parents=True, exist_ok=True)
    text = page(outcomes, facts, seconds)
    (given.output / f"{name}.md").write_text(text)
    results = {"machine": facts, "seconds": seconds, "parts": [asdict(outcome) for outcome in outcomes]}
    (given.output / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{text}\nwritten to {given.output}/{name}.md and .json")
    return 1 if any(outcome.state == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
