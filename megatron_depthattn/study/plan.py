"""From a study to its points: every run with its config, its folder and what it will cost. Nothing is started.

With `schedule: wsd` the points of a rung, method and seed share a trunk: one run with a constant rate after its
warm-up, as long as the stable part of the largest budget, that keeps a checkpoint where each budget branches off. A
point is then a run that begins there, with the optimizer and behind the samples of the trunk, and decays. Together they
are, bit for bit, a run of `optimizer.schedule=wsd` over the budget, with as many steps of warm-up as the rung's largest
budget would have.

The output folder afterwards:

    plan.json            rungs, points and trunks
    configs/<id>.yaml    the whole config of each run
    runs/<id>/           its run directory, once it runs
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_depthattn.config import RunConfig, save_config, validate
from megatron_depthattn.config.load import Layer, build, read_yaml
from megatron_depthattn.config.schedule import Schedule, schedule_of
from megatron_depthattn.config.stages import after_steps
from megatron_depthattn.estimate.counts import decoder_shape, forward_flops
from megatron_depthattn.model.flops import DecoderShape
from megatron_depthattn.study.study import METHODS, Arm, Study
from megatron_depthattn.train.build import transformer_config
from megatron_depthattn.train.step_folders import step_folder

PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a study."""

    id: str
    rung: str
    method: str
    tokens_per_parameter: float
    seed: int
    size: int
    """N of the fits: weights of the rung's vanilla model without the embedding table."""
    parameters: int
    """Of this very model."""
    tokens: int
    """Of its budget, those of its trunk included."""
    steps: int
    """Of this run itself."""
    flops: float
    """Of the whole training, forward and backward, its part of the trunk included."""
    world: int
    layout: dict[str, Any]
    """Keys that were chosen for the devices, not by the study."""
    predicted_step_seconds: float | None
    trunk: str | None = None
    """Id of the run that it branches off."""
    trunk_steps: int = 0
    """After how many steps of that."""

    @property
    def own_share(self) -> float:
        """Of tokens and FLOPs: that of this run itself."""
        return self.steps / (self.steps + self.trunk_steps)

    @property
    def config(self) -> str:
        """File of the run's config, relative to the output folder."""
        return f"configs/{self.id}.yaml"

    @property
    def run_dir(self) -> str:
        """Relative to the output folder."""
        return f"runs/{self.id}"


def make_plan(study: Study, folder: Path, output: Path) -> dict[str, Any]:
    """Write the plan and every point's config below ``output``; returns what ``plan.json`` holds.

    Args:
        study: as `load_study` gives it.
        folder: of the study's file, for the paths in it.

    Raises:
        ValueError: a point's config cannot run on the study's devices; says which and why.
    """
    rungs, points, trunks = [], list[Point](), list[Point]()
    for name in study.rung_names:
        layers = _rung_layers(study, folder, name)
        config, shape = build(RunConfig, layers), _vanilla_shape(layers)
        rungs.append(
            {
                "rung": name,
                "num_layers": config.model.num_layers,
                "hidden_size": config.model.hidden_size,
                "size": _size(shape),
                "parameters": shape.parameters,
                "learning_rate": config.optimizer.lr,
                "global_batch_size": config.train.global_batch_size,
                "sequence_length": config.data.sequence_length,
            }
        )
        arms = [method for method, arm in study.methods.items() if arm.rungs is None or name in arm.rungs]
        runs = [run for method in arms for run in _points(study, name, _size(shape), layers, method, output)]
        # Pairs one after the other: a study that is cut has whole ones.
        runs.sort(key=lambda run: (run.tokens_per_parameter, study.seeds.index(run.seed)))
        sources = {run.trunk for run in runs}
        trunks += [run for run in runs if run.id in sources]
        points += [run for run in runs if run.id not in sources]
    for identity, count in Counter(point.id for point in points).items():
        if count > 1:
            raise ValueError(f"{count} runs of the study are {identity}: take token budgets that differ by more")
    plan = {key: getattr(study, key) for key in ("title", "question", "baseline", "confidence")}
    plan |= {"study": output.name, "rungs": rungs, "points": [dataclasses.asdict(point) for point in points]}
    plan |= {"trunks": [dataclasses.asdict(trunk) for trunk in trunks]}
    output.mkdir(parents=True, exist_ok=True)
    (output / PLAN).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    return plan


