"""What the training loop needs of an engine, and what all engines have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging

from megatron_depthattn.config import RunConfig, to_dict
from megatron_depthattn.train.checkpoint import EngineState, Loaded, checkpoint_state, load_checkpoint
from megatron_depthattn.train.step import Microbatch, Status, StepResult


class Engine(ABC):
    """Owns model, gradients, optimizer and schedule. Every method is called on all ranks."""

    _config: RunConfig
    _state: EngineState
    _scheduler: OptimizerParamScheduler

    def describe(self) -> list[str]:
        """Lines for the log."""
        return []

    def advance_schedule(self) -> None:
        """Set the learning rate of the next step."""
        self._scheduler.step(increment=1)

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
    def loss(self, microbatches: Sequence[Microbatch]) -> float:
        """Mean loss per token over a global batch, without gradients."""

    def checkpoint_state(self, **more: Any) -> dict[str, Any]:
        """What `CheckpointSaver.save` writes; ``more`` as in `checkpoint.checkpoint_state`."""
        return checkpoint_state(self._state, self._scheduler, config=to_dict(self._config), **more)

    def load(self, folder: Path) -> Loaded:
        """Resume from a step folder of any engine and layout; see `checkpoint.load_checkpoint`."""
        return load_checkpoint(folder, self._state, self._scheduler, config=to_dict(self._config))
