"""Measure parts of the stack on this machine: prints a table and, with --json FILE, the figures.

benchmark op          the depth mix alone, as multiples of the time in which its bytes could be copied
benchmark step        a training step with Depth-Attention over one without, or both over transformers' Qwen3
                      --methods: vanilla, Depth-Attention, DenseFormer, Attention Residuals, mHC (the paper's table 3)
benchmark generate    time and peak memory of generation with the exported models (the paper's table 4)
benchmark memory      what is kept for backward above vanilla, beside what the source plan predicts
benchmark hop         what a pipeline sends in a step, against the least possible
benchmark data        the loader's tokens a second over those that training consumes
benchmark store       how long steps wait for a slow object store, with and without shards fetched ahead of need
benchmark prepare     the speed of depthattn prepare over that of the tokenizer alone
benchmark layouts     the planner's best layouts of a config, each run for a few steps
benchmark precision   training in bf16 and every FP8 recipe against the same weights and batches in a base
benchmark checkpoint  what saving costs in time and host memory, against Megatron's gather on one rank
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from megatron_depthattn.benchmarks.result import Result, machine_facts, machine_line, markdown, table, write_json
from megatron_depthattn.cli.common import new_parser, run
from megatron_depthattn.paths import user_path

VERBS = ("op", "step", "generate", "memory", "hop", "data", "store", "prepare", "layouts", "precision", "checkpoint")


def build_parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """The command line with the options of the verb ``wanted``, or of all; what is parsed has ``measure``."""
    parser = new_parser("benchmark", __doc__)
    parser.add_argument(
        "--json", type=user_path, metavar="FILE", help="also write the figures to FILE, as far as there are any"
    )
    parser.add_argument("--markdown", type=user_path, metavar="FILE", help="also write the table to FILE")
    parser.add_argument("--traceback", action="store_true", help="an error is printed with its traceback")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb in VERBS:
        one = verbs.add_parser(verb)
        if wanted in (None, verb):
            module = import_module(f"megatron_depthattn.benchmarks.{verb}")
            module.add_arguments(one)
            one.set_defaults(measure=module.measure)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on stderr: nothing was measured, or what was is over its bounds."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = build_parser(next((word for word in words if word in VERBS), "")).parse_args(words)

    def measure(_: argparse.Namespace) -> int:
        try:
            result: Result = given.measure(given)
            result.until = ""
        except Exception:
            if given.traceback:
                traceback.print_exc()
            raise
        facts, notes = machine_facts(), "".join(f"{note}\n" for note in result.notes)
        print(f"{result.title}\n\n{table(result.columns, result.rows)}\n{notes}{machine_line(facts)}")
        if given.json:
            write_json(given.json, result)
        if given.markdown:
            given.markdown.write_text(markdown(result, facts, ["depthattn", "benchmark", *words]))
        if result.is_over:
            print("error: over its bounds, see the table and its notes", file=sys.stderr)
        return int(result.is_over)

    return run(measure, given, ModuleNotFoundError)
