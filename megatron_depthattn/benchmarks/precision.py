"""Training in other precisions against a base: the same weights, the same batches, paired; then the exported models."""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_depthattn.benchmarks.precision_compare import (
    gradient_cosine,
    num_tail_windows,
    over,
    paired_gap,
    window_size,
)
from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.config.precision import RECIPES
from megatron_depthattn.paths import user_path

if TYPE_CHECKING:
    from megatron_depthattn.config import RunConfig

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


def add_precision(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("precision", help="training in bf16 and FP8, paired with a base; exported and evaluated")
    parser.add_argument("--precisions", nargs="+", metavar="NAME", help=SETTINGS_HELP)
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="steps of a run (default 300)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each setting (default 3)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument(
        "--config", type=user_path, metavar="YAML", help="default: precision-{cuda,cpu}.yaml beside the code"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=c", help="other keys of the config, of all runs")
    parser.add_argument("--tolerance", type=float, default=0.01, metavar="X", help="relative, of losses (default 0.01)")
    parser.add_argument("--least-cosine", type=float, default=0.9, metavar="X", help="of gradients (default 0.9)")
    parser.set_defaults(measure=measure_precision)


def measure_precision(given: argparse.Namespace) -> Result:
    """Train every setting; table and verdicts.

    Raises:
        ValueError: a setting is malformed or cannot run in any place; the base does not run; nothing is left to
            compare with it.
    """
    return _result(_train_all(given), given.tolerance, given.least_cosine)


# ---- settings


@dataclass(frozen=True)
class Setting:
    """A precision by name, and the keys of the config that it stands for."""

    name: str
    keys: tuple[str, ...]

    @property
    def is_fp8(self) -> bool:
        return any(key.startswith("precision.fp8=") for key in self.keys)


def parse_setting(text: str) -> Setting:
    """``NAME[+MODIFIER...][:a.b=c[,a.b=c...]]``.

    Raises:
        ValueError: an unknown name or modifier.
    """
    names, _, more = text.partition(":")
    base, *modifiers = names.split("+")
    if base not in BASES:
        raise ValueError(f"--precisions {text}: {base!r} is none of {', '.join(BASES)}")
    keys = [*BASES[base]]
    for modifier in modifiers:
        if ends := re.fullmatch(r"ends(\d+)", modifier):
            keys += [f"precision.bf16_{place}_layers={ends[1]}" for place in ("first", "last")]
        elif modifier in MODIFIERS:
            keys += MODIFIERS[modifier]
        else:
            raise ValueError(f"--precisions {text}: {modifier!r} is none of {', '.join(MODIFIERS)}, endsN")
    return Setting(text, (*keys, *filter(None, more.split(","))))


def _configs(given: argparse.Namespace, kind: str, settings: list[Setting], spec: str) -> dict[str, RunConfig]:
    """Of the first seed; the layers are all of one spec, so that two settings differ in precision alone."""
    from megatron_depthattn.config import load_config, validate

    path = given.config or Path(__file__).parent / f"precision-{kind}.yaml"
    common = [f"model.spec={spec}", f"train.steps={given.steps}", *given.set]
    configs = {setting.name: load_config(path, [*common, *setting.keys]) for setting in settings}
    for config in configs.values():
        validate(config, 1, needs_data=False)
    return configs


def _choose(given: argparse.Namespace, kind: str) -> tuple[dict[str, RunConfig], dict[str, str]]:
    """The settings that this machine can run, the base first, and why it cannot run the others."""
    from megatron_depthattn.config.hardware_checks import unsupported_on
    from megatron_depthattn.train.hardware import this_machine

    names = given.precisions or DEFAULTS[kind]
    settings = [parse_setting(name) for name in dict.fromkeys(names)]
    refused: dict[str, str] = {}
    fp8 = [setting for setting in settings if setting.is_fp8]
    if fp8:
        machine = this_machine()
        refusals = {name: unsupported_on(config, machine) for name, config in _configs(given, kind, fp8, "te").items()}
        refused = {name: refusal for name, refusal in refusals.items() if refusal}
    left = [setting for setting in settings if setting.name not in refused]
    if settings[0] not in left or len(left) < 2:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or "a base alone was given"
        raise ValueError(f"--precisions {' '.join(names)}: no two settings with their base to compare ({reasons})")
    spec = "te" if any(setting.is_fp8 for setting in left) else "local"
    return _configs(given, kind, left, spec), refused


# ---- runs


def _device_kind(given: argparse.Namespace) -> str:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if given.device in (None, kind):
        return kind
    advice = "set CUDA_VISIBLE_DEVICES= to hide the GPU" if kind == "cuda" else "torch sees no GPU: set --device cpu"
    raise ValueError(f"--device {given.device}, but this process would run on {kind}: {advice}")


def _train_all(given: argparse.Namespace) -> dict[str, Any]:
    """The figures: what was run, every run's curve, and what cannot run here."""
    from megatron_depthattn.benchmarks.precision_run import ByteStream, Run, run
    from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
    from megatron_depthattn.parallel.launch_env import launch_environment

    configs, refused = _choose(given, _device_kind(given))
    base, stream = next(iter(configs)), ByteStream()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    device = initialize_distributed(launch_environment())
    try:
        initialize_model_parallel()
        for seed in range(given.seeds):
            first: Run | None = None
            for name, config in configs.items():
                one = run(_with_seed(config, seed), stream, device, seed=seed)
                first = first or one
                if first.failure:
                    raise ValueError(f"the base {base} did not run, so there is nothing to compare with: {one.failure}")
                runs[name].append(_figures(one, first, seed))
                last = one.failure or f"last loss {one.losses[-1]:.4f}, held-out {one.held_out:.4f}"
                print(f"seed {seed}, {name}: {last}", file=sys.stderr, flush=True)
    finally:
        shut_down()
    return {"about": _about(configs[base], given, stream.digest), "runs": runs, "refused": refused}


def _with_seed(config: RunConfig, seed: int) -> RunConfig:
    return replace(config, run=replace(config.run, seed=config.run.seed + seed))


def _figures(one: Any, base: Any, seed: int) -> dict[str, Any]:
    kept = {key: getattr(one, key) for key in ("losses", "grad_norms", "held_out", "exported", "failure")}
    cosine = gradient_cosine(one.gradient, base.gradient)._asdict() if one.gradient else None
    return {"seed": seed, "cosine": cosine} | kept


def _about(config: RunConfig, given: argparse.Namespace, digest: str) -> dict[str, Any]:
    model, train = config.model, config.train
    return {
        "model": f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads, "
        f"{model.num_query_groups} KV heads of {model.kv_channels}",
        "layers": model.spec,
        "steps": given.steps,
        "seeds": f"{given.seeds} seed{'s' if given.seeds > 1 else ''}",
        "batch": f"{train.global_batch_size} x {config.data.sequence_length}",
        "held_out_tokens": train.eval_batches * train.global_batch_size * config.data.sequence_length,
        "learning_rate": config.optimizer.lr,
        "data_sha256": digest,
    }


# ---- the table


def _result(figures: dict[str, Any], tolerance: float, least_cosine: float) -> Result:
    about, runs, refused = figures["about"], figures["runs"], figures["refused"]
    base = next(iter(runs))
    result = Result(
        title=f"Training against {base}: {about['model']}, {about['steps']} steps of {about['batch']} bytes, "
        f"{about['seeds']}",
        columns=[
            *("precision", "loss, last fifth", "gap to base: mean (least to largest)", "largest gap in any window"),
            *("first gradient: cosine", "its worst parameter", "first loss: gap", "held-out loss", "exported, in bf16"),
            "verdict",
        ],
        figures=figures | {"tolerance": tolerance, "least_cosine": least_cosine, "over": {}},
        notes=_notes(about, base, tolerance, least_cosine),
    )
    if any("+reference" in name for name in runs):
        result.notes.append("+reference: the same arithmetic, rounded elsewhere: what rounding alone grows to")
    for name, own in runs.items():
        cells, found = _row(own, runs[base], tolerance, least_cosine, is_base=name == base)
        result.rows.append([name, *cells, "; ".join(found) or ("base" if name == base else "within")])
        if found:
            result.figures["over"][name] = found
    for name in refused:
        result.rows.append([name, *[""] * 8, "not run here"])
    if refused:
        reasons = "; ".join(
            f"{', '.join(name for name in refused if refused[name] == reason)}: {reason}"
            for reason in dict.fromkeys(refused.values())
        )
        result.notes.append(f"{len(refused)} of {len(runs) + len(refused)} not run here: {reasons}")
    unevaluated = sum(one["exported"] is None and not one["failure"] for own in runs.values() for one in own)
    if unevaluated:
        result.notes.append(f"{unevaluated} models not exported: transformers is not installed")
    result.is_over = bool(result.figures["over"])
    return result


def _row(
    own: list[dict[str, Any]], base: list[dict[str, Any]], tolerance: float, least_cosine: float, *, is_base: bool
) -> tuple[list[str], list[str]]:
    """The cells between name and verdict, and what is over its bound."""
    failures = [f"seed {one['seed']}: {one['failure']}" for one in own if one["failure"]]
    if failures:
        return [""] * 8, failures
    gap = paired_gap([one["losses"] for one in own], [one["losses"] for one in base])
    tail = num_tail_windows(len(own[0]["losses"])) * window_size(len(own[0]["losses"]))
    worst = min((one["cosine"] for one in own), key=lambda cosine: cosine["worst"])
    exported = [one["exported"] / one["held_out"] - 1 for one in own if one["exported"] is not None]
    cosines = [one["cosine"]["model"] for one in own]
    first = [one["losses"][0] / other["losses"][0] - 1 for one, other in zip(own, base, strict=True)]
    cells = [
        f"{statistics.fmean(loss for one in own for loss in one['losses'][-tail:]):.4f}",
        *(
            [""] * 5
            if is_base
            else [
                f"{_percent(gap.mean)} ({_percent(gap.low)} to {_percent(gap.high)})",
                f"{_percent(gap.largest)} (step {gap.largest_step})",
                f"{min(cosines):.6f}",
                f"{worst['worst']:.4f} ({worst['worst_parameter'].removeprefix('decoder.')})",
                f"{max(first, key=abs):+.1e}",
            ]
        ),
        f"{statistics.fmean(one['held_out'] for one in own):.4f}",
        f"{max(exported, key=abs):+.3%}" if exported else "",
    ]
    return cells, over(gap, cosines, exported, tolerance=tolerance, least_cosine=least_cosine)


def _percent(gap: float) -> str:
    """In percent, or as a power of ten where that would be 0.000 %."""
    return f"{gap:+.0e}" if 0 < abs(gap) < 5e-6 else f"{gap:+.3%}"


def _notes(about: dict[str, Any], base: str, tolerance: float, least_cosine: float) -> list[str]:
    size, tail = window_size(about["steps"]), num_tail_windows(about["steps"])
    return [
        f"every run of a seed starts from the same weights and reads the same batches in the same order; layers: "
        f"{about['layers']}; highest learning rate {about['learning_rate']:g}; bytes of the Python standard library "
        f"(sha256 {about['data_sha256']}), every 20th file held out; losses in nats per byte",
        f"gap: relative, of the mean loss in a window of {size} steps to {base}'s of the same window and seed; mean "
        f"and range over the last {tail} windows of all seeds",
        "first gradient: of the same weights and batch, before any update; least over the seeds",
        f"exported: held-out loss ({about['held_out_tokens']:,} bytes) of the Hugging Face model in bf16, relative to "
        "the one in training precision, both after the last step; the seed with the largest difference",
        f"within: none of these windows and no exported model differs by more than {tolerance:.1%}, and no seed's "
        f"gradient has a cosine under {least_cosine}",
    ]
