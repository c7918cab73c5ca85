"""Floating-point operations and weights, counted from the shapes; a multiplication with its addition counts as two.

Pure: integers in, integers out. The mix has a line of its own, so that its price can be read off.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_depthattn.model.source_plan import SourcePlan


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of one token's forward pass through the whole model."""

    projections: int
    """QKV, attention output and SwiGLU matrices of all layers."""
    attention: int
    """Scores and weighted values of causal self-attention, averaged over the positions."""
    logits: int
    """The output layer."""
    mix: int
    """Depth-Attention: group means, scores and weighted values over depth."""

    @property
    def total(self) -> int:
        return self.projections + self.attention + self.logits + self.mix


def forward_flops_per_token(
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,
    ffn_hidden_size: int,
    vocab_size: int,
    sequence_length: int,
    plan: SourcePlan | None,
) -> ForwardFlops:
    """Count one forward pass; a training step costs three times as much (backward is two), recompute not included.

    Args:
        vocab_size: rows of the output layer that are computed, padding included.
        plan: the source plan; None for a vanilla model.
    """
    query, key_value = num_attention_heads * kv_channels, num_query_groups * kv_channels
    matrices = hidden_size * (query + 2 * key_value) + query * hidden_size + 3 * hidden_size * ffn_hidden_size
    # A query at position t sees t + 1 keys: (s + 1) / 2 on average, for the scores and again for the values.
    attention = 2 * query * (sequence_length + 1)
    mix = 0
    if plan is not None:
        for layer in range(num_layers):
            if candidates := len(plan.sources(layer)):
                mix += query + 4 * key_value * (candidates + 1)
    return ForwardFlops(
        projections=2 * num_layers * matrices,
        attention=num_layers * attention,
        logits=2 * hidden_size * vocab_size,
        mix=mix,
    )


def parameter_count(
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    kv_channels: int,
    ffn_hidden_size: int,
    vocab_size: int,
    tie_embeddings: bool,
) -> int:
    """Weights of the decoder; Depth-Attention adds none."""
    query, key_value = num_attention_heads * kv_channels, num_query_groups * kv_channels
    matrices = hidden_size * (query + 2 * key_value) + query * hidden_size + 3 * hidden_size * ffn_hidden_size
    norms = 2 * hidden_size + 2 * kv_channels
    return num_layers * (matrices + norms) + hidden_size + vocab_size * hidden_size * (1 if tie_embeddings else 2)
