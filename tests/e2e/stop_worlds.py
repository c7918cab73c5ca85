"""Small runs that get a stop signal at a chosen place, one after the other, by the training command.

    python -m tests.e2e.stop_worlds WORK CONFIG.yaml    # WORK/concat and WORK/packed: two corpora

The ranks are forked from a process that has imported everything and done nothing; each is a process of its own. How a
run ended: WORK/<case>/result.json. The signals come from the runs themselves, so no case depends on time.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from megatron_depthattn.config import load_config
from megatron_depthattn.data.stream import TokenDataset
from megatron_depthattn.train import __main__ as command
from megatron_depthattn.train import loop, save
from megatron_depthattn.train.curves import WandbMirror
from megatron_depthattn.train.data import GlobalBatches
from megatron_depthattn.train.engine import MegatronEngine
from megatron_depthattn.train.reporter import SampleLog
from tests.e2e.odd_worlds import free_port, wait
from tests.e2e.small_run import pad_corpus

SECONDS = 60
PIPELINE = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
Run = Callable[[], None]


@dataclass
class Case:
    """Where the signal comes: ``arrange(rank, pid of rank 1, run folder)`` is called in each rank before it starts."""

    arrange: Callable[[int, int, Path], None] = lambda *_: None
    settings: tuple[str, ...] = ()
    ranks: int = 1
    exits: bool = False
    """Whether a rank ends as the command does, with exit handlers, which takes longer."""
    kept: tuple[str, ...] = ()
    """Settings of all its starts; CORPUS stands for the run's data, PADDED for one of many short documents, CONCAT and
    PACKED for small ones as prepared, CACHE for a folder of its own."""
    again: bool = False
    """Whether the run is started once more, undisturbed and in one process."""


def at(owner: Any, name: str, call: int, action: Run) -> None:
    """Do something before a certain call of a function."""
    function, calls = getattr(owner, name), itertools.count(1)

    def wrapper(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            action()
        return function(*arguments, **options)

    setattr(owner, name, wrapper)


def send(*numbers: signal.Signals, to: int = 0) -> None:
    for number in numbers:
        os.kill(to or os.getpid(), number)


def in_a_step(_: int, __: int, run_dir: Path) -> None:
    """And twice more while the save, which fails at first, waits to be tried again."""
    in_the_way = run_dir / "checkpoints" / ".step_00000003.part"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()

    def pause(_: float) -> None:
        send(signal.SIGINT, signal.SIGTERM)
        in_the_way.unlink()

    at(MegatronEngine, "train_step", 3, lambda: send(signal.SIGUSR1))
    save.time = type("Time", (), {"monotonic": time.monotonic, "sleep": pause})


def in_the_third_step(*_: Any) -> None:
    at(MegatronEngine, "train_step", 3, lambda: send(signal.SIGUSR1))


def in_an_evaluation(batch: int) -> Callable[[int, int, Path], None]:
    """On the last rank alone, in this batch of all evaluations; every rank counts its batches."""

    def arrange(rank: int, last: int, run_dir: Path) -> None:
        at(MegatronEngine, "loss", batch, lambda: send(signal.SIGHUP, to=last))
        with_count = MegatronEngine.loss

        def loss(*arguments: Any) -> float:
            with (run_dir.parent / f"batches_{rank}").open("a") as file:
                file.write(".")
            return with_count(*arguments)

        MegatronEngine.loss = loss
        at(WandbMirror, "__init__", 1, (run_dir.parent / f"client_{rank}").touch)

    return arrange


def in_the_data(rank: int, last: int, _: Path) -> None:
    """On the last rank alone, once the other's loader process does not come back with the third step."""
    wait_for_data = GlobalBatches.wait

    def wait(*arguments: Any) -> bool:
        is_here = wait_for_data(*arguments)
        if not is_here:
            send(signal.SIGINT, to=last)
        return is_here

    if rank == 0:
        at(TokenDataset, "__getitem__", 2 * 4 + 1, threading.Event().wait)
        GlobalBatches.wait = wait


def after_an_exchange(_: int, __: int, ___: Path) -> None:
    """When the ranks have agreed on the second step already."""
    GlobalBatches.has_next = property(lambda batches: batches.wait(SECONDS))
    at(SampleLog, "write", 1, lambda: send(signal.SIGTERM))


def in_a_save(_: int, __: int, ___: Path) -> None:
    at(save, "write_manifest", 1, lambda: send(signal.SIGTERM))


