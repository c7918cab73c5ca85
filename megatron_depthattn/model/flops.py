"""Weights and floating-point operations, counted from the shapes; a multiplication with its addition counts as two.

Pure: integers in, integers out. The mix has a line of its own, so that its price can be read off.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_depthattn.model.source_plan import SourcePlan


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
    """Depth-Attention: group means, scores and weighted values over depth."""

    @property
    def total(self) -> int:
        return self.projections + self.attention + self.logits + self.mix


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """What weights and operations follow from, in Megatron's names."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    """Rows of the embedding and of the output layer, padding included."""
    tie_embeddings: bool = False

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
        """Weights of the decoder; Depth-Attention adds none."""
        norms = 2 * self.hidden_size + 2 * self.kv_channels
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * (self._matrix_weights + norms) + self.hidden_size + embeddings

    def forward_flops(self, sequence_length: int, plan: SourcePlan | None) -> ForwardFlops:
        """Operations of one token's forward pass; recompute is not counted.

        Args:
            sequence_length: positions of a sequence, for the average length of causal attention.
            plan: the source plan; None for a vanilla model.
        """
        mix = 0
        if plan is not None:
            for layer in range(self.num_layers):
                if num_sources := len(plan.sources(layer)):
                    mix += self._query_size + 4 * self._key_size * (num_sources + 1)
        return ForwardFlops(
            projections=2 * self.num_layers * self._matrix_weights,
            # A query at position t sees t + 1 keys, (s + 1) / 2 on average, for the scores and again for the values.
            attention=self.num_layers * 2 * self._query_size * (sequence_length + 1),
            logits=2 * self.hidden_size * self.vocab_size,
            mix=mix,
        )
