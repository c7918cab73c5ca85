"""What a config costs on so many GPUs, before anything runs.

Parameters, arithmetic, memory of a rank, bytes sent on every axis, predicted time of a step, and with --layouts what
fits, fastest first. With --paper: what Depth-Attention, DenseFormer, Attention Residuals and mHC add, by the paper's
counting (table 2) and by ours. How to read it: docs/estimate.md. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_depthattn.cli.common import add_config, check, find_config, lacks_folder, new_parser, run
from megatron_depthattn.paths import user_path
from megatron_depthattn.terminal import printable

GPUS = ("H100", "H200", "A100", "B200")
OF_PLANS = ("world", "gpu", "layouts", "limit")
"""Options that --paper has no use for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 1 with one line on stderr."""
    parser = new_parser("estimate", __doc__)
    add_config(parser, optional=True)
    parser.add_argument("--world", type=int, metavar="N", help="ranks (default: one model replica)")
    parser.add_argument("--gpu", default="H100", metavar="NAME", help=f"one of {', '.join(GPUS)} (default H100)")
    parser.add_argument("--layouts", action="store_true", help="rank the layouts that fit by predicted step time")
    parser.add_argument("--limit", type=int, default=10, metavar="N", help="layouts to list (default 10)")
    parser.add_argument("--paper", action="store_true", help="the paper's table 2 instead (CONFIG: default 3b)")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write everything to this file as well")
    given = parser.parse_intermixed_args(arguments)  # settings may follow an option
    given.unused = [f"--{name}" for name in OF_PLANS if getattr(given, name) != parser.get_default(name)]
    if given.paper:
        return run(_paper, given, ModuleNotFoundError)
    if given.config is None:
        parser.error("the following arguments are required: CONFIG")
    return run(_estimate, given)


def _paper(given: argparse.Namespace) -> None:
    from megatron_depthattn.config import load_config, validate
    from megatron_depthattn.estimate.paper import TITLES, show_table, with_method

    unused = ", ".join(given.unused)
    check((bool(unused), f"{unused}: not with --paper, whose table is of one model on one rank"))
    check(lacks_folder("--json", given.json))
    words = [given.config, *given.overrides] if given.config else []
    files, settings = ([word for word in words if ("=" in word) == is_setting] for is_setting in (False, True))
    name, *more = files or ["3b"]
    config = load_config(find_config(name), [*map(find_config, more), *settings])
    for method in ("vanilla", *TITLES):
        validate(with_method(config, method), 1, needs_data=False)
    values = show_table(name, config)
    if given.json:
        given.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _estimate(given: argparse.Namespace) -> None:
    from megatron_depthattn.config import load_config
    from megatron_depthattn.estimate.hardware import find_gpu, resolve_for
    from megatron_depthattn.estimate.layouts import best_layouts
    from megatron_depthattn.estimate.report import estimate_config, show, show_assumptions, show_layouts
    from megatron_depthattn.estimate.step_time import MODEL

    path, *overrides = map(find_config, (given.config, *given.overrides))
    hardware = find_gpu(given.gpu)
    resolved = resolve_for(hardware, load_config(path, overrides))
    config, parallel = resolved.config, resolved.config.parallel
    world = given.world if given.world is not None else parallel.tensor * parallel.pipeline * parallel.context
    wrong = f"--world is {world} and --limit is {given.limit}: set both to 1 or more"
    check((min(world, given.limit) < 1, wrong), lacks_folder("--json", given.json))
    print("".join(printable(f"{line}\n") for line in resolved.lines), end="")
    values: dict[str, Any] = {}
    try:
        as_it_stands = estimate_config(config, world, hardware)
        show(config, as_it_stands, hardware)
        values = asdict(as_it_stands)
    except ValueError as error:
        if not given.layouts:
            raise
        print(f"as it stands it does not run on {world} ranks: {error}")
    layouts = best_layouts(config, world, hardware, limit=given.limit) if given.layouts else []
    if given.layouts:
        show_layouts(layouts, hardware)
    show_assumptions()
    if given.json:
        values |= {"layouts": [asdict(each) for each in layouts], "machine": asdict(hardware), "model": MODEL}
        given.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
