"""One global batch of documents in rows under this world's layout: losses and gradients to a file of each rank.

python -m tests.parallel.packed_worker FOLDER LENGTHS AXIS, with LENGTHS the documents of each microbatch as JSON and
AXIS ``pipeline`` or ``context``: of as many ranks as there are.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_depthattn.model.core_attention import context_parallel_positions
from megatron_depthattn.model.documents import documents_of
from megatron_depthattn.model.gpt import build_gpt_model, qwen3_style_config
from megatron_depthattn.model.initialization import globally_named_parameters, initialize_weights
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.parallel.schedule import run_schedule

VOCAB = 128
SHAPE = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8}


def forward_step(work, model):
    (number, lengths), call_arguments = next(work)
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(VOCAB, (1, sum(lengths)), generator=generator)
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    own = context_parallel_positions(sum(lengths), rank, size) if size > 1 else slice(None)
    borders = torch.tensor([0, *lengths]).cumsum(0)
    given = {"labels": tokens.flip(1)[:, own], "packed_seq_params": documents_of(borders, thd=False, device="cpu")}
    output = model(tokens[:, own], None, None, **given, **call_arguments)
    # The schedule multiplies by the number of context ranks, whose gradients are to be averaged.
    return output, lambda losses: (losses.sum() / sum(lengths), losses.detach().clone())


def step(batches: list[list[int]], rank: int = 0, size: int = 1, axis: str = "pipeline") -> dict[str, Any]:
    """Losses (on the last stage) and gradients, in a world that has its groups."""
    is_context = axis == "context"
    config = qwen3_style_config(
        **SHAPE,
        ffn_hidden_size=48,
        depth_attention_stride=1,
        pipeline_model_parallel_size=1 if is_context else size,
        context_parallel_size=size if is_context else 1,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=True,
    )
    length = sum(batches[0])
    ends = {"pre_process": is_context or rank == 0, "post_process": is_context or rank == size - 1}
    model = build_gpt_model(config, vocab_size=VOCAB, max_sequence_length=length, **ends).train()
    initialize_weights(model, seed=3, init_std=0.2)
    given = {"micro_batch_size": 1, "sequence_length": length, "forward_only": False}
    losses = run_schedule(forward_step, list(enumerate(batches)), [model], **given)
    gradients = {name: p.grad for name, p in globally_named_parameters(model)}
    if is_context:
        losses = [_gathered(loss, size) for loss in losses]
        for gradient in gradients.values():
            dist.all_reduce(gradient.div_(size))
    return {"losses": losses, "gradients": gradients}


def _gathered(own: torch.Tensor, size: int) -> torch.Tensor:
    """The losses ``[1, S]`` of a row, of which every rank has its positions'."""
    parts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(parts, own)
    held = [context_parallel_positions(own.size(1) * size, rank, size) for rank in range(size)]
    return torch.cat(parts, dim=1)[:, torch.cat(held).argsort()]


def main(folder: Path, batches: list[list[int]], axis: str) -> None:
    initialize_distributed(launch_environment())
    rank, size = dist.get_rank(), dist.get_world_size()
    initialize_model_parallel(**{axis: size})
    torch.save(step(batches, rank, size, axis), folder / f"{rank}of{size}.pt")
    shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
