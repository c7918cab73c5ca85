"""The faults of the campaign: each waits for its moment, strikes, and says what it did.

A fault returns None when its moment did not come (the run ended first). Otherwise the job has been struck: it continues
by itself, or it ends and has to be started again.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_depthattn.train.step_folders import complete_folders
from tests.e2e.commands import wait_until
from tests.faults.job import Job, RunState

START_SECONDS = 180.0


class Scene:
    """What a fault can lay hands on.

    Args:
        job: the running job.
        run: its run directory.
        corpus: the prepared corpus that it reads.
        rng: draws moments and victims.
    """

    def __init__(self, job: Job, run: RunState, corpus: Path, rng: random.Random) -> None:
        self.job, self.run, self.corpus, self.rng = job, run, corpus, rng
        self.struck_at = 0.0
        """`time.monotonic` of the blow."""
        self.repair: Callable[[], None] | None = None
        """Repairs what the next start must fail for (a damaged shard)."""

    def in_steps(self) -> bool:
        """Wait for a random moment after this start's first step."""
        return self.has_stepped() and self._pause(3.0)

    def in_a_save(self) -> bool:
        """Wait for a random moment while a checkpoint is being written."""
        return (
            self.has_stepped()
            and wait_until(lambda: self.run.is_saving() or not self.job.is_running, 60, poll=0.001)
            and self._pause(0.1)
        )

    def in_the_start(self) -> bool:
        """Wait for a random moment before the first step, more or less."""
        return self._pause(12.0)

    def has_stepped(self) -> bool:
        """Wait for a step of this start; false when the job ended instead."""

        def stepped() -> bool:
            began = self.run.openings() > self.job.earlier_starts
            return not self.job.is_running or (began and self.run.last_step() > self.run.starts()[-1])

        return wait_until(stepped, START_SECONDS) and self.job.is_running

    def a_rank(self) -> tuple[int, psutil.Process]:
        ranks = self.job.ranks()
        number = self.rng.randrange(len(ranks))
        return number, ranks[number]

    def send(self, processes: list[psutil.Process], number: signal.Signals) -> None:
        """Strike: a signal to each of these processes."""
        self.struck_at = time.monotonic()
        for process in processes:
            process.send_signal(number)

    def _pause(self, longest: float) -> bool:
        time.sleep(self.rng.uniform(0.0, longest))
        return self.job.is_running


Moment = Callable[[Scene], bool]
Fault = Callable[[Scene], str | None]


def kill_one_rank(moment: Moment) -> Fault:
    def fault(scene: Scene) -> str | None:
        if not moment(scene):
            return None
        number, process = scene.a_rank()
        scene.send([process], signal.SIGKILL)
        return f"SIGKILL to rank {number}"

    return fault


def kill_everything(moment: Moment) -> Fault:
    """A node that loses its power."""

    def fault(scene: Scene) -> str | None:
        if not moment(scene):
            return None
        scene.struck_at = time.monotonic()
        scene.job.kill()
        return "SIGKILL to the launcher, all ranks and all loader workers"

    return fault


def kill_all_ranks(scene: Scene) -> str | None:
    if not scene.in_steps():
        return None
    scene.send(scene.job.ranks(), signal.SIGKILL)
    return "SIGKILL to all ranks"


def kill_a_loader_worker(scene: Scene) -> str | None:
    if not scene.in_steps():
        return None
    workers = scene.job.loader_workers()
    scene.send([scene.rng.choice(workers)], signal.SIGKILL)
    return "SIGKILL to a process that reads data"


def sigterm_to_the_launcher(scene: Scene) -> str | None:
    """What a scheduler does: the launcher passes it on to every process."""
    if not scene.in_steps():
        return None
    scene.send([psutil.Process(scene.job.process.pid)], signal.SIGTERM)
    return "SIGTERM to the launcher"


def a_signal_to_one_rank(scene: Scene) -> str | None:
    if not scene.in_steps():
        return None
    number, process = scene.a_rank()
    which = scene.rng.choice([signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM])
    scene.send([process], which)
    return f"{which.name} to rank {number}"


def stop_one_rank(scene: Scene) -> str | None:
    """A rank that hangs: the others must notice, and end the job."""
    if not scene.in_steps():
        return None
    number, process = scene.a_rank()
    scene.send([process], signal.SIGSTOP)
    return f"SIGSTOP to rank {number}"


def flip_a_byte(scene: Scene) -> str | None:
    """The newest checkpoint is damaged while the job is down: the one before it must be taken, with a loud line."""
    if not scene.has_stepped() or not wait_until(
        lambda: len(complete_folders(scene.run.checkpoints)) > 1 or not scene.job.is_running, 120
    ):
        return None
    if not scene.in_steps():
        return None
    scene.struck_at = time.monotonic()
    scene.job.kill()
    folder = complete_folders(scene.run.checkpoints)[-1]
    file = scene.rng.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))
    position = scene.rng.randrange(file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << scene.rng.randrange(8)
    file.write_bytes(data)
    return f"a bit flipped in {folder.name}/{file.name}"


def truncate_a_shard(scene: Scene) -> str | None:
    """A shard is cut while the job is down: the next start must fail and name it, and the one after must work."""
    if not scene.in_steps():
        return None
    scene.struck_at = time.monotonic()
    scene.job.kill()
    shard = scene.rng.choice(sorted((scene.corpus / "train").glob("shard.*.zstd")))
    whole = shard.read_bytes()
    os.truncate(shard, scene.rng.randrange(len(whole)))
    for expanded in shard.parent.glob("*.mds"):  # copies that an earlier start has made
        expanded.unlink()
    scene.repair = lambda: shard.write_bytes(whole) and None  # type: ignore[func-returns-value]
    return f"{shard.name} truncated"


def fill_the_disk(scene: Scene) -> str | None:
    """The disk of the checkpoints is full for a while: a save fails, and nothing else does."""
    if not scene.in_steps():
        return None
    filler = scene.run.checkpoints.parent / "filler"
    failed_before = scene.run.log().count("NOT WRITTEN")
    scene.struck_at = time.monotonic()
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
    wait_until(lambda: scene.run.log().count("NOT WRITTEN") > failed_before or not scene.job.is_running, 120, poll=0.02)
    filler.unlink()
    failed = scene.run.log().count("NOT WRITTEN") - failed_before
    return f"a full disk; {failed} save failed" if failed else None


ENDS_THE_JOB: dict[str, Fault] = {
    "kill -9 of one rank": kill_one_rank(Scene.in_steps),
    "kill -9 of all ranks": kill_all_ranks,
    "kill -9 of the whole job": kill_everything(Scene.in_steps),
    "kill -9 of one rank during a save": kill_one_rank(Scene.in_a_save),
    "kill -9 of the whole job during a save": kill_everything(Scene.in_a_save),
    "kill -9 of a loader worker": kill_a_loader_worker,
    "kill -9 during the start": kill_everything(Scene.in_the_start),  # whatever it happens to be doing then
    "SIGTERM to the launcher": sigterm_to_the_launcher,
    "stop signal to one rank": a_signal_to_one_rank,
    "SIGSTOP of one rank": stop_one_rank,
    "flipped bit in the newest checkpoint": flip_a_byte,
    "truncated shard": truncate_a_shard,
}
JOB_GOES_ON: dict[str, Fault] = {"full disk": fill_the_disk}
