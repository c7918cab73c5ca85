"""Train a model.

    depthattn train CONFIG [OVERLAY ...] [a.b=c ...]                      in this process
    depthattn train CONFIG [...] --nproc-per-node N [torchrun's options]  N processes under torchrun

CONFIG is a YAML file or the name of a shipped one (quickstart, 360m, ...); overlays likewise (methods/vanilla,
layouts/tp2-sp). `depthattn config` lists all keys, `depthattn config CONFIG a.b=c` shows what they become.
Other options, such as --nnodes=2 --rdzv-endpoint=host0:29500, are torchrun's: write them with `=`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_depthattn.cli.common import add_config, find_config, new_parser, run

QUICKSTART_DATA = "data/quickstart"
QUICKSTART = (
    *("--input", "builtin:python-stdlib", "--tokenizer", "train-bpe:2048", "--sequence-length", "256"),
    *("--validation-fraction", "0.03", "--output", QUICKSTART_DATA),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Replace this process by the training run; returns only where there is an error."""
    given = parse("train", __doc__, arguments)
    return run(_train, given)


def _train(given: argparse.Namespace) -> NoReturn:
    given_data = any(word.startswith("data.") or word.endswith(".yaml") for word in given.overrides)
    if given.config == "quickstart" and not given_data and not Path(QUICKSTART_DATA, "val/index.json").exists():
        from megatron_depthattn.cli import prepare

        print(f"depthattn prepare {' '.join(QUICKSTART)}", flush=True)
        if code := prepare.main(QUICKSTART):
            sys.exit(code)
    start("megatron_depthattn.train", given)


def parse(verb: str, description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of what runs in ranks."""
    parser = new_parser(verb, description)
    add_config(parser)
    parser.add_argument("--nproc-per-node", metavar="N", help="processes of this machine, one for each GPU; or gpu")
    given, others = parser.parse_known_intermixed_args(arguments)
    given.torchrun = [word for word in others if word.startswith("-")]
    given.overrides += [word for word in others if not word.startswith("-")]  # argparse leaves what follows them
    if any("=" not in option for option in given.torchrun):
        parser.error(f"unknown: {' '.join(others)}; options of torchrun are written --name=value")
    return given


def command(module: str, given: argparse.Namespace) -> list[str]:
    """What runs ``module``: Python, or this package's torchrun where processes are asked for."""
    launcher = [f"--nproc-per-node={given.nproc_per_node or 1}", *given.torchrun, "-m"]
    is_launched = bool(given.nproc_per_node or given.torchrun)
    words = ["megatron_depthattn.launch.torchrun", *launcher, module] if is_launched else [module]
    return [sys.executable, "-m", *words, *map(find_config, (given.config, *given.overrides))]


def start(module: str, given: argparse.Namespace) -> NoReturn:
    """Become the run: its process id, signals and exit code are this command's."""
    sys.stdout.flush()
    os.execv(sys.executable, command(module, given))
