"""torch's variable-length attention kernels, which a CPU has not: on hidden tensors, its flash kernel by document.

Under context parallel a piece of a document has more keys than queries: tests/gpu/test_documents.py, on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_forward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FROM_BOTTOM_RIGHT = 2


def _by_name(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    assert given["dropout_p"] == 0.0 and given.get("is_causal", given.get("custom_mask_type") == FROM_BOTTOM_RIGHT)
    return given


def _documents(given: dict[str, Any], *along: str) -> Iterator[list[Tensor]]:
    """Query, key, value and what else lies along the tokens, ``[1, heads, s, D]`` of each document."""
    name = "cum_seq" if "cum_seq_q" in given else "cu_seqlens"
    borders = [given[f"{name}_{kind}"] for kind in "qk"]
    assert torch.equal(*borders)
    rows = (given[key].view(-1, *given[key].shape[-2:]) for key in ("query", "key", "value", *along))
    parts = (row.transpose(0, 1)[None].split(borders[0].diff().tolist(), dim=2) for row in rows)
    return map(list, zip(*parts, strict=True))


def _row(parts: Any, like: Tensor) -> Tensor:
    return torch.cat([*parts], dim=2).squeeze(0).transpose(0, 1).reshape(like.shape)


def forward(func: Any, *args: Any, **kwargs: Any) -> Any:
    given = _by_name(func, args, kwargs)
    parts = [_forward(*each, 0.0, True, scale=given["scale"])[0] for each in _documents(given)]
    out = _row(parts, given["query"])
    if "max_q" in given:
        return out, *(out.new_empty(0) for _ in range(4))
    return out, *(out.new_empty(0) for _ in range(3)), given["max_seqlen_q"], given["max_seqlen_k"]


def backward(func: Any, *args: Any, **kwargs: Any) -> Any:
    given = _by_name(func, args, kwargs)
    is_flash, found = "grad_out" in given, []
    for *qkv, grad in _documents(given, "grad_out" if is_flash else "grad_out_"):
        kept = _forward(*qkv, 0.0, True, scale=given["scale"])
        found.append(_backward(grad, *qkv, *kept, 0.0, True, scale=given["scale"]))
    wanted = (given[key] for key in ("query", "key", "value"))
    gradients = [_row(parts, like) for parts, like in zip(zip(*found, strict=True), wanted, strict=True)]
    return *gradients, *[None] * (not is_flash)


KERNELS = {f"_{kind}_attention_{way.__name__}": way for kind in ("flash", "efficient") for way in (forward, backward)}
