"""One rank of a pipeline that `benchmark.py hop` measures: torchrun ... hop_worker WORK.json FIGURES.json."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_depthattn.benchmarks.sent import recorded_sends, sent_between_stages
from megatron_depthattn.benchmarks.timing import taking_turns
from megatron_depthattn.config import RunConfig, from_dict
from megatron_depthattn.model.source_plan import hop_bytes
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.train.build import Chunks, build_model, transformer_config
from megatron_depthattn.train.step import Microbatch, run_microbatches

VOCAB = 1024


def main(work: dict[str, Any], output: Path) -> None:
    device = initialize_distributed(launch_environment())
    initialize_model_parallel(pipeline=work["pipeline"], virtual_pipeline=work["virtual"])
    tokens = torch.randint(VOCAB, (1, work["sequence_length"] + 1), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens[:, :-1].to(device), "labels": tokens[:, 1:].to(device)}
    batches: list[Microbatch] = [batch] * work["microbatches"]
    vanilla = build_model(_config(work, {"method": "vanilla"}), device)
    figures = [_measure(work, model, vanilla, batches, device) for model in work["models"]]
    if dist.get_rank() == 0:
        output.write_text(json.dumps(figures))
    shut_down()


def _config(work: dict[str, Any], changes: dict[str, Any]) -> RunConfig:
    heads = work["hidden"] // 64
    model = {
        "num_layers": work["layers"],
        "hidden_size": work["hidden"],
        "num_attention_heads": heads,
        "num_query_groups": max(1, heads // 4),
        "kv_channels": 64,
        "ffn_hidden_size": 3 * work["hidden"],
        "vocab_size": VOCAB,
        "max_position_embeddings": work["sequence_length"],
    } | changes
    parallel = {"pipeline": work["pipeline"], "virtual_pipeline": work["virtual"]}
    data = {"sequence_length": work["sequence_length"]}
    return from_dict({"model": model, "parallel": parallel, "data": data}, "the benchmark")


def _measure(
    work: dict[str, Any], changes: dict[str, Any], vanilla: Chunks, batches: list[Microbatch], device: torch.device
) -> dict[str, Any]:
    """Bytes of one step, and seconds of every kind of step in turns; the same on every rank."""
    config = _config(work, changes)
    chunks = build_model(config, device)
    with recorded_sends() as sent:
        _step(chunks, batches)
    stages = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    between = sent_between_stages(sent, stages) or {"bytes": {}, "messages": 0}

    seconds: dict[str, list[float]] = {"vanilla": [], "planned": []}
    for run in range(-1, work["runs"]):  # the first one warms up
        for kind in taking_turns([*seconds], run + 1):
            took = _step(vanilla if kind == "vanilla" else chunks, batches)
            if run >= 0:
                seconds[kind].append(took)

    model, tokens = transformer_config(config), work["sequence_length"]
    if model.shares_over_layers:
        sizes = {"hidden_size": model.hidden_width, "source_size": len(model.source_kinds) * model.part_width}
        edges = hop_bytes(model.source_plan, **sizes, tokens=tokens, bytes_per_element=4)
    else:
        edges = [4 * tokens * model.hidden_size] * (work["pipeline"] * work["virtual"] - 1)
    vanilla_edge = 2 * len(batches) * tokens * work["hidden"] * 4
    return {
        "sent": sum(between["bytes"].values()),
        "sent_between": between["bytes"],
        "vanilla_edge": vanilla_edge,
        "vanilla_sent": vanilla_edge * len(edges),
        "bound": 2 * len(batches) * sum(edges),
        "messages": between["messages"],
        "least_messages": 2 * len(batches) * len(edges),
        "seconds": seconds,
    }


def _step(chunks: Chunks, batches: list[Microbatch]) -> float:
    """Seconds of one forward and backward pass over the global batch, on all ranks together."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    dist.barrier()
    started = time.perf_counter()
    run_microbatches(chunks, batches, (1, batches[0]["tokens"].size(1)), forward_only=False)
    dist.barrier()
    return time.perf_counter() - started


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