def read_points(output: Path, kind: str = "points") -> list[Point]:
    """The points, or ``trunks``, of the plan below ``output``; ValueError where there is no plan."""
    if not (output / PLAN).is_file():
        raise ValueError(f"{output} holds no plan.json; write it first: depthattn study plan STUDY")
    fields, plan = Point.__dataclass_fields__, json.loads((output / PLAN).read_text(encoding="utf-8"))
    return [Point(**{key: value for key, value in point.items() if key in fields}) for point in plan.get(kind, [])]


def with_trunks(points: Sequence[Point], output: Path) -> list[Point]:
    """Points and the trunks that they branch off, each before the first that needs it."""
    trunks = {trunk.id: trunk for trunk in read_points(output, "trunks")}
    return list({run.id: run for point in points for run in (trunks.get(point.trunk or ""), point) if run}.values())


def _rung_layers(study: Study, folder: Path, name: str) -> list[Layer]:
    """Settings of the run's config that all points of the rung share, by the ladder's rules where it stands on one."""

    def read(file: str | None) -> list[Layer]:
        return read_yaml(folder / os.path.expanduser(file)) if file else []

    shared = Layer("settings of the study", study.settings)
    if study.ladder is None:
        (rung,) = (rung for rung in study.rungs or [] if rung.name == name)
        own = Layer(f"rung {name} of the study", rung.settings)
        return [*read(study.config), *read(rung.config), own, shared]
    shape = study.ladder.shape(study.ladder.layers[study.rung_names.index(name)])
    layers = [*read(study.config), Layer(f"the ladder at {name}", shape), shared]
    return [*layers, Layer(f"the ladder at {name}", study.ladder.recipe(_size(_vanilla_shape(layers))))]


def _vanilla_shape(layers: list[Layer]) -> DecoderShape:
    return decoder_shape(build(RunConfig, [*layers, Layer("a rung's size", {"model.method": "vanilla"})]))


def _size(shape: DecoderShape) -> int:
    return shape.parameters - shape.vocab_size * shape.hidden_size


class _Course(NamedTuple):
    """A run as every seed has it."""

    name: str
    multiple: float
    """Tokens per weight."""
    steps: int
    """Of the run itself."""
    eval_interval: int
    trunk_steps: int = 0
    """Of the trunk that it branches off, before."""
    optimizer: dict[str, Any] | None = None
    """Keys of that section that it sets."""
    keep_steps: list[int] | None = None


def _points(study: Study, rung: str, size: int, layers: list[Layer], method: str, output: Path) -> list[Point]:
    """Every budget and seed of a method at a rung, each seed's trunk before them; their configs are written."""
    arm, devices = study.methods[method], study.world.devices
    settings = ({"model.method": method} if method in METHODS else {}) | arm.settings
    layers = [*layers, Layer(f"methods.{method} of the study", settings)]
    layout, seconds = _layout(study, build(RunConfig, layers), f"{rung}, {method}")
    config = build(RunConfig, [*layers, Layer("the layout", layout | {"checkpoint.load": "latest"})])
    batch = config.train.global_batch_size
    if study.eval_sequences % batch:
        raise ValueError(
            f"{rung}: eval_sequences is {study.eval_sequences} and the global batch {batch}: every size has to be "
            f"evaluated on the same sequences; set eval_sequences to a multiple of {batch}"
        )
    sizes, length = config.train.batch_sizes, config.data.sequence_length

    def courses_of(arm: Arm) -> list[_Course]:
        budgets = arm.tokens_per_parameter or study.tokens_per_parameter_at.get(rung) or study.tokens_per_parameter
        whole = [(budget, sizes.steps_to(budget * size, length)) for budget in budgets or []]
        whole = whole or [(sizes.consumed_after(config.train.steps) * length / size, config.train.steps)]
        return [_Course(f"x{of:.3g}", of, steps, math.ceil(steps / study.evaluations)) for of, steps in whole]

    courses = courses_of(arm)
    if study.schedule == "wsd":
        arms = [each for each in study.methods.values() if each.rungs is None or rung in each.rungs]
        longest = max(course.steps for each in arms for course in courses_of(each))
        courses = _on_a_trunk(study, config, courses, longest, f"{rung}, {method}")
    points = []
    for seed, course in itertools.product(study.seeds, courses):
        point, trunk = (f"{rung}/{method}/{name}/seed{seed}" for name in (course.name, courses[0].name))
        tokens = sizes.consumed_after(course.trunk_steps + course.steps) * length
        saved = config.checkpoint.dir and str(Path(config.checkpoint.dir) / point)
        checkpoint = dataclasses.replace(config.checkpoint, dir=saved, keep_steps=course.keep_steps)
        data, wandb = config.data, config.log.wandb
        if wandb.project:
            wandb = dataclasses.replace(wandb, name=wandb.name or point)
        if course.trunk_steps:
            own = config.checkpoint.dir
            saves = Path(own, trunk) if own else output / "runs" / trunk / "checkpoints"
            begin = str(step_folder(saves, course.trunk_steps))
            checkpoint = dataclasses.replace(checkpoint, start_from=begin, start_optimizer=True)
            data = dataclasses.replace(data, skip_samples=data.skip_samples + course.trunk_steps * batch)
        data = dataclasses.replace(data, stages=after_steps(data.stages, course.trunk_steps, course.steps))
        run = dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, dir=str(output / "runs" / point), seed=seed),
            data=data,
            train=dataclasses.replace(
                config.train,
                steps=course.steps,
                eval_interval=course.eval_interval,
                eval_batches=study.eval_sequences // batch,
            ),
            optimizer=dataclasses.replace(config.optimizer, **(course.optimizer or {})),
            checkpoint=checkpoint,
            log=dataclasses.replace(config.log, wandb=wandb),
        )
        try:
            validate(run, devices)
            transformer_config(run, only_counted=True)
        except ValueError as error:
            raise ValueError(f"{point}: {error}") from error
        points.append(
            Point(
                id=point,
                rung=rung,
                method=method,
                tokens_per_parameter=course.multiple,
                seed=seed,
                size=size,
                parameters=decoder_shape(run).parameters,
                tokens=tokens,
                steps=course.steps,
                flops=3.0 * forward_flops(run).total * tokens,
                world=devices,
                layout=layout,
                predicted_step_seconds=seconds,
                trunk=trunk if course.trunk_steps else None,
                trunk_steps=course.trunk_steps,
            )
        )
        save_config(run, output / points[-1].config)
    return points


