"""Training in other precisions against a base: the same weights, the same batches, paired; then the exported models."""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megatron_depthattn.benchmarks import precision_compare as pairs
from megatron_depthattn.benchmarks.models import Model
from megatron_depthattn.benchmarks.result import Result, failed, progress
from megatron_depthattn.benchmarks.world import joined_world
from megatron_depthattn.cli.common import check
from megatron_depthattn.config import RunConfig, load_config, validate
from megatron_depthattn.config.precision import RECIPES
from megatron_depthattn.data.documents import BUILTIN_STDLIB, corpus_files
from megatron_depthattn.paths import user_path

if TYPE_CHECKING:
    from megatron_depthattn.train.step import Microbatch

BASES = {
    "fp32": ["precision.dtype=fp32"],
    "bf16": ["precision.dtype=bf16"],
    **{name: ["precision.dtype=bf16", f"precision.fp8={name}"] for name in RECIPES},
}
MODIFIERS = {
    "params": ["precision.fp8_params=true"],
    "attention": ["precision.fp8_attention=true"],
    "reference": ["model.depth_attention.op=reference"],
    "recompute": ["recompute.granularity=full", "recompute.method=uniform", "recompute.num_layers=1"],
}
DEFAULTS = {"cuda": ["bf16", "bf16+reference", *RECIPES], "cpu": ["fp32", "fp32+reference", "bf16"]}
SETTINGS_HELP = (
    f"the first is the base; one of {', '.join(BASES)}, with +params (FP8 weights), +attention (FP8 attention), +endsN "
    "(N first and last layers in bf16), +reference (the mix in its reference implementation: the same arithmetic, "
    "rounded elsewhere), +recompute, and other keys of the config behind a colon (bf16:optimizer.lr=1e-4,run.seed=5); "
    f"default: on a GPU {' '.join(DEFAULTS['cuda'])}, else {' '.join(DEFAULTS['cpu'])}"
)
HELD_OUT_EVERY = 20
"""Of so many files, one is held out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precisions", nargs="+", metavar="NAME", help=SETTINGS_HELP)
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="steps of a run (default 300)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each setting (default 3)")
    parser.add_argument(
        "--config", type=user_path, metavar="YAML", help="default: precision-{cuda,cpu}.yaml beside the code"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="other keys of the config, of all runs"
    )
    parser.add_argument("--tolerance", type=float, default=0.01, metavar="X", help="relative, of losses (default 0.01)")
    parser.add_argument("--least-cosine", type=float, default=0.9, metavar="X", help="of gradients (default 0.9)")


def measure(given: argparse.Namespace) -> Result:
    """Train every setting; the table, and what is over its bound.

    Raises:
        ValueError: a setting is malformed or cannot run in any place; the base does not run; nothing is left to
            compare with it.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    configs, unsupported = choose(given, kind)
    base, stream = next(iter(configs)), ByteStream()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}

    def result() -> Result:
        """Of the seeds that all settings ran, or of the settings that have run so far."""
        seeds = min(map(len, runs.values())) or 1
        result = judged(given, {n: own[:seeds] for n, own in runs.items() if own}, unsupported)
        config = configs[base]
        model, train, length = config.model, config.train, config.data.sequence_length
        heads = f"{model.num_attention_heads} heads, {model.num_query_groups} KV heads of {model.kv_channels}"
        held_out = f"{train.eval_batches * train.global_batch_size * length:,}"
        result.title = (
            f"Training against {base}: {model.num_layers} layers, hidden {model.hidden_size}, {heads}, {given.steps} "
            f"steps of {train.global_batch_size} x {length} bytes, {given.seeds} seed{'s' if given.seeds > 1 else ''}"
        )
        result.notes.insert(
            0,
            f"every run of a seed starts from the same weights and reads the same batches in the same order; layers: "
            f"{model.spec}; highest learning rate {config.optimizer.lr:g}; bytes of the Python standard library "
            f"(sha256 {stream.digest}), every {HELD_OUT_EVERY}th file ({held_out} bytes of them) held out; losses in "
            "nats per byte",
        )
        return result

    with joined_world() as device:
        for seed in range(given.seeds):
            gradient: dict[str, Tensor] = {}
            for name, config in configs.items():
                seeded = replace(config, run=replace(config.run, seed=config.run.seed + seed))
                one = _run(seeded, stream, device, seed, gradient)
                runs[name].append(one)
                why = f"the base {base} did not run, so there is nothing to compare with: {one['failure']}"
                check((name == base and one["failure"] is not None, why))
                progress(given, f"seed {seed}, {name}: {one['failure'] or one['losses'][-1]}", result)
    return result()


# ---- settings


def parse_setting(text: str) -> list[str]:
    """The keys of the config that ``NAME[+MODIFIER...][:a.b=c[,a.b=c...]]`` stands for.

    Raises:
        ValueError: an unknown name or modifier.
    """
    names, _, more = text.partition(":")
    base, *modifiers = names.split("+")
    check((base not in BASES, f"--precisions {text}: {base!r} is none of {', '.join(BASES)}"))
    keys = [*BASES[base]]
    for modifier in modifiers:
        ends = re.fullmatch(r"ends(\d+)", modifier)
        known = f"--precisions {text}: {modifier!r} is none of {', '.join(MODIFIERS)}, endsN"
        check((not ends and modifier not in MODIFIERS, known))
        layers = [f"precision.bf16_{place}_layers={ends[1]}" for place in ("first", "last")] if ends else []
        keys += layers or MODIFIERS[modifier]
    return [*keys, *filter(None, more.split(","))]


