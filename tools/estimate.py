"""What a config costs on so many GPUs, before anything runs.

    tools/estimate.py CONFIG.yaml [OVERLAY.yaml ...] [a.b=c ...] [--world N] [--gpu NAME] [--layouts] [--json FILE]
    tools/estimate.py CONFIG.yaml [a.b=c ...] --world N --calibrate FILE     measure this machine with N processes
    tools/estimate.py CONFIG.yaml [a.b=c ...] --machine FILE                 predict for a machine so measured

Parameters, arithmetic, memory of a rank, bytes sent on every axis, predicted time of a step, and with --layouts what
fits, fastest first. How to read it: docs/estimate.md. Needs no GPU. Exit code 0, or 1 with one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_depthattn.paths import user_path
from megatron_depthattn.terminal import printable
from megatron_depthattn.train.__main__ import silence_noise

GPUS = ("H100", "H200", "A100", "B200")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = build_parser().parse_intermixed_args(arguments)  # settings may follow an option
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron's, on each of thousands of candidates
            run(given)
    except (ValueError, OSError) as error:
        print(printable(f"error: {' '.join(str(error).split())}"), file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="What a config costs, before anything runs.")
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", help="further YAML files and a.b=c settings, later ones win")
    parser.add_argument("--world", type=int, metavar="N", help="ranks (default: one model replica)")
    parser.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(GPUS)} (default H100)")
    parser.add_argument("--machine", type=user_path, metavar="FILE", help="in place of --gpu: figures of --calibrate")
    parser.add_argument("--calibrate", type=user_path, metavar="FILE", help="measure this machine into FILE and end")
    parser.add_argument("--layouts", action="store_true", help="rank the layouts that fit by predicted step time")
    parser.add_argument("--limit", type=int, default=10, metavar="N", help="show at most so many layouts (default 10)")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write everything to this file as well")
    return parser


def run(given: argparse.Namespace) -> None:
    """Estimate and print, or calibrate."""
    silence_noise()
    from megatron_depthattn.config import load_config
    from megatron_depthattn.estimate.layouts import best_layouts
    from megatron_depthattn.estimate.machine import check_calibration, find_machine, load_machine, resolve_for
    from megatron_depthattn.estimate.report import Estimate, estimate_config
    from megatron_depthattn.estimate.step_time import MODEL
    from tools.calibration import calibrate_world
    from tools.estimate_tables import show, show_layouts, show_machine

    config = load_config(given.config, given.overrides)
    parallel = config.parallel
    world = given.world if given.world is not None else parallel.tensor * parallel.pipeline * parallel.context
    if world < 1 or given.limit < 1:
        raise ValueError(f"--world is {world} and --limit is {given.limit}: set both to 1 or more")
    if given.machine and given.gpu:
        raise ValueError(f"--gpu {given.gpu} and --machine {given.machine} both name a machine: give one of them")
    if given.calibrate:
        calibrate_world(config, world, given.calibrate)
        show_machine(load_machine(given.calibrate))
        return
    machine = load_machine(given.machine) if given.machine else find_machine(given.gpu or "H100")
    resolved = resolve_for(machine, config)
    config = resolved.config
    for line in resolved.lines:
        print(printable(line))
    check_calibration(machine, config, world)
    as_it_stands: Estimate | None = None
    try:
        as_it_stands = estimate_config(config, world, machine)
        show(config, as_it_stands, machine)
    except ValueError as error:
        if not given.layouts:
            raise
        print(f"as it stands it does not run on {world} ranks: {error}")
    layouts = best_layouts(config, world, machine, limit=given.limit) if given.layouts else []
    if given.layouts:
        show_layouts(layouts, machine)
    show_machine(machine)
    if given.json:
        values = (as_it_stands.as_dict() if as_it_stands else {}) | {
            "layouts": [asdict(each) for each in layouts],
            "machine": asdict(machine),
            "model": MODEL,
        }
        given.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