def _on_a_trunk(study: Study, config: RunConfig, courses: list[_Course], longest: int, name: str) -> list[_Course]:
    """The trunk of some budgets, and a decay for each that branches off it.

    ``longest``: steps of the rung's largest budget, whose warm-up all methods share.
    """

    def parts(steps: int, warmup_ratio: float) -> Schedule:
        settings = dataclasses.replace(
            config.optimizer, schedule="wsd", decay_ratio=study.decay_ratio, warmup_ratio=warmup_ratio
        )
        train = dataclasses.replace(config.train, steps=steps)
        return schedule_of(dataclasses.replace(config, optimizer=settings, train=train))

    if config.train.batch_ramp:
        raise ValueError(f"{name}: schedule: wsd with train.batch_ramp: a branch would ramp again; set one to null")
    warmup = parts(longest, config.optimizer.warmup_ratio).warmup
    decays = [parts(course.steps, warmup / course.steps).decay for course in courses]
    begins = [course.steps - decay for course, decay in zip(courses, decays, strict=True)]
    if min(begins) <= warmup:
        raise ValueError(
            f"{name}: with schedule: wsd the warm-up of the largest budget has {warmup} steps, and the decay of the "
            f"smallest would begin after {min(begins)}: set a smaller optimizer.warmup_ratio or decay_ratio, or larger "
            "budgets"
        )
    length, last = max(begins), max(courses, key=lambda course: course.steps)
    constant = {"schedule": "constant", "warmup_ratio": warmup / length}
    multiple = last.multiple * length / last.steps
    return [
        _Course("trunk", multiple, length, last.eval_interval, 0, constant, sorted({*begins})),
        *(
            course._replace(
                steps=decay,
                trunk_steps=begin,
                optimizer={"schedule": "wsd", "warmup_ratio": 0.0, "decay_ratio": 1.0},
            )
            for course, decay, begin in zip(courses, decays, begins, strict=True)
        ),
    ]


def _layout(study: Study, config: RunConfig, name: str) -> tuple[dict[str, Any], float | None]:
    """Keys of the fastest predicted layout and its seconds a step; nothing without a GPU's name."""
    if study.world.gpu is None:
        return {}, None
    from megatron_depthattn.estimate.hardware import find_gpu
    from megatron_depthattn.estimate.layouts import best_layouts

    print(f"{name}: choosing a layout for {study.world.devices} x {study.world.gpu}", file=sys.stderr, flush=True)
    try:
        (best,) = best_layouts(config, study.world.devices, find_gpu(study.world.gpu), limit=1)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return dict(best.overrides), best.step_seconds
