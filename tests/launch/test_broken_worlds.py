"""Worlds that cannot work are found by the launchers, before torchrun and within a minute, each in one line.

`launch/node.sh` as processes of this machine; no rank is ever started.
"""

import shutil
import socket
from pathlib import Path

import pytest
import yaml
from launch.world import World

from tests.e2e.commands import REPOSITORY, wait_until
from tests.launch.jobs import run, start


@pytest.fixture
def port() -> str:
    """Two free ports, the first of them."""
    for candidate in range(29100, 31000, 2):
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("", candidate)), second.bind(("", candidate + 1))
            except OSError:
                continue
            return str(candidate)
    raise AssertionError("no two free ports")


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {"run": {"dir": str(tmp_path / "run")}, "data": {"path": "somewhere"}, "train": {"global_batch_size": 48}}
        )
    )
    return path


def variables(port: str, node: int, **more: str) -> dict[str, str]:
    usual = {"NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return usual | {"NPROC_PER_NODE": "1", "MEET_SECONDS": "10"} | more


def node(config: Path, *overrides: str, **more: str) -> str:
    """What a node says that is refused."""
    done = run("launch/node.sh", config, *overrides, seconds=60, **more)
    assert done.returncode == 1, done.stderr
    assert not (config.parent / "run").exists(), "nothing was started"
    return only_error(done.stderr)


def only_error(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in text
    return line


def two_nodes(first: tuple, second: tuple, folder: Path) -> list[str]:
    """The errors of two nodes that are started together; of each the variables and the command."""
    outputs = [folder / "node0.txt", folder / "node1.txt"]
    nodes = [start(*own[1:], output=output, **own[0]) for own, output in zip((first, second), outputs, strict=True)]
    assert [process.wait(60) for process in nodes] == [1, 1]
    assert not (folder / "run").exists()
    return [only_error(output.read_text()) for output in outputs]


def test_the_waits_of_a_wrong_start_are_under_a_minute():
    assert World(2, 1, 1).meet_seconds < 60


def test_a_wrong_world_size(settings: Path, port: str):
    told = node(settings, "parallel.tensor=2", "parallel.pipeline=4", **variables(port, 0, NPROC_PER_NODE="3"))
    assert (
        "with 6 processes (NNODES=2 times NPROC_PER_NODE=3): the world has 6 ranks, which is not a multiple of 8"
        in told
    )


def test_everything_that_is_missing_is_named_at_once(settings: Path):
    told = node(settings, NNODES="2", MASTER_PORT="29500")
    assert told.startswith("error: NODE_RANK, MASTER_ADDR, NPROC_PER_NODE not set")
    assert "MASTER_ADDR: name or address of node 0" in told
    alone = run("launch/local.sh", settings, seconds=60)
    assert alone.returncode == 1 and "NPROC_PER_NODE not set (nvidia-smi shows no GPU to count)" in alone.stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"NODE_RANK": "2"}, "NODE_RANK=2 with NNODES=2: nodes count from 0"),
        ({"NNODES": "two"}, "NNODES=two is not a whole number of 1 or more"),
        ({"MASTER_PORT": "65535"}, "MASTER_PORT=65535 is no port with another after it"),
        ({"MEET_SECONDS": "soon"}, "MEET_SECONDS=soon is not a number of seconds above 0"),
    ],
)
def test_variables_that_make_no_sense(wrong: dict, message: str, settings: Path, port: str):
    assert message in node(settings, **(variables(port, 0) | wrong))


def test_a_node_that_does_not_come(settings: Path, port: str):
    told = node(settings, **variables(port, 0, MEET_SECONDS="2"))
    assert f"node 1 of 2 did not come to 127.0.0.1:{port} within 2 s (1 did)" in told


def test_a_head_that_is_this_very_node(settings: Path, port: str):
    """What a name that means a loopback address on every host makes of a second node."""
    told = node(settings, **variables(port, 1, MASTER_ADDR="localhost", MEET_SECONDS="2"))
    assert "localhost is this node itself here, and NODE_RANK=1 is not the head" in told


