"""What `auto` becomes in ``model.spec`` and ``model.depth_attention.op``: a function of the config and of a machine.

A run resolves it once, at its start (`train.hardware.resolve_here`), and its config.yaml and checkpoints hold the
result. Planner and `launch/submit` resolve it for the machine that will train. What names a backend is left as it is.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from megatron_depthattn.config.check import checks, first_unsupported
from megatron_depthattn.config.schema import RunConfig

AUTO = "auto"
LARGEST_TRITON_HEAD = 256
AUTO_CHECKS = checks(
    "machine",
    (
        "{precision.fp8=} with model.spec=auto: only TransformerEngine's layers compute in FP8, and auto cannot take "
        "them here: {reason}; change that, or set precision.fp8=null",
        lambda config, why_local: config.precision.fp8 and why_local and {"reason": why_local},
    ),
)


class Available(NamedTuple):
    """What a machine has."""

    gpu: bool
    no_transformer_engine: str = ""
    """Why its GPUs do without TransformerEngine; empty: they have it."""
    no_triton: str = ""
    """The same of Triton."""


CPU, GPU = Available(gpu=False), Available(gpu=True)
"""A machine without a GPU, and one with GPUs and the software for them."""


class Resolved(NamedTuple):
    """A config without `auto`."""

    config: RunConfig
    reasons: dict[str, str]
    """By the key that was `auto`: what it became, and why."""

    @property
    def lines(self) -> list[str]:
        """The reasons for a log."""
        return [f"{key}={value}" for key, value in self.reasons.items()]


def resolve(config: RunConfig, available: Available) -> Resolved:
    """``config`` with `auto` replaced by what such a machine takes.

    Raises:
        ValueError: FP8 is asked for, which TransformerEngine's layers alone have, and they cannot be used.
    """
    model, reasons = config.model, dict[str, str]()
    spec, op = model.spec, model.depth_attention.op
    if spec == AUTO:
        why_local = _why_local(config, available)
        if message := first_unsupported(AUTO_CHECKS, config, why_local):
            raise ValueError(message)
        spec = "local" if why_local else "te"
        reasons["model.spec"] = f"{spec} (auto: {why_local or 'on GPUs with TransformerEngine'})"
    if op == AUTO:
        why_lean = _why_lean(config, available)
        op = "lean" if why_lean else "triton"
        reasons["model.depth_attention.op"] = f"{op} (auto: {why_lean or 'on GPUs with Triton'})"
    depth = dataclasses.replace(model.depth_attention, op=op)
    model = dataclasses.replace(model, spec=spec, depth_attention=depth)
    return Resolved(dataclasses.replace(config, model=model), reasons)


def _why_local(config: RunConfig, available: Available) -> str:
    """What rules TransformerEngine's layers out; empty: nothing."""
    engine, dtype = config.engine.name, config.precision.dtype
    reasons = {
        "no GPU": not available.gpu,
        "model.compile=true, which compiles the local layers": config.model.compile,
        f"engine.name={engine}, which has not run with TransformerEngine's layers": engine != "megatron",
        "precision.dtype=fp32, whose matrix products TransformerEngine computes in TF32": dtype == "fp32",
        f"no TransformerEngine: {available.no_transformer_engine}": available.no_transformer_engine,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def _why_lean(config: RunConfig, available: Available) -> str:
    """The same of the Triton kernels."""
    if not available.gpu:
        return "no GPU"
    if config.model.kv_channels > LARGEST_TRITON_HEAD:
        return f"model.kv_channels={config.model.kv_channels}, and triton takes heads of {LARGEST_TRITON_HEAD} at most"
    return f"triton {available.no_triton}" if available.no_triton else ""
