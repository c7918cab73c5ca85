"""One global batch of packed documents under this world's number of pipeline stages: losses and gradients to a file.

python -m tests.parallel.packed_worker FOLDER LENGTHS, with LENGTHS the documents of each microbatch as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_depthattn.model.gpt import qwen3_style_config
from megatron_depthattn.model.initialization import globally_named_parameters, initialize_weights
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.parallel.schedule import run_schedule
from tests.document_attention import build_with_document_attention, packed

VOCAB = 128
SHAPE = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8}


def forward_step(work, model):
    (number, lengths), call_arguments = next(work)
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(VOCAB, (1, sum(lengths)), generator=generator)
    given = {"labels": tokens.flip(1), "packed_seq_params": packed(lengths)}
    output = model(tokens, None, None, **given, **call_arguments)
    return output, lambda losses: (losses.mean(), losses.detach().clone())


def step(batches: list[list[int]], rank: int, stages: int) -> dict[str, Any]:
    """Losses (on the last stage) and gradients, in a world that has its groups."""
    config = qwen3_style_config(
        **SHAPE,
        ffn_hidden_size=48,
        depth_attention_stride=1,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=True,
    )
    ends = {"pre_process": rank == 0, "post_process": rank == stages - 1}
    length = sum(batches[0])
    model = build_with_document_attention(config, vocab_size=VOCAB, length=length, **ends).train()
    initialize_weights(model, seed=3, init_std=0.2)
    given = {"micro_batch_size": 1, "sequence_length": length, "forward_only": False}
    losses = run_schedule(forward_step, list(enumerate(batches)), [model], **given)
    gradients = {name: parameter.grad for name, parameter in globally_named_parameters(model)}
    return {"losses": losses, "gradients": gradients}


def main(folder: Path, batches: list[list[int]]) -> None:
    initialize_distributed(launch_environment())
    rank, stages = dist.get_rank(), dist.get_world_size()
    initialize_model_parallel(pipeline=stages)
    torch.save(step(batches, rank, stages), folder / f"{rank}of{stages}.pt")
    shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
