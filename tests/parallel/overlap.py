"""What a rank does to show that overlapped communication changes no number; called by worker.py.

Both runs of a job live through the same: an evaluation before anything is stepped, steps, a step that is not finite
and is left out, an evaluation between steps, and a save. The second one overlaps, in small buckets, and at the worst
of times: a bucket is gathered no earlier than somebody waits for it, so weights that are read without waiting are old;
and reduced at once when its gradients are said to be ready, so what comes later is missing. With several chunks a rank
it also frees what it has sent, as with NCCL, where Megatron-Core can do both.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_depthattn.config import RunConfig, validate
from megatron_depthattn.parallel.schedule import INTERLEAVED_WAITS_FOR_SENDS
from megatron_depthattn.train.build import Chunks, Fp8State, build_model, build_optimizer, finish_param_gather
from megatron_depthattn.train.step import Microbatch, evaluation_mode, run_microbatches, train_step
from megatron_depthattn.train.step_folders import Progress
from tests.checkpoints import load_checkpoint, save_checkpoint
from tests.parallel.cases import SEQUENCE_LENGTH, TRAIN, Job

BUCKET_SIZE = 20_000
BROKEN_STEP, STEPS_BEFORE_SAVE, STEPS = 2, 3, 5
SHAPE = (TRAIN.micro_batch_size, SEQUENCE_LENGTH)
Group = param_and_grad_buffer._ParamAndGradBucketGroup


def compare(job: Job, folder: Path, device: torch.device, microbatches: Callable[[int], list[Microbatch]]) -> Any:
    """Losses and norms of the run without overlap and of the one with it, and how many weights differ at the end."""
    config = job.config()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, fused_gradient_accumulation=job.loops == 1),
        optimizer=dataclasses.replace(config.optimizer, grad_clip=job.grad_clip),
    )
    validate(config, dist.get_world_size(), needs_data=False)
    plain = _Run(config, device, microbatches)
    plain.begin()
    plain.end()
    overlap = dataclasses.replace(config.parallel, overlap_grad_reduce=True, overlap_param_gather=True)
    with worst_timing(), contextlib.ExitStack() as stack:
        overlapped = _Run(dataclasses.replace(config, parallel=overlap), device, microbatches)
        if config.parallel.virtual_pipeline > 1 and INTERLEAVED_WAITS_FOR_SENDS:
            stack.enter_context(_freed_messages(overlapped.chunks))
        with MISTAKES[job.sabotage](overlapped.chunks) if job.sabotage in MISTAKES else contextlib.nullcontext():
            overlapped.begin()
            saved = overlapped.save(folder / job.name)
            overlapped.end()
    resumed = _Run(config, device, microbatches)
    load_checkpoint(saved, resumed.chunks, resumed.optimizer, resumed.scheduler)
    resumed.end()
    return {
        "buckets": sum(len(chunk.bucket_groups) for chunk in overlapped.chunks),
        "plain": {"losses": plain.losses, "grad_norms": plain.grad_norms},
        "overlapped": {"losses": overlapped.losses, "grad_norms": overlapped.grad_norms},
        "resumed": {"losses": resumed.losses, "grad_norms": resumed.grad_norms},
        "different": {
            "overlapped": _differing(plain.chunks, overlapped.chunks),
            "resumed": _differing(overlapped.chunks, resumed.chunks),
        },
    }


class _Run:
    def __init__(
        self, config: RunConfig, device: torch.device, microbatches: Callable[[int], list[Microbatch]]
    ) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self._microbatches = microbatches
        self.chunks = build_model(config, device, bucket_size=BUCKET_SIZE)
        self.optimizer, self.scheduler = build_optimizer(config, self.chunks)
        self._fp8 = Fp8State(self.chunks)

    def begin(self) -> None:
        self._evaluate()
        for step in range(STEPS_BEFORE_SAVE):
            self._step(step)
        self._evaluate()

    def save(self, folder: Path) -> Path:
        self._step(STEPS_BEFORE_SAVE)  # so that no forward has gathered what is saved
        return save_checkpoint(folder, Progress(), self.chunks, self.optimizer, self.scheduler, config={})

    def end(self) -> None:
        """From where `save` has left off; a run that did not save takes its step here."""
        if self.scheduler.num_steps == STEPS_BEFORE_SAVE:
            self._step(STEPS_BEFORE_SAVE)
        for step in range(STEPS_BEFORE_SAVE + 1, STEPS):
            self._step(step)

    def _evaluate(self) -> None:
        with evaluation_mode(self.chunks), self._fp8.untouched():
            self.losses.append(run_microbatches(self.chunks, self._microbatches(STEPS), SHAPE, forward_only=True))

    def _step(self, step: int) -> None:
        self.scheduler.step(1)
        with _overflow(self.chunks[-1]) if step == BROKEN_STEP else contextlib.nullcontext():
            done = train_step(self.chunks, self.optimizer, self._microbatches(step), SHAPE, self._fp8)
        assert done.skipped == (step == BROKEN_STEP)
        if not done.skipped:
            self.losses.append(done.loss)
            self.grad_norms.append(done.grad_norm)


@contextlib.contextmanager
def _overflow(chunk: torch.nn.Module) -> Iterator[None]:
    """On the last data-parallel rank whatever the last chunk puts out is infinite."""
    is_last = parallel_state.get_data_parallel_rank() == parallel_state.get_data_parallel_world_size() - 1
    hook = chunk.register_forward_hook(lambda _, __, output: output * float("inf") if is_last else None)
    yield
    hook.remove()


@torch.no_grad()
def _differing(one: Chunks, other: Chunks) -> int:
    """On all ranks together: parameters that are not equal to the last bit."""
    finish_param_gather(one)
    finish_param_gather(other)
    count = torch.zeros(1)
    for ours, theirs in zip(one, other, strict=True):
        mine, yours = dict(ours.named_parameters()), dict(theirs.named_parameters())
        assert mine.keys() == yours.keys()
        count += sum(not torch.equal(mine[name], yours[name]) for name in mine)
    dist.all_reduce(count)
    return int(count)


# ---- the worst of times


class _Done:
    def wait(self) -> None: ...


class _Late:
    def __init__(self, group: Any, gather: Callable[..., None]) -> None:
        self._group, self._gather = group, gather

    def wait(self) -> None:
        self._group.param_gather_handle = None
        self._gather(self._group, force_sync=True)


@contextlib.contextmanager
def worst_timing() -> Iterator[None]:
    """Gathers happen when they are waited for, reductions when they are started."""
    gather, reduce = Group.start_param_sync, Group.start_grad_sync

    def late(self: Any, force_sync: bool = False) -> None:
        if force_sync:
            gather(self, force_sync=True)
            return
        assert self.param_gather_handle is None
        self.param_gather_handle, self.param_gather_dispatched = _Late(self, gather), True

    def early(self: Any, **arguments: Any) -> None:
        reduce(self, **arguments)
        self.grad_reduce_handle.wait()
        self.grad_reduce_handle = _Done()

    with mock.patch.object(Group, "start_param_sync", late), mock.patch.object(Group, "start_grad_sync", early):
        yield


@contextlib.contextmanager
def _freed_messages(chunks: Chunks) -> Iterator[None]:
    """Outputs are freed when they are sent; copies travel, for gloo holds no more than a pointer to what it sends."""
    config, send = get_model_config(chunks[0]), dist.isend
    assert not config.deallocate_pipeline_outputs
    config.deallocate_pipeline_outputs = True
    sent = mock.patch.object(dist, "isend", lambda tensor, **arguments: send(tensor.clone(), **arguments))
    with sent, mock.patch.object(dist, "get_backend", return_value="nccl"):
        yield


# ---- deliberate mistakes


@contextlib.contextmanager
def _not_waited_for(chunks: Chunks) -> Iterator[None]:
    for chunk in chunks:
        chunk.disable_forward_pre_hook(param_sync=False)
    yield


def _reduced_with_the_first_gradient(_: Chunks) -> Any:
    """A bucket counts as ready when one of its parameters is."""

    def ready(self: Any, param: Tensor, *_: Any) -> None:
        if not self.is_last_microbatch:
            return
        if not self.per_param_grad_ready_counts:
            self.start_grad_sync()
        self.per_param_grad_ready_counts |= {param: 1}

    return mock.patch.object(Group, "register_grad_ready", ready)


MISTAKES: dict[str, Callable[[Chunks], Any]] = {
    "weights_not_waited_for": _not_waited_for,
    "reduced_with_the_first_gradient": _reduced_with_the_first_gradient,
}
