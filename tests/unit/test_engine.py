"""Which engine is built, and what is said where it cannot be; what the engines compute is in tests/parallel."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

from megatron_depthattn.config import EngineConfig, RunConfig
from megatron_depthattn.parallel.launch_env import LaunchEnvironment

DEEPSPEED = dataclasses.replace(RunConfig(), engine=EngineConfig(name="deepspeed"))
LAUNCHED = LaunchEnvironment(rank=0, world_size=1, local_rank=0, launched=True)


def build(environment: LaunchEnvironment = LAUNCHED):
    from megatron_depthattn.train.engine import build_engine

    return build_engine(DEEPSPEED, torch.device("cpu"), environment)


def test_deepspeed_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"DeepSpeed is not installed: pip install 'megatron-depthattn\[deepspeed\]'"):
        build()


def test_deepspeed_without_a_launcher():
    with pytest.raises(ValueError, match="start it with torchrun --standalone --nproc_per_node 1 -m megatron_depth"):
        build(LAUNCHED._replace(launched=False))


def test_deepspeed_that_cannot_build_itself(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"without a GPU needs ninja and a C\+\+ compiler on PATH"):
        build()
