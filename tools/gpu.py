"""On a machine with one NVIDIA GPU: the GPU tests and the benchmarks, in calls of some minutes; `make gpu`.

Kernels are proven first, then the step is timed, then come memory, a checkpoint and the long grids of tests. It runs
with whatever Python starts it and installs nothing: a part whose package is not there is skipped, with the reason.

A call may be cut anywhere. The page and the JSON file, both named after the GPU, are written after every part and while
one runs. The next call on the same GPU with the same versions begins with what has not run, and then renews what other
code ran. A failure stops nothing; the end of its traceback is on the page.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from traceback import format_exc
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_depthattn.benchmarks.result import Result, gpu_name, machine_facts, machine_line, markdown, table
from megatron_depthattn.durable import write_durably
from megatron_depthattn.parallel.launch_env import end_with_parent

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8.5
LEAST_SHARE = 1 / 3
"""A part is not started with less than this share of its limit left."""
LOOK_SECONDS = 3.0
"""How often the page is written while a part runs."""
GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""
TRACEBACK_LINES = 30
MOST_TRACEBACKS = 8
MOST_SAID = 200
"""Characters of a table's cell."""

OP = ("torch", "numpy", "yaml", "omegaconf", "pytest")
MODEL = (*OP, "megatron.core")
STEP = (*MODEL, "xxhash")
PEERS = (*STEP, "transformers")
TE = (*STEP, "transformer_engine")
TE_PEERS = (*TE, "transformers")
PASSED, RAN, FAILED, CUT, SKIPPED = "passed", "ran", "failed", "cut", "skipped"
RANK = {SKIPPED: 0, CUT: 1, FAILED: 2, RAN: 2}
"""What replaces an earlier outcome of the same part: one that is at least as much."""


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
    return ("step", "--shape", shape, "--peers", "--rounds", "12", "--warm-up", "2", *more)


def _te(*settings: str) -> tuple[str, ...]:
    return ("--set", "model.spec=te", *settings)


def _memory(*more: str) -> tuple[str, ...]:
    return ("memory", "--shape", "410m", "--micro-batch", "1", *more)


# Depth and micro-batch are those with which all models of a part fit side by side into 80 GB, but for step-410m.
_PLAIN = "recompute.granularity=null"  # TransformerEngine's attention keeps no scores
_360M = _step("360m", "--micro-batch", "8", "--strides", "12", "--ops", "reference", "lean", "triton")
_410M = _step("410m", "--micro-batch", "4", "--strides", "16", "1")
_3B = _step("3b", "--layers", "12", "--micro-batch", "4", "--no-optimizer", "--strides", "6")
_BOTH, _TRITON = ("--ops", "lean", "triton"), ("--ops", "triton")
_LOCAL = ("--set", "model.spec=local")
_TE_MODES = ("--recompute", "none", "full", "--strides", "16", "1")
# The paper's tables 3 and 4. Of the 2048 new tokens of table 4 as many as there is time for.
_METHODS = ("step", "--methods", "--shape", "3b", "--layers", "12", "--micro-batch", "4", "--no-optimizer", *_LOCAL)
_GENERATE = ("generate", "3b", "--batch-size", "64", "--prompt-length", "2048", "--new-tokens", "64", "--rounds", "2")
_MIX_TESTS, _TE_TESTS = "tests/gpu/test_triton_mix.py", "tests/gpu/test_te.py"
_SMOKE_CASES = (
    "n1-gqa4-d64-bfloat16 or n2-gqa4-d64-float32-contiguous-7x3 or n5-gqa1-d128 or n24-gqa1 or "
    "n2-gqa4-d64-bfloat16-views"
)
PARTS = (
    # Some 40 seconds each with their imports: every kernel once, forward and backward, against its truth.
    Part("smoke-mix", (*STEP, "pytest"), (_MIX_TESTS, "-k", f"fp64 and ({_SMOKE_CASES})"), 60, is_tests=True),
    Part("smoke-te", (*TE, "pytest"), (_TE_TESTS, "-k", "fused or parity"), 75, is_tests=True),
    Part("smoke-fp8", (*TE, "pytest"), (_TE_TESTS, "-k", "test_recipe and 3"), 75, is_tests=True),
    Part("step-360m", PEERS, (*_360M, "--set", _PLAIN), 90),
    Part("step-410m", TE_PEERS, (*_410M, *_BOTH, *_te(_PLAIN)), 90),
    Part("step-410m-fp8", TE_PEERS, (*_410M, *_TRITON, *_te(_PLAIN, "precision.fp8=tensorwise")), 90),
    Part("step-3b", TE_PEERS, (*_3B, *_BOTH, *_te(_PLAIN)), 90),
    Part("step-3b-fp8", TE_PEERS, (*_3B, *_TRITON, *_te(_PLAIN, "precision.fp8=tensorwise")), 90),
    Part("step-3b-delayed", TE_PEERS, (*_3B, *_TRITON, *_te(_PLAIN, "precision.fp8=delayed")), 90),
    Part("memory", TE, _memory(*_TE_MODES, *_te()), 60),
    Part("memory-fp8", TE, _memory(*_TE_MODES, *_te("precision.fp8=tensorwise")), 60),
    Part("checkpoint", STEP, ("checkpoint", "--shape", "410m", "--layouts", "single", "--runs", "2"), 90),
    Part("tests-mix", (*STEP, "pytest"), ("tests/unit/test_ops.py", _MIX_TESTS), 120, is_tests=True),
    Part("tests-documents", (*STEP, "pytest"), ("tests/gpu/test_documents.py",), 60, is_tests=True),
    Part("tests-te", (*TE, "pytest"), (_TE_TESTS,), 240, is_tests=True),
    Part("tests-graphs", (*STEP, "pytest"), ("tests/gpu/test_cuda_graph.py",), 90, is_tests=True),
    Part("op", OP, ("op", "--device", "cuda", "--runs", "20"), 60),
    Part("table-3", STEP, _METHODS, 120),
    Part("table-4", (*MODEL, "transformers"), _GENERATE, 90),
    Part("precision", TE_PEERS, ("precision", "--steps", "300", "--seeds", "1"), 120),
    Part("step-410m-local", PEERS, _step("410m", "--micro-batch", "8", "--strides", "16", *_LOCAL), 60),
    Part("memory-410m-local", MODEL, _memory(*_LOCAL), 60),
    Part("memory-3b-local", MODEL, ("memory", "--shape", "3b", "--layers", "12", "--micro-batch", "1", *_LOCAL), 60),
)

