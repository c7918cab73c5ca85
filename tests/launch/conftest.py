"""Real parts: a Slurm of three nodes on this machine, two hosts that are network namespaces, an undisturbed run."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.commands import must_succeed
from tests.e2e.small_run import train
from tests.launch.jobs import STEPS, records, write_config

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("launch") / "small.yaml", corpus)


@pytest.fixture(scope="session")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two ranks without a launcher, from its first step to its last."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    must_succeed(train(config, f"run.dir={run_dir}", ranks=2))
    assert len(records(run_dir)) == STEPS
    return run_dir


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """Slurm's commands work while this lasts; three nodes, node1 to node3."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name, path=_PATH)]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"a Slurm of one's own needs root and slurm-wlm, munge (here: {missing or 'no root'})")
    folder = tempfile.mkdtemp(prefix="slurm-test.", dir="/tmp")
    variables = os.environ | {"SLURM_LOCAL_DIR": folder}
    script = HERE / "slurm-local.sh"
    started = subprocess.run([script, "start", "3"], env=variables, capture_output=True, text=True, timeout=300)
    assert started.returncode == 0, started.stderr
    os.environ["SLURM_CONF"] = f"{folder}/slurm.conf"
    try:
        yield
    finally:
        del os.environ["SLURM_CONF"]
        subprocess.run([script, "stop"], env=variables, capture_output=True, timeout=120, check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def namespaces() -> Path:
    """The script that runs a command on two hosts that are network namespaces."""
    if os.geteuid() != 0 or not shutil.which("ip", path=_PATH):
        pytest.skip("network namespaces need root and iproute2")
    script = HERE / "netns-2nodes.sh"
    if subprocess.run([script, "-t", "20", "--", "true"], capture_output=True, check=False).returncode == 3:
        pytest.skip("this kernel or container does not let one make network namespaces")
    return script


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
