"""Core attention of the local backend under context parallel: gather keys and values, attend with one's own queries.

Megatron's local ``DotProductAttention`` refuses context parallel; TransformerEngine's ring attention is the fast
path on GPUs. This one is for parity on machines without a GPU: simple, exact, and O(sequence) memory for keys and
values on every rank.

Megatron deals each rank ``r`` of ``c`` two of ``2c`` equal pieces of the sequence, ``r`` and ``2c-1-r``, so that
causal work is balanced; positions below follow that order.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def context_parallel_positions(sequence_length: int, rank: int, size: int) -> Tensor:
    """Positions of the whole sequence that context-parallel ``rank`` of ``size`` holds, in its local order, int64."""
    pieces = torch.arange(sequence_length).chunk(2 * size)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


class AllGatherAttention(DotProductAttention):
    """Causal ``DotProductAttention`` whose keys and values are gathered over the context-parallel group."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        if config.window_size is not None and pg_collection.cp.size() > 1:
            raise ValueError(
                f"window_size={config.window_size} with context_parallel_size={config.context_parallel_size}: "
                "Megatron's local softmax would replace the mask of the gathered sequence. Set window_size=None or "
                "context_parallel_size=1."
            )
        self_contained = copy.copy(config)
        self_contained.context_parallel_size = 1  # each rank computes complete rows: plain attention from here on
        super().__init__(self_contained, layer_number, *args, pg_collection=pg_collection, **kwargs)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As Megatron's; query, key and value hold this rank's positions, ``[s/c, b, heads, d]``.

        Raises:
            ValueError: packed sequences, or an attention mask under context parallel.
        """
        if packed_seq_params is not None:
            raise ValueError(
                "packed_seq_params was given: the local core attention knows no borders between documents and would "
                "attend across them. Build the model with TransformerEngine's layers (backend='te'), or pass one "
                "document a row."
            )
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if size == 1:
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        if attention_mask is not None:
            raise ValueError(
                "an attention mask was given under context parallel: the local backend knows the causal one only. Pass "
                "attention_mask=None."
            )
        # Gathered along dim 0; its backward sums every rank's contribution and returns one's own share.
        key, value = (gather_from_sequence_parallel_region(t, group=self.cp_group) for t in (key, value))
        key_positions = torch.cat([context_parallel_positions(key.size(0), r, size) for r in range(size)])
        query_positions = context_parallel_positions(key.size(0), rank, size)
        future = (key_positions[None, :] > query_positions[:, None]).to(query.device)
        return super().forward(query, key, value, future[None, None], *args, **kwargs)