_TINY_MODEL = (
    *("--set", "model.hidden_size=128", "model.num_attention_heads=4", "model.num_query_groups=2"),
    *("model.kv_channels=32", "model.ffn_hidden_size=256", "model.vocab_size=256"),
)
_TINY_STEP = ("--layers", "2", "--sequence-length", "32", "--micro-batch", "1", "--strides", "1", *_TINY_MODEL)
TINY = {
    "step": ("--rounds", "2", "--warm-up", "0", *_TINY_STEP),
    "memory": _TINY_STEP,
    "generate": ("--batch-size", "2", "--prompt-length", "8", "--new-tokens", "4", *_TINY_MODEL, "model.num_layers=2"),
    "precision": (
        *("--steps", "2", *_TINY_MODEL, "model.num_layers=2"),
        *("train.micro_batch_size=2", "train.global_batch_size=2", "train.eval_batches=1", "data.sequence_length=16"),
    ),
    "op": (
        *("--device", "cpu", "--shape", "cpu", "--tokens", "8", "--sources", "1", "--runs", "1"),
        *("--implementations", "lean", "reference"),
    ),
    "checkpoint": ("--layers", "2", "--runs", "1", *_TINY_MODEL),
}
"""What follows a benchmark's arguments where it is rehearsed on a CPU."""


def tiny(part: Part, *, has_te: bool = False) -> Part:
    """The part with its own command line at a size that a CPU runs in seconds: no Triton; with ``has_te`` its own
    layers and FP8, else local layers and neither."""
    if part.is_tests:
        return replace(part, needs=())  # they are skipped, if they are found
    verb = part.arguments[0]
    more = [*TINY[verb], *(("--ops", "reference", "lean") if "--ops" in part.arguments else ())]
    if verb == "precision":
        more += ["--precisions", "bf16", *(("delayed", "tensorwise", "blockwise") if has_te else ("bf16+reference",))]
        more += ["--tolerance", "1", "--least-cosine", "-1"]
    elif verb != "op" and not has_te:
        more += ["--set", "model.spec=local", "precision.fp8=null"]
    return replace(part, needs=(), arguments=(*part.arguments, *more))


@dataclass
class Outcome:
    """What became of a part."""

    part: str
    state: str
    """ran, failed, cut (it may have left something) or skipped."""
    said: str
    seconds: float = 0.0
    page: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    code: str = ""
    """Digest of the code and arguments that ran."""


Keep = Callable[[Outcome], None]


