"""What the doctor says, from facts to rows, and the program itself where things are missing or broken."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_depthattn.cli.doctor import check_config
from megatron_depthattn.cli.estimate import main as estimate
from megatron_depthattn.config import load_config, validate
from megatron_depthattn.doctor import MODULES, Host, Package, features, find_host, is_in_range, requirements

ROOT = Path(__file__).parents[2]
H100 = {"name": "H100", "capability": [9, 0], "bytes": 80 * 10**9}
HEALTHY = Host(
    python="3.11.7",
    devices=(H100, H100),
    driver="570.86",
    gpus_of_driver=("H100", "H100"),
    cuda="13.0",
    address="10.0.0.1",
    interfaces=("lo", "eth0"),
    gloo_interface=None,
    slurm_error=None,
)
PACKAGES = {name: Package(name, "2.20.2" if "engine" in name else "1.0", "", None) for name in MODULES}
CPU = {"devices": (), "gpus_of_driver": (), "driver": "no nvidia-smi"}


@pytest.mark.parametrize(
    ("setting", "world"), [("parallel.tensor=3", 6), ("train.global_batch_size=15", 2), ("model.kv_channels=7", 2)]
)
def test_doctor_and_estimate_say_what_the_start_would_say(setting, world, tmp_path, capsys):
    """Each runs the one check, for the world that will be started, before anything is queued."""
    config, given = ROOT / "configs/quickstart.yaml", ["parallel.pipeline=1", f"run.dir={tmp_path}/run", setting]
    with pytest.raises(ValueError) as rejected:  # the message is what the others are compared with
        validate(load_config(config, given), world)
    _, problems, _ = check_config(str(config), given, world, HEALTHY, PACKAGES)
    assert problems == [f"{config} on {world} ranks: {rejected.value}"]
    assert estimate([str(config), *given, "--world", str(world)]) == 1
    assert capsys.readouterr().err == f"error: {rejected.value}\n"
    assert not list(tmp_path.iterdir())


def rows(packages=PACKAGES, **host):
    return {row.name: row for row in features(packages, dataclasses.replace(HEALTHY, **host))}


def without(name: str, **change):
    gone = {"version": None, "error": "not installed"} | change
    return PACKAGES | {name: dataclasses.replace(PACKAGES[name], **gone)}


def test_on_a_healthy_hopper_node_all_is_ready_but_what_needs_a_newer_gpu():
    found = rows(python="3.12.3")
    assert [name for name, row in found.items() if row.fix] == ["FP8 mxfp8"]
    assert "2 x H100; driver 570.86, torch for CUDA 13.0" in found["GPU training"].here


CASES = [
    ({"packages": without("torch")}, "CPU training", "pip install 'torch'"),
    ({"packages": without("torch")}, "GPU training", "pip install 'torch'"),
    ({"packages": without("torch", version="2.0", error="not >=2.6")}, "CPU training", "'torch' (torch: not >=2.6)"),
    (
        {"packages": without("transformer-engine", version="2.9", error="ImportError: undefined symbol")},
        "TransformerEngine layers",
        "(transformer-engine: ImportError: undefined symbol)",
    ),
    ({"packages": without("transformer-engine")}, "FP8 delayed", "pip install --no-build-isolation"),
    (
        {"python": "3.11.7"},
        "Muon",
        "Python 3.12 or later with Megatron-Core 0.19 or later; or set optimizer.name=adamw",
    ),
    ({"packages": without("emerging-optimizers"), "python": "3.12.3"}, "Muon", "pip install 'emerging-optimizers'"),
    ({"packages": without("deepspeed")}, "DeepSpeed engine", "pip install 'deepspeed'"),
    ({"packages": without("lm-eval")}, "lm-eval", "pip install 'megatron-depthattn[eval]'"),
    ({"packages": without("wandb")}, "Weights & Biases", "pip install 'megatron-depthattn[wandb]'"),
    ({"packages": without("boto3")}, "S3 streaming", "pip install 'boto3'"),
    ({"packages": without("zstandard")}, "corpora: parquet, zstd", "pip install 'zstandard'"),
    ({"packages": without("safetensors")}, "Hugging Face export", "pip install 'safetensors'"),
    ({"python": "3.10.1"}, "CPU training", "install Python >=3.11"),
    (CPU, "GPU training", "a machine with an NVIDIA GPU and its driver"),
    ({"devices": ()}, "GPU training", "the driver sees 2 x H100, torch (CUDA 13.0) none"),
    (CPU, "TransformerEngine layers", "set model.spec=local"),
    (CPU, "Triton kernels", "TRITON_INTERPRET=1"),
    ({"devices": ({**H100, "capability": [7, 5]},)}, "bf16", "precision.dtype=fp32"),
    ({"devices": ({**H100, "capability": [8, 0]},)}, "FP8 delayed", "capability 8.9 or later and H100 has 8.0"),
    ({"devices": ({**H100, "capability": [8, 9]},)}, "FP8 blockwise", "set precision.fp8 to one of delayed, tensor"),
    ({"cuda": "12.8"}, "FP8 blockwise", "needs a torch built with CUDA 12.9 or later and this one has 12.8"),
    ({"address": "127.0.1.1"}, "multi-node torchrun", "resolves to 127.0.1.1: set GLOO_SOCKET_IFNAME to one of eth0"),
    ({"address": None}, "multi-node torchrun", "does not resolve: set GLOO_SOCKET_IFNAME"),
    ({"interfaces": ("lo",)}, "multi-node torchrun", "a network interface beside lo"),
    ({"slurm_error": "scontrol: no answer"}, "Slurm", "a login node of a Slurm cluster (scontrol: no answer)"),
]


@pytest.mark.parametrize(("change", "name", "fix"), CASES)
def test_what_is_missing_is_reported_with_what_to_do(change: dict, name: str, fix: str):
    assert fix in rows(**change)[name].fix


def test_every_row_has_a_case():
    assert {name for _, name, _ in CASES} | {"FP8 tensorwise", "FP8 mxfp8"} == set(rows())


def test_an_interface_that_is_set_will_do():
    assert rows(address="127.0.1.1", gloo_interface="eth0")["multi-node torchrun"].fix == ""


def test_ranges_come_from_pyproject():
    wanted = requirements()
    assert wanted["megatron-core"] == ">=0.16.1,<0.20" and wanted["numpy"] == ""
    assert wanted["lm-eval"] == ">=0.4.13" and wanted["python"] == ">=3.11"
    assert is_in_range("0.19.2", wanted["megatron-core"]) is True
    assert is_in_range("0.20.0", wanted["megatron-core"]) is False
    assert is_in_range(None, ">=2") and is_in_range("1", "")


def doctor(*arguments: str | Path, python: str = sys.executable, flags: tuple[str, ...] = (), **environment: str):
    command = [python, *flags, "-m", "megatron_depthattn.cli", "doctor", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.fixture
def broken_torch(tmp_path: Path) -> dict[str, str]:
    """A torch that is found first and fails as a build for another driver does; TransformerEngine falls over."""
    for name, text in (
        ("torch", "raise ImportError('libcudart.so.99: cannot open shared object file')"),
        ("transformer_engine", "import os\nos.abort()"),
    ):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text(text + "\n")
    return {"PYTHONPATH": str(tmp_path / "broken")}


def test_a_broken_torch_is_a_row_and_no_crash(broken_torch: dict[str, str], tmp_path: Path):
    result = doctor("--json", tmp_path / "report.json", **broken_torch)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert "libcudart.so.99: cannot open shared object file" in result.stdout
    assert "TO FIX: CPU training: pip install --force-reinstall 'torch" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    packages = {package["name"]: package for package in report["packages"]}
    assert packages["torch"]["error"] == "ImportError: libcudart.so.99: cannot open shared object file"
    assert "ended with code -6" in packages["transformer-engine"]["error"], "a package that takes the process down"
    assert packages["omegaconf"]["error"] is None, "control: what is not broken works"
    assert report["to_fix"] and report["needed"] == ["CPU training"]


def test_an_interpreter_with_nothing_installed(tmp_path: Path):
    """No torch, no rich, no YAML: the interpreter below the environment, without its site-packages."""
    result = doctor("configs/quickstart.yaml", python=sys._base_executable, flags=("-S", "-E"), PYTHONPATH="")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr, result.stderr
    assert "TO FIX: CPU training: pip install 'torch>=2.6' 'megatron-core>=0.16.1,<0.20'" in result.stdout
    assert "configs/quickstart.yaml cannot be read: No module named " in result.stdout


def test_a_driver_whose_gpus_torch_does_not_see(
    broken_torch: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.86.15'\n")
    tool.chmod(0o755)
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    for name, value in (broken_torch | {"PATH": path}).items():
        monkeypatch.setenv(name, value)
    host = find_host()
    assert host.gpus_of_driver == ("NVIDIA H100 80GB HBM3",) and host.driver == "570.86.15" and not host.devices
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed: no driver is running' >&2\nexit 9\n")
    assert find_host().driver == "NVIDIA-SMI has failed: no driver is running"


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the free space of every disk, since a checkpoint of `3b` is larger than some machines' disks."""

    def set_free(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    set_free(10**13)
    return set_free


def problems_of(tmp_path: Path, *settings: str, world: int | None = None, host: Host = HEALTHY) -> list[str]:
    given = ["data.path=/nowhere/data", f"run.dir={tmp_path / 'run'}", *settings]
    return check_config("3b", given, world, dataclasses.replace(host, **CPU), PACKAGES)[1]


@pytest.mark.usefixtures("free_bytes")
def test_what_of_a_config_is_wrong_here(tmp_path: Path):
    """Before anything runs: layout against ranks, keys, data."""
    (problem,) = problems_of(tmp_path, "parallel.tensor=3")
    assert "on 3 ranks: parallel.tensor is 3 and model.num_query_groups is 8" in problem
    assert problems_of(tmp_path, "model.spec=tee")[0].startswith("model.spec is string 'tee'")
    (problem,) = problems_of(tmp_path, "parallel.tensor=2", world=7)
    assert "on 7 ranks: the world has 7 ranks, which is not a multiple of 2" in problem
    (problem,) = problems_of(tmp_path, world=32)
    assert problem == "/nowhere/data is not there: prepare it with depthattn prepare, or set data.path"


def test_a_disk_too_small_for_a_checkpoint(tmp_path: Path, free_bytes: Callable[[int], None]):
    free_bytes(10**9)
    (problem,) = problems_of(tmp_path, "data.path=configs", world=32)
    where, said = problem.split(": ", 1)
    assert where == f"checkpoint.dir={tmp_path}/run/checkpoints"
    assert said == "1.0 GB free, a checkpoint takes about 38.5 GB; free some, or set another"


@pytest.mark.usefixtures("free_bytes")
def test_data_of_another_length_or_vocabulary(tmp_path: Path):
    def said(vocabulary: int) -> list[str]:
        (tmp_path / "manifest.json").write_text(json.dumps({"sequence_length": 64, "vocab_size": vocabulary}))
        settings = [f"data.path={tmp_path}", "data.sequence_length=128", "model.vocab_size=1000"]
        return problems_of(tmp_path, *settings, world=32)

    length, vocabulary = said(1001)
    assert length == f"data.sequence_length is 128 and {tmp_path} has samples of 64: set 64"
    assert vocabulary == f"model.vocab_size is 1000 and the tokenizer of {tmp_path} has 1001: set more"
    assert said(400) == [length]


@pytest.mark.usefixtures("free_bytes")
def test_what_does_not_fit_the_gpus(tmp_path: Path, capsys):
    """The planner's count: what a rank needs, what there is, what to set; the control is the config as it ships."""
    large = ("data.path=configs", "train.micro_batch_size=16")
    (problem,) = problems_of(tmp_path, *large, world=32)
    assert re.match(
        r"32 ranks: a rank needs \d+\.\d GB and H100 has 80 GB less 8%: set recompute.granularity=", problem
    )
    capsys.readouterr()
    assert problems_of(tmp_path, "data.path=configs", world=32) == []
    assert re.search(r"^32 x H100: .* GB on the fullest rank, .* hours for the run", capsys.readouterr().out, re.M)


def test_this_machine_is_ready(tmp_path: Path):
    for name in ("deepspeed", "lm_eval"):  # what the config does not ask for may be broken
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text("raise ImportError('broken')\n")
    settings = ["data.path=configs", f"run.dir={tmp_path / 'run'}", "parallel.pipeline=1"]
    command = ["quickstart", *settings, "--json", tmp_path / "report.json"]
    result = doctor(*command, PYTHONPATH=str(tmp_path / "broken"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"checked {len(MODULES)} of {len(MODULES)}: " in result.stderr
    assert result.stdout.splitlines()[-1].startswith("ready for quickstart on 1 ranks, as far as")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["to_fix"] == []
    assert {package["name"] for package in report["packages"] if package["error"] == "ImportError: broken"} == {
        "deepspeed",
        "lm-eval",
    }
    assert not (tmp_path / "run").exists(), "the doctor starts nothing"
