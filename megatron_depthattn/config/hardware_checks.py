"""What a machine needs for a config's layers, precision and switches: checks of the form of `checks.py`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Any

from megatron_depthattn.config.check import Condition, checks, first_unsupported
from megatron_depthattn.config.precision import NO_LIMIT, RECIPES, Recipe, Version
from megatron_depthattn.config.schema import PrecisionConfig, RunConfig
from megatron_depthattn.switches import COMPILED, Kernels, adds_gradients

MUON_NEEDS = {"megatron-core": ((0, 19), (1,)), "emerging-optimizers": ((0, 3), (0, 4))}
"""Versions from ... to below ... that have the Muon which this package builds; both need Python 3.12."""
INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]'"


@dataclass(frozen=True)
class Accelerator:
    """What TransformerEngine's layers and FP8 may need."""

    gpu: str | None
    """Name of the GPU that torch sees; None: none."""
    capability: Version
    """Its compute capability."""
    cuda: str | None
    """Version of the CUDA that torch was built with."""
    transformer_engine: str | None
    """Version of the TransformerEngine that can be imported; None: none can."""
    import_error: str = ""
    """Why it cannot."""


def unsupported_on(config: RunConfig, accelerator: Accelerator) -> str | None:
    """What the config asks for and this machine does not have, and what to set; None: it has everything."""
    return first_unsupported(ACCELERATOR_CHECKS, config, accelerator)


def recipe_unsupported_on(fp8: str, accelerator: Accelerator) -> str | None:
    """`unsupported_on` of a recipe alone, for a machine with TransformerEngine and a GPU."""
    return unsupported_on(RunConfig(precision=PrecisionConfig(fp8=fp8)), accelerator)  # type: ignore[arg-type]


def unsupported_kernels(config: RunConfig, kernels: Kernels) -> str | None:
    """What the switches ask for and this machine lacks, and what to set; None: it has everything."""
    return first_unsupported(KERNEL_CHECKS, config, kernels)


def muon_lacks() -> str:
    """What Muon needs and this Python does not have, with the versions that it has; empty: nothing."""
    found = [f"Python {python_version()}"] if _version(python_version()) < (3, 12) else []
    for name, (least, above) in MUON_NEEDS.items():
        try:
            has = version(name)
        except PackageNotFoundError:
            found.append(f"no {name}")
        else:
            if not least <= _version(has) < above:
                found.append(f"{name} {has}")
    return ", ".join(found)


def _lacks(recipe: Recipe, accelerator: Accelerator) -> dict[str, str]:
    """What the recipe needs and the machine does not have, in words by the field's name."""
    needed = {
        name: _dotted(getattr(recipe, name))
        for name in ("transformer_engine", "cuda")
        if _version(getattr(accelerator, name) or "0") < getattr(recipe, name)
    }
    for name in ("gpus", "attention_gpus"):
        least, above = getattr(recipe, name) or ((), NO_LIMIT)
        if not least <= accelerator.capability < above:
            needed[name] = f"{_dotted(least)} or later{'' if above == NO_LIMIT else f', below {_dotted(above)}'}"
    return needed


def _recipe(name: str, asked: Callable[[RunConfig], Any] = lambda config: True) -> Condition:
    """Where the recipe needs a field's value that the machine does not have."""

    def applies(config: RunConfig, accelerator: Accelerator) -> dict[str, Any]:
        fp8 = config.precision.fp8
        if name == "transformer_engine" and accelerator.transformer_engine is None:
            return {}  # another check's
        needed = _lacks(RECIPES[fp8], accelerator).get(name) if fp8 and asked(config) else None
        return _values(accelerator) | {"needed": needed} if needed else {}

    return applies


def _values(accelerator: Accelerator) -> dict[str, Any]:
    """For the texts; `others` are the recipes that this machine has."""
    others = [name for name, recipe in RECIPES.items() if not _lacks(recipe, accelerator).keys() - {"attention_gpus"}]
    return vars(accelerator) | {
        "capability": _dotted(accelerator.capability),
        "others": ", ".join([*others, "null"]),
    }


def _version(text: str) -> Version:
    """The leading numbers of a version, as many as there are: 2.3.0.dev0+5fdd7bb is (2, 3, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match.group().split("."))) if match else ()


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


ACCELERATOR_CHECKS = checks(
    "machine",
    (
        f"model.spec=te needs TransformerEngine, which cannot be imported here ({{import_error}}); {INSTALL}, or set "
        "model.spec=local",
        lambda c, machine: c.model.spec == "te" and not machine.transformer_engine and vars(machine),
    ),
    (
        "model.spec=te needs an NVIDIA GPU and torch sees none: TransformerEngine has no CPU kernels; set "
        "model.spec=local",
        lambda c, machine: c.model.spec == "te" and not machine.gpu,
    ),
    (
        "{precision.fp8=} needs TransformerEngine {needed} or later and this is {transformer_engine}; upgrade it, or "
        "set precision.fp8 to one of {others}",
        _recipe("transformer_engine"),
    ),
    (
        "{precision.fp8=} needs a torch built with CUDA {needed} or later and this one has {cuda}; install another "
        "torch, or set precision.fp8 to one of {others}",
        _recipe("cuda"),
    ),
    (
        "{precision.fp8=} needs a GPU of compute capability {needed} and {gpu} has {capability}; set precision.fp8 to "
        "one of {others}",
        _recipe("gpus"),
    ),
    (
        "precision.fp8_attention=true with {precision.fp8=} needs a GPU of compute capability {needed} and {gpu} has "
        "{capability}; set precision.fp8_attention=false",
        _recipe("attention_gpus", lambda config: config.precision.fp8_attention),
    ),
    (
        "precision.fp8_attention=true with {model.kv_channels=} on {gpu} (compute capability {capability}): below 10.0 "
        "cuDNN's FP8 attention trains with heads of 128 only; set precision.fp8_attention=false",
        lambda c, machine: (
            c.precision.fp8_attention
            and c.model.kv_channels != 128
            and machine.capability < (10, 0)
            and _values(machine)
        ),
    ),
)
PACKAGE_CHECKS = checks(
    "machine",
    (
        "optimizer.name=muon needs Python 3.12 or later, Megatron-Core 0.19 or later and emerging-optimizers 0.3, and "
        "here is {lacks}; pip install 'megatron-depthattn[muon]' with such a Python, or set optimizer.name=adamw",
        lambda c, _: c.optimizer.name == "muon" and (lacks := muon_lacks()) and {"lacks": lacks},
    ),
)
KERNEL_CHECKS = checks(
    "machine",
    *(
        (
            f"model.{key}=true builds a kernel at first use, which needs {{compiler}}; install it, or set "
            f"model.{key}=false",
            lambda c, kernels, key=key: getattr(c.model, key) and kernels.compiler and vars(kernels),
        )
        for key in COMPILED
    ),
    (
        "model.fused_gradient_accumulation=true with {model.spec=} needs Apex's fused_weight_gradient_mlp_cuda, which "
        "cannot be imported here; install Apex with --cpp_ext and --cuda_ext, or set "
        "model.fused_gradient_accumulation=false, or model.spec=te",
        lambda c, kernels: c.model.fused_gradient_accumulation and not adds_gradients(c, kernels),
    ),
)
