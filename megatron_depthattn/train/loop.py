"""The training run: `train` is the table of contents."""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from megatron_depthattn.config import RunConfig, to_dict, validate
from megatron_depthattn.model.transformer_config import DepthAttentionConfig
from megatron_depthattn.parallel.agreement import check_same_on_all_ranks
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
from megatron_depthattn.parallel.launch_env import LaunchEnvironment
from megatron_depthattn.train.build import Chunks, build_model, build_optimizer, transformer_config
from megatron_depthattn.train.checkpoint import changed_function, load_checkpoint, save_checkpoint
from megatron_depthattn.train.data import GlobalBatches
from megatron_depthattn.train.metrics import Meter, forward_flops
from megatron_depthattn.train.report import Reporter
from megatron_depthattn.train.step import NonFiniteError, run_microbatches, train_step
from megatron_depthattn.train.step_folders import LATEST, Progress, resolve_checkpoint
from megatron_depthattn.train.summary import Cost, opening_lines


def train(config: RunConfig, environment: LaunchEnvironment) -> None:
    """Train as ``config`` says, from scratch or from a checkpoint, to the end or to ``train.stop_after``.

    Raises:
        ValueError: the config cannot run here; says what to set.
        NonFiniteError: loss or gradient stopped being finite; the last checkpoint is untouched.
    """
    sizes = validate(config, environment.world_size)
    device = initialize_distributed(environment)
    _initialize_layout(config)
    megatron = transformer_config(config)
    _check_agreement(config, megatron)
    resume_from = _starting_point(config)

    chunks = build_model(config, device)
    optimizer, scheduler = build_optimizer(config, chunks)
    progress = Progress()
    if resume_from:
        progress = load_checkpoint(resume_from, chunks, optimizer, scheduler, config=to_dict(config))
    last_step = _last_step(config, progress)
    batches = GlobalBatches(config, sizes, device, split="train", consumed_samples=progress.consumed_samples)
    held_out = GlobalBatches(config, sizes, device, split="val") if config.train.eval_interval else None

    flops = forward_flops(config, megatron)
    meter = Meter(config, flops, environment.world_size)
    report = Reporter(config, is_writer=environment.rank == 0, first_step=progress.step, last_step=last_step)
    start = f"{resume_from}, at step {progress.step}" if resume_from else "from initial weights"
    report.lines(opening_lines(config, megatron, flops, environment.world_size, start))
    report.lines(changed_function(resume_from, to_dict(config)) if resume_from else [])
    cost = Cost()
    if held_out and progress.step == 0:
        cost.add_held_out(0, evaluate(config, chunks, held_out))

    while progress.step < last_step:
        started, waited = time.monotonic(), batches.data_seconds
        scheduler.step(increment=1)
        result = train_step(chunks, optimizer, batches.next(), _microbatch_shape(config))
        progress = _advance(progress, config)
        if device.type == "cuda":
            torch.cuda.synchronize()  # the optimizer's kernels belong to this step
        seconds = time.monotonic() - started
        cost.add_step(seconds)
        lr = get_canonical_lr_for_logging(optimizer.param_groups)
        metrics = meter.record(progress, result, lr=lr, seconds=seconds, data_seconds=batches.data_seconds - waited)
        if held_out and (_is_due(progress, config.train.eval_interval) or progress.step == last_step):
            metrics["eval_loss"] = evaluate(config, chunks, held_out)
            cost.add_held_out(progress.step, metrics["eval_loss"])
        report.step(metrics)
        if _is_due(progress, config.checkpoint.interval) or progress.step == last_step:
            keep = config.checkpoint.keep
            directory = Path(config.checkpoint_dir)
            folder = save_checkpoint(
                directory, progress, chunks, optimizer, scheduler, config=to_dict(config), keep=keep
            )
            report.lines([f"saved {folder}"])

    report.lines(cost.closing_lines(config, progress, environment.world_size))
    for source in (batches, held_out):
        if source:
            source.close()
    report.close()
    shut_down()


@torch.no_grad()
def evaluate(config: RunConfig, chunks: Chunks, held_out: GlobalBatches) -> float:
    """Mean loss in nats per token over the first ``train.eval_batches`` global batches of the val split."""
    num_batches = max(1, min(config.train.eval_batches, held_out.num_samples // config.train.global_batch_size))
    held_out.seek(0)
    for chunk in chunks:
        chunk.eval()
    losses = [
        run_microbatches(chunks, held_out.next(), _microbatch_shape(config), forward_only=True)
        for _ in range(num_batches)
    ]
    for chunk in chunks:
        chunk.train()
    loss = sum(losses) / num_batches
    if not math.isfinite(loss):
        raise NonFiniteError(f"held-out loss {loss} is not finite; the last checkpoint is untouched")
    return loss


def _initialize_layout(config: RunConfig) -> None:
    parallel = config.parallel
    initialize_model_parallel(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        seed=config.run.seed,
    )


def _starting_point(config: RunConfig) -> Path | None:
    """The checkpoint to start from, as rank 0 sees the folder: all ranks must start from the same step.

    Raises:
        ValueError: on all ranks, if there is no such checkpoint, or if the run would overwrite another one.
    """
    found: list[Path | ValueError | None] = [None]
    if dist.get_rank() == 0:
        try:
            found[0] = _find_checkpoint(config)
        except ValueError as error:
            found[0] = error
    dist.broadcast_object_list(found)
    if isinstance(found[0], ValueError):
        raise found[0]
    return found[0]


def _find_checkpoint(config: RunConfig) -> Path | None:
    checkpoints = Path(config.checkpoint_dir)
    folder = resolve_checkpoint(config.checkpoint.load, checkpoints)
    continues = folder is not None and folder.resolve().parent == checkpoints.resolve()
    if (checkpoints / LATEST).exists() and not continues:
        raise ValueError(
            f"{checkpoints} holds the checkpoints of a run that would be overwritten: set checkpoint.load=latest to "
            "continue it, or another run.dir."
        )
    return folder


def _check_agreement(config: RunConfig, megatron: DepthAttentionConfig) -> None:
    settings = json.dumps(to_dict(config), sort_keys=True)
    check_same_on_all_ranks("run configs", hashlib.sha256(settings.encode()).hexdigest()[:16])
    if megatron.depth_attention:
        check_same_on_all_ranks("source plans", megatron.source_plan.digest())


def _last_step(config: RunConfig, progress: Progress) -> int:
    """The step after which this process stops."""
    if config.train.stop_after is None:
        return max(config.train.steps, progress.step)
    return min(config.train.steps, progress.step + config.train.stop_after)


def _is_due(progress: Progress, interval: int | None) -> bool:
    return interval is not None and progress.step % interval == 0


def _microbatch_shape(config: RunConfig) -> tuple[int, int]:
    return config.train.micro_batch_size, config.data.sequence_length


def _advance(progress: Progress, config: RunConfig) -> Progress:
    samples = config.train.global_batch_size
    return Progress(
        step=progress.step + 1,
        consumed_samples=progress.consumed_samples + samples,
        consumed_tokens=progress.consumed_tokens + samples * config.data.sequence_length,
    )
