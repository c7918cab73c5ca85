"""The learning rate's schedule in numbers: what it counts, and how long its warm-up and its decay are."""

from typing import NamedTuple

from megatron_depthattn.config.check import checks
from megatron_depthattn.config.schema import RunConfig


class Schedule(NamedTuple):
    """Lengths of the parts of a run's schedule, all in optimizer steps."""

    length: int
    """Of the whole run."""
    warmup: int
    """At the start, where the learning rate rises from 0."""
    decay: int
    """At the end, where that of wsd falls."""


def schedule_of(config: RunConfig) -> Schedule:
    """What the ratios come to; at least one step is no warm-up, at least one is decay."""
    settings, length = config.optimizer, config.train.steps
    warmup = min(round(settings.warmup_ratio * length), length - 1)
    return Schedule(length, warmup, min(max(1, round(settings.decay_ratio * length)), length - warmup))


def schedule_line(config: RunConfig) -> str:
    """The schedule in one line of the log."""
    settings, parts = config.optimizer, schedule_of(config)
    shape = f"{settings.schedule}, lr {settings.lr:g} after {parts.warmup:,} of {parts.length:,} steps"
    end = settings.lr * settings.min_lr_ratio
    if settings.schedule == "constant":
        return f"schedule: {shape}"
    if settings.schedule == "wsd":
        return f"schedule: {shape}, {settings.decay_style} decay over the last {parts.decay:,} to {end:g}"
    return f"schedule: {shape}, then down to {end:g}" + " at the least" * (settings.schedule == "inverse_sqrt")


SCHEDULES = checks(
    "schedules",
    (
        "optimizer.schedule=wsd with {optimizer.warmup_ratio=} and {optimizer.decay_ratio=|that are more than 1 "
        "together}: the decay would begin before the warm-up has ended; set smaller ones (optimizer.warmup_ratio=0 for "
        "a run that only decays)",
        lambda c, _: c.optimizer.schedule == "wsd" and c.optimizer.warmup_ratio + c.optimizer.decay_ratio > 1 + 1e-9,
    ),
    (
        "optimizer.schedule=inverse_sqrt with {optimizer.warmup_ratio=} of {train.steps=|that is no whole step}: the "
        "learning rate is lr * sqrt(warm-up / step), so it would fall from the first step on; set a larger "
        "optimizer.warmup_ratio, or another optimizer.schedule",
        lambda c, _: c.optimizer.schedule == "inverse_sqrt" and schedule_of(c).warmup == 0,
    ),
)