def reason_to_skip(
    part: Part, *, gpu: str | None, seconds_left: float, is_installed: Callable[[str], bool]
) -> str | None:
    """Why this part cannot run here, if it cannot."""
    missing = [module for module in part.needs if not is_installed(module)]
    reasons = [f"not installed: {', '.join(missing)}"] if missing else []
    if gpu is None:
        reasons.append("torch sees no NVIDIA GPU")
    if seconds_left < LEAST_SHARE * part.seconds:
        reasons.append(f"{max(seconds_left, 0):.0f} s left, and it may take {part.seconds:.0f}")
    return "; ".join(reasons) or None


def is_installed(module: str) -> bool:
    """Whether the module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


# ---- what a part leaves


def without_paths(text: str) -> str:
    """Absolute paths cut to what follows the checkout or site-packages, others to the file's name."""

    def shorten(match: re.Match[str]) -> str:
        for folder in (f"{ROOT}/", "site-packages/", "dist-packages/"):
            if folder in match[0]:
                return match[0].rpartition(folder)[2]
        return Path(match[0]).name

    return re.sub(r"(?<![\w.:/])/(?:[\w.+~@=-]+/)+[\w.+~@=-]*", shorten, text)


def last_lines(text: str) -> str:
    """The end of a log or traceback, as a block of Markdown."""
    lines = without_paths(text).rstrip().splitlines()[-TRACEBACK_LINES:]
    return "```text\n" + "\n".join(line[:300] for line in lines) + "\n```\n"


def read_result(base: Path) -> dict[str, Any]:
    """The fields of a benchmark's `Result` and the machine's facts; nothing without a file."""
    file = base.with_suffix(".json")
    return json.loads(file.read_text()) if file.exists() else {}


def read_lines(base: Path) -> dict[str, Any]:
    """Of what tests/result_lines.py wrote: ``passed``, ``found`` (by test, what it recorded), ``skipped`` (by reason),
    ``failed`` (by test, its traceback) and ``running``; nothing without a file."""
    results: dict[str, Any] = {"passed": 0, "found": {}, "skipped": {}, "failed": {}, "running": None}
    file = base.with_suffix(".jsonl")
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # its writer was killed
            break
        test, outcome = record["test"], record["outcome"]
        results["running"] = test if outcome == "started" else None
        if outcome == PASSED:
            results["passed"] += 1
        elif outcome == SKIPPED:
            reason = record["said"].removeprefix("Skipped: ")
            results["skipped"][reason] = results["skipped"].get(reason, 0) + 1
        elif outcome == FAILED:
            results["failed"][test] = record["said"]
        if found := record.get("found"):
            results["found"][test] = found
    return results


def tests_page(part: Part, results: dict[str, Any]) -> str:
    """A Markdown section."""
    found = [(test, key, value) for test, figures in results["found"].items() for key, value in figures.items()]
    rows = [[test, key, f"{value:.3g}" if isinstance(value, float) else str(value)] for test, key, value in found]
    counted = f"{results['passed']} passed, {len(results['failed'])} failed, {sum(results['skipped'].values())} skipped"
    notes = [f"skipped ({count}): {reason}" for reason, count in results["skipped"].items()]
    notes += [f"running when it ended: {results['running']}"] if results["running"] else []
    return (
        f"### {part.name}: {counted}\n\n"
        + (f"{table(['test', 'figure', 'found'], rows)}\n" if rows else "")
        + "".join(f"- {note}\n" for note in notes)
        + failures_page(results["failed"])
        + f"\n`{shlex.join(['python', '-m', 'pytest', *part.arguments])}`\n"
    )


def failures_page(failures: dict[str, str]) -> str:
    """The ends of the tracebacks, as many as fit on a page; one of several that are alike."""
    text, seen = "", set[str]()
    for name, why in failures.items():
        block = "" if why in seen or len(seen) >= MOST_TRACEBACKS else last_lines(why)
        seen.add(why)
        text += f"\nfailed: {name}\n" + (f"\n{block}" if block else "")
    return text


def benchmark_page(part: Part, figures: dict[str, Any]) -> str:
    """A Markdown section."""
    machine = figures.pop("machine")
    text = markdown(Result(**figures), machine, ["depthattn", "benchmark", *part.arguments])
    return without_paths(text) + failures_page(figures["failures"])


