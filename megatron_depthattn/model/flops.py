"""Weights and floating-point operations, counted from the shapes; a multiplication with its addition counts as two.

Pure: integers in, integers out. The mix has a line of its own, so that its price can be read off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_depthattn.methods.definition import CrossLayerMethod
from megatron_depthattn.model.source_plan import CrossLayerPlan


def matrix_flops(num_weights: int) -> int:
    """Of a vector with a matrix of so many weights."""
    return 2 * num_weights


def attention_flops(query_size: int, sequence_length: int) -> int:
    """Of one layer's causal attention: scores, and again for the weighted values.

    A query at position t sees t + 1 keys, (s + 1) / 2 on average.

    Args:
        query_size: elements of all query heads, ``heads * head_size``.
    """
    return 2 * query_size * (sequence_length + 1)


def mix_flops(query_size: int, key_size: int, num_sources: int, kinds: Sequence[str] = ("key", "value")) -> int:
    """Of one layer's mix: group means of the query, scores and weighted values of its sources and of itself.

    Args:
        query_size: elements of all query heads, ``heads * head_size``.
        key_size: elements of all key heads.
        kinds: of the source plan; all but the key that scores are summed. Uniform weights: sums and a division.
    """
    if not num_sources:
        return 0
    if "key" in kinds:
        return query_size + 2 * len(kinds) * key_size * (num_sources + 1)
    return len(kinds) * key_size * (num_sources + 1)


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of one token's forward pass through the whole model; a training step costs three times as much."""

    projections: int
    """QKV, attention output and SwiGLU matrices of all layers."""
    attention: int
    """Scores and weighted values of causal self-attention, averaged over the positions."""
    logits: int
    """The output layer."""
    mix: int
    """Depth-Attention: group means, scores and weighted values over depth; what another method adds to vanilla."""

    @property
    def total(self) -> int:
        return self.projections + self.attention + self.logits + self.mix


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """What weights and operations follow from, in Megatron's names."""

    num_layers: int
    """Layers that hold weights, unlike Megatron's."""
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    """Rows of the embedding and of the output layer, padding included."""
    tie_embeddings: bool = False
    method: CrossLayerMethod | None = None
    """None for vanilla and Depth-Attention, which have the same weights."""
    num_loops: int = 1
    """Times the layers are run with the same weights."""

    @property
    def _query_size(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def _key_size(self) -> int:
        return self.num_query_groups * self.kv_channels

    @property
    def _matrix_weights(self) -> int:
        """Weights of one layer's matrices."""
        attention = self.hidden_size * (2 * self._query_size + 2 * self._key_size)
        return attention + 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def parameters(self) -> int:
        """Weights of the decoder."""
        norms = 2 * self.hidden_size + 2 * self.kv_channels
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        added = self.method.num_parameters if self.method else 0
        return self.num_layers * (self._matrix_weights + norms) + self.hidden_size + embeddings + added

    def forward_flops(self, sequence_length: int, plan: CrossLayerPlan | None) -> ForwardFlops:
        """Operations of one token's forward pass; recompute is not counted.

        Args:
            sequence_length: positions of a sequence, for the average length of causal attention.
            plan: Depth-Attention's source plan, of the layers of all loops; None for any other model.
        """
        num_layers = self.num_layers * self.num_loops
        sources = [(len(plan.sources(layer)), plan.kinds) for layer in range(num_layers)] if plan else []
        return ForwardFlops(
            projections=matrix_flops(num_layers * self._matrix_weights),
            attention=num_layers * attention_flops(self._query_size, sequence_length),
            logits=matrix_flops(self.hidden_size * self.vocab_size),
            mix=self.method.total_flops
            if self.method
            else sum(mix_flops(self._query_size, self._key_size, *read) for read in sources),
        )
