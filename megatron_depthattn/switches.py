"""Megatron's switches for speed: what one that is null stands for.

None of them changes the model; docs/performance.md says where each has been tried.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_depthattn.config.schema import RunConfig

OVERLAPS = ("overlap_grad_reduce", "overlap_param_gather")
COMPILED = ("compile", "fused_swiglu", "fused_cross_entropy")
MODEL_SWITCHES = (*COMPILED, "fused_gradient_accumulation")
"""The keys of the section ``model`` that say how it is computed and not what."""


@dataclass(frozen=True)
class Kernels:
    """What the machine that will run has."""

    on_gpu: bool
    compiler: str | None
    """What torch.compile lacks to build kernels for the device; None: nothing."""
    adds_gradients: bool
    """Whether local layers have a kernel that adds to a weight's gradient: Apex's, and on CPUs torch's product."""


def resolved_switches(config: RunConfig, same_weights: int, kernels: Kernels) -> RunConfig:
    """The config with every switch that is null set to what it stands for; those that do not apply stay null.

    Args:
        same_weights: ranks that hold the same weights, so data-parallel times context-parallel ones.
        kernels: of the machines that will run.
    """
    model, parallel = config.model, config.parallel
    can_compile = kernels.on_gpu and not kernels.compiler
    has_chunks_of_same_weights = model.num_loops > 1 and parallel.virtual_pipeline > 1
    defaults = {
        "fused_swiglu": can_compile or model.compile,
        "fused_cross_entropy": can_compile and config.precision.dtype == "bf16",
    }
    overlaps: dict[str, Any] = {}
    if config.engine.name == "megatron":
        adds = model.num_loops == 1 and adds_gradients(config, kernels)
        defaults["fused_gradient_accumulation"] = adds
        helps = kernels.on_gpu and same_weights > 1 and not has_chunks_of_same_weights
        reduce = _given(parallel.overlap_grad_reduce, helps or bool(parallel.overlap_param_gather))
        overlaps = dict(zip(OVERLAPS, (reduce, _given(parallel.overlap_param_gather, reduce and helps)), strict=True))
    fusions: dict[str, Any] = {key: _given(getattr(model, key), default) for key, default in defaults.items()}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, **fusions),
        parallel=dataclasses.replace(parallel, **overlaps),
    )


def _given(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def adds_gradients(config: RunConfig, kernels: Kernels) -> bool:
    """Whether the layers of the config can add to a weight's gradient."""
    return config.model.spec == "te" or kernels.adds_gradients
