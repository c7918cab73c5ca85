"""From a study to its points: every run with its config, its folder and what it will cost. Nothing is started.

The output folder afterwards:

    plan.json            rungs and points
    configs/<id>.yaml    the whole config of each run
    runs/<id>/           its run directory, once it runs
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_depthattn.config import RunConfig, save_config, validate
from megatron_depthattn.config.load import Layer, build, read_yaml
from megatron_depthattn.estimate.counts import decoder_shape, forward_flops
from megatron_depthattn.model.flops import DecoderShape
from megatron_depthattn.study.study import METHODS, Study
from megatron_depthattn.train.build import transformer_config

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
    steps: int
    flops: float
    """Of the whole training, forward and backward."""
    world: int
    layout: dict[str, Any]
    """Keys that were chosen for the devices, not by the study."""
    predicted_step_seconds: float | None

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
    rungs, points = [], []
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
        of_rung = [point for method in arms for point in _points(study, name, _size(shape), layers, method, output)]
        # Pairs one after the other: a study that is cut has whole ones.
        points += sorted(of_rung, key=lambda point: (point.tokens_per_parameter, study.seeds.index(point.seed)))
    for identity, count in Counter(point.id for point in points).items():
        if count > 1:
            raise ValueError(f"{count} runs of the study are {identity}: take token budgets that differ by more")
    plan = {key: getattr(study, key) for key in ("title", "question", "baseline", "confidence")}
    plan |= {"study": output.name, "rungs": rungs, "points": [dataclasses.asdict(point) for point in points]}
    output.mkdir(parents=True, exist_ok=True)
    (output / PLAN).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    return plan


def read_points(output: Path) -> list[Point]:
    """The points of the plan below ``output``; ValueError where there is no plan."""
    if not (output / PLAN).is_file():
        raise ValueError(f"{output} holds no plan.json; write it first: depthattn study plan STUDY")
    fields, plan = Point.__dataclass_fields__, json.loads((output / PLAN).read_text(encoding="utf-8"))
    return [Point(**{key: value for key, value in point.items() if key in fields}) for point in plan["points"]]


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


def _points(study: Study, rung: str, size: int, layers: list[Layer], method: str, output: Path) -> list[Point]:
    """Every budget and seed of a method at a rung, their configs written."""
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
    budgets = arm.tokens_per_parameter or study.tokens_per_parameter_at.get(rung) or study.tokens_per_parameter
    courses = [(budget, sizes.steps_to(budget * size, length)) for budget in budgets or []]
    points = []
    whole = sizes.consumed_after(config.train.steps) * length / size, config.train.steps
    for multiple, steps in courses or [whole]:
        tokens = sizes.consumed_after(steps) * length
        interval, batches = math.ceil(steps / study.evaluations), study.eval_sequences // batch
        train = dataclasses.replace(config.train, steps=steps, eval_interval=interval, eval_batches=batches)
        for seed in study.seeds:
            point = f"{rung}/{method}/x{multiple:.3g}/seed{seed}"
            saved = config.checkpoint.dir and str(Path(config.checkpoint.dir) / point)
            checkpoint = dataclasses.replace(config.checkpoint, dir=saved)
            where = dataclasses.replace(config.run, dir=str(output / "runs" / point), seed=seed)
            run = dataclasses.replace(config, run=where, train=train, checkpoint=checkpoint)
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
                    tokens_per_parameter=multiple,
                    seed=seed,
                    size=size,
                    parameters=decoder_shape(run).parameters,
                    tokens=tokens,
                    steps=steps,
                    flops=3.0 * forward_flops(run).total * tokens,
                    world=devices,
                    layout=layout,
                    predicted_step_seconds=seconds,
                )
            )
            save_config(run, output / points[-1].config)
    return points


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
