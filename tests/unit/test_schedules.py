"""The learning rate of every step that an engine takes, against closed formulas in fp64; resumed, to the bit."""

from collections.abc import Callable
from math import cos, pi
from pathlib import Path

import pytest
import torch
import yaml

from megatron_depthattn.config import RunConfig, from_dict, to_dict, validate
from tests.unit.test_save import SETTINGS

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

LR, END = 0.01, 0.001


def between(share: float) -> float:
    return END + (LR - END) * share


def wsd(decay: int, shape: Callable[[float], float], steps: int = 12) -> Callable[[int], float]:
    return lambda n: between(shape(max(0, n - (steps - decay)) / decay))


SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: cos(pi * x / 2) ** 2,
    "exponential": lambda x: 2 / 2**x - 1,
    "minus_sqrt": lambda x: 1 - x**0.5,
}
# name: what is set, steps of the warm-up, and the learning rate of step n after it, of 12
CASES = {
    "the default": ("warmup_ratio=0.25", 3, lambda n: between(SHAPES["cosine"]((n - 3) / 9))),
    "cosine, no warm-up": ("schedule=cosine warmup_ratio=0", 0, lambda n: between(SHAPES["cosine"](n / 12))),
    "linear": ("schedule=linear warmup_ratio=0.25", 3, lambda n: between(1 - (n - 3) / 9)),
    "linear, no warm-up": ("schedule=linear warmup_ratio=0", 0, lambda n: between(1 - n / 12)),
    "constant": ("schedule=constant warmup_ratio=0.25", 3, lambda n: LR),
    "constant, no warm-up": ("schedule=constant warmup_ratio=0", 0, lambda n: LR),
    "inverse_sqrt": ("schedule=inverse_sqrt warmup_ratio=0.25", 3, lambda n: LR * (3 / n) ** 0.5),
    "inverse_sqrt with a floor": (
        "schedule=inverse_sqrt warmup_ratio=0.25 min_lr_ratio=0.7",
        3,
        lambda n: max(LR * (3 / n) ** 0.5, 0.7 * LR),
    ),
    **{
        f"wsd, {style}": (f"schedule=wsd warmup_ratio=0.25 decay_ratio=0.5 decay_style={style}", 3, wsd(6, shape))
        for style, shape in SHAPES.items()
    },
    "batch ramp": (  # the schedule counts samples, 62 of them
        "schedule=wsd warmup_ratio=0.25 decay_ratio=0.5 decay_style=linear batch_ramp=[2,2,8]",
        16,
        wsd(31, SHAPES["linear"], steps=62),
    ),
    "wsd by default": ("schedule=wsd warmup_ratio=0.25", 3, wsd(2, SHAPES["minus_sqrt"])),
    "wsd that only decays": ("schedule=wsd warmup_ratio=0 decay_ratio=1", 0, wsd(12, SHAPES["minus_sqrt"])),
    "wsd without a plateau": ("schedule=wsd warmup_ratio=0.3 decay_ratio=0.7", 4, wsd(8, SHAPES["minus_sqrt"])),
    "wsd whose shares round to more": (
        "schedule=wsd warmup_ratio=0.3 decay_ratio=0.7 steps=5",
        2,
        wsd(3, SHAPES["minus_sqrt"], steps=5),
    ),
}
SAMPLES = [2, 4, 8, *range(14, 63, 6)]
"""With the ramp, after each step: 2, 2, 4 and 6, 6, ... of them."""
SAVED = (2, 9)
"""Steps: in the middle of the warm-up, and of every decay but the default's."""


def config_of(keys: str) -> RunConfig:
    given = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in keys.split())}
    train = SETTINGS["train"] | {"steps": given.pop("steps", 12)}
    if ramp := given.pop("batch_ramp", None):
        train |= {"batch_ramp": ramp, "global_batch_size": 6}
    settings = SETTINGS | {"optimizer": {"lr": LR} | given, "train": train}
    config = from_dict(settings, "a test")
    validate(config, 1, needs_data=False)
    return config


