"""What a pipeline of several processes sends in a step, counted below Megatron, against the least possible."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_depthattn.benchmarks.models import random_microbatch
from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.world import run_world
from megatron_depthattn.config import RunConfig, from_dict, validate
from megatron_depthattn.estimate.traffic import CrossLayer, hop_sizes

LAYOUTS = {"pp2": (2, 1), "pp4": (4, 1), "pp2xvpp2": (2, 2), "pp4xvpp2": (4, 2)}
"""Pipeline ranks and chunks a rank."""
METHODS = ("vanilla", "depth_attention", "denseformer", "attnres", "mhc")
MESSAGES = "messages"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME")
    parser.add_argument("--strides", nargs="+", type=int, metavar="N", help="default: 1, 2 and half the layers")
    parser.add_argument("--windows", nargs="+", type=int, default=[0, 1], metavar="N", help="default: 0 1")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="NAME", help="these in place of strides and windows"
    )
    parser.add_argument("--layers", type=int, default=16, metavar="N", help="default 16")
    parser.add_argument("--hidden", type=int, default=256, metavar="N", help="hidden size (default 256), heads of 64")
    parser.add_argument("--sequence-length", type=int, default=256, metavar="N", help="default 256")
    parser.add_argument("--microbatches", type=int, default=8, metavar="N", help="of a step (default 8)")


def measure(given: argparse.Namespace) -> Result:
    """For every layout and source plan, or method: bytes of one step sent and least possible.

    Raises:
        ValueError: a world of processes failed.
    """
    result = Result(
        title=f"Sent in one step by a pipeline: {given.layers} layers, hidden {given.hidden}, {given.sequence_length} "
        f"tokens, {given.microbatches} microbatches",
        columns=["layout", "model", "sent, MiB", "bound, MiB", "/ vanilla", "messages"],
        notes=[
            "sent: hidden states, sources and gradients over all boundaries between ranks, counted below Megatron",
            "bound: hidden states, and each source over every boundary on its way to its farthest reader once",
        ],
    )
    variants: dict[str, dict[str, Any]] = {name: {"method": name} for name in given.methods or ()} or {
        f"stride {stride}, window {window}": {"depth_attention": {"stride": stride, "recent_window": window}}
        for stride in given.strides or (1, 2, given.layers // 2)
        for window in given.windows
    }
    heads = given.hidden // 64
    shape = {
        **{"num_layers": given.layers, "hidden_size": given.hidden, "ffn_hidden_size": 3 * given.hidden},
        **{"num_attention_heads": heads, "num_query_groups": max(1, heads // 4), "kv_channels": 64},
        **{"vocab_size": 1024, "max_position_embeddings": given.sequence_length},
    }
    for layout in given.layouts:
        pipeline, virtual = LAYOUTS[layout]
        parallel = {"pipeline": pipeline, "virtual_pipeline": virtual}
        train = {"micro_batch_size": 1, "global_batch_size": given.microbatches}
        rest = {"data": {"sequence_length": given.sequence_length}, "train": train}
        settings = [{"model": shape | keys, "parallel": parallel, **rest} for keys in variants.values()]
        found = run_world("hop", pipeline, parallel, {"settings": settings, "microbatches": given.microbatches})
        for name, one in zip(variants, found, strict=True):
            sizes = [f"{one[key] / 2**20:.3f}" for key in ("sent", "bound")]
            ratio, messages = one["sent"] / one["vanilla_sent"], f"{one['messages']} of {one['least_messages']}"
            result.rows.append([layout, name, *sizes, f"{ratio:.2f}", messages])
            result.figures[f"{layout} {name}"] = one
    return result


def work(device: torch.device, *, settings: list[dict[str, Any]], microbatches: int) -> list[dict[str, Any]]:
    """Of every config, on one rank of the pipeline: what is sent in a forward and backward pass (on rank 0: by all)."""
    from megatron.core import parallel_state

    from megatron_depthattn.train.build import build_model
    from megatron_depthattn.train.hardware import for_this_machine
    from megatron_depthattn.train.step import run_microbatches

    def resolved(keys: dict[str, Any]) -> RunConfig:
        config = from_dict(keys, "the benchmark")
        return for_this_machine(config, validate(config, dist.get_world_size(), needs_data=False)).config

    stages = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    found = []
    for keys in settings:
        config, vanilla = resolved(keys), resolved(keys | {"model": keys["model"] | {"method": "vanilla"}})
        chunks, batch = build_model(config, device), random_microbatch(config, device)
        with recorded_sends() as sent:
            run_microbatches(chunks, [batch] * microbatches, (1, config.data.sequence_length), forward_only=False)
        between = sent_between_stages(sent, stages) or {"bytes": {}, "messages": 0}
        edges, vanilla_edges = (hop_sizes(each, CrossLayer.of(each)) for each in (config, vanilla))
        both_ways = 2 * microbatches
        found.append(
            {
                "sent": sum(between["bytes"].values()),
                "bound": both_ways * sum(edges),
                "vanilla_sent": both_ways * sum(vanilla_edges),
                "messages": between["messages"],
                "least_messages": both_ways * len(edges),
                "layers": config.model.spec,
            }
        )
    return found


@contextmanager
def recorded_sends() -> Iterator[Counter[str]]:
    """Bytes that this rank sends, whatever they are, by the receiving rank; under ``MESSAGES`` how many messages.

    ``isend`` and batched sends on gloo both end in the process group's ``send``, which is what is counted.
    """
    sent: Counter[str] = Counter()
    send = dist.ProcessGroup.send

    def record(group: Any, tensors: list[Tensor], to: int, tag: int) -> Any:
        sent[str(dist.get_process_group_ranks(group)[to])] += sum(t.numel() * t.element_size() for t in tensors)
        sent[MESSAGES] += 1
        return send(group, tensors, to, tag)

    with mock.patch.object(dist.ProcessGroup, "send", record):
        yield sent


def sent_between_stages(sent: Counter[str], stages: list[int]) -> dict[str, Any] | None:
    """On rank 0, of one pipeline: bytes from every stage to every other ("0>1"), and the messages of all together.

    Args:
        sent: of this rank; every rank of the world calls this.
        stages: the pipeline's ranks in order.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(sent, gathered if dist.get_rank() == 0 else None)
    if dist.get_rank() > 0:
        return None
    between = {
        f"{i}>{j}": gathered[rank][str(other)] for i, rank in enumerate(stages) for j, other in enumerate(stages)
    }
    return {
        "bytes": {edge: size for edge, size in between.items() if size},
        "messages": sum(gathered[rank][MESSAGES] for rank in stages),
    }
