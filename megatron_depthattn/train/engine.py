"""What the training loop needs of an engine, what all engines have in common, and Megatron's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging

from megatron_depthattn.config import RunConfig, to_dict
from megatron_depthattn.train.build import Fp8State, build_model, build_optimizer
from megatron_depthattn.train.checkpoint import EngineState, Loaded, checkpoint_state, load_checkpoint
from megatron_depthattn.train.megatron_state import MegatronState
from megatron_depthattn.train.step import (
    BatchLoss,
    Microbatch,
    Status,
    StepResult,
    evaluate,
    evaluation_mode,
    train_step,
)


class Engine(ABC):
    """Owns model, gradients, optimizer and schedule. Every method is called on all ranks."""

    _config: RunConfig
    _state: EngineState
    _scheduler: OptimizerParamScheduler

    def describe(self) -> list[str]:
        """Lines for the log."""
        return []

    def advance_schedule(self, batch_size: int) -> None:
        """Set the learning rate of the next step, which has so many samples."""
        self._scheduler.step(increment=batch_size if self._config.train.batch_ramp else 1)

    @property
    def learning_rate(self) -> float:
        """Of the next step, or of the one just taken."""
        return get_canonical_lr_for_logging(self._scheduler.optimizer.param_groups)

    @abstractmethod
    def train_step(self, microbatches: Sequence[Microbatch], status: Status = tuple) -> StepResult:
        """One optimizer step, or none if loss or gradient is not finite; see `step.train_step`."""

    @abstractmethod
    def evaluating(self) -> AbstractContextManager[None]:
        """A context in which `loss` is called."""

    @abstractmethod
    def loss(self, microbatches: Sequence[Microbatch]) -> BatchLoss:
        """The loss over a global batch, without gradients."""

    def checkpoint_state(self, **more: Any) -> dict[str, Any]:
        """What `CheckpointSaver.save` writes; ``more`` as in `checkpoint.checkpoint_state`."""
        return checkpoint_state(self._state, self._scheduler, config=to_dict(self._config), **more)

    def load(self, folder: Path, *, is_parent: bool = False) -> Loaded:
        """Resume, or begin, from a step folder of any engine and layout; see `checkpoint.load_checkpoint`."""
        return load_checkpoint(folder, self._state, self._scheduler, config=to_dict(self._config), is_parent=is_parent)


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

    def loss(self, microbatches: Sequence[Microbatch]) -> BatchLoss:
        return evaluate(self._chunks, microbatches, self._shape)

    def load(self, folder: Path, *, is_parent: bool = False) -> Loaded:
        self._fp8.reset()  # of the initial weights; a checkpoint of a run in FP8 brings its own
        return super().load(folder, is_parent=is_parent)
