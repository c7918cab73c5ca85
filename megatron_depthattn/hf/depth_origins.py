"""Where a layer's mixed value came from, once the mixing of its sources is resolved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def depth_origins(weights: Sequence[Tensor], sources: Sequence[Sequence[int]]) -> list[Tensor]:
    """Shares of the layers' own values in every layer's mixed value.

    A layer reads *mixed* values: with weight ``a`` on a source, it takes ``a`` times whatever that one was mixed of,
    and so on down to layers that read nobody. Heads mix apart, so shares are resolved for each by itself.

    Args:
        weights: of every layer ``[..., n + 1]`` on its sources in order and, last, on itself; layers without a source
            have ``[..., 1]``. As a model's output with ``output_depth_weights=True``.
        sources: of every layer, the layers that it reads, ascending.

    Returns:
        Of every layer ``[..., layers]``: the share of each layer's own value; they sum to 1, later ones have none.
    """
    origins: list[Tensor] = []
    for layer, (own, reads) in enumerate(zip(weights, sources, strict=True)):
        shares = torch.zeros(*own.shape[:-1], len(weights), dtype=own.dtype, device=own.device)
        shares[..., layer] = own[..., -1]
        for i, source in enumerate(reads):
            shares += own[..., i, None] * origins[source]
        origins.append(shares)
    return origins
