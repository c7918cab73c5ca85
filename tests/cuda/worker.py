"""The training command in one rank of a world, run after run, with what the host waits for counted by step.

    python -m tests.cuda.worker FOLDER RUNS.json

RUNS.json lists runs: a name, the command's arguments, and what ranks do wrong on purpose from then on, see `Fault`.
Each rank leaves ``FOLDER/RANK.json``: by run what each step waited for, what the rehearsal objected to, and what was
given to which group; also its device. On the CPU runtime it trains and leaves nothing.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import torch


class Fault(NamedTuple):
    """Other source text in a function, which keeps its file and its lines."""

    function: str
    """``module:qualified.name``"""
    old: str
    """What is once in the module."""
    new: str
    rank: int = -1
    """Whose fault it is; -1: all ranks'."""

    def plant(self) -> None:
        function = inspect.unwrap(pkgutil.resolve_name(self.function))
        path = inspect.getsourcefile(function)
        source = Path(path).read_text()
        assert source.count(self.old) == 1, f"{self.old!r} is {source.count(self.old)} times in {path}"
        whole = compile(source.replace(self.old, self.new), path, "exec")
        function.__code__ = next(code for code in _codes(whole) if code.co_qualname == function.__qualname__)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


class Step(NamedTuple):
    """What one rank counted in one step, by kind and by ``path:line``."""

    number: int
    did: list[str]
    """Beside training: "asked" if the ranks met before it, as they do after a save, "depth", "eval"; or only "save"."""
    syncs: list[tuple[str, str, int]]
    copies: list[tuple[str, str, int]]


def main() -> int:
    folder, runs = sys.argv[1:]
    rank = int(os.environ.get("RANK", 0))
    from megatron_depthattn.train.__main__ import main as command

    is_rehearsed, record = torch.cuda.is_available(), {}
    if is_rehearsed:
        from tests.cuda.ledger import FAULTS
        from tests.cuda.messages import Recorder

        steps = count_steps()
    else:
        torch.backends.cuda.enable_flash_sdp(False)  # the rehearsal's attention is torch's plain one as well
    for name, arguments, faults in json.loads(runs):
        sys.argv[1:] = arguments
        for fault in (Fault(*fields) for fields in faults):
            if fault.rank in (-1, rank):
                fault.plant()
        if not is_rehearsed:
            code = command()
        else:
            with Recorder() as recorder:
                code = command()
            record[name] = {"steps": [*steps], "objections": [*FAULTS], "messages": recorder.messages}
            steps.clear()
            FAULTS.clear()
        if code:
            return code
        gc.unfreeze()
        gc.collect()  # a run's folder is locked as long as the run is there
    if is_rehearsed:
        device = torch.cuda.current_device()
        Path(folder, f"{rank}.json").write_text(json.dumps({"device": device, "runs": record}))
    return 0


def count_steps() -> list[Step]:
    """Let `loop.Training` count from now on what its steps and its saves wait for."""
    from megatron_depthattn.train import loop
    from tests.cuda.ledger import counted

    training: Any = loop.Training
    own_step, own_save = training._step, training._save_if_due
    steps: list[Step] = []

    def step(self: Any) -> bool:
        number, engine_step = self.progress.step + 1, type(self.engine).train_step

        def train_step(*arguments: Any) -> Any:
            self.batches.wait(60)  # for the next samples: whether they are there by then is a matter of chance
            return engine_step(self.engine, *arguments)

        self.engine.train_step = train_step
        is_asked = self.agreement._agreed_on is not self.batches
        with counted() as counts:
            may_continue: bool = own_step(self)
        did = {"asked": is_asked, "depth": number in (1, self.config.train.steps) and self.depth._plan is not None}
        did["eval"] = number == self.last_step and self.held_out is not None
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


if __name__ == "__main__":
    from megatron_depthattn.train.errors import leave_at_once

    leave_at_once(main())
