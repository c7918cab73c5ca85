"""Parameters that a method adds to Megatron's layers: small, on every tensor rank, with defined initial values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from megatron_depthattn.methods.definition import Parameters, Shape

Initial = Callable[[Shape], Tensor]
"""The initial values of a parameter of the given shape, in fp32 on the CPU."""


def method_parameters(
    config: TransformerConfig, shapes: Parameters, initial: dict[str, Initial]
) -> dict[str, Parameter]:
    """Parameters of the given shapes by name.

    Under sequence parallel every tensor rank has other positions, so their gradients are summed over tensor ranks, as
    those of norms. One-dimensional parameters are never decayed (Megatron's rule): of a method's, every one that is no
    matrix is declared one-dimensional.

    Args:
        initial: initial values by name; those that are missing are drawn as any other matrix of the model.
    """
    made = {}
    for name, shape in shapes.items():
        parameter = made[name] = Parameter(torch.empty(shape, dtype=config.params_dtype))
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        parameter.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]  # no matrix of Muon's
        if name in initial:
            parameter.initial = initial[name]  # type: ignore[attr-defined]
    return made


def of_prefix(shapes: Parameters, prefix: str) -> Parameters:
    """The entries whose names begin with ``prefix`` and a dot, under what follows."""
    return {name.removeprefix(f"{prefix}."): shape for name, shape in shapes.items() if name.startswith(f"{prefix}.")}


def recomputed(
    config: TransformerConfig, function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: object
) -> Tensor | tuple[Tensor, ...]:
    """``function(*inputs)``, of which only the inputs are kept for backward: most of them others keep anyway, while
    the fp32 intermediates of a mix over many hidden states would be several times as much.

    Where Megatron recomputes every layer this is part of one, and not recomputed once more.
    """
    within = config.recompute_granularity == "full" and config.recompute_method == "uniform"
    if within or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
