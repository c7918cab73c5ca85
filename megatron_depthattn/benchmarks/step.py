"""A training step with Depth-Attention over one without: the models stand side by side and take turns."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import torch

from megatron_depthattn.benchmarks.model import Model
from megatron_depthattn.benchmarks.peers import add_peers_arguments, measure_peers
from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.shapes import add_model_arguments, implementations_on, run_config, shape_text
from megatron_depthattn.benchmarks.timing import bootstrap_interval, spread, taking_turns

if TYPE_CHECKING:
    from megatron_depthattn.config import RunConfig

VANILLA = "vanilla"
AUTHORS = {"reference": " (authors' formulation, eager torch)"}


def add_step(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("step", help="a training step with Depth-Attention over one without, interleaved")
    add_model_arguments(parser)
    parser.add_argument("--strides", nargs="*", type=int, metavar="N", help="default: half the layers, and 1")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="implementations of the mix; default: all that run here")
    parser.add_argument(
        "--models", nargs="+", metavar="NAME=CONFIG.yaml", help="these run configs instead, the first is compared with"
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="steps of each model (default 20)")
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help="steps before (default 3)")
    parser.add_argument("--no-optimizer", action="store_true", help="forward and backward only: less memory")
    add_peers_arguments(parser)
    parser.set_defaults(measure=measure_step)


def measure_step(given: argparse.Namespace) -> Result:
    """Ratios are those of a step to vanilla's of the same round; median, quartiles, and an interval of the median."""
    if given.peers:
        return measure_peers(given)
    from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
    from megatron_depthattn.parallel.launch_env import launch_environment

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    configs = _configs(given, kind)
    device = initialize_distributed(launch_environment())
    try:
        initialize_model_parallel()
        models, failures = _build(configs, device, given)
        base = next(iter(configs))
        if base in failures:
            raise ValueError(f"{base} did not run, so there is nothing to compare with: {failures[base]}")
        seconds = _run(models, given.rounds)
    finally:
        shut_down()
    return _result(configs, models, seconds, failures, given)


def _configs(given: argparse.Namespace, kind: str) -> dict[str, RunConfig]:
    """Every model by its name; the first one is what the others are compared with."""
    if given.models:
        return dict(_named_config(text) for text in given.models)
    vanilla = run_config(given, kind, model__depth_attention__enabled=False)
    layers = vanilla.model.num_layers * vanilla.model.num_loops
    configs = {VANILLA: vanilla}
    for stride in given.strides or dict.fromkeys((max(1, layers // 2), 1)):
        for op in given.ops or implementations_on(kind):
            keys = {"model__depth_attention__stride": stride, "model__depth_attention__op": op}
            configs[f"stride {stride}, {op}{AUTHORS.get(op, '')}"] = run_config(given, kind, **keys)
    return configs


def _named_config(text: str) -> tuple[str, RunConfig]:
    """The config behind NAME=CONFIG.yaml, with one micro-batch a step on one device."""
    from megatron_depthattn.config import load_config, validate
    from megatron_depthattn.train.hardware import for_this_machine

    name, equals, path = text.partition("=")
    if not equals:
        raise ValueError(f"--models {text}: write NAME=CONFIG.yaml")
    batch = load_config(path).train.micro_batch_size
    alone = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.virtual_pipeline=1", "parallel.context=1"]
    config = load_config(path, [*alone, "parallel.sequence=false", f"train.global_batch_size={batch}"])
    return name, for_this_machine(config, validate(config, 1, needs_data=False)).config


def _build(
    configs: dict[str, RunConfig], device: torch.device, given: argparse.Namespace
) -> tuple[dict[str, Model], dict[str, str]]:
    """The models that fit and run here, warmed up, with the same initial weights; and why the others do not."""
    models: dict[str, Model] = {}
    failures: dict[str, str] = {}
    for name, config in configs.items():
        try:
            models[name] = Model(config, device, has_optimizer=not given.no_optimizer)
            for _ in range(given.warm_up):
                models[name].step()
        except (RuntimeError, ValueError, ImportError) as error:  # out of memory, or an op that does not run here
            failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            models.pop(name, None)
            torch.cuda.empty_cache()
        print(f"{name}: {failures.get(name, 'ready')}", file=sys.stderr, flush=True)
    return models, failures


def _run(models: dict[str, Model], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds):
        for name in taking_turns([*models], turn):
            seconds[name].append(models[name].step())
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return seconds


def _result(
    configs: dict[str, RunConfig],
    models: dict[str, Model],
    seconds: dict[str, list[float]],
    failures: dict[str, str],
    given: argparse.Namespace,
) -> Result:
    what = "forward and backward" if given.no_optimizer else "training step"
    base = next(iter(configs))
    result = Result(
        title=f"A {what}: {shape_text(configs[base], given)}, {given.rounds} rounds",
        columns=[
            *("model", "step, ms: median (quartiles)", f"over {base}: median (quartiles)", "95 % of the median"),
            *("tokens/s", "MFU"),
        ],
        notes=[
            f"recompute: {configs[base].recompute.granularity or 'none'}, layers: {configs[base].model.spec}; "
            "the models are built side by side with the same weights and take turns step by step; a ratio is that of "
            "two steps of the same round; interval: percentile bootstrap",
            *(["MFU: of the device's dense bf16 peak, FP8 or not"] if models[base].peak_tflops else []),
        ],
    )
    for name in configs:
        if name in failures:
            result.rows.append([name, failures[name], "", "", "", ""])
            result.figures[name] = {"failure": failures[name]}
            continue
        model, times = models[name], seconds[name]
        ratios = [own / other for own, other in zip(times, seconds[base], strict=True)]
        low, high = bootstrap_interval(ratios)
        speed = model.tokens / spread(times).median
        mfu = model.flops_per_token * speed / 1e12 / model.peak_tflops if model.peak_tflops else None
        is_base = name == base
        result.rows.append(
            [
                *(name, spread(times).text(1e-3, 1), "1" if is_base else spread(ratios).text(1, 3)),
                *("" if is_base else f"{low:.3f} to {high:.3f}", f"{speed:,.0f}", f"{mfu:.1%}" if mfu else ""),
            ]
        )
        result.figures[name] = {
            "seconds": times,
            "ratio": spread(ratios).median,
            "interval": [low, high],
            "tokens_per_second": speed,
            "mfu": mfu,
        }
    return result
