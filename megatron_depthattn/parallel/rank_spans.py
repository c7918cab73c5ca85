"""Ranks in words."""

from __future__ import annotations

from collections.abc import Sequence


def rank_spans(ranks: Sequence[int]) -> str:
    """``ranks 0-3, 6`` of a sorted list."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"
