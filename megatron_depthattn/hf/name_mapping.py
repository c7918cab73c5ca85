"""Which Hugging Face tensors hold the numbers of which Megatron tensor, both ways: a table and four special cases.

Megatron fuses the projections: `linear_qkv` interleaves its rows by key/value group (the group's query heads, its key,
its value), `linear_fc1` stacks gate over up. Its vocabulary is padded with rows that Hugging Face does not have. A norm
before a linear layer is that layer's `layer_norm_weight`, as in TransformerEngine; checkpoints of the local spec are
stored under the same names. What a method adds keeps its name below the layer; what it adds behind the last layer is
the last layer's in Megatron and the model's own in Hugging Face. FP8 scaling state (`_extra_state`) is no weight and
has no counterpart.

Pure functions of names, shapes and tensors. E hidden size, V vocabulary, H query heads, G key/value heads, d head size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_depthattn.methods.definition import CrossLayerMethod, Shape
from megatron_depthattn.methods.definitions import method_of


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the shapes of the weights follow from."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    tie_embeddings: bool
    method: CrossLayerMethod | None = None
    """The method with weights of its own."""

    @classmethod
    def from_model_section(cls, model: Mapping[str, Any]) -> "ModelShape":
        """From the `model` section of a run's config; its other keys do not change a weight's shape."""
        sizes = {name: model[name] for name in cls.__dataclass_fields__ if name != "method"}
        return cls(**sizes, method=method_of(model))


@dataclass(frozen=True)
class WeightGroup:
    """One Megatron tensor and the Hugging Face tensors with the same numbers."""

    megatron: str
    """Name in a Megatron checkpoint."""
    megatron_shape: Shape
    """Its shape; the vocabulary's rows are those without padding."""
    hf: Mapping[str, Shape]
    """Names and shapes in a Hugging Face checkpoint, in the order of `split`."""
    split: Callable[[Tensor], Sequence[Tensor]]
    """The Megatron tensor's parts, as views of it."""
    merge: Callable[[Sequence[Tensor]], Tensor]
    """The Megatron tensor of those parts."""
    has_vocabulary_rows: bool = False
    """Whether the Megatron tensor may have more rows than `megatron_shape` says: padding."""


def weight_groups(shape: ModelShape) -> list[WeightGroup]:
    """Every weight of the model exactly once, in the order of the forward pass."""
    hidden, ffn, head = shape.hidden_size, shape.ffn_hidden_size, shape.kv_channels
    query_rows = shape.num_attention_heads * head
    groups = [_vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight", shape)]
    for layer in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{ours}.self_attention", f"{ours}.mlp"
        groups += [
            _same(f"{attention}.linear_qkv.layer_norm_weight", f"{theirs}.input_layernorm.weight", (hidden,)),
            _query_key_value(f"{attention}.linear_qkv.weight", f"{theirs}.self_attn", shape),
            _same(f"{attention}.q_layernorm.weight", f"{theirs}.self_attn.q_norm.weight", (head,)),
            _same(f"{attention}.k_layernorm.weight", f"{theirs}.self_attn.k_norm.weight", (head,)),
            _same(f"{attention}.linear_proj.weight", f"{theirs}.self_attn.o_proj.weight", (hidden, query_rows)),
            _same(f"{mlp}.linear_fc1.layer_norm_weight", f"{theirs}.post_attention_layernorm.weight", (hidden,)),
            WeightGroup(
                f"{mlp}.linear_fc1.weight",
                (2 * ffn, hidden),
                {f"{theirs}.mlp.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")},
                split=lambda tensor: tensor.chunk(2),
                merge=lambda parts: torch.cat(list(parts)),
            ),
            _same(f"{mlp}.linear_fc2.weight", f"{theirs}.mlp.down_proj.weight", (hidden, ffn)),
        ]
        if shape.method:
            added = shape.method.layer_parameters(layer)
            groups += [_same(f"{ours}.{name}", f"{theirs}.{name}", size) for name, size in added.items()]
    if shape.method:
        added = shape.method.final_parameters()
        last = f"decoder.layers.{shape.num_layers - 1}"
        groups += [_same(f"{last}.{name}", f"model.{name}", size) for name, size in added.items()]
    groups.append(_same("decoder.final_layernorm.weight", "model.norm.weight", (hidden,)))
    if not shape.tie_embeddings:
        groups.append(_vocabulary("output_layer.weight", "lm_head.weight", shape))
    return groups


def check_weights(
    where: object, expected: Mapping[str, Shape], found: Mapping[str, Shape], padded: frozenset[str] = frozenset()
) -> None:
    """Raise for weights whose names or shapes are not the expected ones.

    Args:
        where: the checkpoint, for the message.
        padded: tensors that may have more rows than expected.

    Raises:
        ValueError: names what is missing, left over or of another shape.
    """
    complaints = [f"{name} is missing" for name in expected.keys() - found.keys()]
    complaints += [f"{name} is left over" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        wanted, shape = tuple(expected[name]), tuple(found[name])
        is_padded = name in padded and shape[1:] == wanted[1:] and shape > wanted
        if shape != wanted and not is_padded:
            complaints.append(f"{name} is {list(found[name])} and should be {list(expected[name])}")
    if complaints:
        more = f", and {len(complaints) - 3} more" if len(complaints) > 3 else ""
        first = "; ".join(sorted(complaints)[:3])
        raise ValueError(f"{where} does not hold the model that its config describes: {first}{more}")


def _same(megatron: str, hf: str, shape: Shape) -> WeightGroup:
    return WeightGroup(megatron, shape, {hf: shape}, split=lambda tensor: [tensor], merge=lambda parts: parts[0])


def _vocabulary(megatron: str, hf: str, shape: ModelShape) -> WeightGroup:
    """Hugging Face's rows are the first; Megatron's padding below them is cut."""
    rows = (shape.vocab_size, shape.hidden_size)
    cut = shape.vocab_size
    return WeightGroup(megatron, rows, {hf: rows}, lambda tensor: [tensor[:cut]], lambda parts: parts[0], True)


def _query_key_value(megatron: str, hf: str, shape: ModelShape) -> WeightGroup:
    """[G · (H/G + 2) · d, E]: of each key/value group its query heads, its key and its value."""
    hidden, head, num_groups = shape.hidden_size, shape.kv_channels, shape.num_query_groups
    per_group = shape.num_attention_heads // num_groups
    rows = {"q": num_groups * per_group * head, "k": num_groups * head, "v": num_groups * head}

    def split(tensor: Tensor) -> list[Tensor]:
        heads = tensor.view(num_groups, per_group + 2, head, hidden)
        parts = heads[:, :per_group], heads[:, per_group], heads[:, per_group + 1]
        return [part.reshape(-1, hidden) for part in parts]

    def merge(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.view(num_groups, -1, head, hidden) for part in parts], dim=1).reshape(-1, hidden)

    return WeightGroup(
        megatron,
        (sum(rows.values()), hidden),
        {f"{hf}.{part}_proj.weight": (count, hidden) for part, count in rows.items()},
        split=split,
        merge=merge,
    )
