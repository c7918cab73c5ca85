"""Proportions of the streams by stage of training: where each stage begins in the order of samples, and its checks."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from megatron_depthattn.config.check import Condition, checks
from megatron_depthattn.config.schema import DataConfig, RunConfig, StageConfig, TrainConfig


class Stage(NamedTuple):
    """Proportions that hold from a position of the order of samples on; a list of these three in a checkpoint."""

    from_step: int
    """Of data.stages; 0: the streams' own, or those in which a parent has read what data.skip_samples passes over."""
    first_sample: int
    proportions: list[float]
    """One for each stream."""


def stages_of(
    data: DataConfig,
    train: TrainConfig,
    *,
    step: int = 0,
    consumed_samples: int = 0,
    known: Sequence[Sequence[Any]] | None = None,
) -> list[Stage]:
    """The stages of a run, in the order in which they begin.

    A stage begins with the first sample of its step. Where that is follows from the batch sizes of the steps before;
    those of a run that resumes may have been others than ``train`` says, so its checkpoint holds where they began.

    Args:
        step, consumed_samples: where the run begins or resumes; samples that ``data.skip_samples`` passes over are not
            counted.
        known: the stages that have begun by then, of the checkpoint; None: the streams' own proportions alone.

    Raises:
        ValueError: ``data.stages`` says other proportions for steps that have been taken.
    """
    begun = [Stage(*stage) for stage in known or [Stage(0, 0, own_proportions(data))]]
    read = [(stage.from_step, stage.proportions) for stage in begun if stage.from_step]
    given = [(stage.from_step, stage.proportions) for stage in data.stages or []]
    if (now := [stage for stage in given if stage[0] <= step]) != read:
        raise ValueError(
            f"data.stages has {_in_words(now)} for the {step} steps that this run has taken, which were read with "
            f"{_in_words(read)}: what has been read stays; set those stages as they were and change the proportions "
            f"from step {step + 1} on, or start a new run: another run.dir with checkpoint.load=null."
        )
    after = data.skip_samples
    return begun + [
        Stage(first, after + train.batch_sizes.consumed_after(first - 1 - step, consumed_samples), proportions)
        for first, proportions in given
        if first > step
    ]


def own_proportions(data: DataConfig) -> list[float]:
    """The proportions that hold before the first stage."""
    return [source.proportion for source in data.sources]


def after_steps(stages: Sequence[StageConfig] | None, steps: int, last: int) -> list[StageConfig] | None:
    """``data.stages`` of a run of ``last`` steps that begins where another one has taken so many steps by them."""
    if stages is None:
        return None
    moved = [(stage.from_step - steps, stage.proportions) for stage in stages if stage.from_step - steps <= last]
    ahead = [StageConfig(from_step=first, proportions=shares) for first, shares in moved if first > 1]
    return [StageConfig(from_step=1, proportions=shares) for first, shares in moved if first <= 1][-1:] + ahead or None


def _in_words(stages: Sequence[tuple[int, list[float]]]) -> str:
    return ", ".join(f"{shares} from step {first}" for first, shares in stages) or "the streams' own proportions"


# ---- checks


def _first(found: Callable[[RunConfig], Iterator[dict[str, Any]]]) -> Condition:
    return lambda config, _: next(found(config), {}) if config.data.streams and config.data.stages else {}


def _outside(config: RunConfig) -> Iterator[dict[str, Any]]:
    for number, stage in enumerate(config.data.stages or []):
        if not 1 <= stage.from_step <= config.train.steps:
            yield {"stage": f"data.stages[{number}]", "step": stage.from_step}


def _unordered(config: RunConfig) -> Iterator[dict[str, Any]]:
    steps = [stage.from_step for stage in config.data.stages or []]
    for number in range(1, len(steps)):
        if steps[number] <= steps[number - 1]:
            yield {"stage": f"data.stages[{number}]", "step": steps[number], "before": steps[number - 1]}


def _wrong_count(config: RunConfig) -> Iterator[dict[str, Any]]:
    streams = len(config.data.streams or [])
    for number, stage in enumerate(config.data.stages or []):
        if len(stage.proportions) != streams:
            yield {"stage": f"data.stages[{number}]", "count": len(stage.proportions), "streams": streams}


def _no_share(config: RunConfig) -> Iterator[dict[str, Any]]:
    for number, stage in enumerate(config.data.stages or []):
        if not all(0 <= share < math.inf for share in stage.proportions) or not any(stage.proportions):
            yield {"stage": f"data.stages[{number}]", "proportions": stage.proportions}


def _rounded_away(config: RunConfig) -> Iterator[dict[str, Any]]:
    from megatron_depthattn.data.order import slots_of

    for number, stage in enumerate(config.data.stages or []):
        try:
            slots_of(stage.proportions)
        except ValueError:
            smallest = min(filter(None, stage.proportions))
            yield {"stage": f"data.stages[{number}]", "share": smallest, "proportions": stage.proportions}


STAGES = checks(
    "data",
    (
        "data.stages with data.streams=null: stages say in which proportions several streams are read; set "
        "data.streams, or data.stages=null",
        lambda c, _: c.data.stages is not None and c.data.streams is None,
    ),
    (
        "data.stages is an empty list; give at least one entry of from_step and proportions, or set data.stages=null",
        lambda c, _: c.data.stages == [],
    ),
    (
        "{stage}.from_step is {step}: steps count from 1, and until the first stage the streams' own proportions hold; "
        "set 1 to {train.steps=}",
        _first(_outside),
    ),
    ("{stage}.from_step is {step}, after a stage from step {before}; set a later step", _first(_unordered)),
    (
        "{stage}.proportions has {count} numbers for {streams} streams; set one for each of data.streams, in their "
        "order, 0 where a stream rests",
        _first(_wrong_count),
    ),
    ("{stage}.proportions is {proportions}; set numbers of 0 or more, one of them above 0", _first(_no_share)),
    (
        "{stage}.proportions is {proportions}, of which {share} rounds to none of 1000 samples; set at least 1/1000 of "
        "the sum, or 0",
        _first(_rounded_away),
    ),
)