class Run:
    """An engine that trains; no loop around it."""

    def __init__(self, keys: str) -> None:
        from megatron_depthattn.train.engine import MegatronEngine

        self.config = config_of(keys)
        self.engine = MegatronEngine(self.config, torch.device("cpu"))
        self.steps: dict[int, tuple[float, float]] = {}

    def take(self, first: int, last: int) -> "Run":
        """Steps ``first`` to ``last``: their learning rates and losses."""
        for number in range(first, last + 1):
            size = SAMPLES[number - 1] - ([0, *SAMPLES])[number - 1] if self.config.train.batch_ramp else 2
            rows = torch.randint(128, (size, 17), generator=torch.Generator().manual_seed(number)).split(2)
            self.engine.advance_schedule(size)
            done = self.engine.train_step([{"tokens": two[:, :-1], "labels": two[:, 1:]} for two in rows])
            self.steps[number] = self.engine.learning_rate, done.loss
        return self

    def save(self, folder: Path, step: int) -> Path:
        from megatron_depthattn.train.save import CheckpointSaver
        from megatron_depthattn.train.step_folders import Progress

        saver = CheckpointSaver(folder)
        saver.save(Progress(step, 2 * step, 32 * step), self.engine.checkpoint_state())
        return saver.take_outcome().folder


def expected(name: str, steps: int) -> list[float]:
    _, warmup, after = CASES[name]
    counted = SAMPLES if name == "batch ramp" else range(1, steps + 1)
    return [LR * n / warmup if n <= warmup else after(n) for n in counted]


@pytest.mark.parametrize("name", CASES)
def test_every_step_has_its_learning_rate_resumed_or_not(name, tmp_path):
    """An engine's steps; from a checkpoint in the warm-up and in the decay the rest are the same to the bit."""
    keys = CASES[name][0]
    run = Run(keys)
    steps = run.config.train.steps
    folders, done = {}, 0
    for step in (*(step for step in SAVED if step < steps), steps):
        run.take(done + 1, step)
        done = step
        if step < steps:
            folders[step] = run.save(tmp_path, step)
    found = [rate for rate, _ in run.steps.values()]
    assert found == pytest.approx(expected(name, steps), rel=1e-12)
    others = [other for other in CASES if other != name and config_of(CASES[other][0]).train.steps == steps]
    assert all(found != pytest.approx(expected(other, steps), rel=1e-3) for other in others), "a table of one row"
    for step, folder in folders.items():
        resumed = Run(keys)
        assert resumed.engine.load(folder).progress.step == step
        assert resumed.take(step + 1, steps).steps.items() <= run.steps.items()


def test_control_a_schedule_that_was_not_loaded_is_seen(tmp_path):
    from megatron_depthattn.train.checkpoint import load_checkpoint

    keys = CASES["wsd, linear"][0]
    run = Run(keys).take(1, 9)
    folder = run.save(tmp_path, 9)
    run.take(10, 12)
    resumed = Run(keys)
    load_checkpoint(folder, resumed.engine._state, None, config=to_dict(resumed.config))
    found = resumed.take(10, 12).steps
    assert [rate for rate, _ in found.values()] == pytest.approx(expected("wsd, linear", 3)), "the warm-up again"
    assert not found.items() & run.steps.items()


def test_the_log_names_the_schedule():
    from megatron_depthattn.config.schedule import schedule_lines

    inverse = "inverse_sqrt, lr 0.01 after 6 of 12 steps, then down to 0.001 at the least"
    lines = {
        "schedule=cosine": "cosine, lr 0.01 after 0 of 12 steps, then down to 0.001",
        "schedule=constant warmup_ratio=0.5": "constant, lr 0.01 after 6 of 12 steps",
        "schedule=wsd": "wsd, lr 0.01 after 0 of 12 steps, minus_sqrt decay over the last 2 to 0.001",
        "schedule=inverse_sqrt warmup_ratio=0.5": inverse,
    }
    for keys, line in lines.items():
        assert schedule_lines(config_of(keys)) == [f"schedule: {line}"]
    counted = "schedule: constant, lr 0.01 after {} samples (with train.batch_ramp it counts samples)"
    ramp = "batch ramp: 2 sequences a step, 2 more at a time over 8 samples, {} on"
    for steps, *found in ((12, "16 of 62", "6 from step 4"), (3, "2 of 8", "4 from step 3")):
        config = config_of(f"schedule=constant warmup_ratio=0.25 batch_ramp=[2,2,8] steps={steps}")
        early = " (the run ends before 6)" * (steps == 3)
        assert schedule_lines(config) == [counted.format(found[0]), ramp.format(found[1]) + early]