def in_the_start(rank: int, last: int, _: Path) -> None:
    """On both ranks, while one works alone and the other waits for it in a collective."""

    def hang() -> None:
        send(signal.SIGUSR2, to=last)
        send(signal.SIGUSR2)
        threading.Event().wait()

    if rank == 0:
        at(loop, "lock_run", 1, hang)


BATCHES = 2
"""Of an evaluation; there is one before the first step, after the second and after the fourth, the last."""
SETTINGS = ("checkpoint.load=latest", "preflight.enabled=false", "checkpoint.async_save=true", "checkpoint.interval=2")
SETTINGS += ("train.micro_batch_size=4", "data.num_workers=1")
SETTINGS += ("train.steps=4", "train.eval_interval=2", f"train.eval_batches={BATCHES}")
WANDB = ("log.wandb.project=stops", "log.wandb.mode=offline")
EVERYTHING = (
    "data.path=",
    "data.streams=[{path: CONCAT, proportion: 0.6}, {path: PADDED, proportion: 0.4}, {path: PACKED, proportion: 0}]",
    "data.stages=[{from_step: 2, proportions: [0.3, 0, 0.7]}, {from_step: 4, proportions: [0.2, 0.7, 0.1]}]",
    *("data.document_mask=true", "data.skip_samples=5", "data.log_samples=true", "train.batch_ramp=[4,4,12]"),
    *("data.cache=CACHE", "data.cache_limit=150kb", "data.predownload=4", "train.micro_batch_size=2"),
)
CASES = {
    "undisturbed": Case(),
    "step": Case(in_a_step, again=True),
    "undisturbed everything": Case(kept=EVERYTHING),
    "everything": Case(in_a_step, again=True, kept=EVERYTHING),
    "everything elsewhere": Case(in_the_third_step, PIPELINE, ranks=2, again=True, kept=EVERYTHING),
    "first evaluation": Case(in_an_evaluation(BATCHES)),
    "evaluation": Case(in_an_evaluation(BATCHES + 2), PIPELINE, ranks=2, again=True, kept=WANDB),
    "last evaluation": Case(in_an_evaluation(5 * BATCHES + 1), kept=("data.held_out={same: CORPUS}",), again=True),
    "data": Case(in_the_data, ("train.eval_interval=null",), ranks=2, exits=True),
    "record": Case(after_an_exchange, ("train.eval_interval=null", "checkpoint.interval=100"), ranks=2),
    "save": Case(in_a_save, ("checkpoint.async_save=false",)),
    "start": Case(in_the_start, ranks=2),
}


def main(work: Path, config: str) -> None:
    gc.freeze()  # a rank's collections need not look at, and copy, what it was forked with
    folders = {name.upper(): str(work / name) for name in ("padded", "concat", "packed")}
    folders["CORPUS"] = load_config(config).data.path
    pad_corpus(Path(folders["CORPUS"]), work / "padded")
    for name, case in CASES.items():
        folder = work / name
        folder.mkdir()
        folders["CACHE"] = str(folder / "cache")
        kept = [reduce(lambda text, each: text.replace(*each), folders.items(), text) for text in case.kept]
        arguments = [config, f"run.dir={folder / 'run'}", *SETTINGS, *kept]
        results = [start_and_wait(folder, [*arguments, *case.settings], case)]
        shutil.copy(folder / "run/metrics.jsonl", folder) if (folder / "run/metrics.jsonl").exists() else None
        if case.again:
            results.append(start_and_wait(folder, arguments, Case()))
        (folder / "result.json").write_text(json.dumps(results))


def start_and_wait(folder: Path, arguments: list[str], case: Case) -> dict[str, Any]:
    port, pids = free_port(), [0] * case.ranks
    began = time.monotonic()
    for rank in reversed(range(case.ranks)):
        pids[rank] = start(rank, port, folder, arguments, case, pids[-1])
    codes = [wait(pid, began + SECONDS) for pid in pids]
    read = lambda kind: [(folder / f"rank{rank}.{kind}").read_text() for rank in range(case.ranks)]  # noqa: E731
    return {"codes": codes, "output": read("out"), "errors": read("err"), "seconds": time.monotonic() - began}


def start(rank: int, port: int, folder: Path, arguments: list[str], case: Case, last: int) -> int:
    """Fork a rank; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if case.ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    sys.argv = ["train", *arguments]
    case.arrange(rank, last, folder / "run")
    code = command.main()
    if case.exits:
        sys.exit(code)
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
