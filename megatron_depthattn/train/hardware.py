"""What this process finds of the hardware and of the libraries that a precision may need."""

from __future__ import annotations

import torch

from megatron_depthattn.config import RunConfig
from megatron_depthattn.precision_check import Machine, machine_refusal


def require_hardware(config: RunConfig) -> None:
    """Raise ``ValueError`` if this machine has not what the config's layers and precision need; call it first."""
    if config.model.spec == "te" and (refusal := machine_refusal(config, this_machine())) is not None:
        raise ValueError(refusal)


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
