"""Processes of their own see TransformerEngine (worker.py, inside.py). This one never does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.te import small, stand_in

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def run_module() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs a module, with arguments, in a process that may see TransformerEngine."""
    if not (stand_in.FOLDER / "transformer_engine").is_dir():
        pytest.skip(f"no TransformerEngine in {stand_in.FOLDER}: run make install, or set DEPTHATTN_TE")
    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("this process sees TransformerEngine, and is meant to be the one that does not")

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        whole = [sys.executable, "-W", "ignore", "-m", *map(str, command)]
        return subprocess.run(whole, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def te(megatron_world_of_one, run_module, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What the worker found (``results``), the checkpoints (``folder``), and the runs that saved the local ones."""
    from megatron_depthattn.convert.from_hf import import_checkpoint
    from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
    from megatron_depthattn.convert.to_hf import export
    from megatron_depthattn.hf.weights_folder import HFFolder
    from tests.te import worker

    folder = tmp_path_factory.mktemp("te")
    run, initial = _trained(folder / "local")
    export(MegatronCheckpoint(folder / "local"), folder / "hf")
    import_checkpoint(HFFolder(folder / "hf"), folder / "imported")
    runs = {method: _trained(folder / method, method=method) for method in small.METHODS}
    done = run_module(worker.__name__, folder)
    if done.returncode:
        pytest.fail(f"{worker.__name__} failed:\n{done.stderr[-4000:]}", pytrace=False)
    results = torch.load(folder / worker.RESULTS)
    print(results["versions"])
    return SimpleNamespace(folder=folder, run=run, initial=initial, runs=runs, **results)


def _trained(folder: Path, **options: str) -> tuple[small.Run, dict[str, torch.Tensor]]:
    """A run of the local spec, saved in ``folder``, and its initial weights."""
    run = small.start("local", **options)
    initial = run.parameters()
    small.train_blindly(run)
    run.save(folder.parent).rename(folder)
    return run, initial
