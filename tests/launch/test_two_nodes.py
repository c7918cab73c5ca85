"""Two hosts, as network namespaces: a run on them is that of one node, also after one of the hosts was lost.

`machine.sh` is each host's supervisor. A host is lost when every process on it is killed at once, launcher included.
"""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.commands import wait_until
from tests.launch.jobs import FULL, end, history, must_reach, records, start, trajectory

pytestmark = pytest.mark.timeout(600)
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def hosts(namespaces: Path, config: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts the run on both hosts; logs are tmp_path/node0.log and node1.log, the run directory tmp_path/run."""
    started = []

    def begin(*settings: str, **variables: str) -> subprocess.Popen[bytes]:
        machine = Path(__file__).with_name("machine.sh")
        command = [namespaces, "-t", "280", "-o", tmp_path, "--", machine, tmp_path, config, f"run.dir={tmp_path}/run"]
        variables = {"NPROC_PER_NODE": "1"} | variables
        started.append(start(*command, *settings, output=tmp_path / "hosts.log", **variables))
        return started[-1]

    yield begin
    for process in started:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            end(process)


def kill_host(folder: Path, node: int) -> float:
    """Every process of the host but its supervisor, at once; returns when."""
    supervisor = psutil.Process(int((folder / f"node{node}.pid").read_text()))
    victims = supervisor.children(recursive=True)
    assert len(victims) >= 3, "launcher, torchrun, a rank"
    for victim in victims:
        victim.kill()
    return time.time()


def is_training_again(run_dir: Path) -> bool:
    """Whether the second start has put a step on record (by its own words: older steps are dropped before)."""
    begins = [record["step"] for record in history(run_dir) if record["event"] == "start"]
    opened = (run_dir / "log.txt").read_text().count(" start: ") == 2
    return len(begins) == 2 and opened and len(records(run_dir)) > begins[1]


@FULL
def test_two_nodes_equal_one(hosts: Start, undisturbed: Path, tmp_path: Path):
    assert hosts().wait(200) == 0, (tmp_path / "node0.log").read_text()[-3000:]
    assert trajectory(tmp_path / "run") == trajectory(undisturbed)
    (logs,) = (tmp_path / "run/logs").iterdir()
    texts = [(logs / f"node_{node}.log").read_text() for node in range(2)]
    assert "node0 rank 0 out | step 120/120" in texts[0]
    assert (logs / "rank_00001.out").exists() and "rank 0" not in texts[1]


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=FULL)])
def test_a_lost_node_comes_back_and_the_run_with_it(victim: int, hosts: Start, undisturbed: Path, tmp_path: Path):
    """Also the head node, which takes the meeting place and torchrun's store with it."""
    run_dir = tmp_path / "run"
    world = hosts()
    must_reach(run_dir, 30, tmp_path / "node0.log")
    struck = kill_host(tmp_path, victim)
    assert wait_until(lambda: is_training_again(run_dir), 200), (tmp_path / "node0.log").read_text()[-3000:]
    seconds = time.time() - struck
    assert world.wait(240) == 0, (tmp_path / "node0.log").read_text()[-3000:]
    assert trajectory(run_dir) == trajectory(undisturbed)
    begins = [record for record in history(run_dir) if record["event"] == "start"]
    assert len(begins) == 2 and begins[1]["step"] >= 20, "it went on from a checkpoint, once"
    assert len({record["run_id"] for record in begins}) == 1
    told = (tmp_path / f"node{1 - victim}.log").read_text()
    assert ("node 1 on node1: its launcher closed its connection" if victim else "the head node at") in told
    print(
        f"\nnode {victim} killed: {seconds:.1f} s to the next step, {begins[1]['step'] + 1}, 3 of them the supervisor's"
    )
