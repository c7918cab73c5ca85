"""The command ``depthattn VERB ...``. Each verb is a module with a ``main`` that imports what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from megatron_depthattn import __version__

VERBS = {
    "train": ("cli.train", "train a model, in this process or, with --nproc-per-node N, under torchrun"),
    "prepare": ("cli.prepare", "turn text into tokenised shards"),
    "convert": ("cli.convert", "export to a Hugging Face folder, import from one, verify that both hold one model"),
    "generate": ("cli.generate", "continue a prompt with an exported model"),
    "evaluate": ("cli.evaluate", "perplexity and accuracy on downstream tasks of exported models"),
    "estimate": ("cli.estimate", "parameters, memory, traffic and time of a config, without a GPU"),
    "study": ("cli.study", "compare methods over a ladder of sizes"),
    "benchmark": ("benchmarks.command", "measure operations, steps, memory, transfers and layouts"),
    "doctor": ("cli.doctor", "what is installed here, what is missing, whether a config can run"),
    "preflight": ("cli.preflight", "check the ranks of a run, train nothing"),
    "submit": ("launch.submit", "submit a run to Slurm"),
    "compare": ("cli.compare", "losses of runs at equal steps and at equal time"),
    "config": ("cli.config", "every config key with default and meaning; the resolved config of a run"),
}
"""Verb: its module and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb that is named first; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in VERBS:
        code: int = import_module(f"megatron_depthattn.{VERBS[given[0]][0]}").main(given[1:])
        return code
    if given in (["--version"], ["-V"]):
        print(f"depthattn {__version__}")
        return 0
    if given and given[0] not in ("-h", "--help"):
        print(f"error: {given[0]!r} is none of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    print("usage: depthattn VERB ...\n\n" + "\n".join(f"  {verb:10} {help}" for verb, (_, help) in VERBS.items()))
    print("\ndepthattn VERB --help lists a verb's options.")
    return 0
