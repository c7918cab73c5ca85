"""How often a step may make the host wait for the device, and what counts it.

`BUDGET` is the whole list: a new `.item()` anywhere fails, and so does an entry that no longer happens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from tests.forked import REPOSITORY

STEP, DATA, METRICS, SAVE = (f"megatron_depthattn/train/{name}.py" for name in ("step", "data", "metrics", "save"))
EXCHANGE = "tolist", STEP, "return everyone.view(-1, len(mine)).tolist()"
BUDGET = {
    "step": Counter({EXCHANGE: 1}),  # loss, norm and status of all ranks
    "asked": Counter({EXCHANGE: 1}),
    "depth": Counter({("copy pageable from device", METRICS, "totals, self._recorder = totals.cpu(), None"): 1}),
    "eval": Counter({EXCHANGE: 2}),  # may all continue, and one batch's loss
    "save": Counter({("torch.cuda.synchronize", SAVE, "torch.cuda.synchronize()"): 1}),
}
"""How often the host waits for what a step does: by kind, file and source line. Of a save the package's own lines."""
COPIES = {("pinned to device", file) for file in (STEP, DATA)}
"""A step's other copies, none of which is waited for."""
BORDERS = {("pinned to device", "megatron_depthattn/model/documents.py")}
"""Those of a step with a document mask, too."""

Line = tuple[str, str, str]


class Step(NamedTuple):
    """What one rank counted in one step, by kind and by ``path:line``."""

    number: int
    did: list[str]
    """Beside training: "asked" if the ranks met before it, as they do after a save, "depth", "eval"; or only "save"."""
    syncs: list[tuple[str, str, int]]
    copies: list[tuple[str, str, int]]


def count_steps() -> list[Step]:
    """Let `loop.Training` count from now on what its steps and its saves wait for."""
    from megatron_depthattn.train import loop
    from tests.cuda.ledger import counted

    training: Any = loop.Training
    own_step, own_save = training._step, training._save_if_due
    steps: list[Step] = []

    def step(self: Any) -> bool:
        number, train, engine_step = self.progress.step + 1, self.config.train, type(self.engine).train_step

        def train_step(*arguments: Any) -> Any:
            self.batches.wait(60)  # for the next samples: whether they are there by then is a matter of chance
            return engine_step(self.engine, *arguments)

        self.engine.train_step = train_step
        self.batches.wait(60)
        is_asked = self.agreement._agreed_on is not self.batches
        with counted() as counts:
            may_continue: bool = own_step(self)
        is_noted = number in (1, train.steps) or loop._is_due(number, train.depth_interval)
        is_evaluated = number == self.last_step or self._is_evaluation_due()
        did = {"asked": is_asked, "depth": is_noted and self.depth._plan is not None}
        did["eval"] = is_evaluated and bool(self.held_out)
        steps.append(Step(number, [what for what, holds in did.items() if holds], *map(_listed, counts)))
        return may_continue

    def save(self: Any) -> None:
        with counted() as counts:
            own_save(self)
        if counts.syncs:
            steps.append(Step(self.progress.step, ["save"], *map(_listed, counts)))

    training._step, training._save_if_due = step, save
    return steps


def _listed(counter: Counter[tuple[str, str]]) -> list[tuple[str, str, int]]:
    return [(kind, where, number) for (kind, where), number in sorted(counter.items())]


def line(kind: str, where: str) -> Line:
    """With the line's own text, which stays when others are written above it."""
    path, number = where.split(":")
    file = REPOSITORY / path
    text = file.read_text().splitlines()[int(number) - 1].split("  #")[0].strip() if file.exists() else number
    return kind, path, text


def beyond_budget(steps: Iterable[Any]) -> tuple[set[Line], set[Line]]:
    """What steps waited for more often than they may, and what they may wait for and did not."""
    more: Counter[Line] = Counter()
    less: Counter[Line] = Counter()
    for _, did, syncs, _ in steps:
        found = Counter({line(kind, where): number for kind, where, number in syncs})
        if did == ["save"]:  # the rest is Megatron's
            found = Counter({key: number for key, number in found.items() if key[1].startswith("megatron_depthattn/")})
        budget = sum((BUDGET[what] for what in did), Counter() if did == ["save"] else BUDGET["step"])
        more, less = more | (found - budget), less | (budget - found)
    return {*more}, {*less}


def other_copies(steps: Iterable[Any]) -> set[tuple[str, str]]:
    """By kind and file, of steps that do nothing else."""
    plain = [copies for _, did, _, copies in steps if not {"depth", "save"} & {*did}]
    return {(kind, where.split(":")[0]) for copies in plain for kind, where, _ in copies}
