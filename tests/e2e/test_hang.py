"""Ranks that hang, as processes: the job ends with its own exit code, the stacks are there, the culprit is named."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from torch.distributed.flight_recorder import fr_trace

from megatron_depthattn.train.watchdog import EXIT_HANG
from tests import forked

TIMEOUT = 2.0
"""Seconds without a heartbeat that are a hang, in these tests."""
PATIENCE = 90
"""Seconds for a world to end; the machine may be busy."""


@dataclass
class World:
    """Two ranks, of which one may end and the other stay."""

    folder: Path
    ranks: forked.World
    errors: list[Path]

    def exit_code(self, rank: int) -> int:
        assert self.ranks.wait(PATIENCE, rank), self.error(rank)
        return self.ranks.codes[rank]

    def error(self, rank: int) -> str:
        return self.errors[rank].read_text()

    def stacks(self, rank: int) -> list[Path]:
        return sorted(self.folder.glob(f"*_rank_{rank}.txt"))

    def collectives(self, *options: str) -> None:
        """Let torch's analyzer print what it makes of the one folder of recordings."""
        (folder,) = self.folder.glob("*_collectives")
        assert sum(f"collectives are in {folder} (" in path.read_text() for path in self.errors) == 1
        with contextlib.suppress(SystemExit):
            fr_trace.main([str(folder), "-p", "gloo_rank_", *options])


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """The world of the scenario that the test is parametrised with; ended afterwards, stopped processes too."""
    folder, logs = tmp_path / "stacks", [tmp_path / "rank{rank}.err"] * 2
    command = ("tests.e2e.hang_worker", folder, str(TIMEOUT), request.param)
    ranks = forked.start(2, *command, logs=logs, end_together=False)
    yield World(folder, ranks, [tmp_path / f"rank{rank}.err" for rank in range(2)])
    for pid in ranks.pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def scenario(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("world", [name], indirect=True)


@scenario("stopped_1")
def test_a_stopped_rank_is_named_with_its_state(world: World, caplog: pytest.LogCaptureFixture):
    assert world.exit_code(0) == EXIT_HANG, world.error(0)
    assert not world.ranks.wait(0.1), "a stopped process cannot end itself; the launcher kills it"
    said = world.error(0)
    pid = world.ranks.pids[1]
    silent = re.search(r"rank 1 is unresponsive: (.*)", said)
    assert silent, said
    assert (
        f"pid {pid}, last heartbeat " in silent[1] and "at step 1 (step); its process is stopped (SIGSTOP)" in silent[1]
    )
    assert re.search(r"rank 0 answered: step 2 \(step\), main thread at .* all_reduce", said), said
    (stacks,) = world.stacks(0)
    assert "hang_worker.py" in stacks.read_text() and "in main" in stacks.read_text()
    assert silent[0] in next(world.folder.glob("*_hang_0.txt")).read_text()
    world.collectives("--allow-incomplete-ranks", "-j")
    assert caplog.text.count("all_reduce(input_sizes=[[1]]") == 3


@scenario("stopped_0")
def test_the_host_of_the_store_may_be_the_one_that_is_stopped(world: World):
    assert world.exit_code(1) == EXIT_HANG, world.error(1)
    assert "rank 1 hangs: last heartbeat" in world.error(1)
    (stacks,) = world.stacks(1)
    assert "in main" in stacks.read_text()


@scenario("endless_loop")
def test_ranks_in_a_loop_and_in_a_collective_both_tell_where_they_are(world: World, caplog: pytest.LogCaptureFixture):
    codes = [world.exit_code(rank) for rank in range(2)]
    assert codes == [EXIT_HANG, EXIT_HANG], world.error(0) + world.error(1)
    assert "endless_loop" in world.stacks(1)[0].read_text()
    assert "all_reduce" in world.stacks(0)[0].read_text()
    said = world.error(0) + world.error(1)
    assert re.search(r"rank 1 answered: step 1 \(step\), main thread at hang_worker.py:\d+ endless_loop", said), said
    assert re.search(r"rank 0 answered: step 2 \(step\), main thread at .* all_reduce", said), said
    assert "is unresponsive" not in said
    child = int(re.search(r"child (\d+) \S+: sleeping", world.stacks(1)[0].read_text())[1])  # type: ignore[index]
    world.collectives()
    found = {message.strip() for message in caplog.messages}
    assert {"group info: 0:default_pg", "collective: gloo:all_reduce", "missing ranks: {1}"} <= found, caplog.text
    assert "hang_worker.py" in caplog.text
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@scenario("lock_held")
def test_a_main_thread_that_holds_the_lock_is_ended_by_the_timer(world: World):
    """No Python runs in that process any more: its stacks come from faulthandler, on stderr, with exit code 1."""
    assert world.exit_code(1) == 1, world.error(1)
    assert "Timeout" in world.error(1) and "in misbehave" in world.error(1)
    assert world.exit_code(0) == EXIT_HANG, world.error(0)


@scenario("slow")
def test_control_a_slow_start_and_slow_steps_are_left_alone(world: World):
    for rank in range(2):
        assert world.exit_code(rank) == 0, world.error(rank)
        assert f"rank {rank} is done" in world.error(rank)
        assert "watchdog" not in world.error(rank)
    assert not world.folder.exists()
