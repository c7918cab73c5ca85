"""``python -m megatron_depthattn.train.wandb_mirror RUN_DIR``: brings a run's record to Weights & Biases.

A process of its own beside rank 0, so that nothing of the client (its threads, its service, its network, its hooks) can
stop, slow down or change a run. It reads what the run writes: config.yaml, metrics.jsonl, evaluations.jsonl. So each
start can bring whatever Weights & Biases has not got, however the last one ended:

- Online, the run there is resumed (its id is that of the run's history), and what is later than its newest step
  follows, also what was lost on the way. Steps that a crash has undone and that are trained again are there from the
  first attempt, and stay.
- Offline, nothing can be resumed: each start writes the whole record anew, without what a crash has undone, and
  then removes the folders of the starts before. `wandb sync` of the one that is left gives the whole run. A start that
  has to leave before it has caught up removes its own.

Every row has its training step under ``step``, the axis of all curves, because a row may come late: an evaluation of an
earlier checkpoint, a held-out loss that a stop had cut off. Weights & Biases' own count of rows means nothing.

Lines for the run's log go to stdout. What is read from stdin, up to its end, says that the run has ended well.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from megatron_depthattn.config import to_dict
from megatron_depthattn.config.load import load_record
from megatron_depthattn.parallel.launch_env import set_variables, unset_variable
from megatron_depthattn.train.curves import (
    EVALUATION,
    EVALUATIONS,
    STILL_SENDING,
    end_tree,
    evaluation_curves,
    run_curves,
)
from megatron_depthattn.train.history import METRICS, recorded_run_id
from megatron_depthattn.train.stop_signals import STOP_SIGNALS

POLL_SECONDS = 1.0
LOCK_SECONDS = 600.0
COUNT = f"{EVALUATION}/count"
"""Lines of evaluations.jsonl so far."""
PICTURES = 20
"""How many are drawn at most of what is new at a time, evenly spaced up to the newest: each takes a quarter second."""
ENDING = threading.RLock()
"""Held by the thread that ends this process: the other sees the client's service die, and must not start another."""
PASSING: set[Path] = set()
"""Folders that are removed if this process leaves now: the client's temporary files, and an offline run that lacks
what earlier ones have."""


