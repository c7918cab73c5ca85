"""A training step with Depth-Attention over one without, or of all over their exports in transformers, in turns.

With ``--methods`` the five models of table 3 of arXiv:2606.05014, with the paper's figures beside ours.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from megatron_depthattn.benchmarks import models
from megatron_depthattn.benchmarks.models import Model, mixing_configs, shape_text
from megatron_depthattn.benchmarks.peers import IN_TRANSFORMERS, Peer, require_agreement
from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.timing import bootstrap_interval, device_clock, spread, taking_turns
from megatron_depthattn.benchmarks.world import joined_world
from megatron_depthattn.cli.common import check
from megatron_depthattn.config import RunConfig, load_config

PAPER = {
    "vanilla": ("3.28", "4.63"),
    "Depth-Attention": ("3.58 (+9.1 %)", "5.15 (+11.2 %)"),
    "DenseFormer": ("4.95 (+50.6 %)", "6.84 (+47.9 %)"),
    "Attention Residuals": ("4.85 (+47.8 %)", "8.10 (+75.1 %, smaller micro-batch)"),
    "mHC": ("13.83 (+321 %)", "18.85 (+308 %)"),
}
"""Seconds a step at 1.5B and 3B, on a GPU that is not named, without kernels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser)
    parser.add_argument("--ops", nargs="+", metavar="OP", help="implementations of the mix; default: all that run here")
    parser.add_argument(
        "--models", nargs="+", metavar="NAME=CONFIG.yaml", help="these run configs instead, the first is compared with"
    )
    parser.add_argument("--methods", action="store_true", help="the paper's five models instead: its table 3")
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
    if given.methods:
        check(
            (bool(given.models or given.peers or given.ops), "--methods: leave out --models, --peers and --ops"),
            (len(given.strides or [1]) > 1, "--methods compares one stride: set one --strides, or none for half"),
        )
        configs = models.method_configs(given, kind)
    else:
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
    """The config behind NAME=CONFIG.yaml."""
    name, equals, path = text.partition("=")
    if not equals:
        raise ValueError(f"--models {text}: write NAME=CONFIG.yaml")
    return name, models.single_config(path)


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
    """Seconds of every model's steps, by `device_clock`."""
    now = device_clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(-given.warm_up, given.rounds):
        for name in taking_turns([*timed], turn):
            started = now()
            timed[name].gradients() if given.no_optimizer else timed[name].update()
            if turn >= 0:
                seconds[name].append(now() - started)
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
    if given.methods:
        result.notes[0] = result.notes[0].replace("the same weights", "the same weights of what they share")
        result.columns[1:4] = ["s a step: median (quartiles)", "over vanilla, %: median (quartiles)", "95 %, %"]
        result.columns[-2:] = [f"arXiv:2606.05014: {size}, s a step" for size in ("1.5B", "3B")]
        path = models.shape_path(given, "cuda" if torch.cuda.is_available() else "cpu")
        if cuts := models.cuts_text(first, load_config(path)):
            result.notes.append(f"cut from {path.stem}: {cuts}; the paper's columns are of whole models on its GPUs")
    elif peak_tflops(first):
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
        if given.methods:
            more = [spread([100 * (ratio - 1) for ratio in ratios]).text(1, 1)]
            more += [f"{100 * (low - 1):.1f} to {100 * (high - 1):.1f}"]
            cells = [spread(times).text(1, 3), *(["", ""] if name == base else more), *PAPER[name]]
        result.rows.append([name, *cells])
        found = {"seconds": times, "ratio": spread(ratios).median, "interval": [low, high], "mfu": mfu}
        result.figures[name] = found | {"tokens_per_second": speed} | agreement.get(name, {})
    for name, why in failures.items():
        result.rows.append([name, why, "", "", "", ""])
        result.figures[name] = {"failure": why}
    return result
