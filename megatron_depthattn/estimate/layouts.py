"""The layouts of a config in a world of a given size, ranked by predicted step time among those that fit.

A layout is what `Layout.overrides` lists; everything else of the config stays. A candidate is one that `validate`
accepts, with tensor-parallel ranks in one node; what is shown is accepted by Megatron's config too, so it also starts.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from megatron_depthattn.config import RunConfig, Sizes, validate
from megatron_depthattn.config.pipeline import EVEN, is_even
from megatron_depthattn.estimate.counts import forward_flops
from megatron_depthattn.estimate.hardware import Hardware, resolve_for
from megatron_depthattn.estimate.memory import RankMemory, rank_memory
from megatron_depthattn.estimate.step_time import StepTime, run_seconds, step_time
from megatron_depthattn.estimate.traffic import CrossLayer

MEMORY_RESERVE = 0.08
"""Share of a device's memory left to the framework, to communication buffers and to fragmentation."""
LARGEST_MICRO_BATCH = 16
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {"granularity": None, "method": None, "num_layers": None},
    "selective": {"granularity": "selective", "method": None, "num_layers": None},
    "full": {"granularity": "full", "method": "uniform", "num_layers": 1},
}

FARTHEST = 16
"""Of a cut that is proposed, layers a chunk by which the first and the last stage differ from an even one's."""

PARALLEL_KEYS = ("tensor", "pipeline", "virtual_pipeline", "context", "sequence", *EVEN)
"""The keys of the section ``parallel`` that make a layout."""


@dataclass(frozen=True)
class Layout:
    """What a layout sets, with the config that it makes."""

    config: RunConfig
    shared: CrossLayer
    sizes: Sizes

    @property
    def overrides(self) -> dict[str, Any]:
        """Its keys of the run's config."""
        keys = {f"parallel.{key}": getattr(self.config.parallel, key) for key in PARALLEL_KEYS}
        keys |= {f"recompute.{key}": value for key, value in dataclasses.asdict(self.config.recompute).items()}
        return keys | {"train.micro_batch_size": self.config.train.micro_batch_size}

    @property
    def name(self) -> str:
        """Short, for tables: dp2 tp2+sp pp4x2 cp2 mb4 full."""
        return layout_name(self.config, self.sizes)


@dataclass(frozen=True)
class LayoutEstimate:
    """What a layout is predicted to cost."""

    name: str
    overrides: dict[str, Any]
    step_seconds: float
    tokens_per_second: float
    mfu: float
    """The model's arithmetic (recompute not counted) over the peak."""
    run_hours: float
    """Of train.steps steps, those of a batch ramp shorter; checkpoints, evaluation and restarts not counted."""
    memory: RankMemory
    """Of the fullest rank."""
    breakdown: StepTime
    other_chunks: tuple[int, ...] = ()
    """parallel.virtual_pipeline of slower layouts that fit and differ in nothing else."""


class Cut(NamedTuple):
    """Layers of the first and the last stage, and the predicted seconds of a step."""

    first_stage_layers: int
    last_stage_layers: int
    step_seconds: float


def layout_name(config: RunConfig, sizes: Sizes) -> str:
    """A layout in a few letters; parts of one rank are left out."""
    parallel = config.parallel
    parts = [f"dp{sizes.data_parallel_size}"]
    if parallel.tensor > 1:
        parts.append(f"tp{parallel.tensor}{'+sp' if parallel.sequence else ''}")
    if parallel.context > 1:
        parts.append(f"cp{parallel.context}")
    if parallel.pipeline > 1:
        virtual = parallel.virtual_pipeline
        uneven = "" if is_even(parallel) else " uneven"
        parts.append(f"pp{parallel.pipeline}{f'xvpp{virtual}' if virtual > 1 else ''}{uneven}")
    mode = config.recompute.granularity or "none"
    return " ".join([*parts, f"mb{config.train.micro_batch_size}", f"recompute {mode}"])


