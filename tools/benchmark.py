"""Measure parts of the stack on this machine: prints a table and, with --json FILE, the figures.

benchmark.py op          the depth mix alone, as multiples of the time in which its bytes could be copied
benchmark.py step        a training step with Depth-Attention over one without, or both over transformers' Qwen3
benchmark.py record      a training step whose weights over depth go on record over one without
benchmark.py memory      what is kept for backward above vanilla, beside what the source plan predicts; or by a layer
benchmark.py rank-memory memory of every stage of a layout, what the planner predicts beside what is measured
benchmark.py flops       the arithmetic of the mix, as a share of all
benchmark.py hop         what a pipeline sends, against the least possible, and what that costs a step
benchmark.py traffic     what a rank hands to the collectives of every axis, beside the estimate
benchmark.py layouts     predicted and measured time of a step under several layouts
benchmark.py data        how fast the loader reads, over how fast training consumes
benchmark.py prepare     the whole corpus preparation against the bare tokenizer library, on the same cores
benchmark.py precision   training in bf16 and every FP8 recipe against the same weights and batches in a base
benchmark.py checkpoint  what saving costs in time and host memory, against Megatron's gather on one rank
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_depthattn.paths import user_path
from tools.benchmarks.checkpoint import add_checkpoint
from tools.benchmarks.data import add_data
from tools.benchmarks.flops import add_flops
from tools.benchmarks.hop import add_hop
from tools.benchmarks.layouts import add_layouts
from tools.benchmarks.memory import add_memory
from tools.benchmarks.op import add_op
from tools.benchmarks.precision import add_precision
from tools.benchmarks.prepare import add_prepare
from tools.benchmarks.rank_memory import add_rank_memory
from tools.benchmarks.record import add_record
from tools.benchmarks.result import Result, machine_facts, machine_line, markdown, table
from tools.benchmarks.step import add_step
from tools.benchmarks.traffic import add_traffic

VERBS = [
    *(add_op, add_step, add_record, add_memory, add_rank_memory, add_flops, add_hop, add_traffic, add_layouts),
    *(add_data, add_prepare, add_precision, add_checkpoint),
]


def build_parser() -> argparse.ArgumentParser:
    """All verbs; what is parsed has the verb's function as ``measure``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=user_path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument(
        "--markdown", type=user_path, metavar="FILE", help="also write the table to FILE, for a document"
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for add in VERBS:
        add(verbs)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on stderr: nothing was measured, or what was is over its bounds."""
    given = build_parser().parse_args(arguments)
    try:
        result: Result = given.measure(given)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    machine = result.machine or machine_facts()
    notes = "".join(f"{note}\n" for note in result.notes)
    print(f"{result.title}\n\n{table(result.columns, result.rows)}\n{notes}{machine_line(machine)}")
    if given.json:
        given.json.write_text(json.dumps(asdict(result) | {"machine": machine}, indent=2) + "\n")
    if given.markdown:
        command = ["tools/benchmark.py", *(sys.argv[1:] if arguments is None else arguments)]
        given.markdown.write_text(markdown(result, machine, command))
    if result.is_over:
        print("error: over its bounds, see the verdicts in the table", file=sys.stderr)
    return int(result.is_over)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # the bare library gets all cores
    sys.exit(main())
