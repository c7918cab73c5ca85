"""Which engine is built, and what is said where it cannot be; what the engines compute is in tests/parallel."""

from __future__ import annotations

import dataclasses
import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_depthattn.config import EngineConfig, RunConfig
from megatron_depthattn.parallel.launch_env import LaunchEnvironment

DEEPSPEED = dataclasses.replace(RunConfig(), engine=EngineConfig(name="deepspeed"))
LAUNCHED = LaunchEnvironment(rank=0, world_size=1, local_rank=0, launched=True)


def build(environment: LaunchEnvironment = LAUNCHED):
    from megatron_depthattn.train.loop import build_engine

    return build_engine(DEEPSPEED, torch.device("cpu"), environment)


def test_deepspeed_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"DeepSpeed is not installed: pip install 'megatron-depthattn\[deepspeed\]'"):
        build()


def test_deepspeed_without_a_launcher():
    with pytest.raises(ValueError, match="start it with torchrun --standalone --nproc_per_node 1 -m megatron_depth"):
        build(LAUNCHED._replace(launched=False))


def test_gradients_in_host_memory_are_summed_where_the_backend_takes_them(monkeypatch):
    """With an offloaded optimizer; NCCL takes no tensor on the CPU. Tensors without data stand for both devices.

    The accelerator is "meta" here: the CPU runtime, which stays once a test has entered it, turns "cuda" into "cpu".
    """
    from megatron.core import parallel_state

    from megatron_depthattn.train.deepspeed_engine.shards import sum_over_tensor_ranks

    summed = []
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", lambda: None)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: summed.append(tensor.device.type))
    with FakeTensorMode():
        gradients = {name: torch.ones(4, device="cpu") for name in ("a.q_layernorm.weight", "a.k_layernorm.weight")}
        held = [SimpleNamespace(name=name, parameter=torch.ones(4, device="meta")) for name in gradients]
        after = {}
        shards = SimpleNamespace(
            held=held,
            gradient=lambda shard: gradients[shard.name],
            set_gradient=lambda shard, value: after.update({shard.name: value.device.type}),
        )
        sum_over_tensor_ranks(shards, torch.device("meta"))
    assert (summed, set(after.values())) == (["meta"], {"cpu"})
