"""A training step with Depth-Attention over one without, or of all over their exports in transformers, in turns."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from megatron_depthattn.benchmarks import models
from megatron_depthattn.benchmarks.models import Model, mixing_configs, shape_text
from megatron_depthattn.benchmarks.peers import IN_TRANSFORMERS, Peer, require_agreement
from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.timing import bootstrap_interval, spread, taking_turns
from megatron_depthattn.benchmarks.world import joined_world
from megatron_depthattn.config import RunConfig, load_config, validate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser)
    parser.add_argument("--ops", nargs="+", metavar="OP", help="implementations of the mix; default: all that run here")
    parser.add_argument(
        "--models", nargs="+", metavar="NAME=CONFIG.yaml", help="these run configs instead, the first is compared with"
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="steps of each model (default 20)")
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help="steps before (default 3)")
    parser.add_argument("--no-optimizer", action="store_true", help="forward and backward only: less memory")
    parser.add_argument("--peers", action="store_true", help="over transformers' Qwen3, with our exported models")


def measure(given: argparse.Namespace) -> Result:
    """Ratios are those of a step to the first model's of the same round: median, quartiles, interval of the median.

    Raises:
        ValueError: the first model does not run; with ``--peers`` also: two models of the same weights do not have the
            same loss and gradient.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    ops = given.ops or (["auto"] if given.peers else models.implementations_on(kind))
    configs = dict(map(_named_config, given.models)) if given.models else mixing_configs(given, kind, ops)
    with joined_world() as device:
        ours, failures = _build(configs, device, given)
        base = next(iter(configs))
        if base in failures:
            raise ValueError(f"{base} did not run, so there is nothing to compare with: {failures[base]}")
        pairs = {name: (model, Peer(model)) for name, model in ours.items()} if given.peers else {}
        agreement = require_agreement(pairs)
        peers = {f"{name}{IN_TRANSFORMERS}": peer for name, (_, peer) in pairs.items()}
        seconds = _time({**peers, **ours}, given, device)
    return _result(configs, seconds, failures, agreement, given)


def _named_config(text: str) -> tuple[str, RunConfig]:
    """The config behind NAME=CONFIG.yaml, with one micro-batch a step on one device."""
    from megatron_depthattn.train.hardware import for_this_machine

    name, equals, path = text.partition("=")
    if not equals:
        raise ValueError(f"--models {text}: write NAME=CONFIG.yaml")
    batch = load_config(path).train.micro_batch_size
    alone = [f"parallel.{axis}=1" for axis in ("tensor", "pipeline", "virtual_pipeline", "context")]
    config = load_config(path, [*alone, "parallel.sequence=false", f"train.global_batch_size={batch}"])
    return name, for_this_machine(config, validate(config, 1, needs_data=False)).config


def _build(
    configs: dict[str, RunConfig], device: torch.device, given: argparse.Namespace
) -> tuple[dict[str, Model], dict[str, str]]:
    """The models that fit and run here, with the same initial weights; and why the others do not."""
    built: dict[str, Model] = {}
    failures: dict[str, str] = {}
    for name, config in configs.items():
        model: Model | None = None
        try:
            model = Model(config, device, has_optimizer=not given.no_optimizer)
            model.gradients() if given.no_optimizer else model.update()
            built[name] = model
        except (RuntimeError, ValueError, ImportError) as error:  # out of memory, or an op that does not run here
            failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        model = None  # not bound while the next is built
        torch.cuda.empty_cache()  # after the handler: its error holds what the failed step allocated
        print(f"{name}: {failures.get(name, 'ready')}", file=sys.stderr, flush=True)
    return built, failures


def _time(timed: dict[str, Any], given: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every model's steps: CPU time with one thread on a CPU, else on the wall until the device is done."""
    is_alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if is_alone else time.perf_counter
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(-given.warm_up, given.rounds):
        for name in taking_turns([*timed], turn):
            wait()
            started = clock()
            timed[name].gradients() if given.no_optimizer else timed[name].update()
            wait()
            if turn >= 0:
                seconds[name].append(clock() - started)
        print(f"round {turn + 1} of {given.rounds}", file=sys.stderr, flush=True)
    return seconds


def _result(
    configs: dict[str, RunConfig],
    seconds: dict[str, list[float]],
    failures: dict[str, str],
    agreement: dict[str, dict[str, float]],
    given: argparse.Namespace,
) -> Result:
    from megatron_depthattn.estimate.counts import forward_flops
    from megatron_depthattn.train.metrics import peak_tflops

    first, base = next(iter(configs.values())), next(iter(seconds))
    result = Result(
        title=f"A {'forward and backward pass' if given.no_optimizer else 'training step'}: "
        f"{shape_text(first, given)}, {given.rounds} rounds",
        columns=[
            *("model", "ms: median (quartiles)", f"over {base}: median (quartiles)", "95 % of the median"),
            *("tokens/s", "MFU"),
        ],
        notes=[
            f"recompute: {first.recompute.granularity or 'none'}, layers: {first.model.spec}; the models stand side by "
            "side with the same weights and take turns step by step; a ratio is that of two steps of the same round; "
            "interval: percentile bootstrap; seconds: CPU time of the process with one thread on a CPU, else the wall's"
        ],
    )
    if given.peers:
        result.notes.append(
            "in transformers: the exported model (vanilla's is Qwen3) in fp32 with sdpa, is_causal, no cache, torch's "
            "AdamW(fused=True), the same clipping and schedule; before anything is timed, loss and gradient norm of "
            "each pair agree"
        )
    if peak_tflops(first):
        result.notes.append("MFU: of the device's dense bf16 peak, FP8 or not")
    for name, times in seconds.items():
        config = configs[name.removesuffix(IN_TRANSFORMERS)]
        ratios = [own / other for own, other in zip(times, seconds[base], strict=True)]
        low, high = bootstrap_interval(ratios)
        speed = config.train.micro_batch_size * config.data.sequence_length / spread(times).median
        peak = peak_tflops(config)
        mfu = 3 * forward_flops(config).total * speed / 1e12 / peak if peak else None
        over = ["1", ""] if name == base else [spread(ratios).text(1, 3), f"{low:.3f} to {high:.3f}"]
        cells = [spread(times).text(1e-3, 1), *over, f"{speed:,.0f}", f"{mfu:.1%}" if mfu else ""]
        result.rows.append([name, *cells])
        found = {"seconds": times, "ratio": spread(ratios).median, "interval": [low, high], "mfu": mfu}
        result.figures[name] = found | {"tokens_per_second": speed} | agreement.get(name, {})
    for name, why in failures.items():
        result.rows.append([name, why, "", "", "", ""])
        result.figures[name] = {"failure": why}
    return result
