"""Measure parts of the stack on this machine: prints a table and, with --json FILE, the figures.

benchmark.py prepare     the whole corpus preparation against the bare tokenizer library, on the same cores
benchmark.py hop         what a pipeline sends, against the least possible, and what that costs a step
benchmark.py checkpoint  what saving costs the training loop, synchronous and asynchronous
"""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from tools.benchmarks.checkpoint import add_checkpoint
from tools.benchmarks.hop import add_hop
from tools.benchmarks.prepare import add_prepare
from tools.benchmarks.result import Result

VERBS = [add_hop, add_checkpoint, add_prepare]
PACKAGES = ("torch", "megatron-core", "tokenizers", "mosaicml-streaming", "pyarrow")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for add in VERBS:
        add(verbs)
    given = parser.parse_args(arguments)
    try:
        result: Result = given.measure(given)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    machine = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    table = Table(*result.columns, title=result.title, caption=", ".join(f"{k} {v}" for k, v in machine.items()))
    for row in result.rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)  # a file has no width of its own
    if given.json:
        given.json.write_text(json.dumps(asdict(result) | {"machine": machine}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # the bare library gets all cores
    sys.exit(main())
