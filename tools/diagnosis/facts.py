"""What is on this machine. The standard library only, and every import in a process of its own: whatever is missing or
broken, a package that takes the interpreter down included, is a fact and no crash.
"""

from __future__ import annotations

import json
import locale
import os
import platform
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_depthattn.preflight import machine

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 180.0
"""For one import; torch from a cold network disk takes a while."""
MODULES = {
    "torch": "torch",
    "megatron-core": "megatron.core.parallel_state",
    "transformer-engine": "transformer_engine.pytorch",
    "triton": "triton",
    "mosaicml-streaming": "streaming",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "omegaconf": "omegaconf",
    "pyyaml": "yaml",
    "rich": "rich",
    "pyarrow": "pyarrow",
    "zstandard": "zstandard",
    "boto3": "boto3",
    "deepspeed": "deepspeed",
    "lm-eval": "lm_eval",
}
"""Distributions that a feature needs, and the module that shows whether they work."""
_DEVICES = """
import json, torch
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({
    "devices": [{"name": d.name, "capability": [d.major, d.minor], "bytes": d.total_memory} for d in devices],
    "cuda": torch.version.cuda,
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if devices else None,
}))
"""


@dataclass(frozen=True)
class Package:
    """A distribution as it is here."""

    name: str
    version: str | None
    """None: not installed."""
    wanted: str
    """The range in pyproject.toml; empty: any."""
    is_in_range: bool | None
    """None: not installed, or nothing here can compare versions."""
    error: str | None
    """The last line of what its import says; None: it works."""

    @property
    def works(self) -> bool:
        """Whether it can be used."""
        return self.error is None and self.is_in_range is not False

    @property
    def here(self) -> str:
        """In a few words."""
        if self.error is None:
            return f"{self.name} {self.version}{'' if self.is_in_range is not False else f' (not {self.wanted})'}"
        return f"{self.name} {self.version}: {self.error}" if self.version else f"no {self.name}"


def find_packages() -> dict[str, Package]:
    """Every package of `MODULES` and of pyproject.toml's dependencies, by name; imports those of `MODULES`."""
    wanted = requirements()
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        errors = dict(
            zip(MODULES, pool.map(lambda module: run_python(f"import {module}")[1], MODULES.values()), strict=True)
        )
    packages = {}
    for name in dict.fromkeys([*wanted, *MODULES]):
        version = machine.installed_version(name)
        error = errors.get(name, None if version else "not installed")
        packages[name] = Package(name, version, wanted.get(name, ""), is_in_range(version, wanted.get(name, "")), error)
    return packages


def requirements() -> dict[str, str]:
    """Distribution -> version range, from pyproject.toml: what the package needs, and what its extras do."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        each for name, texts in project.get("optional-dependencies", {}).items() if name != "test" for each in texts
    ]
    ranges = {}
    for text in [*project["dependencies"], *extras]:
        name = text.split(";")[0].strip()
        cut = next((i for i, letter in enumerate(name) if letter in "<>=!~ ["), len(name))
        ranges[name[:cut]] = name[cut:].partition("]")[2] if name[cut:].startswith("[") else name[cut:]
    return ranges


def python_wanted() -> str:
    """The range of Python versions in pyproject.toml."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])


def is_in_range(version: str | None, wanted: str) -> bool | None:
    """Whether a version is in a range; None if it cannot be told."""
    if version is None:
        return None
    if not wanted:
        return True
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return None
    return SpecifierSet(wanted).contains(version, prereleases=True)


def run_python(code: str, *arguments: str) -> tuple[str, str | None]:
    """What ``code`` prints in a process of its own, and the last line of its error; None: it ended well."""
    # A folder named like a package, where the doctor is started, must not stand in for it: -P.
    command = [sys.executable, *(["-S"] if sys.flags.no_site else []), "-P", "-W", "ignore", "-c", code, *arguments]
    paths = [path for path in (os.environ.get("PYTHONPATH"), str(ROOT)) if path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return "", f"not done after {SECONDS:.0f} s"
    if done.returncode == 0:
        return done.stdout, None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return done.stdout, lines[-1] if lines else f"ended with code {done.returncode} and said nothing"


def run_command(*command: str, seconds: float = 15.0) -> tuple[str, str | None]:
    """What a program prints, and why it failed, in one line; None: it did not."""
    if shutil.which(command[0]) is None:
        return "", f"no {command[0]}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        return "", f"{command[0]}: {error}"
    said = (done.stderr.strip() or done.stdout.strip() or f"code {done.returncode}").splitlines()[-1]
    return done.stdout, None if done.returncode == 0 else f"{command[0]}: {said}"


@dataclass(frozen=True)
class Machine:
    """All but the Python packages."""

    python: str
    system: str
    devices: tuple[dict[str, Any], ...]
    """The GPUs that torch sees: name, capability, bytes."""
    driver: str | None
    gpus_of_driver: tuple[str, ...]
    """The GPUs that the driver sees."""
    driver_error: str | None
    cuda: str | None
    nccl: str | None
    shared_memory_bytes: int | None
    disk_bytes: int
    """Free in the current folder."""
    memory_bytes: int
    open_files: int
    encoding: str
    host: str
    address: str | None
    """What the host's name resolves to."""
    interfaces: tuple[str, ...]
    gloo_interface: str | None
    """GLOO_SOCKET_IFNAME."""
    slurm: Mapping[str, bool]
    slurm_error: str | None
    programs: Mapping[str, bool]
    aws_credentials: bool


def find_machine() -> Machine:
    """Look around."""
    seen: dict[str, Any] = {}
    with suppress(ValueError):
        seen = json.loads(run_python(_DEVICES)[0] or "{}")
    listed, driver_error = run_command("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    gpus = [] if driver_error else [line.rpartition(",") for line in listed.splitlines() if line.strip()]
    slurm = {name: shutil.which(name) is not None for name in ("sbatch", "srun", "scontrol")}
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        devices=tuple(seen.get("devices", ())),
        driver=machine.driver_version() or (gpus[0][2].strip() if gpus else None),
        gpus_of_driver=tuple(name.strip() for name, _, _ in gpus),
        driver_error=driver_error,
        cuda=seen.get("cuda"),
        nccl=seen.get("nccl"),
        shared_memory_bytes=machine.shared_memory_bytes(),
        disk_bytes=shutil.disk_usage(".").free,
        memory_bytes=machine.memory_bytes(),
        open_files=machine.open_files(),
        encoding=locale.getpreferredencoding(False),
        host=socket.gethostname(),
        address=machine.own_address(),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        gloo_interface=os.environ.get("GLOO_SOCKET_IFNAME"),
        slurm=slurm,
        slurm_error=run_command("scontrol", "ping")[1] if slurm["scontrol"] else None,
        programs={
            name: shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
            is not None
            for name in ("g++", "ninja", "nvcc", "torchrun")
        },
        aws_credentials="AWS_ACCESS_KEY_ID" in os.environ or Path("~/.aws/credentials").expanduser().exists(),
    )
