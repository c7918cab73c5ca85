"""The watchdog's parts that need no second process; tests/e2e/test_hang.py has those that end one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from megatron_depthattn.train import watchdog
from megatron_depthattn.train.watchdog import Watchdog
from tests.e2e.commands import wait_until


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("watchdog")]


def test_a_closed_watchdog_is_gone_and_its_last_sign_says_so(tmp_path: Path):
    store = dist.HashStore()
    with Watchdog(60.0, tmp_path / "stacks", rank=0, world_size=1, store=store) as dog:
        dog.heartbeat(7, "evaluation")
        assert own_threads() == ["watchdog", "watchdog store"]
    assert own_threads() == []
    sign = json.loads(store.get("watchdog/state/0"))
    assert (sign["step"], sign["phase"], sign["pid"]) == (7, "closed", os.getpid())
    assert not (tmp_path / "stacks").exists()


def test_an_exception_in_the_loop_ends_the_watch(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), Watchdog(60.0, tmp_path, rank=0, world_size=1, store=dist.HashStore()):
        _ = 1 / 0
    assert own_threads() == []


@pytest.fixture
def neighbour() -> Iterator[subprocess.Popen[bytes]]:
    """A process that sleeps: past its start, in which it may be caught waiting for the disk."""
    code = "import time; print('awake', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"awake\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_state_of_a_process_on_this_host(neighbour: subprocess.Popen[bytes]):
    sign = {"pid": neighbour.pid, "started": psutil.Process(neighbour.pid).create_time()}
    watched = psutil.Process(neighbour.pid)
    assert wait_until(lambda: watched.status() == psutil.STATUS_SLEEPING, 60.0)
    assert "its threads do not run" in watchdog._process_state(sign)
    neighbour.send_signal(signal.SIGSTOP)
    os.waitpid(neighbour.pid, os.WUNTRACED)  # returns when it has stopped
    assert watchdog._process_state(sign) == "stopped (SIGSTOP)"
    assert watchdog._process_state(sign | {"started": sign["started"] - 100}) == "gone", "another process by its number"
    neighbour.kill()
    neighbour.wait()
    assert watchdog._process_state(sign) == "gone"


def test_the_odd_rank_comes_first():
    usual = {"step": 12, "phase": "step", "where": "all_reduce"}
    answers = dict.fromkeys((0, 1, 2, 5), usual) | {4: {"step": 11, "phase": "evaluation", "where": "loop"}}
    assert watchdog._groups(answers) == [
        "rank 4 answered: step 11 (evaluation), main thread at loop",
        "ranks 0-2, 5 answered: step 12 (step), main thread at all_reduce",
    ]


def test_main_thread_frames_are_those_of_the_main_thread():
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(watchdog.main_thread(3)))
    thread.start()
    thread.join()
    assert found[0].count(" < ") == 2
    assert "test_watchdog.py" in found[0] or "threading.py" in found[0].split(" < ")[0]
