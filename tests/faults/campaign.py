"""Strike a training run again and again, start it again each time, and compare it with an undisturbed one.

    python -m tests.faults.campaign --output docs/faults.md --work DIR [--seed N]

Two pipeline stages times two data-parallel replicas, on CPU. Each run of the campaign is struck by a shuffled list of
faults at random moments until it reaches its last step; then its record (loss, gradient norm, learning rate of every
step) and every tensor of its last checkpoint must be those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import platform
import random
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.e2e.commands import must_succeed, wait_until
from tests.e2e.small_run import MODEL, prepare_small_corpus, train
from tests.faults.job import Job, RunState
from tests.faults.kinds import ENDS_THE_JOB, JOB_GOES_ON, START_SECONDS, Scene
from tests.small_disk import small_disk

NUM_PROCESSES = 4
STEPS = 400
SAME = ("step", "loss", "grad_norm", "lr", "tokens", "samples", "skipped_steps")
FULL: dict[str, int] = {
    "kill -9 of one rank": 6,
    "kill -9 of all ranks": 4,
    "kill -9 of the whole job": 4,
    "kill -9 of one rank during a save": 5,
    "kill -9 of the whole job during a save": 5,
    "kill -9 of a loader worker": 2,
    "kill -9 during the start": 3,
    "SIGTERM to the launcher": 3,
    "stop signal to one rank": 4,
    "SIGSTOP of one rank": 2,
    "flipped bit in the newest checkpoint": 4,
    "truncated shard": 2,
    "full disk": 3,
}
CONFIG: dict[str, Any] = {
    "model": MODEL,
    "parallel": {"pipeline": 2},
    "data": {"sequence_length": 32, "num_workers": 1},
    "train": {
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "log_interval": 1,
        "hang_timeout": 12,
        "max_restarts_without_progress": None,
    },
    "optimizer": {"lr": 5.0e-3},
    "checkpoint": {"interval": 7, "load": "latest", "keep": 3},
}


@dataclass
class Blow:
    """One injected fault and what followed."""

    kind: str
    what: str
    asynchronous: bool
    step: int
    """Last step in the record when it struck."""
    saved: int
    """Newest intact checkpoint once the job was down."""
    resumed: int
    """Step from which the next start went on."""
    seconds: float
    """From the blow to the next recorded step."""
    restarts: int

    @property
    def lost_beyond_the_save(self) -> int:
        return self.saved - self.resumed


class Campaign:
    """Runs, struck and undisturbed, over one corpus.

    Args:
        work: folder for corpus, runs and logs.
        steps: length of each run.
        rng: draws moments, victims and the order of the faults.
    """

    def __init__(self, work: Path, steps: int, rng: random.Random) -> None:
        self.work, self.rng = work, rng
        self.corpus = work / "corpus"
        self.config = work / "config.yaml"
        self.blows: list[Blow] = []
        self.num_runs = 0
        work.mkdir(parents=True, exist_ok=True)
        if not self.corpus.exists():
            prepare_small_corpus(self.corpus)
        data = CONFIG["data"] | {"path": str(self.corpus)}
        self.config.write_text(yaml.safe_dump(CONFIG | {"data": data, "train": CONFIG["train"] | {"steps": steps}}))
        self._undisturbed: RunState | None = None

    def undisturbed(self) -> RunState:
        """The run that nothing happens to."""
        if self._undisturbed is None:
            state = RunState(self.work / "undisturbed", self.work / "undisturbed/checkpoints")
            must_succeed(train(self.config, *_settings(state, asynchronous=False), ranks=NUM_PROCESSES, seconds=600))
            self._undisturbed = state
        return self._undisturbed

    def struck_run(self, faults: list[str], *, asynchronous: bool) -> list[str]:
        """One run, struck until it is done; returns the faults for which there was no time left.

        Raises:
            AssertionError: it differs from the undisturbed one, or a fault was not answered as it must be.
        """
        self.num_runs += 1
        run_dir = self.work / f"struck_{self.num_runs}"
        faults = list(faults)
        with ExitStack() as stack:
            checkpoints = run_dir / "checkpoints"
            if "full disk" in faults:
                checkpoints = stack.enter_context(small_disk(self.work / f"disk_{self.num_runs}")) / "checkpoints"
            run = RunState(run_dir, checkpoints)
            job = self._start(run, asynchronous=asynchronous)
            stack.callback(lambda: job.kill())
            while job.is_running and faults:
                kind = faults[0]
                scene = Scene(job, run, self.corpus, self.rng)
                fault = JOB_GOES_ON.get(kind) or ENDS_THE_JOB[kind]
                what = fault(scene)
                if what is None:
                    break
                faults.pop(0)
                job = self._after(kind, what, scene, asynchronous=asynchronous)
            assert job.wait(600) == 0, f"{run_dir.name} did not finish; see {run_dir}.out"
            compare(run, self.undisturbed())
        return faults

    def _start(self, run: RunState, *, asynchronous: bool) -> Job:
        settings = _settings(run, asynchronous=asynchronous)
        output = run.run_dir.with_suffix(".out")
        return Job([str(self.config), *settings], NUM_PROCESSES, output, earlier_starts=run.openings())

    def _after(self, kind: str, what: str, scene: Scene, *, asynchronous: bool) -> Job:
        """Let the job continue or end, start it again if need be, and note how long it took to the next step."""
        run, job, restarts = scene.run, scene.job, 0
        step = run.last_step()
        saved = resumed = 0
        if kind in ENDS_THE_JOB:
            code = job.wait()
            assert code != 0 or run.last_step() == step, f"{what}: the job ended as if nothing had happened"
            self._check_words(kind, run)
            if scene.repair:
                shard = what.split()[0].removesuffix(".zstd")
                output = run.run_dir.with_suffix(".out")
                said = len(output.read_bytes())
                job = self._start(run, asynchronous=asynchronous)
                assert job.wait() != 0, f"{what}: the job trained on a damaged shard"
                errors = [line for line in output.read_bytes()[said:].decode().splitlines() if "error (rank" in line]
                assert any(shard in line for line in errors), f"{what}: no error names {shard}"
                scene.repair()
                restarts += 1
            saved = run.newest_good_step()
            starts = len(run.starts())
            job = self._start(run, asynchronous=asynchronous)
            restarts += 1
            assert wait_until(lambda: len(run.starts()) > starts or not job.is_running, START_SECONDS)
            assert len(run.starts()) > starts, f"after '{what}' the job did not start; see {run.run_dir}.out"
            resumed = run.starts()[-1]
            step_after = resumed
        else:
            step_after = run.last_step()
        wait_until(lambda: run.last_step() > step_after or not job.is_running, START_SECONDS, poll=0.02)
        seconds = time.monotonic() - scene.struck_at
        blow = Blow(kind, what, asynchronous, step, saved, resumed, seconds, restarts)
        print(f"{len(self.blows) + 1:3d} {blow}", flush=True)
        assert blow.lost_beyond_the_save == 0, f"{what}: step {saved} was saved, and the run went on from {resumed}"
        self.blows.append(blow)
        return job

    def _check_words(self, kind: str, run: RunState) -> None:
        """What must be on record about some faults."""
        if kind in ("SIGTERM to the launcher", "stop signal to one rank"):
            assert "saved: start the same command again" in run.log().splitlines()[-1]
            assert run.newest_good_step() == run.last_step(), "a stop by signal saves the step that it stops at"
        if kind == "SIGSTOP of one rank":
            assert list((run.run_dir / "stacks").glob("*")), "no stacks were written"


def _settings(run: RunState, *, asynchronous: bool) -> list[str]:
    settings = [f"run.dir={run.run_dir}", f"checkpoint.dir={run.checkpoints}"]
    return [*settings, f"checkpoint.async_save={str(asynchronous).lower()}"]


def compare(run: RunState, undisturbed: RunState) -> None:
    """Every step once, every number and every tensor of the last checkpoint equal."""
    ours, theirs = ([tuple(record[name] for name in SAME) for record in each.records()] for each in (run, undisturbed))
    assert [row[0] for row in ours] == [row[0] for row in theirs], f"{run.run_dir.name}: other steps are on record"
    different = [row[0] for row, other in zip(ours, theirs, strict=True) if row != other]
    assert not different, f"{run.run_dir.name}: the steps {different} differ"
    folder = f"step_{len(theirs):08d}"
    mine, other = tensors(run.checkpoints / folder), tensors(undisturbed.checkpoints / folder)
    assert mine.keys() == other.keys() and len(mine) > 100
    changed = [name for name in mine if not torch.equal(mine[name], other[name])]
    assert not changed, f"{run.run_dir.name}: {changed} differ"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a step folder: weights and optimizer state."""
    reader = FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def table(blows: Sequence[Blow]) -> list[str]:
    """A Markdown table, one line a kind of fault."""
    by_kind: dict[str, list[Blow]] = defaultdict(list)
    for blow in blows:
        by_kind[blow.kind].append(blow)
    lines = [
        "| fault | injected | steps lost beyond the last save | restarts | seconds to the next step (median, most) |",
        "|---|---|---|---|---|",
    ]
    for kind, group in [*by_kind.items(), ("**all**", list(blows))]:
        seconds = [blow.seconds for blow in group]
        lines.append(
            f"| {kind} | {len(group)} | {sum(blow.lost_beyond_the_save for blow in group)} | "
            f"{sum(blow.restarts for blow in group)} | {statistics.median(seconds):.0f}, {max(seconds):.0f} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and logs")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    campaign = Campaign(arguments.work, STEPS, rng)
    faults = [kind for kind, count in FULL.items() for _ in range(count)]
    rng.shuffle(faults)
    started = time.monotonic()
    asynchronous = True
    while faults:
        faults = campaign.struck_run(faults, asynchronous=asynchronous)
        asynchronous = not asynchronous
    lines = [
        *table(campaign.blows),
        "",
        f"{len(campaign.blows)} faults over {campaign.num_runs} runs of {STEPS} steps, "
        f"{(time.monotonic() - started) / 60:.0f} minutes. Every run: record and last checkpoint bit-equal to the "
        "undisturbed run.",
    ]
    print("\n".join(lines))
    if arguments.output:
        versions = f"torch {torch.__version__}, Python {platform.python_version()}, {NUM_PROCESSES} processes on CPU"
        arguments.output.write_text("\n".join([*lines, "", versions, ""]))
    shutil.rmtree(arguments.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