def choose(given: argparse.Namespace, kind: str) -> tuple[dict[str, RunConfig], dict[str, str]]:
    """The configs of the settings that this machine can run, the base first, and why it cannot run the others.

    The layers are all of one spec, so that two settings differ in precision alone.
    """
    from megatron_depthattn.config.hardware_checks import unsupported_on
    from megatron_depthattn.train.hardware import for_this_machine, this_machine

    settings = {name: parse_setting(name) for name in given.precisions or DEFAULTS[kind]}
    path = given.config or Path(__file__).parent / f"precision-{kind}.yaml"

    def load(names: Sequence[str], spec: str) -> dict[str, RunConfig]:
        common = [f"model.spec={spec}", f"train.steps={given.steps}", "train.batch_ramp=null", *given.set]
        configs = {name: load_config(path, [*common, *settings[name]]) for name in names}
        for config in configs.values():
            validate(config, 1, needs_data=False)
        return configs

    fp8 = [name for name, keys in settings.items() if any(key.startswith("precision.fp8=") for key in keys)]
    reasons = {name: unsupported_on(config, this_machine()) for name, config in load(fp8, "te").items()}
    unsupported = {name: reason for name, reason in reasons.items() if reason}
    left = [name for name in settings if name not in unsupported]
    if next(iter(settings)) not in left or len(left) < 2:
        why = "; ".join(f"{name}: {reason}" for name, reason in unsupported.items()) or "a base alone was given"
        raise ValueError(f"--precisions {' '.join(settings)}: no two settings with their base to compare ({why})")
    configs = load(left, "te" if {*left} & {*fp8} else "local")
    return {
        name: for_this_machine(config, validate(config, 1, needs_data=False)).config for name, config in configs.items()
    }, unsupported


# ---- runs


class ByteStream:
    """The Python standard library's source files, a byte a token: real text that every machine has."""

    def __init__(self) -> None:
        files = [file.path.read_bytes() for file in corpus_files([BUILTIN_STDLIB])]
        held_out = files[::HELD_OUT_EVERY]
        train = [file for number, file in enumerate(files) if number % HELD_OUT_EVERY]
        self._train, self._held_out = (np.frombuffer(b"".join(part), np.uint8) for part in (train, held_out))
        self.digest = hashlib.sha256(b"".join(files)).hexdigest()[:16]

    def batch(self, config: RunConfig, device: torch.device, *, seed: int, step: int) -> list[Microbatch]:
        """Microbatches of one step: sequences that begin anywhere in the training part, by seed and step alone."""
        last, number = len(self._train) - config.data.sequence_length, config.train.global_batch_size
        starts = np.random.default_rng([seed, step]).integers(last, size=number)
        return _microbatches(self._train, starts, config, device)

    def held_out(self, config: RunConfig, device: torch.device) -> list[Microbatch]:
        """Microbatches of ``train.eval_batches`` global batches, spread evenly over the held-out part."""
        last = len(self._held_out) - config.data.sequence_length - 1
        starts = np.linspace(0, last, config.train.eval_batches * config.train.global_batch_size).astype(int)
        return _microbatches(self._held_out, starts, config, device)


def _microbatches(tokens: np.ndarray, starts: np.ndarray, config: RunConfig, device: torch.device) -> list[Microbatch]:
    length = config.data.sequence_length
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    parts = torch.from_numpy(rows).to(device).split(config.train.micro_batch_size)
    return [{"tokens": part[:, :-1].contiguous(), "labels": part[:, 1:].contiguous()} for part in parts]


def _run(
    config: RunConfig, stream: ByteStream, device: torch.device, seed: int, base_gradient: dict[str, Tensor]
) -> dict[str, Any]:
    """Train from initial weights; a run that cannot be built or stops being finite says so in its ``failure``.

    Args:
        seed: of the batches; that of the weights is ``run.seed``.
        base_gradient: the base's first gradient, by parameter; empty: this is the base, which fills it.
    """
    if "transformer_engine.pytorch" in sys.modules:  # no FP8 scales are left of the run before, and no memory
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
    gc.collect()
    torch.cuda.empty_cache()
    found: dict[str, Any] = {"seed": seed, "losses": [], "cosine": None}
    found |= {"held_out": None, "exported": None, "failure": None}
    try:
        model = Model(config, device)
        for step in range(config.train.steps):
            done = model.update(stream.batch(config, device, seed=seed, step=step))
            if done.skipped:
                raise ArithmeticError(f"step {step + 1}: {done.diagnosis[0]}")
            found["losses"].append(done.loss)
            if step == 0:
                gradient = model.gradient()
                base_gradient |= {} if base_gradient else gradient
                found["cosine"] = pairs.gradient_cosine(gradient, base_gradient)._asdict()
        found |= _held_out(model, stream.held_out(config, device))
    except Exception as error:  # such as out of memory
        found["failure"], found["traceback"] = failed(error)
    return found


