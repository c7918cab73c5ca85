"""What is installed on this machine, what each feature needs, and whether a config can run here.

The standard library only, and every import in a process of its own: whatever is missing or broken, a package that takes
the interpreter down included, is a row and no crash.
"""

from __future__ import annotations

import ipaddress
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_depthattn.parallel.launch_env import communication_variables
from megatron_depthattn.preflight import machine
from megatron_depthattn.terminal import printable

ROOT = Path(__file__).resolve().parents[1]
_SAME_NAME = "torch triton transformers tokenizers safetensors omegaconf rich pyarrow zstandard boto3 deepspeed wandb"
MODULES = {name: name for name in _SAME_NAME.split()} | {
    "matplotlib": "matplotlib",
    "megatron-core": "megatron.core.parallel_state",
    "transformer-engine": "transformer_engine.pytorch",
    "mosaicml-streaming": "streaming",
    "pyyaml": "yaml",
    "lm-eval": "lm_eval",
    "emerging-optimizers": "emerging_optimizers",
}
"""Distributions that a feature needs, and the module that shows whether they work."""
TRAINING = ("torch", "megatron-core", "mosaicml-streaming", "omegaconf", "pyyaml", "rich")
ASKED_FOR = {
    "bf16": ("precision.dtype", "bf16"),
    "TransformerEngine layers": ("model.spec", "te"),
    "Triton kernels": ("model.depth_attention.op", "triton"),
    "DeepSpeed engine": ("engine.name", "deepspeed"),
    "Muon": ("optimizer.name", "muon"),
    **{f"FP8 {recipe}": ("precision.fp8", recipe) for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")},
}
"""Features and the setting by which a config asks for each."""
_DEVICES = """
import json, torch
found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
devices = [{"name": d.name, "capability": [d.major, d.minor], "bytes": d.total_memory} for d in found]
print(json.dumps({"cuda": torch.version.cuda, "devices": devices}))
"""


@dataclass(frozen=True)
class Package:
    """A distribution as it is here."""

    name: str
    version: str | None
    """None: not installed."""
    wanted: str
    """The range that this package declares; empty: any."""
    error: str | None
    """The last line of what its import says, or that the version is out of range; None: it works."""

    @property
    def here(self) -> str:
        """In a few words."""
        error = f": {self.error}" if self.error else ""
        return f"{self.name} {self.version}{error}" if self.version else f"no {self.name}"


@dataclass(frozen=True)
class Host:
    """All but the Python packages."""

    python: str
    devices: tuple[dict[str, Any], ...]
    """The GPUs that torch sees: name, capability, bytes."""
    cuda: str | None
    gpus_of_driver: tuple[str, ...]
    """The GPUs that the driver sees."""
    driver: str
    """Its version, or why there is none."""
    address: str | None
    """What the host's name resolves to."""
    interfaces: tuple[str, ...]
    gloo_interface: str | None
    slurm_error: str | None

    @property
    def capability(self) -> tuple[int, ...]:
        """The least of the GPUs; empty without one."""
        return min((tuple(device["capability"]) for device in self.devices), default=())


@dataclass(frozen=True)
class Feature:
    """A row: what it is, what of it is here, and how to get what is not."""

    name: str
    here: str
    fix: str
    """Empty: it is ready."""


def find_packages() -> dict[str, Package]:
    """Import every package of `MODULES`, with a line on stderr for each."""
    ranges, found, end = requirements(), dict[str, Package](), "\r" if sys.stderr.isatty() else "\n"

    def look(name: str) -> Package:
        version, wanted = machine.installed_version(name), ranges.get(name, "")
        error = run_python(f"import {MODULES[name]}")[1]
        return Package(name, version, wanted, error or (None if is_in_range(version, wanted) else f"not {wanted}"))

    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        for package in pool.map(look, MODULES):
            found[package.name] = package
            line = f"checked {len(found)} of {len(MODULES)}: {printable(package.here)}"
            print(f"{line:100.100}", end=end, file=sys.stderr, flush=True)
    return found


def requirements() -> dict[str, str]:
    """Distribution -> version range: of pyproject.toml in a checkout, else of the installed package."""
    lines: list[str] = []
    with suppress(metadata.PackageNotFoundError):
        found = metadata.metadata("megatron-depthattn")
        lines = [*(found.get_all("Requires-Dist") or []), f"python {found['Requires-Python']}"]
    with suppress(OSError, KeyError):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = chain(*project["optional-dependencies"].values())
        lines = [*project["dependencies"], *extras, f"python {project['requires-python']}"]
    parts = (re.match(r"([\w.-]+)(?:\[.*?\])?\s*([^;]*)", line) for line in lines)
    return {part[1]: part[2].strip() for part in parts if part}


def is_in_range(version: str | None, wanted: str) -> bool:
    """Whether a version is in a range, as far as it can be known."""
    with suppress(ImportError):
        from packaging.specifiers import SpecifierSet

        return version is None or SpecifierSet(wanted).contains(version, prereleases=True)
    return True


def run_python(code: str) -> tuple[str, str | None]:
    """`run_command` of Python code; an import of torch from a cold network disk takes a while."""
    # -P: a folder that is named like a package, where the doctor is started, must not stand in for it
    flags = [*(["-S"] if sys.flags.no_site else []), "-P", "-W", "ignore"]
    found = f"import sys; sys.path.append({str(ROOT)!r})\n"
    return run_command(sys.executable, *flags, "-c", found + code, seconds=180)


def run_command(*command: str, seconds: int = 15) -> tuple[str, str | None]:
    """What a program prints, and why it failed, in one line; None: it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "", f"not done after {seconds} s"
    except OSError:
        return "", f"no {command[0]}"
    said = done.stderr.strip() or done.stdout.strip() or f"ended with code {done.returncode} and said nothing"
    return done.stdout, said.splitlines()[-1].strip() if done.returncode else None


def find_host() -> Host:
    """Look around."""
    seen: dict[str, Any] = {}
    with suppress(ValueError):
        seen = json.loads(run_python(_DEVICES)[0])
    listed, driver_error = run_command("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    gpus = [] if driver_error else [line.rpartition(",") for line in listed.splitlines() if line.strip()]
    return Host(
        python=platform.python_version(),
        devices=tuple(seen.get("devices", ())),
        cuda=seen.get("cuda"),
        gpus_of_driver=tuple(name.strip() for name, _, _ in gpus),
        driver=machine.driver_version() or (gpus[0][2].strip() if gpus else driver_error or "no driver"),
        address=machine.own_address(),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        gloo_interface=communication_variables().get("GLOO_SOCKET_IFNAME"),
        slurm_error=run_command("scontrol", "ping")[1],
    )


def install(names: Sequence[str], packages: Mapping[str, Package], extra: str = "") -> str:
    """How to get what is missing, broken or of the wrong version among these; empty if nothing is."""
    bad = [packages[name] for name in names if packages[name].error]
    broken = "; ".join(f"{package.name}: {package.error}" for package in bad if package.version)
    wrong = extra or " ".join(f"'{package.name}{package.wanted}'" for package in bad)
    command = f"pip install --force-reinstall {wrong} ({broken})" if broken else f"pip install {wrong}"
    return command if bad else ""


def features(packages: Mapping[str, Package], host: Host) -> list[Feature]:
    """One row for each feature."""

    def row(name: str, needs: Sequence[str] = (), problem: str = "", here: str = "", extra: str = "") -> Feature:
        shown = here or ", ".join(packages[each].here for each in needs)
        return Feature(name, shown, install(needs, packages, extra) or problem)

    te = packages["transformer-engine"]
    te_fix = "pip install --no-build-isolation 'transformer-engine[pytorch]'; or set model.spec=local"
    te_fix = install([te.name], packages) if te.version else te_fix
    te_fix = te_fix or ("" if host.devices else "it runs on GPUs only; set model.spec=local")
    triton = "" if host.devices else "a GPU, or model.depth_attention.op=lean; TRITON_INTERPRET=1 runs it on CPU"
    names = [device["name"] for device in host.devices]
    gpus = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "torch sees no GPU"
    capability = ".".join(map(str, host.capability)) or "none"
    wanted = requirements().get("python", "")
    python = "" if is_in_range(host.python, wanted) else f"install Python {wanted}"
    newer = is_in_range(host.python, ">=3.12") and is_in_range(packages["megatron-core"].version, ">=0.19")
    muon = "" if newer else "Python 3.12 or later with Megatron-Core 0.19 or later; or set optimizer.name=adamw"
    bf16 = "set precision.dtype=fp32" if () < host.capability < (8, 0) else ""
    slurm = f"a login node of a Slurm cluster ({host.slurm_error})" if host.slurm_error else ""
    network = f"{host.address or 'no address'}; {', '.join(host.interfaces) or 'no interfaces'}"
    return [
        row("CPU training", TRAINING, python, f"python {host.python}"),
        row("GPU training", TRAINING, _gpu(host), f"{gpus}; driver {host.driver}, torch for CUDA {host.cuda}"),
        row("bf16", problem=bf16, here=f"GPU capability {capability}; on CPU it works, slower than fp32"),
        row("TransformerEngine layers", problem=te_fix, here=te.here),
        *(
            row(name, problem=te_fix or _fp8(recipe, te.version, host), here=te.here)
            for name, (key, recipe) in ASKED_FOR.items()
            if key == "precision.fp8"
        ),
        row("Triton kernels", ["triton"], triton),
        row("DeepSpeed engine", ["deepspeed"]),
        row("Muon", [] if muon else ["emerging-optimizers"], muon, f"python {host.python}"),
        row("multi-node torchrun", problem=_multi_node(host), here=network),
        row("Slurm", problem=slurm),
        row("S3 streaming", ["boto3", "mosaicml-streaming"]),
        row("corpora: parquet, zstd", ["pyarrow", "zstandard"]),
        row("Hugging Face export", ["transformers", "tokenizers", "safetensors"]),
        row("Weights & Biases", ["wandb", "matplotlib"], extra="'megatron-depthattn[wandb]'"),
        row("lm-eval", ["lm-eval", "transformers"], extra="'megatron-depthattn[eval]'"),
    ]


def _gpu(host: Host) -> str:
    if not host.devices and host.gpus_of_driver:
        seen = f"the driver sees {len(host.gpus_of_driver)} x {host.gpus_of_driver[0]}"
        return f"{seen}, torch (CUDA {host.cuda}) none: a torch for this driver, or CUDA_VISIBLE_DEVICES"
    driver = "a machine with an NVIDIA GPU and its driver; in a container start it with --gpus or --nv"
    return "" if host.devices else driver


def _fp8(recipe: str, transformer_engine: str | None, host: Host) -> str:
    from megatron_depthattn.config.hardware_checks import Accelerator, recipe_unsupported_on

    here = Accelerator(host.devices[0]["name"], host.capability, host.cuda, transformer_engine)
    return recipe_unsupported_on(recipe, here) or ""


def _multi_node(host: Host) -> str:
    others = [name for name in host.interfaces if name != "lo"]
    if not others:
        return "a network interface beside lo"
    if host.gloo_interface or (host.address and not ipaddress.ip_address(host.address).is_loopback):
        return ""
    means = f"resolves to {host.address}" if host.address else "does not resolve"
    return f"the host's name {means}: set GLOO_SOCKET_IFNAME to one of {', '.join(others)}, or correct /etc/hosts"
