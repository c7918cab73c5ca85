"""What this process finds of the hardware and of the libraries that a precision may need."""

from __future__ import annotations

import torch

from megatron_depthattn.backends import AUTO, CPU, Available, Resolved, resolve
from megatron_depthattn.config import RunConfig
from megatron_depthattn.ops.triton_mix import triton_refusal
from megatron_depthattn.precision_check import INSTALL, Machine, machine_refusal


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
