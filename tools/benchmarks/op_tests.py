"""No figure of an op whose tests are red."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OP_TESTS = [ROOT / "tests" / "unit" / "test_ops.py"]
GPU_TESTS = ROOT / "tests" / "gpu" / "test_triton_mix.py"


def add_tests_passed(parser: argparse.ArgumentParser) -> None:
    """The flag of `tools/gpu.py`, which runs these tests once for all."""
    parser.add_argument(
        "--tests-passed", action="store_true", help="the op's tests have just been run here, and passed"
    )


def require_green(device: str, seconds: float = 300.0) -> None:
    """Run the op's tests, on a GPU those for GPUs too; call before measuring.

    Raises:
        ValueError: a test fails, none ran, they take too long, or pytest is not installed.
    """
    if importlib.util.find_spec("pytest") is None:
        raise ValueError("the op's tests run before anything is measured, and pytest is not installed: no figure")
    paths = [*OP_TESTS, *([GPU_TESTS] if device == "cuda" else [])]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, paths)]
    print(f"first the tests: {', '.join(path.name for path in paths)}", file=sys.stderr)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"the op's tests were not done after {seconds:.0f} s: no figure") from error
    if done.returncode != 0:
        said = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
        last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
        raise ValueError(f"the op's tests are red, so nothing is measured: {(said[-1:] or [last])[0]} ({last})")
