"""What this process finds of the hardware and of the libraries that a precision may need."""

from __future__ import annotations

import importlib.util
import shutil

import torch

from megatron_depthattn.backends import AUTO, CPU, Available, Resolved, resolve
from megatron_depthattn.config import RunConfig, Sizes
from megatron_depthattn.ops.triton_mix import triton_refusal
from megatron_depthattn.precision_check import INSTALL, Machine, machine_refusal
from megatron_depthattn.switches import Kernels, kernels_refusal, resolved_switches, switches_refusal


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
    no_te = this_machine().import_error if model.spec == AUTO else ""
    no_te += f" ({INSTALL})" if no_te else ""
    return resolve(config, Available(True, no_te, triton_refusal(torch.device("cuda")) or ""))


def require_hardware(config: RunConfig) -> Resolved:
    """`resolve_here`; raises ``ValueError`` if this machine has not what the config's layers and precision need."""
    resolved = resolve_here(config)
    if resolved.config.model.spec == "te" and (refusal := machine_refusal(resolved.config, this_machine())) is not None:
        raise ValueError(refusal)
    return resolved


def for_this_machine(config: RunConfig, sizes: Sizes) -> Resolved:
    """What a run on this machine computes with: `auto` and every switch that is null replaced; call it first.

    Raises:
        ValueError: this machine has not what the config's layers, precision or switches need.
    """
    resolved, kernels = require_hardware(config), these_kernels()
    if (refusal := switches_refusal(resolved.config) or kernels_refusal(resolved.config, kernels)) is not None:
        raise ValueError(refusal)
    same_weights = sizes.data_parallel_size * config.parallel.context
    return resolved._replace(config=resolved_switches(resolved.config, same_weights, kernels))


def these_kernels() -> Kernels:
    """What this process can compile and import."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        missing = "Triton" if importlib.util.find_spec("triton") is None else None
    else:
        missing = "the C++ compiler g++ on PATH" if shutil.which("g++") is None else None
    return Kernels(on_gpu, missing, adds_gradients())


def adds_gradients() -> bool:
    """Whether Megatron's linear layers can add to their weights' gradients: by Apex's kernel, or on a CPU."""
    return not torch.cuda.is_available() or importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def this_machine() -> Machine:
    """Asks torch, and imports TransformerEngine, which takes seconds: call only for a config that uses it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    capability = torch.cuda.get_device_capability() if gpu else ()
    try:
        import transformer_engine
        import transformer_engine.pytorch
    except Exception as error:  # without its compiled part, or with one for another torch, it raises anything
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        return Machine(gpu, capability, torch.version.cuda, None, why)
    return Machine(gpu, capability, torch.version.cuda, str(transformer_engine.__version__))
