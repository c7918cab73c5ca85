"""The wheel, installed where the checkout is on no path: it trains a shipped config by name, from another folder."""

import json
import sysconfig
from pathlib import Path

import pytest

from tests.e2e.commands import REPOSITORY, must_succeed, python, run

SHIPPED = (
    "megatron_depthattn",
    "configs",
    "launch",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, which sees the packages of the test environment; no network is needed."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "source").mkdir()
    must_succeed(run(["cp", "-r", *SHIPPED, folder / "source"], seconds=30))
    wheel = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder)
    must_succeed(python(*wheel, folder / "source"))
    must_succeed(python("-m", "venv", "--without-pip", folder / "venv"))
    interpreter = folder / "venv/bin/python"
    install = (
        "-m",
        "pip",
        "--python",
        interpreter,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
    )
    must_succeed(python(*install, *folder.glob("*.whl")))
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    # A plain line: the .pth files there, one of which leads to the checkout, are not read.
    (packages / "test_environment.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "venv"


def depthattn(environment: Path, folder: Path, *arguments: str | Path, seconds: float = 120) -> str:
    command = ["env", "-u", "PYTHONPATH", environment / "bin/depthattn", *arguments]
    return must_succeed(run(command, seconds=seconds, cwd=folder)).stdout


def test_an_installed_wheel_trains_by_name_from_another_folder(environment: Path, corpus: Path, tmp_path: Path):
    small = ["parallel.pipeline=1", "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64"]
    small += [
        "model.vocab_size=384",
        "model.depth_attention.stride=1",
        "data.sequence_length=32",
        f"data.path={corpus}",
    ]
    small += ["train.steps=3", "train.eval_interval=3", "data.num_workers=0"]
    depthattn(environment, tmp_path, "train", "quickstart", *small)
    steps = [json.loads(line) for line in (tmp_path / "runs/quickstart/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3] and steps[-1]["eval_loss"] is not None
    assert (tmp_path / "runs/quickstart/checkpoints/latest").is_file()


def test_configs_and_launch_scripts_are_in_the_wheel(environment: Path, tmp_path: Path):
    resolved = depthattn(environment, tmp_path, "config", "3b", "layouts/tp8-sp")
    (package,) = (environment / "lib").glob("python*/site-packages/megatron_depthattn")
    assert f"# {package}/configs/3b.yaml" in resolved and f"# {package}/configs/layouts/tp8-sp.yaml" in resolved
    shapes = sorted((REPOSITORY / "megatron_depthattn/benchmarks").glob("*.yaml"))
    assert [path.name for path in shapes] == sorted(path.name for path in package.glob("benchmarks/*.yaml"))
    for folder, shipped in (("configs", "configs"), ("launch", "launch/scripts")):
        there = {path.relative_to(REPOSITORY / folder) for path in (REPOSITORY / folder).rglob("*") if path.is_file()}
        there = {path for path in there if path.suffix not in (".py", ".pyc")}
        assert there and all((package / shipped / path).is_file() for path in there)
