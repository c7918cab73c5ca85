"""Weights under Hugging Face's names in a Megatron model of one process; nothing of the package is used."""

from collections.abc import Mapping

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

MEGATRON_NAMES = {
    "embed_tokens.weight": "embedding.word_embeddings.weight",
    "norm.weight": "decoder.final_layernorm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "lm_head.weight": "output_layer.weight",
}


def interleaved_qkv(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> Tensor:
    """Rows as Megatron reads them: for every KV head its query heads, then its key, then its value."""
    num_groups = k.shape[0] // head_dim
    groups = zip(q.chunk(num_groups), k.chunk(num_groups), v.chunk(num_groups), strict=True)
    return torch.cat([rows for group in groups for rows in group])


def concatenated_qkv(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> Tensor:
    """The wrong order: a control."""
    return torch.cat([q, k, v])


def to_megatron(
    weights: Mapping[str, Tensor], num_layers: int, head_dim: int, qkv=interleaved_qkv
) -> dict[str, Tensor]:
    """Weights (or gradients: the mapping only moves numbers) from Hugging Face's names to Megatron's.

    What a method adds has the same names in a layer; what it adds behind the last layer is in the last layer.
    """
    weights = dict(weights)
    mapped = {}
    for layer in range(num_layers):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        parts = [weights.pop(f"{old}self_attn.{name}_proj.weight") for name in "qkv"]
        mapped[new + "self_attention.linear_qkv.weight"] = qkv(*parts, head_dim)
        mapped[new + "mlp.linear_fc1.weight"] = torch.cat(
            [weights.pop(f"{old}mlp.{n}_proj.weight") for n in ("gate", "up")]
        )
        for name in [name for name in weights if name.startswith(old)]:
            own = name.removeprefix(old)
            mapped[new + MEGATRON_NAMES.get(own, own)] = weights.pop(name)
    last = f"decoder.layers.{num_layers - 1}."
    for name, weight in weights.items():
        own = name.removeprefix("model.")
        mapped[MEGATRON_NAMES.get(own, last + own)] = weight
    return mapped


def load(model: GPTModel, weights: dict[str, Tensor], vocab_size: int) -> None:
    """Every parameter is written exactly once; rows of the padding get large numbers, which must not matter."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, weight in weights.items():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                parameters[name].fill_(99.0)
                parameters[name][:vocab_size].copy_(weight)
            else:
                parameters[name].copy_(weight)


@torch.no_grad()
def leave_initial_values(model: torch.nn.Module) -> None:
    """Move norms and what a method begins with, some of which makes other gradients zero; the same for every method."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def unpadded_logits(model: GPTModel, tokens: Tensor, vocab_size: int) -> Tensor:
    """fp32 logits [b, s, V] of tokens [b, s], without the columns of the padding to a multiple of 128."""
    logits = model(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None)
    assert logits.shape == (*tokens.shape, -(-vocab_size // 128) * 128) and logits.dtype == torch.float32
    return logits[..., :vocab_size]
