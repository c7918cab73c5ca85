"""A study's YAML: what is compared, over which sizes, seeds and budgets. Every key, its default and its meaning.

    tools/scale_study.py plan STUDY.yaml

Sizes come from a `ladder` (one dial, ladder.py) or from `rungs`, run configs that exist already. Everything else of a
run comes from `config` and `settings`, in the keys of the run's config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from megatron_depthattn.config.load import build, read_yaml
from megatron_depthattn.methods.definitions import DEFINITIONS
from megatron_depthattn.study.ladder import Ladder

METHODS = ("vanilla", "depth_attention", *DEFINITIONS)
"""Labels that set ``model.method`` by themselves."""


@dataclass
class Rung:
    """A size with a config of its own, batch, learning rate and number of steps included."""

    name: str = MISSING
    config: str = MISSING
    """Run config, relative to the study's file."""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Arm:
    """One of the models that are compared."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Keys of the run's config; ``model.method`` is the arm's name where that names a method."""
    rungs: list[str] | None = None
    """Names of the rungs it runs at; null: all."""
    tokens_per_parameter: list[float] | None = None
    """Its token budgets; null: the study's."""


@dataclass
class Corpus:
    """Text that is prepared before the first run, if ``data.path`` does not hold it yet."""

    input: str = "builtin:python-stdlib"
    tokenizer: str = MISSING
    validation_fraction: float = 0.03


@dataclass
class World:
    """The devices of one run."""

    devices: int = 1
    devices_per_node: int = 8
    gpu: str | None = None
    """Name of the GPU, for which the planner chooses layout, micro-batch and recompute (tools/estimate.py); null: the
    config's own."""

    @property
    def nodes(self) -> int:
        """How many a run needs."""
        return math.ceil(self.devices / self.devices_per_node)


@dataclass
class Study:
    """A study; paths are relative to its file."""

    title: str = MISSING
    question: str = ""
    """What it is to answer, for the report."""
    config: str | None = None
    """Run config that every point starts from; null where rungs have their own."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys of the run's config for every point."""
    corpus: Corpus | None = None
    ladder: Ladder | None = None
    rungs: list[Rung] | None = None
    methods: dict[str, Arm] = field(default_factory=dict)
    baseline: str = "vanilla"
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Of weights and sample order, the same for all methods: points that differ in the method alone are pairs."""
    tokens_per_parameter: list[float] | None = None
    """Token budgets as multiples of a rung's size (ladder.py says which weights count); null: the config's steps."""
    tokens_per_parameter_at: dict[str, list[float]] = field(default_factory=dict)
    """Other budgets for a rung, by its name: the largest one is often trained once."""
    eval_sequences: int = 128
    """Held-out sequences of every evaluation, the same ones at every size."""
    evaluations: int = 8
    """Evaluations of a run, the one at its end included."""
    world: World = field(default_factory=World)
    confidence: float = 0.9
    """Of every interval."""
    resamples: int = 400
    """Of the bootstrap."""
    timing_rounds: int = 30
    """Interleaved steps of every method at a rung, for equal wall time; 0: the runs' own steps."""

    @property
    def rung_names(self) -> list[str]:
        """From the smallest to the largest."""
        if self.rungs:
            return [rung.name for rung in self.rungs]
        assert self.ladder is not None
        return [f"d{layers}" for layers in self.ladder.layers]


def load_study(path: Path) -> Study:
    """Read a study.

    Raises:
        ValueError: the file is missing or no YAML, a key is unknown, a value has the wrong type or makes no sense.
    """
    study = build(Study, read_yaml(path))
    _check(study, path)
    return study


def arm_settings(name: str, arm: Arm) -> Mapping[str, Any]:
    """The arm's keys, with the method that its name stands for."""
    return ({"model.method": name} if name in METHODS else {}) | arm.settings


def _check(study: Study, path: Path) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"{path}: {message}")

    require((study.ladder is None) != (study.rungs is None), "give the sizes either as a ladder or as rungs")
    require(study.ladder is None or study.config is not None, "a ladder needs 'config', the run config to start from")
    require(
        study.ladder is None or study.tokens_per_parameter is not None,
        "a ladder needs tokens_per_parameter, a list of token budgets such as [10, 20]",
    )
    require(
        study.baseline in study.methods,
        f"the baseline '{study.baseline}' is none of the methods {list(study.methods)}: add it, or set 'baseline'",
    )
    require(bool(study.seeds) and len(set(study.seeds)) == len(study.seeds), "seeds must be different, one at least")
    names = study.rung_names
    for name in (*names, *study.methods):
        require(
            re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name) is not None,
            f"a rung or method is named {name!r}, and its runs' folders after it: take letters, digits and _ . + -",
        )
    require(len(set(names)) == len(names), f"the rungs {names} are not all different")
    require(0 < study.confidence < 1, f"confidence is {study.confidence}; set it between 0 and 1, such as 0.9")
    require(study.evaluations >= 1 and study.eval_sequences >= 1, "set evaluations and eval_sequences to 1 or more")
    other = [rung for rung in study.tokens_per_parameter_at if rung not in names]
    require(not other, f"tokens_per_parameter_at names {other}; the rungs are {names}")
    budgets = [study.tokens_per_parameter or [], *study.tokens_per_parameter_at.values()]
    budgets += [arm.tokens_per_parameter or [] for arm in study.methods.values()]
    require(
        all(0 < budget < math.inf for each in budgets for budget in each),
        "tokens_per_parameter must be numbers above 0",
    )
    for name, arm in study.methods.items():
        unknown = [rung for rung in arm.rungs or [] if rung not in names]
        require(not unknown, f"methods.{name}.rungs names {unknown}; the rungs are {names}")
        require(
            name in METHODS or bool(arm.settings),
            f"methods.{name} is no method ({', '.join(METHODS)}): give it settings, such as {{model.num_loops: 2}}",
        )
