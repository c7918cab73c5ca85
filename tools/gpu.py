"""On a machine with one NVIDIA GPU: the GPU tests and the benchmarks, in under nine minutes; `make gpu`.

Runs with whatever Python starts it and installs nothing: a part whose package is not there is skipped, with the
reason, and counted. Writes one page and one JSON file named after the GPU. A later call with `--parts` renews those
and keeps the others, so what did not fit into one call goes into a second.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_depthattn.benchmarks.result import gpu_name, machine_facts, machine_line, table

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 530.0
LEAST_SECONDS = 15.0
"""A part is not started with less than this left."""

OP = ("torch", "numpy", "yaml", "omegaconf", "pytest")
MODEL = (*OP, "megatron.core")
STEP = (*MODEL, "xxhash")
TE = (*STEP, "transformer_engine")


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


def _te(*settings: str) -> tuple[str, ...]:
    return ("--set", "model.spec=te", *settings)


_LOCAL = ("--set", "model.spec=local")


def _memory(*more: str) -> tuple[str, ...]:
    return ("memory", "--shape", "410m", "--micro-batch", "1", *more)


# Correctness first, then what no other machine can show. Depth and micro-batch are those with which all models fit side
# by side into 80 GB.
_3B = _step("3b", "--layers", "12", "--micro-batch", "4", "--no-optimizer", "--strides", "6", "--ops", "lean", "triton")
_PLAIN = "recompute.granularity=null"  # TransformerEngine's attention keeps no scores
_410M = _step("410m", "--micro-batch", "4", "--strides", "16", "1", "--ops", "lean", "triton")
# The paper's tables 3 and 4. Of the 2048 new tokens of table 4 as many as there is time for.
_METHODS = _step("3b", "--methods", "--layers", "12", "--micro-batch", "4", "--no-optimizer", *_LOCAL)
_GENERATE = ("generate", "3b", "--batch-size", "64", "--prompt-length", "2048", "--new-tokens", "64", "--rounds", "2")
_TE_MODES = ("--recompute", "none", "full", "--strides", "16", "1")
PARTS = (
    Part("tests", ("torch", "pytest"), ("tests/unit/test_ops.py", "tests/gpu/test_triton_mix.py"), 120, is_tests=True),
    Part("tests-te", (*TE, "pytest"), ("tests/gpu/test_te.py",), 150, is_tests=True),
    Part("precision", (*TE, "transformers"), ("precision", "--steps", "300", "--seeds", "1"), 120),
    Part("table-3", STEP, _METHODS, 120),
    Part("table-4", (*MODEL, "transformers"), _GENERATE, 90),
    Part("step-410m-te", TE, (*_410M, *_te(_PLAIN)), 60),
    Part("step-410m-fp8", TE, (*_410M, *_te(_PLAIN, "precision.fp8=tensorwise")), 60),
    Part("step-3b-tensorwise", TE, (*_3B, *_te(_PLAIN, "precision.fp8=tensorwise")), 60),
    Part("step-3b-delayed", TE, (*_3B, *_te(_PLAIN, "precision.fp8=delayed")), 60),
    Part("memory-te", TE, _memory(*_TE_MODES, *_te()), 45),
    Part("memory-fp8", TE, _memory(*_TE_MODES, *_te("precision.fp8=tensorwise")), 45),
    Part("op", OP, ("op", "--device", "cuda", "--runs", "20"), 60),
    Part("step-3b-te", TE, (*_3B, *_te(_PLAIN)), 60),
    Part("step-410m", STEP, _step("410m", "--strides", "16", *_LOCAL), 60),
    Part("step-410m-stride-1", STEP, _step("410m", "--strides", "1", "--micro-batch", "4", *_LOCAL), 60),
    Part("memory-410m", MODEL, _memory(*_LOCAL), 60),
    Part("memory-3b", MODEL, ("memory", "--shape", "3b", "--layers", "12", "--micro-batch", "1", *_LOCAL), 60),
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
    date: str = ""


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


def read_junit(file: Path) -> dict[str, Any]:
    """Of pytest's JUnit file: ``passed``, ``found`` (by test, what it recorded), ``skipped`` (by reason) and
    ``failed`` (by test, the first line of why); nothing without a file."""
    results: dict[str, Any] = {"passed": 0, "found": {}, "skipped": {}, "failed": {}}
    if not file.exists():
        return results
    for case in ElementTree.parse(file).iter("testcase"):
        name, skipped = case.get("name", ""), case.find("skipped")
        problem = next((each for kind in ("failure", "error") if (each := case.find(kind)) is not None), None)
        if problem is not None:
            results["failed"][name] = problem.get("message", "").partition("\n")[0]
        elif skipped is not None:
            reason = skipped.get("message", "")
            results["skipped"][reason] = results["skipped"].get(reason, 0) + 1
        else:
            results["passed"] += 1
        for found in case.iter("property"):
            results["found"][name] = ast.literal_eval(found.get("value", "{}"))
    return results


def tests_page(name: str, arguments: Sequence[str], results: dict[str, Any]) -> str:
    """A Markdown section."""
    rows = [[test, key, f"{value:.3g}"] for test, found in results["found"].items() for key, value in found.items()]
    skipped = sum(results["skipped"].values())
    counted = f"{results['passed']} passed, {len(results['failed'])} failed, {skipped} skipped"
    notes = [f"failed: {test}: {why}" for test, why in results["failed"].items()]
    notes += [f"skipped ({count}): {reason}" for reason, count in results["skipped"].items()]
    return (
        f"### {name}: {counted}\n\n"
        + (f"{table(['test', 'figure', 'found'], rows)}\n" if rows else "")
        + "".join(f"- {note}\n" for note in notes)
        + f"\n`{shlex.join(['python', '-m', 'pytest', *arguments])}`\n"
    )


def run_part(part: Part, seconds: float, work: Path) -> Outcome:
    """Run it in a process of its own, in ``work`` leave its figures."""
    base = work / part.name
    if part.is_tests:
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={base}.xml", *part.arguments]
    else:
        files = ["--json", f"{base}.json", "--markdown", f"{base}.md"]
        command = ["tools/benchmark.py", *files, *part.arguments]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(part.name, "failed", f"not done after {seconds:.0f} s", seconds)
    took = time.perf_counter() - started
    output = done.stdout if part.is_tests else done.stderr
    said = (output.strip() or done.stderr.strip() or "no output").splitlines()[-1].strip("= ")
    if part.is_tests:
        figures = read_junit(Path(f"{base}.xml"))
        state = "failed" if done.returncode else "ran"
        return Outcome(part.name, state, said, took, tests_page(part.name, part.arguments, figures), figures)
    if done.returncode != 0 and not Path(f"{base}.json").exists():
        return Outcome(part.name, "failed", f"exit code {done.returncode}: {said}", took)
    page, figures = Path(f"{base}.md").read_text(), json.loads(Path(f"{base}.json").read_text())
    if figures.get("is_over"):
        return Outcome(part.name, "failed", "over a bound, see below", took, page, figures)
    return Outcome(part.name, "ran", "see below", took, page, figures)


def merge(earlier: dict[str, Any] | None, outcomes: Sequence[Outcome], facts: dict[str, Any]) -> list[Outcome]:
    """The outcomes of this call, and of an earlier one on the same GPU with the same versions what this did not run."""
    merged = {}
    before: dict[str, Any] = earlier["machine"] if earlier else {}
    known = facts.keys() & before.keys() - {"date"}  # an earlier page may list other packages
    if earlier and all(before[name] == facts[name] for name in known):
        merged = {part["part"]: Outcome(**part) for part in earlier["parts"]}
    for outcome in outcomes:
        if outcome.state != "skipped" or merged.get(outcome.part, outcome).state == "skipped":
            merged[outcome.part] = outcome
    return [merged[part.name] for part in PARTS if part.name in merged]


def page(outcomes: Sequence[Outcome], facts: dict[str, Any]) -> str:
    """The Markdown page: what ran and what did not, then every table."""
    counts = Counter(outcome.state for outcome in outcomes)
    counted = ", ".join(f"{counts[state]} {state}" for state in ("ran", "failed", "skipped"))
    rows = [[o.part, o.state, f"{o.seconds:.0f}" if o.seconds else "", o.said, o.date] for o in outcomes]
    tables = "".join(f"\n{outcome.page}" for outcome in outcomes if outcome.page)
    seconds = sum(outcome.seconds for outcome in outcomes)
    return (
        f'# {facts["gpu"] or "No GPU"}\n\n`make gpu` (a part alone: `make gpu GPU_ARGS="--parts NAME"`), '
        f"{seconds:.0f} s: {counted}.\n{machine_line(facts)}\n\n"
        f"{table(['part', 'state', 'seconds', 'said', 'when'], rows)}{tables}"
    )


def run_parts(names: Sequence[str], gpu: str | None, date: str) -> list[Outcome]:
    """The parts of these names, as long as there is time."""
    started, outcomes = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as work:
        for part in PARTS:
            if part.name not in names:
                continue
            left = TOTAL_SECONDS - (time.perf_counter() - started)
            reason = reason_to_skip(part, gpu=gpu, seconds_left=left, is_installed=is_installed)
            if reason:
                last = Outcome(part.name, "skipped", reason)
            else:
                last = run_part(part, min(part.seconds, left), Path(work))
            last.date = date
            outcomes.append(last)
            print(f"{last.part}: {last.state}, {last.said} ({last.seconds:.0f} s)", flush=True)
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if nothing failed; what was skipped does not count as failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu", help="folder (default docs/gpu)")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {names}")
    given = parser.parse_args(arguments)
    gpu, facts = gpu_name(), machine_facts()
    ran = run_parts(given.parts, gpu, facts["date"])
    name = re.sub(r"[^a-z0-9]+", "-", (gpu or "no GPU").lower()).strip("-")
    given.output.mkdir(parents=True, exist_ok=True)
    results, document = given.output / f"{name}.json", given.output / f"{name}.md"
    outcomes = merge(json.loads(results.read_text()) if results.exists() else None, ran, facts)
    text = page(outcomes, facts)
    document.write_text(text)
    results.write_text(json.dumps({"machine": facts, "parts": [asdict(each) for each in outcomes]}, indent=2) + "\n")
    print(f"\n{text}\nwritten to {document} and {results.name}")
    return 1 if any(outcome.state == "failed" for outcome in ran) else 0


if __name__ == "__main__":
    sys.exit(main())
