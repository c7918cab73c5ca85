"""Core attention of the local layers: torch's ``scaled_dot_product_attention`` in Megatron's place.

Causal attention needs no mask tensor and grouped heads no repeated keys; torch picks a flash kernel where it has one,
on a CPU as well, so what a layer keeps for backward grows with the sequence and not with its square.

``is_causal`` lets row i of the queries see the first i + 1 keys, which is right only where both begin at position 0.
Queries that are the last positions of longer keys (with a cache, and under context parallel) go in blocks of rows, each
with a mask.

Documents that do not see each other (`model.documents`) take a call each on a CPU, and one for all of them on a GPU:
torch's variable-length kernels, which line up the last query with the last key.

Under context parallel keys and values are gathered and a rank attends with its own queries: simple and exact, but every
rank holds keys and values of the whole sequence; TransformerEngine's ring attention is the fast path on GPUs. Megatron
deals each rank ``r`` of ``c`` two of ``2c`` equal pieces of the sequence, ``r`` and ``2c-1-r``, so that causal work is
balanced.

Shape suffixes: S positions, B micro-batch, H query heads and G key/value heads of this rank, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.nn.functional import scaled_dot_product_attention

from megatron_depthattn.model.activation_memory import BLOCK_ROWS
from megatron_depthattn.model.documents import Cut, as_documents

_LOWER_RIGHT = 2
"""The memory-efficient kernel's causal mask that lines up the last query with the last key."""


def context_parallel_positions(sequence_length: int, rank: int, size: int) -> Tensor:
    """Positions of the whole sequence that context-parallel ``rank`` of ``size`` holds, in its local order, int64."""
    pieces = torch.arange(sequence_length).chunk(2 * size)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


class _LastRows(CausalBias):
    """A `CausalBias` without memory: torch's own is a tensor on the host, twice as large as the scores."""

    def __new__(cls, *_: Any) -> _LastRows:
        return torch.Tensor._make_subclass(cls, torch.empty(0))  # type: ignore[no-any-return]


