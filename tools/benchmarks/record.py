"""What it costs to look inside: a training step whose weights over depth go on record over one without."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tools.benchmarks.model import Model
from tools.benchmarks.result import Result
from tools.benchmarks.shapes import add_model_arguments, run_config, shape_text
from tools.benchmarks.timing import bootstrap_interval, spread, taking_turns

PLAIN, ON_RECORD = "plain", "on record"


def add_record(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("record", help="a step with weights over depth on record over one without, interleaved")
    add_model_arguments(parser)
    parser.add_argument("--strides", nargs="+", type=int, metavar="N", help="default: half the layers, and 1")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="pairs of steps (default 20)")
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help="pairs before (default 3)")
    parser.set_defaults(measure=measure_record)


def measure_record(given: argparse.Namespace) -> Result:
    """The steps of a pair are of one model, one after the other; the first is the plain one every other time."""
    from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
    from megatron_depthattn.parallel.launch_env import launch_environment

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    config = run_config(given, kind)
    layers = config.model.num_layers * config.model.num_loops
    strides = given.strides or [*dict.fromkeys((max(1, layers // 2), 1))]
    interval = config.train.depth_interval
    if interval is None:
        raise ValueError("train.depth_interval=null: nothing goes on record; set the interval whose cost is asked for")
    result = Result(
        title=f"Weights over depth on record: {shape_text(config, given)}, {given.rounds} rounds",
        columns=[
            *("model", "step, ms: median (quartiles)", "on record, ms", "over the plain step: median (quartiles)"),
            *("95 % of the median", f"cost at train.depth_interval={interval}: median (95 %)"),
        ],
        notes=[
            "a ratio is that of two steps of one model, one after the other; interval: percentile bootstrap; seconds: "
            + ("on the wall" if kind == "cuda" else "CPU time of the process, so that other work here does not count")
        ],
    )
    device = initialize_distributed(launch_environment())
    try:
        initialize_model_parallel()
        for stride in strides:
            seconds = _seconds(given, kind, stride, device)
            ratios = [one / other for one, other in zip(seconds[ON_RECORD], seconds[PLAIN], strict=True)]
            low, high = bootstrap_interval(ratios)
            costs = [100 * (ratio - 1) / interval for ratio in (spread(ratios).median, low, high)]
            result.rows.append(
                [
                    *(f"stride {stride}", *(spread(seconds[name]).text(1e-3, 1) for name in (PLAIN, ON_RECORD))),
                    *(spread(ratios).text(1, 3), f"{low:.3f} to {high:.3f}"),
                    "{:.3f} % ({:.3f} to {:.3f} %)".format(*costs),
                ]
            )
            result.figures[f"stride {stride}"] = {
                "seconds": seconds,
                "ratio": spread(ratios).median,
                "interval": [low, high],
                "percent_at_interval": costs,
            }
    finally:
        shut_down()
    return result


def _seconds(given: argparse.Namespace, kind: str, stride: int, device: torch.device) -> dict[str, list[float]]:
    from megatron_depthattn.train.build import transformer_config
    from megatron_depthattn.train.depth_record import DepthRecord

    config = run_config(given, kind, model__depth_attention__stride=stride)
    record = DepthRecord(config, transformer_config(config))
    model = Model(config, device, has_optimizer=True)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {PLAIN: [], ON_RECORD: []}
    for turn in range(-given.warm_up, given.rounds):
        for name in taking_turns([*seconds], turn):
            seconds[name].append(model.step(record if name == ON_RECORD else None, clock=clock))
        print(f"stride {stride}: round {turn + 1} of {given.rounds}", file=sys.stderr, flush=True)
    return {name: times[given.warm_up :] for name, times in seconds.items()}
