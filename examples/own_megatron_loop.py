"""Your own Megatron-Core training loop, with Depth-Attention as its layer spec.

python examples/own_megatron_loop.py                                       one process, on CPU or a GPU
torchrun --nproc_per_node 4 examples/own_megatron_loop.py                  data parallel
torchrun --nproc_per_node 4 examples/own_megatron_loop.py --tensor 2       two ranks share each layer
"""

import argparse

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.parallel_state import get_data_parallel_rank

from megatron_depthattn.model import depth_attention_block_spec, qwen3_style_config
from megatron_depthattn.parallel.cpu_runtime import enter_cpu_runtime
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.quiet import silence_libraries

parser = argparse.ArgumentParser()
parser.add_argument("--tensor", type=int, default=1)
parser.add_argument("--steps", type=int, default=30)
given = parser.parse_args()

silence_libraries()  # Megatron warns once for each random generator that is the CPU's
enter_cpu_runtime()  # without a GPU, Megatron's "cuda" means the CPU; with one, nothing changes
device = initialize_distributed(launch_environment())  # joins torchrun's ranks, or is a world of one
initialize_model_parallel(tensor=given.tensor, seed=1234)  # Megatron's groups and its random generators

config = qwen3_style_config(
    num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=16, ffn_hidden_size=128,
    depth_attention_stride=2, tensor_model_parallel_size=given.tensor,
)  # fmt: skip
spec = depth_attention_block_spec(config, backend="local")  # "te": TransformerEngine's layers
model = GPTModel(config, spec, vocab_size=512, max_sequence_length=64, position_embedding_type="rope").to(device)
model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
model.broadcast_params()
optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=1.0), [model])

text = torch.randint(512, (65,), generator=torch.Generator().manual_seed(get_data_parallel_rank())).to(device)
for step in range(given.steps):
    tokens, labels = text[None, :-1], text[None, 1:]  # your data: a batch of this data-parallel rank, [batch, sequence]
    model.zero_grad_buffer()
    optimizer.zero_grad()
    loss = model(tokens, None, None, labels=labels).mean()
    loss.backward()
    finalize_model_grads([model])  # sums gradients over data-parallel ranks
    optimizer.step()
    if step % 10 == 0 or step == given.steps - 1:
        print(f"rank {torch.distributed.get_rank()} step {step} loss {loss.item():.4f}", flush=True)
shut_down()
