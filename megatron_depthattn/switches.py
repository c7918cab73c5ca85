"""Megatron's switches for speed: which cannot run, and what one that is null stands for.

None of them changes the model; docs/performance.md says where each has been tried.
"""

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


def switches_refusal(config: "RunConfig") -> str | None:
    """What was given, why it cannot run and what to set, from the config alone; None: it can run."""
    return _overlap_refusal(config) or _fusion_refusal(config) or _tensor_refusal(config)


def _overlap_refusal(config: "RunConfig") -> str | None:
    parallel = config.parallel
    for key in OVERLAPS:
        value = getattr(parallel, key)
        if value and config.engine.name == "deepspeed":
            return (
                f"parallel.{key}=true with engine.name=deepspeed, which reduces and gathers in its own "
                f"way; set parallel.{key}=null, or engine.name=megatron"
            )
        if value and _has_lent_chunks(config):
            return (
                f"parallel.{key}=true with model.num_loops={config.model.num_loops} and parallel.virtual_pipeline="
                f"{parallel.virtual_pipeline}: the chunks of a rank use the same weights, whose gradients are finished "
                f"once for each chunk, so no bucket knows the last time; set parallel.{key}=null, or "
                "parallel.pipeline=1 and parallel.virtual_pipeline=1"
            )
    if parallel.overlap_param_gather and parallel.overlap_grad_reduce is False:
        return (
            "parallel.overlap_param_gather=true with parallel.overlap_grad_reduce=false: the buckets that are gathered "
            "one by one are those of the reduction; set parallel.overlap_grad_reduce=true, or "
            "parallel.overlap_param_gather=false"
        )
    return None


def _fusion_refusal(config: "RunConfig") -> str | None:
    model = config.model
    if model.compile and model.spec == "te":
        return (
            "model.compile=true with model.spec=te: the norms of the local layers are compiled, TransformerEngine's "
            "are kernels already; set model.compile=false, or model.spec=local"
        )
    if model.compile and config.engine.name == "deepspeed":
        return (
            "model.compile=true with engine.name=deepspeed, which takes weights away from the modules and has not been "
            "tried with compiled ones; set model.compile=false, or engine.name=megatron"
        )
    if model.fused_cross_entropy and config.precision.dtype != "bf16":
        return (
            f"model.fused_cross_entropy=true with precision.dtype={config.precision.dtype}: Megatron's kernel rounds "
            "the logits' gradient to bf16; set model.fused_cross_entropy=false, or precision.dtype=bf16"
        )
    if not model.fused_gradient_accumulation:
        return None
    key = "model.fused_gradient_accumulation"
    if config.engine.name == "deepspeed":
        return (
            f"{key}=true with engine.name=deepspeed, whose gradients are not summed in Megatron's buffers; set "
            f"{key}=null, or engine.name=megatron"
        )
    if model.num_loops > 1:
        return (
            f"{key}=true with model.num_loops={model.num_loops}: TransformerEngine's first microbatch of a step "
            "overwrites a weight's gradient, also that of the loops before; "
            f"set {key}=null, or model.num_loops=1"
        )
    return None


def _tensor_refusal(config: "RunConfig") -> str | None:
    if not config.parallel.tp_comm_overlap:
        return None
    needed = {
        "engine.name=megatron": config.engine.name == "megatron",
        "model.spec=te": config.model.spec != "local",
        "precision.dtype=bf16": config.precision.dtype == "bf16",
        "parallel.tensor=2 or more": config.parallel.tensor > 1,
        "parallel.sequence=true": config.parallel.sequence,
    }
    missing = [setting for setting, is_there in needed.items() if not is_there]
    if not missing:
        return None
    return (
        "parallel.tp_comm_overlap=true overlaps the gathers and reductions of sequence parallel inside "
        f"TransformerEngine's layers, in bf16; set {' and '.join(missing)}, or parallel.tp_comm_overlap=false"
    )


def kernels_refusal(config: "RunConfig", kernels: Kernels) -> str | None:
    """What was asked for and this machine lacks, and what to set; None: it has everything."""
    for key in COMPILED:
        if getattr(config.model, key) and kernels.compiler:
            return (
                f"model.{key}=true builds a kernel at first use, which needs {kernels.compiler}: install it, or set "
                f"model.{key}=false"
            )
    if config.model.fused_gradient_accumulation and not _adds_gradients(config, kernels):
        return (
            f"model.fused_gradient_accumulation=true with model.spec={config.model.spec} needs Apex's "
            "fused_weight_gradient_mlp_cuda, which cannot be imported here: install Apex with --cpp_ext and "
            "--cuda_ext, or set model.fused_gradient_accumulation=false, or model.spec=te"
        )
    return None


def resolved_switches(config: "RunConfig", same_weights: int, kernels: Kernels) -> "RunConfig":
    """The config with every switch that is null set to what it stands for; those that do not apply stay null.

    Args:
        same_weights: ranks that hold the same weights, so data-parallel times context-parallel ones.
        kernels: of the machines that will run.
    """
    model, parallel = config.model, config.parallel
    can_compile = kernels.on_gpu and not kernels.compiler
    defaults = {
        "fused_swiglu": can_compile or model.compile,
        "fused_cross_entropy": can_compile and config.precision.dtype == "bf16",
    }
    overlaps: dict[str, Any] = {}
    if config.engine.name == "megatron":
        adds = model.num_loops == 1 and _adds_gradients(config, kernels)
        defaults["fused_gradient_accumulation"] = adds
        helps = kernels.on_gpu and same_weights > 1 and not _has_lent_chunks(config)
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


def _has_lent_chunks(config: "RunConfig") -> bool:
    """Whether a rank has several pipeline chunks that use the same weights."""
    return config.model.num_loops > 1 and config.parallel.virtual_pipeline > 1


def _adds_gradients(config: "RunConfig", kernels: Kernels) -> bool:
    return config.model.spec == "te" or kernels.adds_gradients
