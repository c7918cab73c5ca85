"""One rank of a world that works off jobs of the DeepSpeed campaign; started by launch.py.

    python -m tests.parallel.deepspeed_worker FOLDER JOBS.json

Results, errors and rounds as in worker.py.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_depthattn.config import to_dict, validate
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.train.build import build_model, transformer_config
from megatron_depthattn.train.loop import build_engine
from megatron_depthattn.train.metrics import DepthRecord
from megatron_depthattn.train.non_finite import Attempt
from megatron_depthattn.train.save import CheckpointSaver
from megatron_depthattn.train.step import Microbatch, finish_attempt, run_microbatches
from megatron_depthattn.train.step_folders import Progress, step_folder
from tests.checkpoints import save_checkpoint
from tests.megatron_weights import leave_initial_values
from tests.parallel import worker
from tests.parallel.cases import METHODS, NO_GRADIENT, RAMP, SEQUENCE_LENGTH, TRAIN
from tests.parallel.compare import relative_errors
from tests.parallel.deepspeed_cases import SAVE_AFTER, STEPS, Job
from tests.parallel.worker import gather_gradients, progress_after, whole, work_off


def main(folder: Path, jobs: list[Job]) -> None:
    def do(job: Job, device: torch.device) -> dict[str, Any]:
        with SABOTAGES[job.sabotage]():
            return work(job, folder, device)

    work_off(folder, jobs, do)


def work(job: Job, folder: Path, device: torch.device) -> dict[str, Any]:
    """Losses and gradient norms of ten steps and, from the initial weights, the first step's gradients."""
    config = job.config()
    validate(config, dist.get_world_size(), needs_data=False)
    result: dict[str, Any] = {"losses": [], "grad_norms": [], "learning_rates": []}
    if job == job.reference:
        save_gradients(job, folder, device)
    engine = build_engine(config, device, launch_environment())
    if job.method in METHODS:
        engine.load(step_folder(folder / weights_of(job), 0))
    depth = DepthRecord(config.train, transformer_config(config), config.data.sequence_length)
    first = 0
    if job.resume:
        step = engine.load(step_folder(folder / job.resume, SAVE_AFTER), is_parent=job.branch).progress.step
        assert step == (0 if job.branch else SAVE_AFTER)
        first = SAVE_AFTER
        for _ in range(first - step):
            engine.advance_schedule(TRAIN.global_batch_size)
    elif job.engine == "deepspeed":
        result |= compare_gradients(job, folder, engine)
    for step in range(first, STEPS):
        batch_size = RAMP[step] if job.ramp else TRAIN.global_batch_size
        engine.advance_schedule(batch_size)
        if job.poison and step == SAVE_AFTER:
            result |= poisoned_step(engine, job)
        with depth.recording(step + 1):
            done = engine.train_step(microbatches(job, step, batch_size))
        assert not done.skipped
        result["depth"] = result.get("depth") or depth.collect()
        result["losses"].append(done.loss)
        result["grad_norms"].append(done.grad_norm)
        result["learning_rates"].append(engine.learning_rate)
        if job.save and step + 1 == SAVE_AFTER:
            saver = CheckpointSaver(folder / job.name)
            saver.save(progress_after(SAVE_AFTER), engine.checkpoint_state(run_id="campaign", corpus="none"))
            outcome = saver.take_outcome()
            assert outcome is not None and outcome.error is None, outcome
    with engine.evaluating():
        result["held_out"] = engine.loss(microbatches(job, 1000)).mean
    return result


def microbatches(job: Job, step: int, batch_size: int = TRAIN.global_batch_size) -> list[Microbatch]:
    """The parity campaign's, in micro-batches of this job."""
    return worker.microbatches(step, batch_size, job.rows, job.documents, job.alone)


# ---- gradients


def save_gradients(job: Job, folder: Path, device: torch.device) -> None:
    """The reference's first gradients, by a model of its own, and the weights with which runs of a method begin."""
    chunks = build_model(job.config(), device)
    if job.method in METHODS:
        leave_initial_values(chunks[0])
        save_checkpoint(folder / weights_of(job), Progress(), chunks, None, None, config=to_dict(job.config()))
    run_microbatches(chunks, microbatches(job, 0), (job.rows, SEQUENCE_LENGTH), forward_only=False)
    gathered = gather_gradients(chunks)
    assert gathered is not None
    torch.save(gathered[0], folder / f"{job.name}.pt")


def weights_of(job: Job) -> str:
    """The folder of the weights with which all runs of the job's method begin; without an optimizer."""
    return f"weights-of-{job.reference.name}"


