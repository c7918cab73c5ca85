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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_depthattn.config import RunConfig, save_config, validate
from megatron_depthattn.config.load import Layer, build, read_yaml
from megatron_depthattn.estimate.counts import decoder_shape, forward_flops
from megatron_depthattn.study.study import Arm, Rung, Study, arm_settings
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
    config: str
    """File of the run's config, relative to the output folder."""
    run_dir: str
    """Relative to the output folder."""
    world: int
    layout: dict[str, Any]
    """Keys that were chosen for the devices, not by the study."""
    predicted_step_seconds: float | None


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
        rung = _rung(study, folder, name)
        rungs.append(rung.description())
        arms = {method: arm for method, arm in study.methods.items() if arm.rungs is None or name in arm.rungs}
        of_rung = [point for method, arm in arms.items() for point in rung.points(method, arm, output)]
        # Pairs one after the other: a study that is cut has whole ones.
        points += sorted(of_rung, key=lambda point: (point.tokens_per_parameter, study.seeds.index(point.seed)))
    for identity, count in Counter(point.id for point in points).items():
        if count > 1:
            raise ValueError(f"{count} runs of the study are {identity}: take token budgets that differ by more")
    plan = {
        "study": output.name,
        "title": study.title,
        "question": study.question,
        "baseline": study.baseline,
        "confidence": study.confidence,
        "devices": dataclasses.asdict(study.world),
        "rungs": rungs,
        "points": [dataclasses.asdict(point) for point in points],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / PLAN).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    return plan


def read_points(output: Path) -> list[Point]:
    """The points of the plan below ``output``.

    Raises:
        ValueError: there is no plan.
    """
    if not (output / PLAN).is_file():
        raise ValueError(f"{output} holds no plan.json; write it first: tools/scale_study.py plan STUDY.yaml")
    plan = json.loads((output / PLAN).read_text(encoding="utf-8"))
    return [Point(**point) for point in plan["points"]]


def _rung(study: Study, folder: Path, name: str) -> _RungPlan:
    """The rung's settings, completed by the ladder's rules where it stands on a ladder."""
    corpus_free = [Layer("settings of the study", study.settings)]
    if study.ladder is None:
        (given,) = (rung for rung in study.rungs or [] if rung.name == name)
        return _RungPlan(study, name, [*_files(folder, study.config), *_own(folder, given), *corpus_free])
    layers = study.ladder.layers[study.rung_names.index(name)]
    base = [*_files(folder, study.config), Layer(f"the ladder at {name}", study.ladder.shape(layers)), *corpus_free]
    size = _size(build(RunConfig, base))
    return _RungPlan(study, name, [*base, Layer(f"the ladder at {name}", study.ladder.recipe(size))])


@dataclass(frozen=True)
class _RungPlan:
    """One size of a study.

    Attributes:
        layers: settings of the run's config that all points of the rung share.
    """

    study: Study
    name: str
    layers: list[Layer]

    @property
    def vanilla(self) -> RunConfig:
        return build(RunConfig, self.layers)

    def description(self) -> dict[str, Any]:
        config = self.vanilla
        return {
            "rung": self.name,
            "num_layers": config.model.num_layers,
            "hidden_size": config.model.hidden_size,
            "size": _size(config),
            "parameters": decoder_shape(_as_vanilla(config)).parameters,
            "learning_rate": config.optimizer.lr,
            "global_batch_size": config.train.global_batch_size,
            "sequence_length": config.data.sequence_length,
        }

    def points(self, method: str, arm: Arm, output: Path) -> list[Point]:
        """Every budget and seed of an arm, their configs written."""
        own = Layer(f"methods.{method} of the study", arm_settings(method, arm))
        config = build(RunConfig, [*self.layers, own])
        layout, seconds = _layout(self.study, config, f"{self.name}, {method}")
        sequences = config.train.global_batch_size * config.data.sequence_length
        size = _size(self.vanilla)
        found = []
        shared = self.study.tokens_per_parameter_at.get(self.name) or self.study.tokens_per_parameter
        budgets: Sequence[float | None] = arm.tokens_per_parameter or shared or [None]
        for budget in budgets:
            steps = config.train.steps if budget is None else math.ceil(budget * size / sequences)
            for seed in self.study.seeds:
                multiple = budget if budget is not None else steps * sequences / size
                identity = f"{self.name}/{method}/x{multiple:.3g}/seed{seed}"
                keys = {"run.dir": str(output / "runs" / identity), "run.seed": seed, "train.steps": steps}
                if config.checkpoint.dir:
                    keys["checkpoint.dir"] = str(Path(config.checkpoint.dir) / identity)
                keys |= self._course(config, steps) | layout
                run = build(RunConfig, [*self.layers, own, Layer(f"the study at {identity}", keys)])
                found.append(self._point(identity, run, method, multiple, layout, seconds, output))
        return found

    def _course(self, config: RunConfig, steps: int) -> dict[str, Any]:
        """Evaluations on the same sequences at every size, one checkpoint to go on from, and the way to go on."""
        batch = config.train.global_batch_size
        if self.study.eval_sequences % batch:
            raise ValueError(
                f"{self.name}: eval_sequences is {self.study.eval_sequences} and the global batch {batch}: every size "
                f"has to be evaluated on the same sequences; set eval_sequences to a multiple of {batch}"
            )
        return {
            "train.eval_interval": math.ceil(steps / self.study.evaluations),
            "train.eval_batches": self.study.eval_sequences // batch,
            "checkpoint.load": "latest",
        }

    def _point(
        self,
        identity: str,
        config: RunConfig,
        method: str,
        multiple: float,
        layout: dict[str, Any],
        seconds: float | None,
        output: Path,
    ) -> Point:
        try:
            validate(config, self.study.world.devices)
            transformer_config(config, only_counted=True)  # which checks what Megatron does not support
        except ValueError as error:
            raise ValueError(f"{identity}: {error}") from error
        file = Path("configs") / f"{identity}.yaml"
        save_config(config, output / file)
        tokens = config.train.steps * config.train.global_batch_size * config.data.sequence_length
        return Point(
            id=identity,
            rung=self.name,
            method=method,
            tokens_per_parameter=multiple,
            seed=config.run.seed,
            size=_size(self.vanilla),
            parameters=decoder_shape(config).parameters,
            tokens=tokens,
            steps=config.train.steps,
            flops=3.0 * forward_flops(config).total * tokens,
            config=str(file),
            run_dir=str(Path("runs") / identity),
            world=self.study.world.devices,
            layout=layout,
            predicted_step_seconds=seconds,
        )


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


def _size(config: RunConfig) -> int:
    shape = decoder_shape(_as_vanilla(config))
    return shape.parameters - shape.vocab_size * shape.hidden_size


def _as_vanilla(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, method="vanilla"))


def _files(folder: Path, file: str | None) -> list[Layer]:
    return read_yaml(folder / os.path.expanduser(file)) if file else []


def _own(folder: Path, rung: Rung) -> list[Layer]:
    return [*_files(folder, rung.config), Layer(f"rung {rung.name} of the study", rung.settings)]
