"""What all ranks must agree on before the first step, and what rank 0 says about it."""

from __future__ import annotations

import torch.distributed as dist

from megatron_depthattn.model.transformer_config import DepthAttentionConfig
from megatron_depthattn.parallel.patience import announced


def check_same_on_all_ranks(what: str, digest: str) -> None:
    """Raise on every rank if ranks hold different ``digest`` strings of ``what``."""
    digests: list[str] = [""] * dist.get_world_size()
    with announced(f"rank {dist.get_rank()}", lambda: f"the other ranks' {what}"):
        dist.all_gather_object(digests, digest)
    outliers = {rank: other for rank, other in enumerate(digests) if other != digests[0]}
    if outliers:
        raise ValueError(
            f"ranks hold different {what}: rank 0 has {digests[0]}, but {outliers}. Start all ranks with the same "
            "config, code, data and software."
        )


def describe_transfers(config: DepthAttentionConfig, *, rows: int, bytes_per_element: int) -> list[str]:
    """One line per pipeline edge: the sources that cross it and the bytes of one micro-batch, one way; for people.

    Args:
        rows: of a message: positions of the hidden state on one rank, times the micro-batch.

    Empty without pipelining.
    """
    plain = rows * bytes_per_element * config.hidden_size
    sizes = [
        rows * bytes_per_element * config.message_into(chunk).width
        for chunk in range(1, len(config.source_plan.chunk_starts))
    ]
    return [
        f"hop {i} -> {i + 1}: {size / 2**20:.2f} MiB a micro-batch each way ({size / plain:.2f}x vanilla)"
        + (f", sources of layers {list(edge)}" if edge else "")
        for i, (edge, size) in enumerate(zip(config.source_plan.edges(), sizes, strict=True))
    ]