class SDPAttention(DotProductAttention):
    """Megatron's ``DotProductAttention`` computed by torch's kernels, also under context parallel.

    Raises:
        ValueError: a sliding window or a softmax other than the plain one.
    """

    takes_rows_of_documents = True

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
        for field, given, plain in (
            ("window_size", config.window_size, None),
            ("softmax_type", config.softmax_type, "vanilla"),
        ):
            if given != plain:
                raise ValueError(
                    f"{field}={given!r}: torch's attention kernels, which the local layers use, do not have it. Set "
                    f"{field}={plain!r}, or build the model with TransformerEngine's layers."
                )
        self_contained = copy.copy(config)
        self_contained.context_parallel_size = 1  # each rank computes complete rows
        super().__init__(self_contained, layer_number, *args, pg_collection=pg_collection, **kwargs)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend over the sequence.

        Args:
            query: ``[S, B, H, D]``, this rank's positions; with documents in Megatron's format ``[t, H, D]``.
            key, value: ``[S, B, G, D]``; as many positions, or more where ``query`` holds the last ones.
            attention_mask: True where a query must not see a key, broadcast to ``[B, H, S, S]``; None: causal.
            attn_mask_type: as Megatron's; causal unless a mask is given.
            packed_seq_params: the documents that the positions belong to.

        Returns:
            ``[S, B, H * D]``, or ``[t, H * D]``.

        Raises:
            ValueError: a bias, or an attention mask under context parallel or with documents, or documents that are
                not those of the positions.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias was given: the local core attention has none. Pass attention_bias=None.")
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if attention_mask is not None and (size > 1 or packed_seq_params is not None):
            where = "under context parallel" if packed_seq_params is None else "beside packed_seq_params"
            raise ValueError(
                f"an attention mask was given {where}: the local backend knows the causal one only. Pass "
                "attention_mask=None."
            )
        cut = self._cut(query, packed_seq_params) if packed_seq_params is not None else None
        # As Megatron's: under sequence parallel every rank drops out by the same generator.
        forked = nullcontext() if self.config.sequence_parallel or not self._dropout else get_cuda_rng_tracker().fork()
        with forked:
            if size > 1:
                key, value = (_in_sequence_order(t, self.cp_group) for t in (key, value))
            if cut is not None:
                return self._attend_to_documents(query, key, value, cut)
            if size == 1:
                return self._attend(query, key, value, attention_mask)
            rows = query.size(0) // 2
            ends = ((rank + 1) * rows, (2 * size - rank) * rows)
            pieces = zip(query.split(rows), ends, strict=True)
            return torch.cat([self._attend(piece, key[:end], value[:end], None) for piece, end in pieces])

    def _cut(self, query: Tensor, packed: PackedSeqParams) -> Cut:
        size, documents = self.cp_group.size(), as_documents(packed)
        is_thd = documents.qkv_format == "thd"
        if is_thd and size > 1:
            raise ValueError(
                "packed_seq_params of qkv_format='thd' were given under context parallel, where Megatron cuts every "
                "document: the local backend cuts the row. Give documents_of(cu_seqlens, thd=False, ...)."
            )
        if not is_thd and query.size(1) != 1:
            raise ValueError(
                f"packed_seq_params were given with a micro-batch of {query.size(1)} rows: documents lie in one. Give "
                "the whole micro-batch as one row, tokens.view(1, -1)."
            )
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "packed_seq_params were given while a CUDA graph is captured: it would replay these borders whatever "
                "the next ones are. Leave the capture out."
            )
        if documents.borders[-1] != query.size(0) * size:
            raise ValueError(
                f"cu_seqlens end at {documents.borders[-1]}, and the row has {query.size(0) * size} tokens: every "
                "token belongs to a document, padding as well."
            )
        return documents.cut(self.cp_group.rank(), size, query.device)

    def _attend_to_documents(self, query: Tensor, key: Tensor, value: Tensor, cut: Cut) -> Tensor:
        """Each piece of a document to its own keys."""
        is_thd, rows = query.dim() == 3, query.size(0)
        query, key, value = (t if is_thd else t.squeeze(1) for t in (query, key, value))
        if cut.spans != [(0, rows)]:
            key, value = (torch.cat([t[start:end] for start, end in cut.spans]) for t in (key, value))
        if query.is_cuda:
            context = self._varlen(query, key, value, cut)
        else:
            runs = zip(
                cut.runs,
                query.split([count * rows for count, rows, _ in cut.runs]),
                *(t.split([count * keys for count, _, keys in cut.runs]) for t in (key, value)),
                strict=True,
            )
            context = torch.cat([self._attend_alike(count, *run) for (count, *_), *run in runs])
        return context.reshape(rows, -1) if is_thd else context.reshape(rows, 1, -1)

    def _attend_alike(self, count: int, *run: Tensor) -> Tensor:
        """``[t, H * D]`` of ``count`` pieces of documents with as many queries and keys each."""
        context = self._causal(*(t.view(count, -1, *t.shape[1:]).transpose(1, 2) for t in run))
        return context.transpose(1, 2).reshape(run[0].size(0), -1)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, cut: Cut) -> Tensor:
        """``[t, H, D]`` of all pieces, by kernels of torch's own attention; neither waits for the device."""
        borders, scale = (cut.query_borders, cut.key_borders, *cut.longest, self._dropout), self._scale
        if _flash_takes(query):
            attend = torch.ops.aten._flash_attention_forward
            return attend(query, key, value, *borders, True, False, scale=scale)[0]  # type: ignore[no-any-return]
        group = query.size(1) // key.size(1)
        key, value = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (key, value))
        attend = torch.ops.aten._efficient_attention_forward
        rows = (t.unsqueeze(0) for t in (query, key, value))
        keeps = torch.is_grad_enabled()
        return attend(*rows, None, *borders, _LOWER_RIGHT, keeps, scale=scale)[0].squeeze(0)  # type: ignore[no-any-return]

    @property
    def _scale(self) -> float:
        return self.softmax_scale * (self.scale_mask_softmax.scale or 1.0)  # type: ignore[no-any-return]

    @property
    def _dropout(self) -> float:
        return self.attention_dropout.p if self.training else 0.0

    def _attend(self, query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, masked: Tensor | None) -> Tensor:
        given = query_SBHD, key_SBGD, value_SBGD
        if masked is not None:
            query, key, value = (t.permute(1, 2, 0, 3) for t in given)
            return self._sdpa(query, key, value, attn_mask=~masked).permute(2, 0, 1, 3).flatten(2)
        # Batch and heads as one dimension: what comes out then lies as the output projection reads it, without a copy.
        query, key, value = (t.flatten(1, 2).transpose(0, 1).unsqueeze(0) for t in given)
        context = self._causal(query, key, value)
        return context.squeeze(0).transpose(0, 1).reshape(*query_SBHD.shape[:2], -1)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[B, H, S, D]``: the queries are the last positions of the keys."""
        rows, keys = query.size(2), key.size(2)
        if rows == keys:
            return self._sdpa(query, key, value, is_causal=rows > 1)
        if rows == 1:
            return self._sdpa(query, key, value)
        if query.is_cuda:
            return self._sdpa(query, key, value, attn_mask=_LastRows(CausalVariant.LOWER_RIGHT, rows, keys))
        return torch.cat(list(self._in_blocks(query, key, value)), dim=2)

    def _in_blocks(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Tensor]:
        """Contexts of blocks of rows, of queries that are the last positions of the keys.

        Every block's mask is a view of one strip, so that what is kept of the masks is linear in the sequence, too.
        """
        rows, keys = query.size(2), key.size(2)
        size = min(rows, BLOCK_ROWS)
        strip = query.new_full((size, keys + size), -torch.inf).triu(keys + 1)
        for start in range(0, rows, size):
            block = query[:, :, start : start + size]
            before = keys - rows + start
            visible = before + block.size(2)
            mask = strip[: block.size(2), keys - before : keys - before + visible]
            yield self._sdpa(block, key[:, :, :visible], value[:, :, :visible], attn_mask=mask)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        group = query.size(1) // key.size(1)
        is_masked = "attn_mask" in mask and not isinstance(mask["attn_mask"], CausalBias)
        if group > 1 and query.is_cuda and (query.dtype is torch.float32 or is_masked):
            # CUDA's flash kernels take neither, and the memory-efficient one takes no grouped heads in many versions of
            # torch: what is left would keep every score.
            key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
        return scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self._dropout,
            scale=self._scale,
            enable_gqa=query.size(1) != key.size(1),
            **mask,
        )


def _flash_takes(query: Tensor) -> bool:
    """Whether torch's flash kernel takes such queries: no fp32, no large heads, and nothing on GPUs before Ampere."""
    is_new = torch.cuda.get_device_capability(query.device) >= (8, 0) or torch.version.hip is not None
    has_size = query.size(-1) % 8 == 0 and query.size(-1) <= 256
    return query.dtype in (torch.float16, torch.bfloat16) and has_size and is_new


def _in_sequence_order(mine: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The whole sequence, of which every context-parallel rank holds two pieces.

    The backward sums every rank's contribution and returns one's own share.
    """
    pieces = gather_from_sequence_parallel_region(mine, group=group).chunk(2 * group.size())
    return torch.cat([*pieces[::2], *pieces[::-2]])