class Lines:
    """A .jsonl file that another process writes."""

    def __init__(self, path: Path) -> None:
        self._path, self._inode, self._position, self._number = path, 0, 0, 0

    def new(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number, from 1, and object of every whole line since the last time; all of them if the file is another."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_ino != self._inode:
                self._inode, self._position, self._number = os.fstat(file.fileno()).st_ino, 0, 0
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._position, self._number = self._position + len(line), self._number + 1
                with suppress(ValueError, RecursionError):
                    record = json.loads(line)
                    if isinstance(record, dict) and isinstance(record.get("step"), int):
                        yield self._number, record


class Mirror:
    """A run's record, and the run of Weights & Biases that it goes to."""

    def __init__(self, run_dir: Path, progress: Callable[[], None], *, is_once: bool) -> None:
        import wandb

        config = load_record(run_dir / "config.yaml")
        given, known = config.log.wandb, wandb.setup().settings  # what the environment says
        run_id = recorded_run_id(run_dir)
        is_online = (given.mode or known.mode) in ("online", "shared")
        stats: dict[str, Any] = {"x_disable_stats": True} if is_once else {"x_stats_pid": os.getppid()}
        self._run = wandb.init(
            project=given.project,
            entity=given.entity,
            mode=given.mode,
            name=given.name or known.run_name or run_dir.name,
            id=run_id,
            resume="allow" if is_online else None,
            dir=run_dir,
            config=to_dict(config),
            allow_val_change=True,
            settings=wandb.Settings(console="off", disable_git=True, disable_code=not known.save_code, **stats),
        )
        self.is_disabled: bool = self._run.disabled
        self._image, self._progress = wandb.Image, progress
        progress()
        summary = dict(self._run.summary)
        self._newest = {name: value for name, value in summary.items() if isinstance(value, int | float)}
        self._axes: dict[str, str] = {}
        self._steps, self._evaluations = Lines(run_dir / METRICS), Lines(run_dir / EVALUATIONS)
        self._older = [] if is_online else list((run_dir / "wandb").glob(f"offline-run-*-{run_id}"))
        if self.is_disabled:
            return
        folder = Path(self._run.settings.sync_dir)
        self._older = [each for each in self._older if each.name != folder.name]
        if not is_online:
            PASSING.add(folder)
        if not is_once:
            where = self._run.url if is_online else f"{folder} (wandb sync takes it)"
            say(f"run {run_id} of project {given.project}: {where}")

    def send(self) -> None:
        """Bring what is new in the record."""
        records = [record for _, record in self._steps.new()]
        weighed = [record["step"] for record in records if record.get("depth")]
        drawn = {*weighed[:: -max(1, -(-len(weighed) // PICTURES))]}
        for record in records:
            step, row = record["step"], run_curves(record)
            if step < self._newest.get("step", 0):
                continue
            if step == self._newest.get("step"):  # it is there, but for a held-out loss that came late
                late = [name for name in row if name.startswith("eval_loss") and self._newest.get(name) != row[name]]
                row = {name: row[name] for name in late}
            elif step in drawn:
                row |= {"depth/weights": self._image(depth_figure(record["depth"]), caption=f"step {step}")}
            self._log("step", step, row)
        for number, record in self._evaluations.new():
            if number > self._newest.get(COUNT, 0):
                self._log(f"{EVALUATION}/step", record["step"], evaluation_curves(record) | {COUNT: number})
        PASSING.discard(Path(self._run.settings.sync_dir))
        while self._older:  # superseded
            shutil.rmtree(self._older.pop(), ignore_errors=True)

    def has_more(self) -> bool:
        """Whether an evaluation has come since."""
        return any(True for _ in self._evaluations.new())

    def finish(self, exit_code: int) -> None:
        """Wait until all is on its way."""
        self._run.finish(exit_code=exit_code)

    def _log(self, axis: str, step: int, row: Mapping[str, Any]) -> None:
        if not row:
            return
        for name in row.keys() - self._axes.keys():
            self._run.define_metric(name, step_metric=axis)
            self._axes[name] = axis
        self._run.log({axis: step, **row})
        self._newest |= {axis: step, **row}
        self._progress()


def depth_figure(depth: Mapping[str, Any]) -> Any:
    """A heat map of the weights over depth: layers by sources."""
    import io

    from matplotlib.figure import Figure
    from PIL import Image

    from megatron_depthattn.study.plots import draw_weights

    layers = {int(layer): (of["sources"], of["weights"]) for layer, of in depth["layers"].items()}
    figure, buffer = Figure(figsize=(4.7, 1.5 + 0.26 * len(layers)), layout="constrained"), io.BytesIO()
    draw_weights(figure.add_subplot(), [layers])
    figure.savefig(buffer, format="png", dpi=120)
    return Image.open(buffer)


class Parent(threading.Thread):
    """Waits for the end of stdin; from then on this process leaves once nothing was sent for ``seconds``."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self._seconds = seconds
        self._sent = time.monotonic()
        self.ended = threading.Event()
        self.exit_code = 1

    def progress(self) -> None:
        """Note that something was sent."""
        self._sent = time.monotonic()

    def run(self) -> None:
        """Wait, then count down."""
        self.exit_code = 0 if sys.stdin.buffer.read() else 1
        self._sent = time.monotonic()
        self.ended.set()
        time.sleep(self._seconds)
        while (left := self._sent + self._seconds - time.monotonic()) > 0:
            say(STILL_SENDING)
            time.sleep(left)
        leave(f"not all was sent, and nothing more for {self._seconds:g} s")


def say(line: str) -> None:
    """Print one line for the run's log."""
    with suppress(OSError):
        print(" ".join(line.split()), flush=True)


def leave(line: str) -> None:
    """End this process and the client's at once."""
    ENDING.acquire()
    say(line)
    end_client()
    os._exit(1)


def end_client() -> None:
    """End the client's processes, and remove what they leave behind."""
    for child in psutil.Process().children():
        end_tree(child)
    for path in PASSING:
        shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    """Mirror the run until stdin ends; exit code 0: all that there is has been brought."""
    parser = argparse.ArgumentParser(description="Bring a run's record to Weights & Biases.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--once", action="store_true", help="only if no other process does so")
    parser.add_argument(
        "--finish-seconds", type=float, required=True, help="from the end of stdin on, without progress"
    )
    parser.add_argument("--once-more", type=int, default=1, help="0: the client has been lost once already")
    given = parser.parse_args()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the training process obeys them, and ends this one
    parent = Parent(given.finish_seconds)
    parent.start()
    tempfile.tempdir = tempfile.mkdtemp(prefix="wandb-")  # the client and its service leave folders and sockets behind
    set_variables(TMPDIR=tempfile.tempdir)
    PASSING.add(Path(tempfile.tempdir))
    atexit.register(end_client)  # after the client's own, which are registered later
    folder: Path = given.run_dir / "wandb"
    folder.mkdir(exist_ok=True)
    try:
        has_more = True
        while has_more:
            with FileLock(folder / ".lock", timeout=0 if given.once else LOCK_SECONDS):
                mirror = Mirror(given.run_dir, parent.progress, is_once=given.once)
                if mirror.is_disabled:
                    return 0
                while not parent.ended.wait(POLL_SECONDS):
                    mirror.send()
                mirror.send()
                mirror.finish(parent.exit_code)
            # Who added an evaluation while the lock was held has left it to this process.
            has_more = mirror.has_more()
    except ConnectionError as error:
        ENDING.acquire()
        # A scheduler signals all processes of a job, and SIGTERM ends the client's service, which cannot ignore it.
        if not given.once_more:
            leave(f"its service has ended again: {error}")
        say("its service has ended and is started again")
        end_client()
        unset_variable("WANDB_SERVICE")  # which the client has set to the address of the lost one
        set_variables(TMPDIR=str(Path(tempfile.gettempdir()).parent))
        words = ["-m", "megatron_depthattn.train.wandb_mirror", *sys.argv[1:], "--once-more=0"]
        os.execv(sys.executable, [sys.executable, *words])
    except Timeout:
        if not given.once:
            leave(f"another process still sends this run after {LOCK_SECONDS:g} s")
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        leave(f"{type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
