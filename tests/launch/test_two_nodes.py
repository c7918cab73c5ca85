"""Two hosts, as network namespaces: a run on them is that of one node, also after one of the hosts was lost.

`machine.sh` is each host's supervisor. A host is lost when every process on it is killed at once, launcher included.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.commands import wait_until
from tests.launch.jobs import FULL, end, free_port, history, must_reach, records, run, start, trajectory

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
    assert len(victims) >= 2, "launcher and rank"
    for victim in victims:
        victim.kill()
    return time.time()


def is_training_again(run_dir: Path) -> bool:
    """Whether the second start has put a step on record (by its own words: older steps are dropped before)."""
    begins = [record["step"] for record in history(run_dir) if record["event"] == "start"]
    opened = (run_dir / "log.txt").read_text().count(" start: ") == 2
    return len(begins) == 2 and opened and len(records(run_dir)) > begins[1]


def test_a_node_that_does_not_come(namespaces: Path, config: Path, tmp_path: Path):
    """Every node that waits says how many have joined, and gives up in time; one that finds no head says where."""
    script = 'if [ "$NODE_RANK" = 1 ]; then export MASTER_ADDR=10.231.7.77; fi; exec launch/node.sh "$@"'
    command = [namespaces, "-t", "100", "-o", tmp_path, "--", "sh", "-c", script, "sh", config]
    done = run(*command, f"run.dir={tmp_path}/run", seconds=120, NPROC_PER_NODE="1", JOIN_TIMEOUT="7")
    assert "node0: exit 1" in done.stderr and "node1: exit 1" in done.stderr
    joined = "1 of 2 nodes joined at 10.231.7.1:29500 (10.231.7.1)"
    assert (tmp_path / "node0.log").read_text().splitlines() == [
        f"waiting for nodes: {joined}",
        f"error: not all nodes came within 7 s (JOIN_TIMEOUT): {joined}",
    ]
    (line,) = (tmp_path / "node1.log").read_text().splitlines()
    assert line.startswith("error: no rendezvous at 10.231.7.77:29500 within 7 s (JOIN_TIMEOUT); ")


def test_a_lost_node_comes_back_and_the_run_with_it(hosts: Start, undisturbed: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    world = hosts()
    must_reach(run_dir, 30, tmp_path / "node0.log")
    struck = kill_host(tmp_path, 1)
    assert wait_until(lambda: is_training_again(run_dir), 200), (tmp_path / "node0.log").read_text()[-3000:]
    seconds = time.time() - struck
    assert world.wait(240) == 0, (tmp_path / "node0.log").read_text()[-3000:]
    assert trajectory(run_dir) == trajectory(undisturbed)
    begins = [record for record in history(run_dir) if record["event"] == "start"]
    assert len(begins) == 2 and begins[1]["step"] >= 20, "it resumed from a checkpoint, once"
    assert len({record["run_id"] for record in begins}) == 1
    assert "failed; starting again, 9 restarts left" in (tmp_path / "node0.log").read_text()
    print(f"\nnode 1 killed: {seconds:.1f} s to the next step, {begins[1]['step'] + 1}, 3 of them the supervisor's")


RANK = """
import os, signal, sys, time
if "FAILS" in os.environ:
    sys.exit(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a rank that waits in a collective ends no step
time.sleep(3600)
"""
LAUNCHER = """
import sys
from megatron_depthattn.launch import agent, torchrun
agent.STOP_SECONDS = 2
sys.exit(torchrun.main())
"""


def test_ranks_do_not_wait_for_a_node_that_has_given_up(tmp_path: Path):
    """Neither where the head has ended with its store, nor where another node has closed the rendezvous; ten minutes
    are for saving alone."""
    (tmp_path / "rank.py").write_text(RANK)
    ends = {
        0: "the head at 127.0.0.1:{} has ended",
        1: "another node has ended the run, or is lost; 2 of 2 nodes joined",
    }
    worlds, ports = {}, {}
    for failing in ends:
        ports[failing] = free_port()
        for node in range(2):
            options = ("--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint=127.0.0.1:{ports[failing]}", "--rdzv-id=a")
            options += (f"--rdzv-conf=is_host={int(node == 0)}", "--local-addr=127.0.0.1", str(tmp_path / "rank.py"))
            variables = {"FAILS": "1"} if node == failing else {}
            output = tmp_path / f"{failing}_{node}.txt"
            worlds[failing, node] = start(sys.executable, "-c", LAUNCHER, *options, output=output, **variables)
    try:
        for (failing, node), launcher in worlds.items():
            text = tmp_path / f"{failing}_{node}.txt"
            assert launcher.wait(200) == 1, text.read_text()
            assert node == failing or ends[failing].format(ports[failing]) in text.read_text(), text.read_text()
    finally:
        for launcher in worlds.values():
            end(launcher)


@FULL
def test_a_lost_head_ends_the_run_and_the_same_command_resumes_it(hosts: Start, undisturbed: Path, tmp_path: Path):
    """Its rendezvous is lost with it: what torchrun does not recover from, a scheduler must start again."""
    run_dir = tmp_path / "run"
    first = hosts(JOIN_TIMEOUT="20")
    must_reach(run_dir, 30, tmp_path / "node0.log")
    kill_host(tmp_path, 0)
    assert first.wait(200) == 1, (tmp_path / "node1.log").read_text()[-3000:]
    assert hosts().wait(200) == 0, (tmp_path / "node0.log").read_text()[-3000:]
    assert trajectory(run_dir) == trajectory(undisturbed)
