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
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_depthattn.parallel.launch_env import communication_variables
from megatron_depthattn.preflight import machine

ROOT = Path(__file__).resolve().parents[1]
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
TRAINING = ("torch", "megatron-core", "mosaicml-streaming", "omegaconf", "pyyaml", "rich")
ASKED_FOR = {
    "bf16": ("precision.dtype", "bf16"),
    "TransformerEngine layers": ("model.spec", "te"),
    "Triton kernels": ("model.depth_attention.op", "triton"),
    "DeepSpeed engine": ("engine.name", "deepspeed"),
    **{f"FP8 {recipe}": ("precision.fp8", recipe) for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")},
}
"""Features and the setting by which a config asks for each."""
_DEVICES = """
import json, torch
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"cuda": torch.version.cuda, "devices": [
    {"name": d.name, "capability": [d.major, d.minor], "bytes": d.total_memory} for d in devices
]}))
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
    programs: tuple[str, ...]

    @property
    def capability(self) -> tuple[int, int] | None:
        """The least of the GPUs; None without one."""
        return min(((device["capability"][0], device["capability"][1]) for device in self.devices), default=None)


@dataclass(frozen=True)
class Feature:
    """A row: what it is, what of it is here, and how to get what is not."""

    name: str
    here: str
    fix: str
    """Empty: it is ready."""


def find_packages(on_result: Callable[[str], None] = lambda line: None) -> dict[str, Package]:
    """Import every package of `MODULES`; calls ``on_result`` with a line after each."""
    wanted = requirements()

    def look(name: str) -> Package:
        version = machine.installed_version(name)
        error = run_python(f"import {MODULES[name]}")[1]
        if error is None and is_in_range(version, wanted.get(name, "")) is False:
            error = f"not {wanted[name]}"
        package = Package(name, version, wanted.get(name, ""), error)
        on_result(package.here)
        return package

    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        return {package.name: package for package in pool.map(look, MODULES)}


def requirements() -> dict[str, str]:
    """Distribution -> version range: of pyproject.toml in a checkout, else of the installed package."""
    with suppress(OSError, KeyError):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        lines = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
        return _ranges(lines) | {"python": project["requires-python"]}
    with suppress(metadata.PackageNotFoundError):
        found = metadata.metadata("megatron-depthattn")
        return _ranges(found.get_all("Requires-Dist") or []) | {"python": found["Requires-Python"]}
    return {}


def _ranges(lines: Iterable[str]) -> dict[str, str]:
    parts = (re.match(r"([\w.-]+)(?:\[.*?\])?\s*([^;]*)", line) for line in lines)
    return {part[1]: part[2].strip() for part in parts if part}


def is_in_range(version: str | None, wanted: str) -> bool | None:
    """Whether a version is in a range; None if that is unknown."""
    if version is None or not wanted:
        return None
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return None
    return SpecifierSet(wanted).contains(version, prereleases=True)


def run_python(code: str, *arguments: str) -> tuple[str, str | None]:
    """What ``code`` prints in a process of its own, and the last line of its error; None: it ended well."""
    # -P: a folder that is named like a package, where the doctor is started, must not stand in for it
    flags = [*(["-S"] if sys.flags.no_site else []), "-P", "-W", "ignore"]
    found = f"import sys; sys.path.append({str(ROOT)!r})\n"
    try:
        done = subprocess.run(
            [sys.executable, *flags, "-c", found + code, *arguments], capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return "", f"not done after {SECONDS:.0f} s"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    error = lines[-1] if lines else f"ended with code {done.returncode} and said nothing"
    return done.stdout, error if done.returncode else None


def run_command(*command: str) -> tuple[str, str | None]:
    """What a program prints, and why it failed, in one line; None: it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except FileNotFoundError:
        return "", f"no {command[0]}"
    except (subprocess.TimeoutExpired, OSError) as error:
        return "", f"{command[0]}: {error}"
    said = (done.stderr.strip() or done.stdout.strip() or f"code {done.returncode}").splitlines()[-1]
    return done.stdout, f"{command[0]}: {said}" if done.returncode else None


def find_host() -> Host:
    """Look around."""
    seen: dict[str, Any] = {}
    with suppress(ValueError):
        seen = json.loads(run_python(_DEVICES)[0] or "{}")
    listed, driver_error = run_command("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    gpus = [] if driver_error else [line.rpartition(",") for line in listed.splitlines() if line.strip()]
    near = Path(sys.executable).parent
    programs = ("g++", "ninja", "torchrun")
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
        programs=tuple(name for name in programs if shutil.which(name) or (near / name).exists()),
    )


def install(names: Sequence[str], packages: Mapping[str, Package], extra: str = "") -> str:
    """How to get what is missing, broken or of the wrong version among these; empty if nothing is."""
    bad = [packages[name] for name in names if packages[name].error]
    broken = "; ".join(f"{package.name}: {package.error}" for package in bad if package.version)
    force = "--force-reinstall " if broken else ""
    wrong = extra or " ".join(f"'{package.name}{package.wanted}'" for package in bad)
    return f"pip install {force}{wrong}{f' ({broken})' if broken else ''}" if bad else ""


def features(packages: Mapping[str, Package], host: Host) -> list[Feature]:
    """One row for each feature."""
    te = "pip install --no-build-isolation 'transformer-engine[pytorch]'; or set model.spec=local"
    te = te if packages["transformer-engine"].version is None else install(["transformer-engine"], packages)
    te = te or ("" if host.devices else "it runs on GPUs only; set model.spec=local")
    triton = "" if host.devices else "a GPU, or model.depth_attention.op=lean; TRITON_INTERPRET=1 runs it on CPU"
    compiler = [name for name in ("g++", "ninja") if name not in host.programs]
    names = [device["name"] for device in host.devices]
    gpus = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "torch sees no GPU"
    old_gpu = host.capability is not None and host.capability < (8, 0)
    capability = ".".join(map(str, host.capability or ())) or "none"
    needs = {
        "CPU training": (TRAINING, _python(host)),
        "GPU training": (TRAINING, _gpu(host)),
        "bf16": ((), "set precision.dtype=fp32" if old_gpu else ""),
        "TransformerEngine layers": (("transformer-engine",), te),
        **{name: (("transformer-engine",), te or _fp8(name, packages, host)) for name in ASKED_FOR if "FP8" in name},
        "Triton kernels": (("triton",), triton),
        "DeepSpeed engine": (("deepspeed",), ""),
        "DeepSpeed CPU Adam (offload)": (
            ("deepspeed",),
            f"install {' and '.join(compiler)}: it is compiled here" if compiler else "",
        ),
        "multi-node torchrun": ((), _multi_node(host)),
        "Slurm": ((), f"a login node of a Slurm cluster ({host.slurm_error})" if host.slurm_error else ""),
        "S3 streaming": (("boto3", "mosaicml-streaming"), ""),
        "corpora: parquet, zstd": (("pyarrow", "zstandard"), ""),
        "Hugging Face export": (("transformers", "tokenizers", "safetensors"), ""),
        "lm-eval": (("lm-eval", "transformers"), ""),
    }
    here = {
        "CPU training": f"python {host.python}",
        "GPU training": f"{gpus}; driver {host.driver}, torch for CUDA {host.cuda}",
        "bf16": f"GPU capability {capability}; on CPU it works, slower than fp32",
        "multi-node torchrun": f"{host.address or 'no address'}; {', '.join(host.interfaces) or 'no interfaces'}",
    }
    extras = {"lm-eval": "'megatron-depthattn[eval]'"}
    rows = []
    for name, (wanted, problem) in needs.items():
        shown = [here[name]] if name in here else [packages[each].here for each in wanted]
        fix = problem if wanted == ("transformer-engine",) else install(wanted, packages, extras.get(name, ""))
        rows.append(Feature(name, ", ".join(shown), fix or problem))
    return rows


def _python(host: Host) -> str:
    wanted = requirements().get("python", "")
    return f"install Python {wanted}" if is_in_range(host.python, wanted) is False else ""


def _gpu(host: Host) -> str:
    if host.devices:
        return ""
    if host.gpus_of_driver:
        seen = f"the driver sees {len(host.gpus_of_driver)} x {host.gpus_of_driver[0]}"
        return f"{seen}, torch (CUDA {host.cuda}) none: a torch for this driver, or CUDA_VISIBLE_DEVICES"
    return "a machine with an NVIDIA GPU and its driver; in a container start it with --gpus or --nv"


def _fp8(name: str, packages: Mapping[str, Package], host: Host) -> str:
    from megatron_depthattn.config.hardware_checks import Accelerator, recipe_unsupported_on

    gpu = host.devices[0]["name"] if host.devices else None
    version = packages["transformer-engine"].version
    here = Accelerator(gpu=gpu, capability=host.capability or (), cuda=host.cuda, transformer_engine=version)
    return recipe_unsupported_on(name.removeprefix("FP8 "), here) or ""


def _multi_node(host: Host) -> str:
    others = [name for name in host.interfaces if name != "lo"]
    if "torchrun" not in host.programs:
        return "torchrun comes with torch"
    if not others:
        return "a network interface beside lo"
    if host.gloo_interface or (host.address and not ipaddress.ip_address(host.address).is_loopback):
        return ""
    means = f"resolves to {host.address}" if host.address else "does not resolve"
    return f"the host's name {means}: set GLOO_SOCKET_IFNAME to one of {', '.join(others)}, or correct /etc/hosts"
