"""Megatron's own engine, and the one place that chooses an engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_depthattn.config import RunConfig
from megatron_depthattn.ops.triton_mix import triton_refusal
from megatron_depthattn.parallel.launch_env import LaunchEnvironment
from megatron_depthattn.train.base_engine import Engine
from megatron_depthattn.train.build import build_model, build_optimizer
from megatron_depthattn.train.checkpoint import Loaded
from megatron_depthattn.train.fp8_state import Fp8State
from megatron_depthattn.train.megatron_state import MegatronState
from megatron_depthattn.train.step import Microbatch, Status, StepResult, evaluation_mode, run_microbatches, train_step


def build_engine(config: RunConfig, device: torch.device, environment: LaunchEnvironment) -> Engine:
    """The engine that ``engine.name`` names, with initial weights; call after the process groups are there.

    Raises:
        ValueError: DeepSpeed is not installed, no launcher started this process, or the mix's op cannot run on this
            device.
    """
    mixes = config.model.effective_method == "depth_attention"
    if mixes and config.model.depth_attention.op == "triton" and (reason := triton_refusal(device)):
        raise ValueError(f"model.depth_attention.op=triton {reason}")
    if config.engine.name == "megatron":
        return MegatronEngine(config, device)
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "engine.name=deepspeed, but DeepSpeed is not installed: pip install 'megatron-depthattn[deepspeed]', or "
            "set engine.name=megatron"
        )
    if not environment.launched:
        raise ValueError(
            "engine.name=deepspeed in a process that no launcher started: DeepSpeed reads the launcher's LOCAL_RANK; "
            "start it with torchrun --standalone --nproc_per_node 1 -m megatron_depthattn.train ..."
        )
    from megatron_depthattn.train.deepspeed_engine.engine import DeepSpeedEngine

    return DeepSpeedEngine(config, device)


class MegatronEngine(Engine):
    """Megatron's schedules, data-parallel wrapper and distributed optimizer."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._config = config
        self._shape = (config.train.micro_batch_size, config.data.sequence_length)
        self._chunks = build_model(config, device)
        self._optimizer, self._scheduler = build_optimizer(config, self._chunks)
        self._state = MegatronState(self._chunks, self._optimizer)
        self._fp8 = Fp8State(self._chunks if config.precision.fp8 == "delayed" else ())

    def train_step(self, microbatches: Sequence[Microbatch], status: Status = tuple) -> StepResult:
        return train_step(self._chunks, self._optimizer, microbatches, self._shape, self._fp8, status)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with evaluation_mode(self._chunks), self._fp8.untouched():
            yield

    def loss(self, microbatches: Sequence[Microbatch]) -> float:
        return run_microbatches(self._chunks, microbatches, self._shape, forward_only=True)

    def load(self, folder: Path) -> Loaded:
        self._fp8.reset()  # of the initial weights; a checkpoint of a run in FP8 brings its own
        return super().load(folder)