def test_a_head_with_an_unknown_name(settings: Path, port: str):
    told = node(settings, **variables(port, 1, MASTER_ADDR="no-such-head.invalid", MEET_SECONDS="2"))
    assert f"cannot reach the head node at no-such-head.invalid:{port} after 2 s" in told
    assert "cannot resolve the name" in told


def test_a_head_that_does_not_answer(settings: Path, port: str, namespaces: Path, tmp_path: Path):
    """On a network where the address belongs to nobody."""
    command = [namespaces, "-t", "100", "-o", tmp_path, "--", "launch/node.sh", settings]
    script = 'if [ "$NODE_RANK" = 0 ]; then exit 0; fi; export MASTER_ADDR=10.231.7.77; exec launch/node.sh "$0"'
    done = run(*command[:6], "sh", "-c", script, settings, seconds=120, NPROC_PER_NODE="1", MEET_SECONDS="5")
    told = only_error((tmp_path / "node1.log").read_text())
    assert "node1: exit 1" in done.stderr
    assert "node 1 (node1) cannot reach the head node at 10.231.7.77:29500 after 5 s (" in told
    assert "start launch/node.sh with NODE_RANK=0 there" in told


def test_the_head_is_somewhere_else(settings: Path, port: str):
    told = node(settings, **variables(port, 0, MASTER_ADDR="192.0.2.1", MEET_SECONDS="2"))
    assert "node 0 calls itself by that address" in told


def test_a_port_that_is_taken(settings: Path, port: str):
    with socket.socket() as other:
        other.bind(("", int(port) + 1))
        other.listen()
        told = node(settings, **variables(port, 0))
    assert f"port {int(port) + 1} of this node, the head, is taken" in told


@pytest.mark.parametrize(
    ("other", "overrides", "message"),
    [
        ({"NNODES": "3"}, (), "has another NNODES than"),
        ({"NPROC_PER_NODE": "2"}, (), "has another NPROC_PER_NODE than"),
        ({}, ("optimizer.lr=0.5",), "has another config (digest) than"),
    ],
)
def test_nodes_that_were_started_otherwise(
    other: dict, overrides: tuple, message: str, settings: Path, port: str, tmp_path: Path
):
    command = ("launch/node.sh", settings)
    told = two_nodes((variables(port, 0), *command), (variables(port, 1, **other), *command, *overrides), tmp_path)
    assert all(message in line for line in told), told


def test_two_versions_of_the_code(settings: Path, port: str, tmp_path: Path):
    for folder in ("launch", "megatron_depthattn"):
        shutil.copytree(REPOSITORY / folder, tmp_path / "copy" / folder)
    with (tmp_path / "copy/megatron_depthattn/config.py").open("a") as file:
        file.write("# another version\n")
    other = tmp_path / "copy/launch/node.sh"
    told = two_nodes((variables(port, 0), "launch/node.sh", settings), (variables(port, 1), other, settings), tmp_path)
    assert all("has another code (digest of megatron_depthattn) than" in line for line in told), told


def test_two_nodes_of_one_rank(settings: Path, port: str, tmp_path: Path):
    command = ("launch/node.sh", settings)
    head = start(*command, output=tmp_path / "head.txt", **variables(port, 0, NNODES="3"))
    same = variables(port, 1, NNODES="3")
    told = two_nodes((same, *command), (same, *command), tmp_path)
    assert any("two launchers say that they are node 1" in line for line in told), told
    assert head.wait(60) == 1


def test_a_stop_while_waiting(settings: Path, port: str, tmp_path: Path):
    waiting = start("launch/node.sh", settings, output=tmp_path / "out.txt", **variables(port, 0, MEET_SECONDS="60"))
    with socket.socket() as probe:
        assert wait_until(lambda: probe.connect_ex(("127.0.0.1", int(port))) == 0, 60), "it listens, so it waits"
    waiting.terminate()
    assert waiting.wait(30) == 75
    assert "stopped by a signal before the ranks were started" in (tmp_path / "out.txt").read_text()
