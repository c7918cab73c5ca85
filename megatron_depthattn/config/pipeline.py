"""Where a pipeline cuts the layers, as Megatron-Core places them, and the cuts that it does not have."""

import re
from functools import lru_cache
from itertools import accumulate
from typing import Any

from megatron_depthattn.config.check import checks
from megatron_depthattn.config.schema import ModelConfig, ParallelConfig, RunConfig

EVEN: dict[str, Any] = {"first_stage_layers": None, "last_stage_layers": None, "pipeline_layout": None}
"""The keys of the section ``parallel`` that cut the layers unevenly, as they are where all chunks are alike."""
LONGEST = 1 << 17
"""Letters of a product in a layout, about twice the most layers of a model."""


@lru_cache
def stages_of_layout(layout: str) -> tuple[str, ...]:
    """The letters of every chunk in model order: ``Ett|(t|)*2L`` are ``Ett``, ``t``, ``t`` and ``L``."""

    def repeated(match: re.Match[str]) -> str:
        times = int(match[2])
        return match[1] * times if len(match[1]) * times <= LONGEST else match[0]

    text = layout.replace(",", "")
    for product in (r"\(([^()]+)\)\*(\d{1,6})", r"([^()])\*(\d{1,6})"):
        text = re.sub(product, repeated, text)
    return tuple(text.split("|"))


def is_even(parallel: ParallelConfig) -> bool:
    """Whether all chunks hold the same number of layers."""
    return not any(getattr(parallel, key) for key in EVEN)


def chunk_layers(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """Effective layers of every chunk in model order, of settings that the checks accept."""
    if parallel.pipeline_layout:
        return tuple(stage.count("t") for stage in stages_of_layout(parallel.pipeline_layout))
    given = _given(parallel)
    left, others = model.num_layers * model.num_loops - sum(given.values()), parallel.pipeline - len(given)
    even = left // others if others else 0
    of_stages = (given.get(stage, even) for stage in range(parallel.pipeline))
    return tuple(layers // parallel.virtual_pipeline for layers in of_stages) * parallel.virtual_pipeline


def chunk_starts(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """The first effective layer of every chunk, in model order."""
    return tuple(accumulate(chunk_layers(model, parallel)[:-1], initial=0))


def _given(parallel: ParallelConfig) -> dict[int, int]:
    """Layers of the stages that the config counts."""
    ends = {0: parallel.first_stage_layers, parallel.pipeline - 1: parallel.last_stage_layers}
    return {stage: layers for stage, layers in ends.items() if layers is not None}


def _ends_that_do_not_fit(config: RunConfig, _: int) -> dict[str, Any]:
    parallel, layers = config.parallel, config.model.num_layers * config.model.num_loops
    stage, count = next(iter((given := _given(parallel)).items()), (0, 0))
    others, virtual = parallel.pipeline - len(given), parallel.virtual_pipeline

    def fits(count: int) -> bool:
        counts = (given | {stage: count}).values()
        left = layers - sum(counts)
        is_shared = left > 0 and left % (others * virtual) == 0 if others else left == 0
        return is_shared and all(count > 0 and count % virtual == 0 for count in counts)

    if not given or fits(count):
        return {}
    left, step = layers - sum(given.values()) + count, others * virtual or layers
    near = min(count, left) - (min(count, left) - left) % step
    counts = " or ".join(str(one) for one in (near - step, near, near + step) if fits(one))
    key = "parallel.last_stage_layers" if stage else "parallel.first_stage_layers"
    return {"layers": layers, "key": key, "counts": counts or "none does with the other settings"}


def _layout_that_is_none(config: RunConfig, _: int) -> dict[str, Any]:
    """What is wrong with a layout, and what to set."""
    parallel, layers, loops = config.parallel, config.model.num_layers * config.model.num_loops, config.model.num_loops
    if not parallel.pipeline_layout:
        return {}
    parts, chunks = stages_of_layout(parallel.pipeline_layout), parallel.pipeline * parallel.virtual_pipeline
    text, starts, a_loop = "".join(parts), [0, *accumulate(part.count("t") for part in parts)], len(parts) // loops
    empty = next((number for number, part in enumerate(parts) if not part), None)
    if unknown := re.sub("[EtL]", "", text):
        is_mtp = ", a layer of multi-token prediction, which this stack has not" * (unknown[0] == "m")
        found = f"has {unknown[0]!r}{is_mtp}", "a layout of E (embedding), t (decoder layer), L (loss) and |"
    elif len(parts) != chunks:
        virtual, rest = divmod(len(parts), parallel.pipeline)
        found = (
            f"has {len(parts)} parts, and there are {chunks} chunks (parallel.pipeline={parallel.pipeline} times "
            f"parallel.virtual_pipeline={parallel.virtual_pipeline})",
            f"one of {chunks} parts" + ("" if rest else f", or parallel.virtual_pipeline={virtual}"),
        )
    elif empty is not None:
        found = (
            f"leaves part {empty} (from 0) empty, through which every message would only be copied",
            "one without it, and fewer stages",
        )
    elif not re.fullmatch("Et*L", text):
        found = "does not begin with its one E and end with its one L", "one like Ett|tt|ttL"
    elif text.count("t") != layers:
        found = f"has {text.count('t')} layers (t), and the model {layers}", f"one of {layers} layers"
    elif any(starts[i] != starts[i - a_loop] + layers // loops for i in range(a_loop, len(parts))):
        found = (
            f"does not cut {loops} loops alike, and a stage keeps its layers' weights for all of them",
            f"one in which every {a_loop} parts hold {layers // loops} layers as the first {a_loop} do",
        )
    else:
        return {}
    return {"that": found[0], "instead": found[1]}


PIPELINE = checks(
    "pipeline",
    *(
        f"{{parallel.{key}=}} with parallel.pipeline=1: there is one stage, which holds all layers; set "
        f"parallel.{key}=null, or parallel.pipeline=2 or more"
        for key in EVEN
    ),
    *(
        f"{{parallel.pipeline_layout=}} with {{parallel.{key}=}}: a layout says the layers of every stage; set one of "
        "the two to null"
        for key in ("first_stage_layers", "last_stage_layers")
    ),
    (
        "{parallel.first_stage_layers=} and {parallel.last_stage_layers=} with {layers} layers, {parallel.pipeline=} "
        "and {parallel.virtual_pipeline=}: the chunks of a stage hold the same number of layers, and all stages "
        "that are not counted share what is left evenly; set {key} to one that fits: {counts}",
        _ends_that_do_not_fit,
    ),
    (
        "{parallel.pipeline_layout=} {that|is not one part for every chunk, E first, L last, with all layers and no "
        "other letters}; set {instead}, or parallel.pipeline_layout=null",
        _layout_that_is_none,
    ),
)
