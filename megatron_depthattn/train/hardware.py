"""What this process finds of the hardware and of the libraries that a precision may need."""

from __future__ import annotations

import importlib.util

import torch

from megatron_depthattn.config import RunConfig, Sizes
from megatron_depthattn.config.check import first_unsupported
from megatron_depthattn.config.checks import SWITCHES
from megatron_depthattn.config.hardware_checks import (
    INSTALL,
    PACKAGE_CHECKS,
    Accelerator,
    unsupported_kernels,
    unsupported_on,
)
from megatron_depthattn.config.resolve import AUTO, CPU, Available, Resolved, resolve
from megatron_depthattn.ops.triton_mix import triton_unsupported
from megatron_depthattn.parallel.launch_env import finds_compiler
from megatron_depthattn.switches import Kernels, resolved_switches

C_COMPILER = "a C compiler, gcc or clang on PATH (or another in CC)"
"""With which Triton builds its launchers on every host."""


def resolve_here(config: RunConfig) -> Resolved:
    """``config`` with `auto` replaced by what this process takes.

    Raises:
        ValueError: FP8 is asked for and TransformerEngine's layers cannot be used.
    """
    model = config.model
    if AUTO not in (model.spec, model.depth_attention.op):
        return Resolved(config, {})
    if not torch.cuda.is_available():
        return resolve(config, CPU)
    no_te = f"{error} ({INSTALL})" if model.spec == AUTO and (error := this_machine().import_error) else ""
    no_triton = triton_unsupported(torch.device("cuda")) or ("" if _has_c_compiler() else f"needs {C_COMPILER}")
    return resolve(config, Available(True, no_te, no_triton))


def require_hardware(config: RunConfig) -> Resolved:
    """`resolve_here`; raises ``ValueError`` if this machine has not what the config's layers and precision need."""
    resolved = resolve_here(config)
    if resolved.config.model.spec == "te" and (message := unsupported_on(resolved.config, this_machine())):
        raise ValueError(message)
    return resolved


def for_this_machine(config: RunConfig, sizes: Sizes) -> Resolved:
    """What a run on this machine computes with: `auto` and every switch that is null replaced; call it first.

    Raises:
        ValueError: this machine has not what the config's layers, precision or switches need.
    """
    resolved, kernels = require_hardware(config), these_kernels()
    if message := first_unsupported((*SWITCHES, *PACKAGE_CHECKS), resolved.config) or unsupported_kernels(
        resolved.config, kernels
    ):
        raise ValueError("; ".join([message, *resolved.lines]))
    same_weights = sizes.data_parallel_size * config.parallel.context
    return resolved._replace(config=resolved_switches(resolved.config, same_weights, kernels))


def these_kernels() -> Kernels:
    """What this process can compile and import."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        has_triton = importlib.util.find_spec("triton") is not None
        missing = "Triton" if not has_triton else None if _has_c_compiler() else C_COMPILER
    else:
        missing = None if finds_compiler("CXX", "g++") else "the C++ compiler g++ on PATH (or another in CXX)"
    return Kernels(on_gpu, missing, adds_gradients())


def _has_c_compiler() -> bool:
    return finds_compiler("CC", "gcc", "clang")


def adds_gradients() -> bool:
    """Whether Megatron's linear layers can add to their weights' gradients: by Apex's kernel, or on a CPU."""
    return not torch.cuda.is_available() or importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def this_machine() -> Accelerator:
    """Asks torch, and imports TransformerEngine, which takes seconds: call only for a config that uses it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    capability = torch.cuda.get_device_capability() if gpu else ()
    try:
        import transformer_engine
        import transformer_engine.pytorch
    except Exception as error:  # without its compiled part, or with one for another torch, it raises anything
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        return Accelerator(gpu, capability, torch.version.cuda, None, why)
    return Accelerator(gpu, capability, torch.version.cuda, str(transformer_engine.__version__))
