"""From what is here to what can be done with it: a pure function, one row for each feature."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_depthattn import precision_check
from megatron_depthattn.precision import RECIPES
from tools.diagnosis.facts import Machine, Package, is_in_range, python_wanted

TRAINING = ("torch", "megatron-core", "mosaicml-streaming", "omegaconf", "pyyaml", "rich")
ASKED_FOR = {
    "bf16": ("precision.dtype=bf16",),
    "TransformerEngine layers": ("model.spec=te",),
    "FP8 delayed": ("precision.fp8=delayed",),
    "FP8 tensorwise": ("precision.fp8=tensorwise",),
    "FP8 blockwise": ("precision.fp8=blockwise",),
    "FP8 mxfp8": ("precision.fp8=mxfp8",),
    "Triton kernels": ("model.depth_attention.op=triton",),
    "DeepSpeed engine": ("engine.name=deepspeed",),
}
"""The settings by which a config asks for a feature."""


@dataclass(frozen=True)
class Feature:
    """A row: what it is, what it needs, what of it is here, and how to mend what is not."""

    name: str
    needs: str
    here: str
    is_ready: bool
    mend: str = ""


def features(
    packages: Mapping[str, Package], machine: Machine, refusal: Callable[[Sequence[str]], str | None]
) -> list[Feature]:
    """All rows.

    Args:
        packages: by distribution.
        machine: the rest.
        refusal: what the package itself says against these settings in this version; None: nothing.
    """
    rows = [
        _cpu(packages, machine),
        _gpu(packages, machine),
        _bf16(machine),
        _transformer_engine(packages, machine),
        *(_fp8(recipe, packages, machine) for recipe in RECIPES),
        _triton(packages, machine),
        _deepspeed(packages, machine),
        _cpu_adam(packages, machine),
        _multi_node(machine),
        _slurm(machine),
        _packages_only("S3 streaming", ("boto3", "mosaicml-streaming"), packages, _credentials(machine)),
        _packages_only("corpora: parquet, zstd", ("pyarrow", "zstandard"), packages),
        _packages_only("Hugging Face export", ("transformers", "tokenizers", "safetensors"), packages),
        _packages_only("lm-eval", ("lm-eval", "transformers"), packages, extra="eval"),
    ]
    return [_unless_refused(row, refusal(ASKED_FOR[row.name]) if row.name in ASKED_FOR else None) for row in rows]


def _unless_refused(row: Feature, refused: str | None) -> Feature:
    if refused is None:
        return row
    return Feature(row.name, row.needs, row.here, False, f"refused in this version: {refused}")


def install(names: Sequence[str], packages: Mapping[str, Package]) -> str:
    """How to mend what is missing, broken or of the wrong version among these; empty if nothing is."""
    bad = [packages[name] for name in names if not packages[name].works]
    if not bad:
        return ""
    wrong = " ".join(f"'{package.name}{package.wanted}'" for package in bad)
    broken = "; ".join(f"{package.name}: {package.error}" for package in bad if package.version and package.error)
    return f"pip install {'--force-reinstall ' if broken else ''}{wrong}{f' ({broken})' if broken else ''}"


def _here(names: Sequence[str], packages: Mapping[str, Package]) -> str:
    return ", ".join(packages[name].here for name in names)


def _packages_only(
    name: str, needed: Sequence[str], packages: Mapping[str, Package], note: str = "", extra: str | None = None
) -> Feature:
    mend = install(needed, packages)
    if mend and extra:
        mend = f"pip install -e '.[{extra}]'"
    here = _here(needed, packages) + (f"; {note}" if note else "")
    return Feature(name, ", ".join(needed), here, not mend, mend)


def _cpu(packages: Mapping[str, Package], machine: Machine) -> Feature:
    wanted = python_wanted()
    is_old = is_in_range(machine.python, wanted) is False
    mend = f"install Python {wanted}, then make install PYTHON=..." if is_old else install(TRAINING, packages)
    here = f"python {machine.python}, {_here(TRAINING, packages)}"
    return Feature("CPU training", f"python {wanted}, {', '.join(TRAINING)}", here, not mend, mend)


def _gpu(packages: Mapping[str, Package], machine: Machine) -> Feature:
    needs = "what CPU training needs, a GPU, its driver, torch built for CUDA"
    mend = install(TRAINING, packages)
    if not mend and not machine.devices:
        if machine.gpus_of_driver:
            mend = f"torch (CUDA {machine.cuda}) sees none of them: a torch for this driver, or CUDA_VISIBLE_DEVICES"
        else:
            mend = "a machine with an NVIDIA GPU and its driver; in a container start it with --gpus or --nv"
    names = [device["name"] for device in machine.devices]
    gpus = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "torch sees no GPU"
    if machine.gpus_of_driver and not names:
        gpus += f", the driver {len(machine.gpus_of_driver)} x {machine.gpus_of_driver[0]}"
    driver = f"driver {machine.driver}" if machine.driver else machine.driver_error or "no driver"
    nccl = f", NCCL {machine.nccl}" if machine.nccl else ""
    return Feature("GPU training", needs, f"{gpus}; {driver}, torch for CUDA {machine.cuda}{nccl}", not mend, mend)


def _capability(machine: Machine) -> tuple[int, int] | None:
    """The least of the GPUs; None without one."""
    return min(((device["capability"][0], device["capability"][1]) for device in machine.devices), default=None)


def _bf16(machine: Machine) -> Feature:
    capability = _capability(machine)
    if capability is None:
        return Feature("bf16", "CPU, or a GPU of capability 8.0", "CPU: works, slower than fp32", True)
    is_ready = capability >= (8, 0)
    mend = "" if is_ready else "set precision.dtype=fp32"
    return Feature("bf16", "CPU, or a GPU of capability 8.0", f"capability {_dotted(capability)}", is_ready, mend)


def _dotted(capability: tuple[int, int] | None) -> str:
    return f"{capability[0]}.{capability[1]}" if capability else "none"


def _transformer_engine(packages: Mapping[str, Package], machine: Machine) -> Feature:
    package = packages["transformer-engine"]
    mend = install(["transformer-engine"], packages)
    if mend and package.version is None:
        mend = "pip install --no-build-isolation 'transformer-engine[pytorch]'; or set model.spec=local"
    elif not mend and not machine.devices:
        mend = "it runs on GPUs only; set model.spec=local"
    return Feature("TransformerEngine layers", "transformer-engine, a GPU", package.here, not mend, mend)


def _fp8(recipe: str, packages: Mapping[str, Package], machine: Machine) -> Feature:
    capability, engine = _capability(machine), _transformer_engine(packages, machine)
    device = precision_check.Machine(
        gpu=machine.devices[0]["name"] if machine.devices else None,
        capability=capability or (),
        cuda=machine.cuda,
        transformer_engine=packages["transformer-engine"].version,
    )
    mend = engine.mend or precision_check.recipe_refusal(recipe, device) or ""
    here = f"{engine.here}; GPU capability {_dotted(capability)}"
    needs = f"TransformerEngine, a GPU of capability {precision_check.span(RECIPES[recipe].gpus)}"
    return Feature(f"FP8 {recipe}", needs, here, not mend, mend)


def _triton(packages: Mapping[str, Package], machine: Machine) -> Feature:
    mend = install(["triton"], packages)
    if not mend and not machine.devices:
        mend = "a GPU, or model.depth_attention.op=lean; TRITON_INTERPRET=1 runs kernels on CPU, to test them"
    return Feature("Triton kernels", "triton, a GPU", packages["triton"].here, not mend, mend)


def _deepspeed(packages: Mapping[str, Package], machine: Machine) -> Feature:
    return _packages_only("DeepSpeed engine", ("deepspeed",), packages)


def _cpu_adam(packages: Mapping[str, Package], machine: Machine) -> Feature:
    tools = {name: machine.programs[name] for name in ("g++", "ninja")}
    missing = [name for name, is_there in tools.items() if not is_there]
    mend = install(["deepspeed"], packages) or (
        f"install {' and '.join(missing)}: it is compiled here" if missing else ""
    )
    here = f"{packages['deepspeed'].here}, {_present(tools)}"
    return Feature("DeepSpeed CPU Adam (offload)", "deepspeed, g++, ninja", here, not mend, mend)


def _present(tools: Mapping[str, bool]) -> str:
    return ", ".join(name if is_there else f"no {name}" for name, is_there in tools.items())


def _multi_node(machine: Machine) -> Feature:
    is_loopback = machine.address is None or ipaddress.ip_address(machine.address).is_loopback
    others = [name for name in machine.interfaces if name != "lo"]
    mend = ""
    if not machine.programs["torchrun"]:
        mend = "torchrun comes with torch"
    elif not others:
        mend = "a network interface beside lo"
    elif is_loopback and not machine.gloo_interface:
        means = f"resolves to {machine.address}" if machine.address else "does not resolve"
        mend = f"the host's name {means}: set GLOO_SOCKET_IFNAME to one of {', '.join(others)}, or mend /etc/hosts"
    here = f"{machine.host} is {machine.address or 'unknown'}; interfaces {', '.join(machine.interfaces) or 'none'}"
    if machine.gloo_interface:
        here += f"; GLOO_SOCKET_IFNAME={machine.gloo_interface}"
    return Feature("multi-node torchrun", "torchrun, an address that other hosts can reach", here, not mend, mend)


def _slurm(machine: Machine) -> Feature:
    missing = [name for name, is_there in machine.slurm.items() if not is_there]
    mend = ""
    if missing:
        mend = "a login node of a Slurm cluster, or its client programs; launch without it by launch/node.sh"
    elif machine.slurm_error:
        mend = f"the controller does not answer ({machine.slurm_error})"
    return Feature("Slurm", "sbatch, srun, scontrol, a controller", _present(machine.slurm), not mend, mend)


def _credentials(machine: Machine) -> str:
    return "credentials in the environment or ~/.aws" if machine.aws_credentials else "no AWS credentials found"
