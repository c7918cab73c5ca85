"""A training step with Depth-Attention over one without, or of all over their exports in transformers, in turns.

With ``--peers`` each also stands beside its export in transformers: vanilla's is Qwen3, and Depth-Attention's is its
authors' formulation in plain torch. With ``--methods`` the five models of table 3 of arXiv:2606.05014, with the paper's
figures beside ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_depthattn.benchmarks import models
from megatron_depthattn.benchmarks.models import Model, mixing_configs, shape_text
from megatron_depthattn.benchmarks.peers import IN_TRANSFORMERS, Peer, check_has_peer, compare, runs_in_flash_alone
from megatron_depthattn.benchmarks.result import Failure, Result, failed, progress
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
    parser.add_argument(
        "--documents",
        nargs="+",
        type=int,
        metavar="N",
        help="sequences cut into documents of N tokens, over whole",
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="steps of each model (default 20)")
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help="steps before (default 3)")
    parser.add_argument("--no-optimizer", action="store_true", help="forward and backward only: less memory")
    parser.add_argument("--peers", action="store_true", help="over transformers' Qwen3, with our exported models")


def measure(given: argparse.Namespace) -> Result:
    """Ratios are those of a step to the first model's of the same round: median, quartiles, interval of the median.

    Raises:
        ValueError: the first model does not run.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    lengths: dict[str, int] = {}
    ops = given.ops or (["auto"] if given.peers else models.implementations_on(kind))
    if given.methods:
        check(
            (bool(given.models or given.peers or given.ops), "--methods: leave out --models, --peers and --ops"),
            (len(given.strides or [1]) > 1, "--methods compares one stride: set one --strides, or none for half"),
        )
        configs = models.method_configs(given, kind)
    elif given.documents:
        check(
            (bool(given.models or given.peers or given.ops), "--documents: leave out --models, --peers and --ops"),
            (len(given.strides or [1]) > 1, "--documents compares one stride: set one --strides, or none for half"),
            (min(given.documents) < 1, "--documents: set 1 or more tokens"),
        )
        keys = {"model.depth_attention.stride": given.strides[0]} if given.strides else {}
        lengths = {f"documents of {length} tokens": length for length in given.documents}
        configs = dict.fromkeys(["whole sequences", *lengths], models.run_config(given, kind, keys))
    else:
        configs = dict(map(_named_config, given.models)) if given.models else mixing_configs(given, kind, ops)
    for config in configs.values() if given.peers else ():
        check_has_peer(config)
    with joined_world() as device:
        ours, failures = _build(configs, device, given, lengths)
        base = next(iter(configs))
        if base in failures:
            raise ValueError(f"{base} did not run, so there is nothing to compare with: {failures[base].said}")
        peers, agreement, over = _peers(ours, failures, given) if given.peers else ({}, {}, [])
        timed: dict[str, Model | Peer] = {**peers, **ours}
        seconds: dict[str, list[float]] = {name: [] for name in timed}

        def result() -> Result:
            known = {name: model.config for name, model in timed.items()}
            return _result(known, seconds, failures, agreement, over, given)

        now = device_clock(device)
        for turn in range(-given.warm_up, given.rounds):
            for name in taking_turns([*timed], turn):
                started = now()
                timed[name].gradients() if given.no_optimizer else timed[name].update()
                if turn >= 0:
                    seconds[name].append(now() - started)
            progress(given, f"round {turn + 1} of {given.rounds}", result if turn >= 0 else None)
        return result()


def _named_config(text: str) -> tuple[str, RunConfig]:
    """The config behind NAME=CONFIG.yaml."""
    name, equals, path = text.partition("=")
    if not equals:
        raise ValueError(f"--models {text}: write NAME=CONFIG.yaml")
    return name, models.single_config(path)


def _build(
    configs: dict[str, RunConfig], device: torch.device, given: argparse.Namespace, lengths: dict[str, int]
) -> tuple[dict[str, Model], dict[str, Failure]]:
    """The models that fit and run here, with the same initial weights; and why the others do not.

    ``lengths``: of the documents that the sequences of some are cut into.
    """
    built: dict[str, Model] = {}
    failures: dict[str, Failure] = {}
    for name, config in configs.items():
        model: Model | None = None
        try:
            model = Model(config, device, has_optimizer=not given.no_optimizer, documents=lengths.get(name))
            model.gradients() if given.no_optimizer else model.update()
            built[name] = model
        except Exception as error:  # out of memory, an op that does not run here, a kernel that does not compile
            failures[name] = failed(error)
        model = None  # not bound while the next is built
        torch.cuda.empty_cache()  # after the handler: its error holds what the failed step allocated
        progress(given, f"{name}: {'failed' if name in failures else 'ready'}")
    return built, failures


