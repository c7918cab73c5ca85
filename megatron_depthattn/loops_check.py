"""Which looped models cannot run, from strings and integers alone; `config_check.validate` raises what it returns."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_depthattn.config.schema import RunConfig


def loops_refusal(config: "RunConfig") -> str | None:
    """What was given, why it is refused and what to set; None: not looped, or it can run."""
    model, parallel = config.model, config.parallel
    loops = f"model.num_loops is {model.num_loops}"
    if model.num_loops == 1:
        return None
    if model.method not in ("depth_attention", "vanilla"):
        return (
            f"{loops} with model.method={model.method}, which has weights of its own for every place in depth and is "
            "not defined for a stack that is run again; set model.num_loops=1, or model.method to depth_attention or "
            "vanilla"
        )
    if config.precision.fp8 is not None:
        return (
            f"{loops} with precision.fp8={config.precision.fp8}: scaling state has not been tried with weights that "
            "several layers use; set precision.fp8=null or model.num_loops=1"
        )
    if parallel.pipeline > 1 and parallel.virtual_pipeline != model.num_loops:
        return (
            f"{loops} with parallel.pipeline={parallel.pipeline} and parallel.virtual_pipeline="
            f"{parallel.virtual_pipeline}: a stage keeps its layers' weights for all loops, so it holds one chunk for "
            f"each; set parallel.virtual_pipeline={model.num_loops}, or parallel.pipeline=1"
        )
    return None