def candidate_layouts(config: RunConfig, world_size: int, hardware: Hardware) -> Iterator[Layout]:
    """Every layout that can run, in no particular order.

    Micro-batches up to `LARGEST_MICRO_BATCH`, recompute modes as in `RECOMPUTE`.
    """
    batch = config.train.global_batch_size
    for parallel in _parallel_settings(config, world_size, hardware):
        shared = None
        replicas = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
        for mode in RECOMPUTE.values():
            recompute, sizes = dataclasses.replace(config.recompute, **mode), None
            for micro in _divisors(batch, LARGEST_MICRO_BATCH):
                unit = micro * replicas * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
                if config.train.batch_sizes.divisor % unit:
                    continue
                passes = batch // (micro * replicas)
                train = dataclasses.replace(config.train, micro_batch_size=micro)
                candidate = dataclasses.replace(config, parallel=parallel, recompute=recompute, train=train)
                if sizes is None:  # the size of a micro-batch is of no consequence for the other checks
                    sizes = _accepted(candidate, world_size)
                if sizes is not None:
                    shared = shared or CrossLayer.of(candidate)
                    yield Layout(candidate, shared, dataclasses.replace(sizes, num_microbatches=passes))


def best_layouts(
    config: RunConfig,
    world_size: int,
    hardware: Hardware,
    *,
    limit: int = 10,
    accept: Callable[[RunConfig], bool] = lambda config: True,
) -> list[LayoutEstimate]:
    """The layouts that fit, fastest first.

    Args:
        limit: at most so many.
        accept: narrows the candidates, such as to the recompute mode that a study fixes.

    Raises:
        ValueError: no layout is valid, or none fits; names the smallest and what to set.
    """
    config = resolve_for(hardware, config).config
    candidates = [each for each in candidate_layouts(config, world_size, hardware) if accept(each.config)]
    if not candidates:
        try:
            validate(config, world_size, needs_data=False)
        except ValueError as error:
            raise ValueError(f"no layout of this config runs on {world_size} ranks; as it stands: {error}") from error
        raise ValueError(f"no candidate was accepted on {world_size} ranks; widen what is accepted")
    room = hardware.memory_gb * 1e9 * (1 - MEMORY_RESERVE)
    found: dict[str, LayoutEstimate] = {}
    smallest: tuple[float, str] = (float("inf"), "")
    too_large: dict[str, int] = {}  # a layout that did not fit does not fit with larger micro-batches
    for time, layout in _by_time(candidates, hardware):
        parallel, micro = layout.config.parallel, layout.config.train.micro_batch_size
        family = layout_name(dataclasses.replace(layout.config, train=config.train), layout.sizes)
        if micro >= too_large.get(family, micro + 1):
            continue
        chunks: dict[str, Any] = {"virtual_pipeline": 1} if is_even(parallel) else {}
        like = dataclasses.replace(layout.config, parallel=dataclasses.replace(parallel, **chunks))
        line = layout_name(like, layout.sizes)
        if len(found) == limit and line not in found:
            break
        memory = fullest_rank(layout, world_size, room)
        if memory.total > room:
            smallest = min(smallest, (memory.total, layout.name))
            too_large[family] = micro
        elif line in found:  # differs in its chunks alone
            also = (*found[line].other_chunks, parallel.virtual_pipeline)
            found[line] = dataclasses.replace(found[line], other_chunks=also)
        elif _accepted(layout.config, world_size, starts=True):
            found[line] = estimate(layout, time, memory, world_size, hardware)
    if not found:
        raise ValueError(
            f"none of {len(candidates)} layouts on {world_size} x {hardware.name} fits {room / 1e9:.1f} GB "
            f"({hardware.memory_gb:.0f} GB less {MEMORY_RESERVE:.0%}): the smallest, {smallest[1]}, needs "
            f"{smallest[0] / 1e9:.1f} GB. Set a larger --world, a shorter data.sequence_length, or a smaller model"
        )
    return [*found.values()]


def faster_cut(layout: Layout, seconds: float, world_size: int, hardware: Hardware) -> Cut | None:
    """The fastest cut that fits whose last stage, with the output layer, has no more layers than an even one.

    Args:
        seconds: a step of ``layout``; the cut takes less by 1 % or more.
    """
    config, found = layout.config, list[tuple[float, int, int, Layout]]()
    parallel, layers, step = config.parallel, len(layout.shared.num_sources), config.parallel.virtual_pipeline
    if parallel.pipeline == 1:
        return None
    even = layers // parallel.pipeline // step * step
    ends = range(even, max(0, even - FARTHEST * step), -step)
    starts = range(max(step, even - FARTHEST * step), even + FARTHEST * step, step)
    pairs = product(starts, ends) if parallel.pipeline > 2 else ((layers - last, last) for last in ends)
    for first, last in pairs:
        given = EVEN | {"first_stage_layers": first, "last_stage_layers": last}
        other = dataclasses.replace(config, parallel=dataclasses.replace(parallel, **given))
        if sizes := _accepted(other, world_size):
            cut = Layout(other, CrossLayer.of(other), sizes)
            found.append((step_time(other, cut.shared, sizes, hardware).total, first, last, cut))
    room = hardware.memory_gb * 1e9 * (1 - MEMORY_RESERVE)
    for time, first, last, cut in sorted(found, key=lambda each: each[0]):
        if time < 0.99 * seconds and fullest_rank(cut, world_size, room).total <= room:
            return Cut(first, last, time)
    return None