def _held_out(model: Model, batches: list[Microbatch]) -> dict[str, float | None]:
    """Mean losses of the trained model in training precision, and of its export in bf16 (None: no transformers)."""
    from megatron_depthattn.train.step import evaluation_mode, run_microbatches

    with evaluation_mode(model.chunks):
        trained = statistics.fmean(
            run_microbatches(model.chunks, [batch], model.shape, forward_only=True) for batch in batches
        )
    if importlib.util.find_spec("transformers") is None:
        return {"held_out": trained, "exported": None}
    exported, losses = model.exported(torch.bfloat16), []
    with torch.inference_mode():
        for batch in batches:
            logits = exported(input_ids=batch["tokens"], use_cache=False).logits.float()
            losses.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())))
    return {"held_out": trained, "exported": statistics.fmean(losses)}


# ---- the table


def judged(given: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], unsupported: dict[str, str]) -> Result:
    """The table of all runs, the first setting being the base, with what is over its bound."""
    base, bounds = next(iter(runs)), {"tolerance": given.tolerance, "least_cosine": given.least_cosine}
    size, tail = pairs.window_size(given.steps), pairs.num_tail_windows(given.steps)
    result = Result(
        title="",
        columns=[
            *("precision", "loss, last fifth", "gap to base: mean (least to largest)", "largest gap in any window"),
            *("first gradient: cosine", "its worst parameter", "first loss: gap", "held-out loss", "exported, in bf16"),
            "within",
        ],
        figures={"runs": runs, "unsupported": unsupported, "over": {}, **bounds},
        notes=[
            f"gap: relative, of the mean loss in a window of {size} steps to {base}'s of the "
            f"same window and seed; mean and range over the last {tail} windows of all seeds",
            "first gradient: of the same weights and batch, before any update; least over the seeds",
            "exported: held-out loss of the Hugging Face model in bf16, relative to the one in training precision, "
            "both after the last step; the seed with the largest difference",
            f"yes: none of these windows and no exported model differs by more than {given.tolerance:.1%}, and no "
            f"seed's gradient has a cosine under {given.least_cosine}",
        ],
    )
    for name, own in runs.items():
        for one in own:
            result.failures |= {name: one.get("traceback", one["failure"])} if one["failure"] else {}
        cells, found = _row(own, runs[base], bounds, is_base=name == base)
        result.rows.append([name, *cells, "; ".join(found) or ("base" if name == base else "yes")])
        if found:
            result.figures["over"][name] = found
    for name, reason in unsupported.items():
        result.rows.append([name, *[""] * 8, "not run here"])
        result.notes.append(f"{name} is not run here: {reason}")
    if any("+reference" in name for name in runs):
        result.notes.append("+reference: the same arithmetic, rounded elsewhere: what rounding alone grows to")
    if any(one["exported"] is None and not one["failure"] for own in runs.values() for one in own):
        result.notes.append("models are not exported: transformers is not installed")
    result.is_over = bool(result.figures["over"])
    return result


def _row(
    own: list[dict[str, Any]], base: list[dict[str, Any]], bounds: dict[str, float], *, is_base: bool
) -> tuple[list[str], list[str]]:
    """The cells between the name and the last one, and what is over its bound."""
    if failures := [f"seed {one['seed']}: {one['failure']}" for one in own if one["failure"]]:
        return [""] * 8, failures
    gap = pairs.paired_gap([one["losses"] for one in own], [one["losses"] for one in base])
    steps = len(own[0]["losses"])
    tail = pairs.num_tail_windows(steps) * pairs.window_size(steps)
    worst = min((one["cosine"] for one in own), key=lambda cosine: cosine["worst"])
    exported = [one["exported"] / one["held_out"] - 1 for one in own if one["exported"] is not None]
    cosines = [one["cosine"]["model"] for one in own]
    first = [one["losses"][0] / other["losses"][0] - 1 for one, other in zip(own, base, strict=True)]
    gaps = [
        f"{_percent(gap.mean)} ({_percent(gap.low)} to {_percent(gap.high)})",
        f"{_percent(gap.largest)} (step {gap.largest_step})",
        f"{min(cosines):.6f}",
        f"{worst['worst']:.4f} ({worst['worst_parameter'].removeprefix('decoder.')})",
        f"{max(first, key=abs):+.1e}",
    ]
    cells = [
        f"{statistics.fmean(loss for one in own for loss in one['losses'][-tail:]):.4f}",
        *([""] * 5 if is_base else gaps),
        f"{statistics.fmean(one['held_out'] for one in own):.4f}",
        f"{max(exported, key=abs):+.3%}" if exported else "",
    ]
    return cells, pairs.over(gap, cosines, exported, **bounds)


def _percent(gap: float) -> str:
    """In percent, or as a power of ten where that would be 0.000 %."""
    return f"{gap:+.0e}" if 0 < abs(gap) < 5e-6 else f"{gap:+.3%}"
