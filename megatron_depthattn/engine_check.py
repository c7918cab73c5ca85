"""Which engine settings cannot run, from strings and integers alone; `config_check.validate` raises what it returns."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_depthattn.config.schema import RunConfig


def engine_refusal(config: "RunConfig") -> str | None:
    """What was given, why it is refused and what to set; None: the engine can run it."""
    return _megatron_refusal(config) if config.engine.name == "megatron" else _deepspeed_refusal(config)


def _megatron_refusal(config: "RunConfig") -> str | None:
    engine = config.engine
    if engine.zero_stage != 0:
        return (
            f"engine.zero_stage is {engine.zero_stage} with engine.name=megatron, which has no ZeRO stages; "
            "set engine.zero_stage=0 (its optimizer's state is always sharded over the data-parallel ranks)"
        )
    if engine.offload_optimizer:
        return (
            "engine.offload_optimizer=true with engine.name=megatron, whose optimizer stays on its device; set "
            "engine.offload_optimizer=false, or engine.name=deepspeed with engine.zero_stage=1 or more"
        )
    return None


def _deepspeed_refusal(config: "RunConfig") -> str | None:
    engine, parallel = config.engine, config.parallel
    if not 0 <= engine.zero_stage <= 3:
        return f"engine.zero_stage is {engine.zero_stage}; set one of DeepSpeed's stages: 0, 1, 2, 3"
    if config.model.num_loops > 1:
        return (
            f"model.num_loops is {config.model.num_loops} with engine.name=deepspeed, which expects every weight's "
            "gradient once in a backward pass and gathers ZeRO-3 weights for the one module that holds them; set "
            "model.num_loops=1 or engine.name=megatron"
        )
    for key, value in (("virtual_pipeline", parallel.virtual_pipeline), ("pipeline", parallel.pipeline)):
        if value > 1:
            return (
                f"parallel.{key} is {value} with engine.name=deepspeed, which does not run Megatron's pipeline "
                f"schedules; set parallel.{key}=1 (and more parallel.tensor, or a higher engine.zero_stage), or "
                "engine.name=megatron"
            )
    if engine.offload_optimizer and engine.zero_stage == 0:
        return (
            "engine.offload_optimizer=true with engine.zero_stage=0, where DeepSpeed has no offload; set "
            "engine.zero_stage=1 or more, or engine.offload_optimizer=false"
        )
    if config.precision.dtype != "fp32" and engine.zero_stage == 0:
        return (
            f"precision.dtype={config.precision.dtype} with engine.name=deepspeed and engine.zero_stage=0, where "
            "DeepSpeed would sum gradients in bf16; set engine.zero_stage=1 or more (they sum in fp32), or "
            "engine.name=megatron"
        )
    return None
