"""What `auto` becomes in ``model.spec`` and ``model.depth_attention.op``: a function of the config and of a machine.

A run resolves it once, at its start (`train.hardware.resolve_here`), and its config.yaml and checkpoints hold the
result. Planner and `launch/submit` resolve it for the machine that will train. What names a backend is left as it is.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from megatron_depthattn.config.check import Check, first_unsupported
from megatron_depthattn.config.schema import RunConfig

AUTO = "auto"
SPEC, OP = "model.spec", "model.depth_attention.op"
LARGEST_TRITON_HEAD = 256
FP8_IN_AUTO_LAYERS = Check(
    "machine",
    "{precision.fp8=} with model.spec=auto",
    lambda config, why_local: config.precision.fp8 and why_local and {"reason": why_local},
    "only TransformerEngine's layers compute in FP8, and auto cannot take them here: {reason}",
    "change that, or set precision.fp8=null",
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
    model, depth = config.model, config.model.depth_attention
    reasons: dict[str, str] = {}
    spec, op = model.spec, depth.op
    if spec == AUTO:
        why_local = _why_local(config, available)
        if message := first_unsupported((FP8_IN_AUTO_LAYERS,), config, why_local):
            raise ValueError(message)
        spec = "local" if why_local else "te"
        reasons[SPEC] = f"{spec} (auto: {why_local or 'on GPUs with TransformerEngine'})"
    if op == AUTO:
        why_lean = _why_lean(config, available)
        op = "lean" if why_lean else "triton"
        reasons[OP] = f"{op} (auto: {why_lean or 'on GPUs with Triton'})"
    if not reasons:
        return Resolved(config, reasons)
    depth = dataclasses.replace(depth, op=op)
    return Resolved(
        dataclasses.replace(config, model=dataclasses.replace(model, spec=spec, depth_attention=depth)), reasons
    )


def _why_local(config: RunConfig, available: Available) -> str:
    """What rules TransformerEngine's layers out; empty: nothing."""
    if not available.gpu:
        return "no GPU"
    if config.model.compile:
        return "model.compile=true, which compiles the local layers"
    if config.model.num_loops > 1:
        return f"model.num_loops={config.model.num_loops}, and looped models have not run on TransformerEngine's layers"
    if config.engine.name != "megatron":
        return f"engine.name={config.engine.name}, which has not run with TransformerEngine's layers"
    if config.precision.dtype == "fp32":
        return "precision.dtype=fp32, whose matrix products TransformerEngine computes in TF32"
    if available.no_transformer_engine:
        return f"no TransformerEngine: {available.no_transformer_engine}"
    return ""


def _why_lean(config: RunConfig, available: Available) -> str:
    """The same of the Triton kernels."""
    if not available.gpu:
        return "no GPU"
    if config.model.kv_channels > LARGEST_TRITON_HEAD:
        return f"model.kv_channels={config.model.kv_channels}, and triton takes heads of {LARGEST_TRITON_HEAD} at most"
    return f"triton {available.no_triton}" if available.no_triton else ""
