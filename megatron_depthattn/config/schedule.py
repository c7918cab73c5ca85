"""The learning rate's schedule in numbers: what it counts, how long its warm-up and its decay are; the batch ramp."""

from typing import Any, NamedTuple

from megatron_depthattn.config.check import checks
from megatron_depthattn.config.schema import RunConfig


class Schedule(NamedTuple):
    """Lengths of the parts of a run's schedule."""

    unit: str
    """What they count: steps, or samples where the batch size changes."""
    length: int
    """Of the whole run."""
    warmup: int
    """At the start, where the learning rate rises from 0."""
    decay: int
    """At the end, where that of wsd falls."""


def schedule_of(config: RunConfig) -> Schedule:
    """What the ratios come to; at least one step or sample is no warm-up, at least one is decay."""
    settings, train = config.optimizer, config.train
    counted = ("samples", train.batch_sizes.consumed_after(train.steps)) if train.batch_ramp else ("steps", train.steps)
    unit, length = counted
    warmup = min(round(settings.warmup_ratio * length), length - 1)
    return Schedule(unit, length, warmup, min(max(1, round(settings.decay_ratio * length)), length - warmup))


def schedule_lines(config: RunConfig) -> list[str]:
    """The schedule, and the batch sizes where they change, for a log."""
    settings, parts, train = config.optimizer, schedule_of(config), config.train
    line = f"schedule: {settings.schedule}, lr {settings.lr:g} after {parts.warmup:,} of {parts.length:,} {parts.unit}"
    end = f"{settings.lr * settings.min_lr_ratio:g}"
    if settings.schedule == "wsd":
        line += f", {settings.decay_style} decay over the last {parts.decay:,} to {end}"
    elif settings.schedule != "constant":
        line += f", then down to {end}" + " at the least" * (settings.schedule == "inverse_sqrt")
    if train.batch_ramp is None:
        return [line]
    *rising, (last, _) = train.batch_sizes.stretches(train.steps)
    steps, (start, increment, samples) = sum(count for _, count in rising), train.batch_ramp
    return [
        f"{line} (with train.batch_ramp it counts samples)",
        f"batch ramp: {start} sequences a step, {increment} more at a time over {samples:,} samples, {last} from step "
        f"{steps + 1:,} on" + f" (the run ends before {train.global_batch_size})" * (last < train.global_batch_size),
    ]


def _unlike(config: RunConfig, _: int) -> dict[str, Any]:
    """What is missing where whole increments do not lead from the start to the full batch."""
    start, increment, _samples = config.train.batch_ramp or (1, 1, 1)
    rest = config.train.global_batch_size - start
    return {"rest": rest} if config.train.batch_ramp and (rest <= 0 or rest % increment) else {}


SCHEDULES = checks(
    "schedules",
    (
        "{train.batch_ramp is}; set [start, increment, samples], three integers from 1 to 2147483647, or null",
        lambda c, _: (
            (ramp := c.train.batch_ramp) is not None and (len(ramp) != 3 or not all(1 <= n < 1 << 31 for n in ramp))
        ),
    ),
    (
        "{train.batch_ramp is}, which does not lead to {train.global_batch_size=}: the increment is added to the start "
        "until the batch is full; set a start below it, and an increment that divides the difference ({rest})",
        _unlike,
    ),
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
        lambda c, _: c.optimizer.schedule == "inverse_sqrt" and schedule_of(c).warmup < (c.train.batch_ramp or [1])[0],
    ),
)
