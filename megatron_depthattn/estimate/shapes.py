"""Sizes of one micro-batch and of one layer on one rank. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RankShape:
    """What activations follow from; heads, widths and rows are this rank's share."""

    batch: int
    """Sequences of a micro-batch."""
    query_length: int
    """Positions of a sequence whose queries this rank has; context ranks share them."""
    key_length: int
    """Positions whose keys core attention reads: all of the sequence."""
    rows: int
    """Tokens whose hidden state this rank keeps between layers; under sequence parallel tensor ranks share them."""
    hidden_size: int
    num_heads: int
    num_groups: int
    """Key/value heads; at least one, which then several tensor ranks have."""
    group_heads: int
    """Query heads of one key/value head over all tensor ranks."""
    projection_size: int
    """Numbers per token behind q, k and v; more than theirs where they had to be gathered."""
    head_size: int
    ffn_size: int
    vocab_size: int
    """Rows of the embedding, padding included."""
    element: int
    """Bytes of a number: 4 (fp32) or 2 (bf16)."""
    tensor: int
    """Tensor ranks."""
    on_cpu: bool = False
    """Torch's RMSNorm is then not one operation but several, in fp32."""
    spec: str = "local"
    """Whose layers: local or te."""
    fused_swiglu: bool = False
    """SwiGLU is one kernel, which keeps its input alone."""
    fused_loss: bool = False
    """The loss is Megatron's fused one, which keeps its softmax in fp32."""
    fp8: str | None = None
    """Recipe of the linear layers."""

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch on this rank's context share."""
        return self.batch * self.query_length

    @property
    def spreads_groups(self) -> bool:
        """Whether the query heads of one key/value head lie on several tensor ranks."""
        return self.num_heads < self.group_heads

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one hidden state."""
        return self.element * self.rows * self.hidden_size

    @property
    def query_bytes(self) -> int:
        """Bytes of one tensor of the size of all query heads."""
        return self.element * self.tokens * self.num_heads * self.head_size

    @property
    def key_bytes(self) -> int:
        """Bytes of one tensor of the size of all key heads."""
        return self.element * self.tokens * self.num_groups * self.head_size
