"""Floating-point operations counted from the modules of a built model; `flops.py` counts the same from the shapes.

Operations are per token of a forward pass, under named lines; a multiplication with its addition counts as two. What
a rank holds of a matrix is counted for all tensor ranks, so that the chunks of one pipeline sum up to the whole model,
whatever the layout. Norms, RoPE, activations and the embedding (a look-up) are not counted.

Another kind of layer declares lines of its own with a method ``forward_flops() -> Mapping[str, int]``, for what its
submodules do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_depthattn.model.flops import attention_flops, matrix_flops


def module_flops(chunks: Iterable[torch.nn.Module], sequence_length: int) -> Counter[str]:
    """Operations of one token's forward pass, by line: those of `flops.ForwardFlops`, and what layers declare.

    Args:
        chunks: of one rank of every pipeline stage, to count the whole model; of fewer, to count their share.
        sequence_length: positions of a sequence, for the average length of causal attention.
    """
    lines: Counter[str] = Counter()
    for chunk in chunks:
        tensor_ranks = get_model_config(chunk).tensor_model_parallel_size
        models = [module for module in chunk.modules() if isinstance(module, GPTModel)]
        output_layers = {id(module.output_layer): module.output_layer for module in models if module.post_process}
        for module in chunk.modules():
            if output := output_layers.get(id(module)):
                # Its weight may be the embedding's, but its sizes are its own.
                lines["logits"] += matrix_flops(output.input_size * output.output_size)
            else:
                lines.update(_own_flops(module, sequence_length, tensor_ranks))
    return lines


def _own_flops(module: torch.nn.Module, sequence_length: int, tensor_ranks: int) -> Mapping[str, int]:
    """What the module itself computes, without its submodules."""
    declared: Any = getattr(module, "forward_flops", None)
    if declared is not None:
        return declared()
    if isinstance(module, SelfAttention):
        query_size = module.config.num_attention_heads * module.hidden_size_per_attention_head
        return {"attention": attention_flops(query_size, sequence_length)}
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, VocabParallelEmbedding):
        return {}
    is_split = getattr(weight, "tensor_model_parallel", False)
    return {"projections": matrix_flops(weight.numel() * (tensor_ranks if is_split else 1))}