def _by_time(candidates: list[Layout], hardware: Hardware) -> Iterator[tuple[StepTime, Layout]]:
    """The layouts, fastest first; with recompute none is faster than without, so few of those are timed."""
    times: dict[tuple[Any, int], float] = {}
    waiting: list[tuple[float, int, StepTime | None]] = []  # seconds, at least, of which candidate; its time
    for number, layout in enumerate(candidates):
        config = layout.config
        family, time = (config.parallel, config.train.micro_batch_size), None
        if config.recompute.granularity is None:
            time = step_time(config, layout.shared, layout.sizes, hardware)
            times[family] = time.total
        waiting.append((times.get(family, 0.0), number, time))
    heapq.heapify(waiting)
    while waiting:
        _, number, time = heapq.heappop(waiting)
        layout = candidates[number]
        if time is not None:
            yield time, layout
        else:
            time = step_time(layout.config, layout.shared, layout.sizes, hardware)
            heapq.heappush(waiting, (time.total, number, time))


def fullest_rank(layout: Layout, world_size: int, room: float = float("inf")) -> RankMemory:
    """Memory of the pipeline stage that needs most, or of the first that needs more than ``room`` bytes."""
    fullest = None
    for stage in range(layout.config.parallel.pipeline):
        memory = rank_memory(layout.config, world_size, pipeline_rank=stage)
        if fullest is None or memory.total > fullest.total:
            fullest = memory
        if fullest.total > room:
            break
    assert fullest is not None
    return fullest


def estimate(layout: Layout, time: StepTime, memory: RankMemory, world_size: int, hardware: Hardware) -> LayoutEstimate:
    """One layout's figures."""
    config = layout.config
    tokens = config.train.global_batch_size * config.data.sequence_length
    peak = hardware.peak_tflops[config.precision.dtype]
    arithmetic = 3 * forward_flops(config).total * tokens / world_size
    return LayoutEstimate(
        name=layout.name,
        overrides=layout.overrides,
        step_seconds=time.total,
        tokens_per_second=tokens / time.total,
        run_hours=run_seconds(config, layout.shared, layout.sizes, hardware) / 3600,
        mfu=arithmetic / time.total / (peak * 1e12),
        memory=memory,
        breakdown=time,
    )


def _divisors(number: int, largest: int | None = None) -> list[int]:
    return [d for d in range(1, min(number, largest or number) + 1) if number % d == 0]


def _parallel_settings(config: RunConfig, world_size: int, hardware: Hardware) -> Iterator[Any]:
    depth, given = config.model.num_layers * config.model.num_loops, config.parallel
    for tensor in _divisors(world_size):
        if tensor > hardware.devices_per_node:
            break
        for pipeline in _divisors(world_size // tensor):
            for context in _divisors(world_size // tensor // pipeline):
                even = _divisors(depth // pipeline) if depth >= pipeline > 1 else [1]
                cuts = [EVEN | {"virtual_pipeline": virtual} for virtual in even]
                if pipeline == given.pipeline and not is_even(given):
                    cuts.append({})
                for cut in cuts:
                    for sequence in (False, True) if tensor > 1 else (False,):
                        yield dataclasses.replace(
                            given,
                            tensor=tensor,
                            pipeline=pipeline,
                            context=context,
                            sequence=sequence,
                            **cut,
                        )


def _accepted(config: RunConfig, world_size: int, *, starts: bool = False) -> Sizes | None:
    """What `validate` returns, None if it or (``starts``) Megatron's config does not take this one."""
    try:
        sizes = validate(config, world_size, needs_data=False)
        if starts:
            from megatron_depthattn.train.build import transformer_config

            transformer_config(config, only_counted=True)
    except ValueError:
        return None
    return sizes