def outcome_of(part: Part, base: Path, exit_code: int | None, took: float) -> Outcome:
    """Of what the part has left beside ``base`` so far; without an exit code it is running, or was ended."""
    log = base.with_suffix(".log")
    output = log.read_text(errors="replace") if log.exists() else ""
    last_said = without_paths(next(reversed(output.strip().splitlines()), "no output")).strip("= ")
    figures = (read_lines if part.is_tests else read_result)(base)
    is_whole, is_bad = exit_code in (0, 1) and not figures.get("until"), bool(figures.get("failed"))
    if part.is_tests:
        text, has_any = tests_page(part, figures), figures["passed"] > 0 or is_bad
        said = f"{figures['passed']} passed, {len(figures['failed'])} failed"
    else:
        has_any, is_bad = bool(figures), bool(figures.get("failures") or figures.get("is_over"))
        text = benchmark_page(part, dict(figures)) if has_any else ""
        said = "over a bound, see below" if figures.get("is_over") else figures.get("until") or "see below"
        said += f"; did not run: {', '.join(figures['failures'])}" if figures.get("failures") else ""
    if exit_code is None:
        limit = f"stopped at its limit, {took:.0f} s" if took >= part.seconds else f"not done after {took:.0f} s"
        state, said = FAILED if took >= part.seconds else CUT, f"{limit}: {said if has_any else last_said}"
    elif not is_whole or (exit_code and not is_bad):
        state, said = FAILED, f"exit code {exit_code}: {last_said}"
    elif part.is_tests and not has_any:
        state, said = SKIPPED, "every test was skipped, see below"
    else:
        return Outcome(part.name, FAILED if is_bad else RAN, said[:MOST_SAID], took, text, figures)
    if state != SKIPPED and output:
        text += f"{'' if text else f'### {part.name}'}\n\nthe end of its output\n\n{last_lines(output)}"
    return Outcome(part.name, state, said[:MOST_SAID], took, text, figures)


# ---- running


def code_digest(part: Part) -> str:
    """Of the files that decide what the part computes, and of its arguments."""
    digest = files_digest("tests/**/*.py" if part.is_tests else "tools/benchmark.py")
    return hashlib.sha256("\0".join((digest, *part.arguments)).encode()).hexdigest()[:8]


@functools.cache
def files_digest(starts: str) -> str:
    """Of the package, the configs, and what starts the part: files of this pattern."""
    digest = hashlib.sha256()
    for pattern in ("megatron_depthattn/**/*.py", "megatron_depthattn/**/*.yaml", "configs/**/*.yaml", starts):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def command_of(part: Part, base: Path) -> list[str]:
    """The process of a part; what it finds it writes beside ``base``."""
    if part.is_tests:
        lines = ["-p", "tests.result_lines", "--result-lines", f"{base}.jsonl"]
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *lines, *part.arguments]
    return [sys.executable, "tools/benchmark.py", "--traceback", "--json", f"{base}.json", *part.arguments]


