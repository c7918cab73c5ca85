"""Looped models: a stack of L layers is run R times with the same weights, unrolled here into R * L effective layers.

A layer of a later loop is a module of its own, so it has its own number and, with it, its own sources, pipeline chunk
and KV-cache slot. It only holds no weights: in place of each parameter it has a plain attribute, the parameter of its
layer in the first loop. The module's forward finds it under the same name, and everything that walks registered
parameters (initialisation, the data-parallel wrapper, the optimizer, gradient reduction, checkpoints) meets each weight
once, named after the first loop's layer. Autograd sums a leaf's gradients over all its uses, so that of a weight is the
sum over the loops; with interleaved pipelining a rank's chunks add theirs to it one after another. Chunk c runs on rank
c % P: with m * P chunks a loop each rank has the same layers of every loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.gpt import GPTModel


def share_weights(chunks: Sequence[GPTModel], *, num_loops: int) -> None:
    """Let every layer of a later loop use the weights of its layer in the first loop.

    Weights that the later loops were built with are freed. Moves that keep `Parameter` objects (``.to(device)``, a
    change of dtype, the data-parallel wrapper's buffers) carry over to all loops; after one that replaces them
    (``to_empty`` from the meta device) call this again.

    Args:
        chunks: pipeline chunks of one rank in order, the first loop's all among them; without pipelining the model.
        num_loops: R, which divides the number of effective layers.

    Raises:
        KeyError: a layer's counterpart in the first loop is not among ``chunks``.
    """
    lenders: dict[int, torch.nn.Module] = {}
    for chunk in chunks:
        num_layers = chunk.config.num_layers // num_loops
        for layer in chunk.decoder.layers:
            index = layer.layer_number - 1
            if index < num_layers:
                lenders[index] = layer
            else:
                _borrow(layer, lenders[index % num_layers])


def _borrow(layer: torch.nn.Module, lender: torch.nn.Module) -> None:
    """Replace every parameter of ``layer`` by the lender's of the same name, as an attribute that is not registered."""
    mine = dict(layer.named_modules())
    for path, module in lender.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name not in vars(mine[path]):
                delattr(mine[path], name)
            object.__setattr__(mine[path], name, parameter)  # torch's own would register it
        if any(base.__name__ == "BasicOperation" for base in type(module).__mro__):
            # TransformerEngine's norms ask themselves for the parameters that autograd is to see.
            object.__setattr__(mine[path], "parameters", module.parameters)
    left = [name for name, _ in layer.named_parameters()]
    assert not left, f"a layer of a later loop has weights that its layer in the first has not: {left}"
