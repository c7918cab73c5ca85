"""What all ranks must agree on before the first step, and what rank 0 says about it."""

from __future__ import annotations

import torch.distributed as dist

from megatron_depthattn.model.source_plan import CrossLayerPlan, hop_bytes


def check_same_on_all_ranks(what: str, digest: str) -> None:
    """Raise on every rank if ranks hold different ``digest`` strings of ``what``."""
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    odd = {rank: other for rank, other in enumerate(digests) if other != digests[0]}
    if odd:
        raise ValueError(
            f"ranks hold different {what}: rank 0 has {digests[0]}, but {odd}. Start all ranks with the same "
            "config and code."
        )


def describe_hops(
    plan: CrossLayerPlan,
    *,
    vanilla_size: int,
    hidden_size: int,
    source_size: int,
    tokens: int,
    bytes_per_element: int,
) -> list[str]:
    """One line per pipeline edge: the sources that cross it and the bytes of one micro-batch, one way; for people.

    Arguments as `hop_bytes`, and the numbers per token of a vanilla model's hidden state. Empty without pipelining.
    """
    sizes = hop_bytes(
        plan, hidden_size=hidden_size, source_size=source_size, tokens=tokens, bytes_per_element=bytes_per_element
    )
    plain = tokens * bytes_per_element * vanilla_size
    return [
        f"hop {i} -> {i + 1}: {size / 2**20:.2f} MiB a micro-batch each way ({size / plain:.2f}x vanilla)"
        + (f", sources of layers {list(edge)}" if edge else "")
        for i, (edge, size) in enumerate(zip(plan.edges(), sizes, strict=True))
    ]