def _peers(
    ours: dict[str, Model], failures: dict[str, Failure], given: argparse.Namespace
) -> tuple[dict[str, Peer], dict[str, dict[str, float]], list[str]]:
    """The exports, one of models that differ in the op alone, and what `compare` says of each and its model."""
    peers: dict[str, Peer] = {}
    agreement: dict[str, dict[str, float]] = {}
    over: list[str] = []
    seen = []
    for name, model in ours.items():
        shape = replace(model.config.model, depth_attention=replace(model.config.model.depth_attention, op="auto"))
        if shape in seen:
            continue
        seen.append(shape)
        label = name.removesuffix(f", {model.config.model.depth_attention.op}") + IN_TRANSFORMERS
        peer: Peer | None = None
        try:
            peer = Peer(model)
            found, apart = compare(name, model, label, peer)
            agreement |= found
            over += apart
            if not given.no_optimizer:  # the first step makes the optimizer's state
                peer.update()
            peers[label] = peer
        except Exception as error:  # as above, or an export that does not load
            failures[label] = failed(error)
        peer = None  # not bound while the next is built
        torch.cuda.empty_cache()
        progress(given, f"{label}: {'failed' if label in failures else 'ready'}")
    return peers, agreement, over


def _result(
    configs: dict[str, RunConfig],
    seconds: dict[str, list[float]],
    failures: dict[str, Failure],
    agreement: dict[str, dict[str, float]],
    over: Sequence[str],
    given: argparse.Namespace,
) -> Result:
    from megatron_depthattn.estimate.counts import forward_flops
    from megatron_depthattn.train.metrics import peak_tflops

    first, base = next(iter(configs.values())), next(iter(seconds))
    others = [name for name in seconds if name != base and _is_base(name)] if given.peers else []
    result = Result(
        title=f"A {'forward and backward pass' if given.no_optimizer else 'training step'}: "
        f"{shape_text(first, given)}, {given.rounds} rounds",
        columns=[
            *("model", "ms: median (quartiles)", f"over {base}: median (quartiles)", "95 % of the median"),
            *(f"over {other}: median (95 %)" for other in others),
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
            f"in transformers: the exported model (vanilla's is Qwen3, Depth-Attention's mixes in plain torch as its "
            f"authors' does), weights and AdamW(fused=True) in {first.precision.dtype}, the same clipping and "
            "schedule, attention by sdpa with is_causal and no cache"
            + (", in flash attention's kernels alone" if runs_in_flash_alone(first) else "")
        )
        result.notes.append("; ".join(over) or "loss and gradient norm of each pair agreed before anything was timed")
        result.is_over = bool(over)
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
        config, over_others = configs[name], {other: _ratio(times, seconds[other]) for other in others}
        ratios = [own / other for own, other in zip(times, seconds[base], strict=True)]
        low, high = bootstrap_interval(ratios)
        speed = config.train.micro_batch_size * config.data.sequence_length / spread(times).median
        peak = peak_tflops(config)
        mfu = 3 * forward_flops(config).total * speed / 1e12 / peak if peak else None
        first_ratio = ["1", ""] if name == base else [spread(ratios).text(1, 3), f"{low:.3f} to {high:.3f}"]
        cells = [spread(times).text(1e-3, 1), *first_ratio]
        for other, (median, *ends) in over_others.items():
            cells.append("1" if other == name else f"{median:.3f} ({ends[0]:.3f} to {ends[1]:.3f})")
        cells += [f"{speed:,.0f}", f"{mfu:.1%}" if mfu else ""]
        if given.methods:
            more = [spread([100 * (ratio - 1) for ratio in ratios]).text(1, 1)]
            more += [f"{100 * (low - 1):.1f} to {100 * (high - 1):.1f}"]
            cells = [spread(times).text(1, 3), *(["", ""] if name == base else more), *PAPER[name]]
        result.rows.append([name, *cells])
        found = {"seconds": times, "ratio": spread(ratios).median, "interval": [low, high], "mfu": mfu}
        result.figures[name] = found | {"tokens_per_second": speed, "over": over_others} | agreement.get(name, {})
    for name, why in failures.items():
        result.rows.append([name, why.said, *[""] * (len(result.columns) - 2)])
        result.figures[name], result.failures[name] = {"failure": why.said}, why.traceback
    return result


def _is_base(name: str) -> bool:
    """What others are compared with beside the first: vanilla, and the authors' formulation of Depth-Attention."""
    return name == "vanilla" or name.endswith((IN_TRANSFORMERS, ", reference"))


def _ratio(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Median of the ratios of two steps of one round, and its interval."""
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    return spread(ratios).median, *bootstrap_interval(ratios)