def compare_gradients(job: Job, folder: Path, engine: Any) -> dict[str, Any]:
    """Relative error of every parameter's whole gradient, put together from every rank's shards."""
    engine.attempt(microbatches(job, 0))
    mine = {
        shard.name: (shard.start, engine.shards.gradient(shard).clone().cpu(), split_dimension(shard.parameter))
        for shard in engine.shards.held
    }
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.model.named_parameters()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(
        (parallel_state.get_tensor_model_parallel_rank(), mine), gathered if dist.get_rank() == 0 else None
    )
    if dist.get_rank() > 0:
        return {}
    pieces: dict[str, dict[int, tuple[Tensor, int]]] = {name: {} for name in shapes}
    for tensor_rank, gradients in gathered:
        for name, (start, gradient, split) in gradients.items():
            rank = tensor_rank if split >= 0 else 0  # copies of one gradient: the last written stands for all
            share, _ = pieces[name].setdefault(rank, (torch.full(shapes[name], torch.nan), split))
            share.view(-1)[start : start + gradient.numel()] = gradient
    wholes = {name: whole(name, by_rank) for name, by_rank in pieces.items()}
    references = torch.load(folder / f"{job.reference.name}.pt")
    for name in [name for name in references if name.startswith(NO_GRADIENT)]:
        largest = max(float(gradient.norm()) for gradient in references.values())
        assert max(float(side.pop(name).norm()) for side in (wholes, references)) < 1e-6 * largest, name
    return {"gradient_errors": relative_errors(wholes, references)}


def split_dimension(parameter: Any) -> int:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else -1


# ---- a step that is not finite


def poisoned_step(engine: Any, job: Job) -> dict[str, Any]:
    """A step with a NaN from one rank's layer: what was said, and whether anything changed."""
    layer = engine.model.decoder.layers[1]
    is_blamed = dist.get_rank() == dist.get_world_size() - 1

    def poison(_: Any, __: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return output[0] * torch.nan, output[1]

    before = state_of(engine)
    hook = layer.mlp.linear_fc2.register_forward_hook(poison) if is_blamed else None
    skipped = engine.train_step(microbatches(job, 500))
    if hook:
        hook.remove()
    unchanged = [torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (skipped.skipped, all(unchanged), list(skipped.diagnosis)))
    return {"poisoned": everyone}


def state_of(engine: Any) -> list[Tensor]:
    """Copies of every weight as the model computes with it, and of everything that the optimizer holds here."""
    weights = [getattr(parameter, "ds_tensor", parameter).detach().clone() for parameter in engine.model.parameters()]
    states = [
        engine.shards.read(shard, state).clone()
        for shard in engine.shards.held
        for state in ("param", "exp_avg", "exp_avg_sq")
    ]
    return [*weights, *states, torch.tensor(engine.shards.num_steps)]


# ---- deliberate mistakes

ENGINE = "megatron_depthattn.train.deepspeed_engine.engine"
SHARDS = "megatron_depthattn.train.deepspeed_engine.shards"


def _last_microbatch_only() -> Any:
    """The boundary after every microbatch that gradient_accumulation_steps=1 would mean."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    return mock.patch.object(DeepSpeedEngine, "set_gradient_accumulation_boundary", return_value=None)


def _own_norm(losses: Any, squared_norm: torch.Tensor, status: Any) -> Attempt:
    attempt = finish_attempt(losses, squared_norm, status)
    dist.all_reduce(squared_norm, group=parallel_state.get_data_parallel_group())
    return attempt._replace(grad_norm=float(squared_norm.sqrt()))


def _constant_divisor() -> Any:
    """Of the positions, whatever is on them."""
    from megatron_depthattn.train.deepspeed_engine.engine import DeepSpeedEngine

    right = DeepSpeedEngine._loss_scale
    return mock.patch.object(DeepSpeedEngine, "_loss_scale", lambda self, given: right(self, [{}] * len(given)))


SABOTAGES: dict[str, Any] = {
    "": contextlib.nullcontext,
    "constant_divisor": _constant_divisor,
    "norms_not_reduced": lambda: mock.patch(f"{ENGINE}.sum_over_tensor_ranks", return_value=None),
    "last_microbatch_only": _last_microbatch_only,
    "norm_of_own_tensor_rank": lambda: mock.patch(f"{ENGINE}.finish_attempt", _own_norm),
    "norm_counts_copies": lambda: mock.patch(f"{SHARDS}.param_is_not_tensor_parallel_duplicate", return_value=True),
    "not_clipped": lambda: mock.patch(f"{ENGINE}.clip", return_value=None),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Job(**job) for job in json.loads(Path(sys.argv[2]).read_text())])