def end(process: subprocess.Popen[bytes]) -> None:
    """The part's processes, first kindly."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(GRACE_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue


def run_part(part: Part, seconds: float, work: Path, keep: Keep, environment: dict[str, str] | None = None) -> Outcome:
    """Run it in a process of its own; ``keep`` gets what there is so far, again and again."""
    base, started = work / part.name, time.perf_counter()

    def so_far(exit_code: int | None = None) -> Outcome:
        return outcome_of(part, base, exit_code, time.perf_counter() - started)

    keep(so_far())
    with base.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            command_of(part, base), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}), process_group=0,
            preexec_fn=end_with_parent,  # nothing is left on the GPU when this process is killed
        )  # fmt: skip
        try:
            while process.poll() is None and (left := started + seconds - time.perf_counter()) > 0:
                try:
                    process.wait(min(LOOK_SECONDS, left))
                except subprocess.TimeoutExpired:
                    keep(so_far())
            exit_code = process.returncode
        finally:  # also where this process is to end
            end(process)
            keep(so_far(process.returncode if process.returncode in (0, 1) else None))
    return so_far(exit_code)


class Pages:
    """The page and the JSON file of a GPU: what this call ran, and what earlier ones did with the same versions."""

    def __init__(self, folder: Path, name: str, facts: dict[str, Any]) -> None:
        self.document, self._results, self._facts = folder / f"{name}.md", folder / f"{name}.json", facts
        folder.mkdir(parents=True, exist_ok=True)
        self._before: dict[str, Outcome] = {}
        if self._results.exists():
            earlier = json.loads(self._results.read_text())
            before = {key: value for key, value in earlier["machine"].items() if key in facts}
            others = ("date", "cpu", "cores")  # of a machine that holds the same GPU
            if all(facts[key] == value for key, value in before.items() if key not in others):
                self._before = {each["part"]: Outcome(**each) for each in earlier["parts"]}
        self.outcomes = {**self._before}

    def keep(self, outcome: Outcome) -> None:
        """Write it, unless it is less than what an earlier call left of its part."""
        earlier = self._before.get(outcome.part)
        if earlier is None or RANK[outcome.state] >= RANK[earlier.state]:
            self.outcomes[outcome.part] = outcome
        ordered = [self.outcomes[part.name] for part in PARTS if part.name in self.outcomes]
        contents = {"machine": self._facts, "parts": [asdict(each) for each in ordered]}
        write_durably(self._results, json.dumps(contents, indent=1) + "\n")
        write_durably(self.document, page(ordered, self._facts))

    def to_run(self, parts: Iterable[Part], *, again: bool) -> list[Part]:
        """What has not run, then what other code ran; with ``again`` all."""
        known = {part: self.outcomes.get(part.name, Outcome(part.name, SKIPPED, "")) for part in parts}
        if again:
            return [*known]
        old = [part for part, one in known.items() if one.state == RAN and one.code != code_digest(part)]
        new = [
            part for part, one in known.items()
            if RANK[one.state] < RANK[RAN] or (one.state == FAILED and one.code != code_digest(part))
        ]  # fmt: skip
        return new + old


def page(outcomes: Sequence[Outcome], facts: dict[str, Any]) -> str:
    """The Markdown page: what ran and what did not, then every table."""
    counts = Counter(outcome.state for outcome in outcomes)
    counted = ", ".join(f"{counts[state]} {state}" for state in (RAN, FAILED, CUT, SKIPPED))
    rows = [[o.part, o.state, f"{o.seconds:.0f}" if o.seconds else "", o.date, o.code, o.said] for o in outcomes]
    tables = "".join(f"\n{outcome.page}" for outcome in outcomes if outcome.page)
    seconds = sum(outcome.seconds for outcome in outcomes)
    return (
        f'# {facts["gpu"] or "No GPU"}\n\n`make gpu` (a part once more: `make gpu GPU_ARGS="--again --parts NAME"`), '
        f"{seconds:.0f} s: {counted}.\n{machine_line(facts)}\n\n"
        f"{table(['part', 'state', 'seconds', 'when', 'code', 'said'], rows)}{tables}"
    )


def run_parts(parts: Sequence[Part], pages: Pages, seconds: float, facts: dict[str, Any], *, is_tiny: bool) -> int:
    """Those for which there is time; how many failed."""
    started, failures = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as work:
        for part in parts:
            own, left = tiny(part) if is_tiny else part, seconds - (time.perf_counter() - started)
            gpu = "none is needed" if is_tiny else facts["gpu"]
            stamp = {"date": facts["date"], "code": code_digest(part)}

            def keep(outcome: Outcome, stamp: dict[str, str] = stamp) -> None:
                vars(outcome).update(stamp)
                pages.keep(outcome)

            if reason := reason_to_skip(own, gpu=gpu, seconds_left=left, is_installed=is_installed):
                last = Outcome(part.name, SKIPPED, reason)
            else:
                environment = {"CUDA_VISIBLE_DEVICES": ""} if is_tiny else {}
                try:
                    last = run_part(own, min(part.seconds, left), Path(work), keep, environment)
                except (ValueError, KeyError, TypeError, OSError):  # ours: what the part left cannot be read
                    last = Outcome(part.name, FAILED, "its results cannot be read", page=last_lines(format_exc()))
            keep(last)
            failures += last.state == FAILED
            print(f"{last.part}: {last.state}, {last.said} ({last.seconds:.0f} s)", flush=True)
    return failures


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if nothing failed; what was skipped or cut does not count as failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the page (default docs/gpu)")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {names}")
    parser.add_argument("--again", action="store_true", help="also those that this code has already run")
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="N", help=f"of this call (default {MINUTES})")
    parser.add_argument(
        "--tiny", action="store_true", help="rehearse on the CPU: the same command lines, at sizes of seconds"
    )
    given = parser.parse_args(arguments)
    if given.tiny and given.output is None:
        parser.error("--tiny measures nothing: set --output to a folder that is not docs/gpu")
    for kind in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, lambda number, _: sys.exit(128 + number))
    facts = machine_facts() | ({"gpu": None} if given.tiny else {})
    name = "tiny" if given.tiny else re.sub(r"[^a-z0-9]+", "-", (gpu_name() or "no GPU").lower()).strip("-")
    pages = Pages(given.output or ROOT / "docs" / "gpu", name, facts)
    parts = pages.to_run((part for part in PARTS if part.name in given.parts), again=given.again)
    if not parts:
        print("all of these parts have run with this code; --again runs them once more")
    failures = run_parts(parts, pages, 60 * given.minutes, facts, is_tiny=given.tiny)
    print(f"written to {pages.document} and its .json")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
