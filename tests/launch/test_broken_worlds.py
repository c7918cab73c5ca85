"""Starts that cannot work are found by the launchers before torchrun starts a rank, each in one line."""

from pathlib import Path

import pytest
import yaml

from tests.launch.jobs import run


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    values = {"run": {"dir": str(tmp_path / "run")}, "data": {"path": "somewhere"}, "train": {"global_batch_size": 48}}
    path.write_text(yaml.safe_dump(values))
    return path


def error_of(script: str, config: Path, *overrides: str, **variables: str) -> str:
    """What a launcher that starts nothing says."""
    done = run(script, config, *overrides, seconds=60, **variables)
    assert done.returncode == 1, done.stderr
    assert not (config.parent / "run").exists(), "nothing was started"
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


USUAL = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "NPROC_PER_NODE": "1"}


def test_a_wrong_world_size(settings: Path):
    layout = ("parallel.tensor=2", "parallel.pipeline=4")
    line = error_of("launch/node.sh", settings, *layout, **(USUAL | {"NPROC_PER_NODE": "3"}))
    assert "with 2 x 3 processes: the world has 6 ranks, which is not a multiple of 8" in line


def test_everything_that_is_missing_is_named_at_once(settings: Path):
    line = error_of("launch/node.sh", settings, NNODES="2", MASTER_PORT="29500")
    assert line.startswith("error: NODE_RANK, MASTER_ADDR not set")
    assert "MASTER_ADDR: name or address of node 0" in line
    assert "there is no GPU to count: set NPROC_PER_NODE" in error_of("launch/local.sh", settings)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"NODE_RANK": "2"}, "NODE_RANK=2 with NNODES=2: nodes count from 0"),
        ({"NNODES": "two"}, "NNODES=two is not a whole number of 0 or more"),
        ({"JOIN_TIMEOUT": "soon"}, "JOIN_TIMEOUT=soon is not a whole number"),
        ({"JOIN_TIMEOUT": "0"}, "JOIN_TIMEOUT=0 leaves nodes no time"),
    ],
)
def test_variables_that_make_no_sense(wrong: dict, message: str, settings: Path):
    assert message in error_of("launch/node.sh", settings, **(USUAL | wrong))
