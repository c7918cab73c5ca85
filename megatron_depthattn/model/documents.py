"""Documents that lie one after the other in a row of tokens and do not see each other.

Layers get the borders as Megatron's ``packed_seq_params``. In Megatron's own format, ``thd``, core attention gets
``[t, H, D]`` and Megatron turns q and k itself, document by document. The other, ``sbhd``, leaves everything as for an
ordinary sequence ``[S, 1, ...]``: the angles of RoPE are gathered per token (`DocumentGPTModel`), and only core
attention looks at the borders. Under context parallel a rank then holds two pieces of the row, wherever they cut
documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby, islice, pairwise
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_depthattn.model.cross_entropy import ChunkedLossGPTModel


class Cut(NamedTuple):
    """What one context-parallel rank attends with, in its local order: pieces of documents.

    A piece's keys begin with its document and end where its queries do.
    """

    spans: list[tuple[int, int]]
    """Of the row: the keys of all pieces, one after the other."""
    runs: list[tuple[int, int, int]]
    """How many pieces in a row have the same number of queries and of keys, and these numbers."""
    query_borders: Tensor
    """As ``cu_seqlens``, int32 on the device."""
    key_borders: Tensor
    longest: tuple[int, int]
    """The most queries and the most keys of a piece."""
    positions: Tensor
    """Of every query in its document, int64 on the device."""


class Documents(PackedSeqParams):  # type: ignore[misc]
    """Megatron's ``PackedSeqParams`` with the borders on the host, too."""

    @cached_property
    def borders(self) -> list[int]:
        """Where each document starts, and where the last one ends; waits for the device unless `documents_of` made it.

        Raises:
            ValueError: queries and keys have other borders, or they are none.
        """
        queries, keys = (
            sequences if padded is None else padded
            for sequences, padded in (
                (self.cu_seqlens_q, self.cu_seqlens_q_padded),
                (self.cu_seqlens_kv, self.cu_seqlens_kv_padded),
            )
        )
        if keys is not queries and not torch.equal(keys.cpu(), queries.cpu()):
            raise ValueError(
                f"cu_seqlens_q={queries.tolist()} and cu_seqlens_kv={keys.tolist()}: in self-attention documents have "
                "as many keys as queries. Give the same borders twice."
            )
        return _checked(queries)

    @cached_property
    def _cuts(self) -> dict[tuple[int, int, torch.device], Cut]:
        return {}

    def cut(self, rank: int, size: int, device: torch.device) -> Cut:
        """The cut of context-parallel ``rank`` of ``size``; computed once.

        Raises:
            ValueError: the row is not divisible by ``2 * size``.
        """
        key = rank, size, device
        if key not in self._cuts:
            self._cuts[key] = _cut(self.borders, rank, size, device)
        return self._cuts[key]


