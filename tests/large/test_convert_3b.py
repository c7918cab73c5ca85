"""Memory and time of converting a 3B checkpoint (`make convert-3b`): what fits a login node of a cluster."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_depthattn.config import load_config, to_dict
from megatron_depthattn.convert.from_hf import write_megatron_checkpoint
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.hf.name_mapping import ModelShape, weight_groups

ROOT = Path(__file__).parents[2]
GB = 1e9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Holds `step`, a randomly initialised 3B model in bf16."""
    folder = tmp_path_factory.mktemp("3b")
    config = to_dict(load_config(ROOT / "configs/3b.yaml"))
    groups = weight_groups(ModelShape.from_model_section(config["model"]))
    shapes = {
        group.megatron: torch.empty(group.megatron_shape, dtype=torch.bfloat16, device="meta") for group in groups
    }
    generator = torch.Generator().manual_seed(0)

    def random(name: str) -> torch.Tensor:
        return torch.empty(shapes[name].shape, dtype=torch.bfloat16).normal_(0, 0.01, generator=generator)

    (folder / "step").mkdir()
    write_megatron_checkpoint(folder / "step", shapes, random, {"config": config})
    yield folder
    shutil.rmtree(folder)


def run(*command: str | Path) -> tuple[float, float]:
    """Seconds, and the process's largest resident memory in GB."""
    started = time.monotonic()
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, command
    return time.monotonic() - started, usage.ru_maxrss * 1024 / GB


@pytest.mark.timeout(1800)
def test_conversion_of_3b_stays_within_its_memory(folder: Path):
    tool = (sys.executable, "tools/convert_checkpoint.py")
    import_limit, export_limit = 4.0, 2.5
    copied = run("cp", "-r", folder / "step", folder / "copy")
    exported = run(*tool, "to-hf", "--checkpoint", folder / "step", "--output", folder / "hf")
    imported = run(*tool, "from-hf", "--model", folder / "hf", "--output", folder / "back")
    size = sum(file.stat().st_size for file in (folder / "hf").glob("*.safetensors")) / GB
    print(f"\n{size:.2f} GB: copy {copied[0]:.0f} s; export {exported[0]:.0f} s, {exported[1]:.2f} GB peak; ", end="")
    print(f"import {imported[0]:.0f} s, {imported[1]:.2f} GB peak")
    assert size > 5.4
    assert exported[1] < export_limit
    assert imported[1] < import_limit
    before, after = MegatronCheckpoint(folder / "step"), MegatronCheckpoint(folder / "back")
    assert before.weights.keys() == after.weights.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.weights)
