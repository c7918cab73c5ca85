"""How many micro-batches' activations a rank holds at once under Megatron's schedules. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def in_flight(chunk_bytes: Sequence[int], *, rank: int, num_ranks: int, num_microbatches: int) -> tuple[int, ...]:
    """Of every chunk of a pipeline rank, the micro-batches that are between forward and backward at the peak.

    Forward and backward of (chunk, micro-batch) pairs run in the order of ``get_schedule_table`` in Megatron's
    ``pipeline_parallel/schedules.py``, backward with the chunks mirrored: first as many forwards as that file's
    ``get_pp_rank_microbatches`` says, then one forward and one backward in turn.

    Args:
        chunk_bytes: what one micro-batch leaves in each of the rank's chunks; one chunk: plain 1F1B.
        rank, num_ranks: of the pipeline.
        num_microbatches: of a step on one replica.
    """
    num_chunks = len(chunk_bytes)
    # Peaks repeat once the pipeline is full, so a few rounds give the peak of any number of them.
    rounds = min(num_microbatches, 4 * num_ranks * num_chunks)
    if num_chunks == 1:
        return (min(num_ranks - rank, rounds),)
    order = [
        chunk
        for first in range(0, rounds, num_ranks)
        for chunk in range(num_chunks)
        for _ in range(min(num_ranks, rounds - first))
    ]
    ahead = min(len(order), 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks)
    alive = [0] * num_chunks
    best, most = tuple(alive), -1
    for step, chunk in enumerate(order):
        alive[chunk] += 1
        size = sum(number * bytes_ for number, bytes_ in zip(alive, chunk_bytes, strict=True))
        if size > most:
            best, most = tuple(alive), size
        if step >= ahead:
            alive[num_chunks - 1 - order[step - ahead]] -= 1
    return best
