"""A study's YAML: what is compared, over which sizes, seeds and budgets. Every key, its default and its meaning.

    tools/scale_study.py plan STUDY.yaml

Sizes come from a `ladder` (one dial, ladder.py) or from `rungs`, run configs that exist already. Everything else of a
run comes from `config` and `settings`, in the keys of the run's config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from megatron_depthattn.config.load import build, parse_overrides, read_yaml
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
    schedule: str | None = None
    """wsd: a rung, method and seed has one trunk, a run with a constant rate, and each budget is a decay that branches
    off it (plan.py). null: every budget is a run of its own, with the config's schedule."""
    decay_ratio: float = 0.2
    """With wsd: the last fraction of a budget, over which the rate falls."""
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
        return [rung.name for rung in self.rungs or []] or [
            f"d{n}" for n in (self.ladder.layers if self.ladder else [])
        ]


def load_study(path: Path, settings: Sequence[str] = ()) -> Study:
    """Read a study, and ``a.b=c`` settings of its keys over it.

    Raises:
        ValueError: the file is missing or no YAML, a key is unknown, a value has the wrong type or makes no sense.
    """
    study = build(Study, [*read_yaml(path), parse_overrides(settings, Study)])
    for is_wrong, text in _checks(study):
        if is_wrong:
            raise ValueError(f"{path}: {text}")
    return study


def _checks(study: Study) -> Iterator[tuple[bool, str]]:
    """(Whether it is wrong, what is and what to set)."""
    names, seeds, arms = study.rung_names, study.seeds, study.methods
    yield (study.ladder is None) == (study.rungs is None), "give the sizes either as a ladder or as rungs"
    yield (
        study.ladder is not None and None in (study.config, study.tokens_per_parameter),
        "a ladder needs 'config', the run config to start from, and tokens_per_parameter, such as [10, 20]",
    )
    yield (
        study.baseline not in arms,
        f"the baseline '{study.baseline}' is none of the methods {list(arms)}: add it, or set 'baseline'",
    )
    yield not seeds or len({*seeds}) < len(seeds), f"seeds is {seeds}; they must be different, one at least"
    for name in (*names, *arms):
        yield (
            not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name),
            f"a rung or method is named {name!r}, and its runs' folders after it: take letters, digits and _ . + -",
        )
    yield len({*names}) < len(names), f"the rungs {names} are not all different"
    yield not 0 < study.confidence < 1, f"confidence is {study.confidence}; set it between 0 and 1, such as 0.9"
    yield study.schedule not in (None, "wsd"), f"schedule is {study.schedule!r}; set wsd, or null for the config's own"
    yield not 0 < study.decay_ratio < 1, f"decay_ratio is {study.decay_ratio}; set it between 0 and 1, such as 0.2"
    yield min(study.evaluations, study.eval_sequences) < 1, "set evaluations and eval_sequences to 1 or more"
    budgets = [study.tokens_per_parameter, *study.tokens_per_parameter_at.values()]
    budgets += [arm.tokens_per_parameter for arm in arms.values()]
    yield not all(0 < of < math.inf for each in budgets for of in each or []), "tokens_per_parameter must be above 0"
    named = {"tokens_per_parameter_at": [*study.tokens_per_parameter_at]}
    named |= {f"methods.{name}.rungs": arm.rungs or [] for name, arm in arms.items()}
    for key, rungs in named.items():
        yield not {*rungs} <= {*names}, f"{key} names {rungs}; the rungs are {names}"
    for name, arm in arms.items():
        yield (
            name not in METHODS and not arm.settings,
            f"methods.{name} is no method ({', '.join(METHODS)}): give it settings, such as {{model.num_loops: 2}}",
        )