def documents_of(cu_seqlens: Tensor, *, thd: bool, device: torch.device | str) -> Documents:
    """The documents of a row, as ``packed_seq_params`` of a model's call.

    Args:
        cu_seqlens: on the host, ``[documents + 1]``: where each document starts in the row, and where the last ends.
        thd: for TransformerEngine's layers without context parallel; else for a row that goes through the model as an
            ordinary sequence.
        device: of the model.

    Raises:
        ValueError: they are no borders.
    """
    borders = _checked(cu_seqlens)
    on_device = _sent(torch.tensor(borders, dtype=torch.int32), device)
    longest = max(end - start for start, end in pairwise(borders))
    documents = Documents(
        qkv_format="thd" if thd else "sbhd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    documents.borders = borders
    return documents


def as_documents(packed: PackedSeqParams) -> Documents:
    """``packed`` itself, or Megatron's plain one with what `Documents` adds."""
    if isinstance(packed, Documents):
        return packed
    return Documents(**{field.name: getattr(packed, field.name) for field in dataclasses.fields(packed) if field.init})


class DocumentGPTModel(ChunkedLossGPTModel):
    """Megatron's ``GPTModel``; positions begin anew with each of the documents in ``packed_seq_params``."""

    def forward(self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any) -> Any:
        """As Megatron's; ``packed_seq_params``: Megatron's own (thd), or from `documents_of`.

        Raises:
            ValueError: documents with an inference context.
        """
        if packed_seq_params is not None:
            if kwargs.get("inference_context") is not None or kwargs.get("inference_params") is not None:
                raise ValueError(
                    "packed_seq_params and an inference context were given: a cache has one document a row. Leave out "
                    "one of the two."
                )
            packed_seq_params = as_documents(packed_seq_params)
            if packed_seq_params.qkv_format != "thd" and takes_thd(self):
                raise ValueError(
                    f"packed_seq_params of qkv_format={packed_seq_params.qkv_format!r} with TransformerEngine's core "
                    "attention, which would not look at their borders: give documents_of(..., thd=True); under context "
                    "parallel build the model with document_mask=True."
                )
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)

    def _preprocess(self, *args: Any, packed_seq_params: Documents | None = None, **kwargs: Any) -> Any:
        """As Megatron's; the angles of documents in an ordinary sequence are those of each token's position."""
        if packed_seq_params is None or packed_seq_params.qkv_format == "thd":
            return super()._preprocess(*args, packed_seq_params=packed_seq_params, **kwargs)
        hidden_states, _, *others = super()._preprocess(*args, **kwargs)
        group, borders = self.pg_collection.cp, packed_seq_params.borders
        longest = max(end - start for start, end in pairwise(borders))
        angles = self.rotary_pos_emb(max(self.max_sequence_length, longest), packed_seq=True)
        positions = packed_seq_params.cut(group.rank(), group.size(), angles.device).positions
        return hidden_states, angles[positions], *others


def takes_thd(model: torch.nn.Module) -> bool:
    """Whether documents go to TransformerEngine's core attention, which knows borders in the format ``thd`` alone."""
    layers = (module for module in model.modules() if isinstance(module, SelfAttention))
    return any(not hasattr(layer.core_attention, "takes_rows_of_documents") for layer in islice(layers, 1))


def _checked(cu_seqlens: Tensor) -> list[int]:
    """The borders without empty documents."""
    given: list[Any] = cu_seqlens.tolist() if cu_seqlens.dim() == 1 and not cu_seqlens.is_floating_point() else []
    if len(given) < 2 or given[0] or sorted(given) != given or not given[-1]:
        raise ValueError(
            f"cu_seqlens={cu_seqlens.tolist()}: borders of documents are a row of integers that begins with 0 and "
            "rises to the number of tokens."
        )
    return list(dict.fromkeys(given))


def _sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy that the host does not wait for: of page-locked memory, if ``device`` is a GPU."""
    return (tensor.pin_memory() if torch.device(device).type == "cuda" else tensor).to(device, non_blocking=True)


def _cut(borders: Sequence[int], rank: int, size: int, device: torch.device) -> Cut:
    tokens = borders[-1]
    if size > 1 and tokens % (2 * size):
        raise ValueError(
            f"cu_seqlens end at {tokens} under context_parallel_size={size}: a row is cut into {2 * size} equal "
            f"pieces. Give a multiple of {2 * size} tokens."
        )
    rows = tokens // (2 * size)
    parts = [(r * rows, (r + 1) * rows) for r in (rank, 2 * size - 1 - rank)] if size > 1 else [(0, tokens)]
    spans, pieces, positions = [], [], []
    for first, last in parts:
        touched = [(s, min(e, last)) for s, e in pairwise(borders) if s < last and e > first]
        spans.append((touched[0][0], last))
        pieces += [(end - max(start, first), end - start) for start, end in touched]
        positions += [torch.arange(max(start, first) - start, end - start) for start, end in touched]
    queries, keys = zip(*pieces, strict=True)
    query_borders, key_borders, where = (
        _sent(t, device)
        for t in (*(torch.tensor([0, *n]).cumsum(0).int() for n in (queries, keys)), torch.cat(positions))
    )
    runs = [(len(list(same)), *piece) for piece, same in groupby(pieces)]
    return Cut(spans, runs, query_borders, key_borders, (max(queries), max(keys)), where)
