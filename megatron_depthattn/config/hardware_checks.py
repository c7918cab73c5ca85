"""What a machine needs for a config's layers, precision and switches: checks of the form of `checks.py`."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_depthattn.config.check import Check, first_unsupported
from megatron_depthattn.config.precision import NO_LIMIT, RECIPES, Version
from megatron_depthattn.config.schema import PrecisionConfig, RunConfig
from megatron_depthattn.switches import COMPILED, Kernels, adds_gradients

if TYPE_CHECKING:
    from collections.abc import Callable

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


def _of_te(lacks: "Callable[[Accelerator], bool]") -> "Callable[[RunConfig, Accelerator], Any]":
    return lambda config, accelerator: config.model.spec == "te" and lacks(accelerator) and vars(accelerator)


def _old_transformer_engine(config: RunConfig, accelerator: Accelerator) -> dict[str, Any]:
    least = RECIPES[config.precision.fp8].transformer_engine if config.precision.fp8 else ()
    if accelerator.transformer_engine is None or _version(accelerator.transformer_engine) >= least:
        return {}
    return _values(accelerator, needed=_dotted(least))


def _old_cuda(config: RunConfig, accelerator: Accelerator) -> dict[str, Any]:
    least = RECIPES[config.precision.fp8].cuda if config.precision.fp8 else ()
    return {} if _version(accelerator.cuda or "0") >= least else _values(accelerator, needed=_dotted(least))


def _wrong_gpu(config: RunConfig, accelerator: Accelerator) -> dict[str, Any]:
    gpus = RECIPES[config.precision.fp8].gpus if config.precision.fp8 else None
    return {} if gpus is None or _fits(accelerator.capability, gpus) else _values(accelerator, needed=span(gpus))


def _wrong_gpu_for_attention(config: RunConfig, accelerator: Accelerator) -> dict[str, Any]:
    fp8 = config.precision.fp8
    gpus = RECIPES[fp8].attention_gpus if fp8 and config.precision.fp8_attention else None
    return {} if gpus is None or _fits(accelerator.capability, gpus) else _values(accelerator, needed=span(gpus))


def _heads_for_attention(config: RunConfig, accelerator: Accelerator) -> dict[str, Any]:
    if not config.precision.fp8_attention or config.model.kv_channels == 128 or accelerator.capability >= (10, 0):
        return {}
    return _values(accelerator)


def _values(accelerator: Accelerator, **more: str) -> dict[str, Any]:
    """For the texts; `others` are the recipes that this machine has."""
    others = [
        name
        for name, recipe in RECIPES.items()
        if _fits(accelerator.capability, recipe.gpus)
        and _version(accelerator.cuda or "0") >= recipe.cuda
        and _version(accelerator.transformer_engine or "0") >= recipe.transformer_engine
    ]
    dotted = {"capability": _dotted(accelerator.capability), "others": ", ".join([*others, "null"])}
    return vars(accelerator) | dotted | more


def _fits(capability: Version, gpus: tuple[Version, Version]) -> bool:
    return gpus[0] <= capability < gpus[1]


def span(gpus: tuple[Version, Version]) -> str:
    """A range of compute capabilities in words."""
    least, above = gpus
    return f"{_dotted(least)} or later" + ("" if above == NO_LIMIT else f", below {_dotted(above)}")


def _version(text: str) -> Version:
    """The leading numbers of a version, as many as there are: 2.3.0.dev0+5fdd7bb is (2, 3, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match.group().split("."))) if match else ()


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


ACCELERATOR_CHECKS = (
    Check(
        "machine",
        "model.spec=te needs TransformerEngine, which cannot be imported here ({import_error})",
        _of_te(lambda accelerator: not accelerator.transformer_engine),
        "",
        f"{INSTALL}, or set model.spec=local",
    ),
    Check(
        "machine",
        "model.spec=te needs an NVIDIA GPU and torch sees none",
        _of_te(lambda accelerator: not accelerator.gpu),
        "TransformerEngine has no CPU kernels",
        "set model.spec=local",
    ),
    Check(
        "machine",
        "{precision.fp8=} needs TransformerEngine {needed} or later and this is {transformer_engine}",
        _old_transformer_engine,
        "",
        "upgrade it, or set precision.fp8 to one of {others}",
    ),
    Check(
        "machine",
        "{precision.fp8=} needs a torch built with CUDA {needed} or later and this one has {cuda}",
        _old_cuda,
        "",
        "install another torch, or set precision.fp8 to one of {others}",
    ),
    Check(
        "machine",
        "{precision.fp8=} needs a GPU of compute capability {needed} and {gpu} has {capability}",
        _wrong_gpu,
        "",
        "set precision.fp8 to one of {others}",
    ),
    Check(
        "machine",
        "precision.fp8_attention=true with {precision.fp8=} needs a GPU of compute capability {needed} and {gpu} has "
        "{capability}",
        _wrong_gpu_for_attention,
        "",
        "set precision.fp8_attention=false",
    ),
    Check(
        "machine",
        "precision.fp8_attention=true with {model.kv_channels=} on {gpu} (compute capability {capability})",
        _heads_for_attention,
        "below 10.0 cuDNN's FP8 attention trains with heads of 128 only",
        "set precision.fp8_attention=false",
    ),
)
KERNEL_CHECKS = (
    *(
        Check(
            "machine",
            f"model.{key}=true builds a kernel at first use, which needs {{compiler}}",
            lambda c, kernels, key=key: getattr(c.model, key) and kernels.compiler and vars(kernels),  # type: ignore[misc]
            "",
            f"install it, or set model.{key}=false",
        )
        for key in COMPILED
    ),
    Check(
        "machine",
        "model.fused_gradient_accumulation=true with {model.spec=} needs Apex's fused_weight_gradient_mlp_cuda, which "
        "cannot be imported here",
        lambda c, kernels: c.model.fused_gradient_accumulation and not adds_gradients(c, kernels),
        "",
        "install Apex with --cpp_ext and --cuda_ext, or set model.fused_gradient_accumulation=false, or model.spec=te",
    ),
)
