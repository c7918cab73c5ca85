"""A run's numbers: those of each step, and what it says when it starts and when it ends."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_depthattn.config import RunConfig, TrainConfig
from megatron_depthattn.config.pipeline import chunk_layers, is_even
from megatron_depthattn.config.schedule import schedule_lines
from megatron_depthattn.estimate.counts import PEAK_TFLOPS_BF16, decoder_shape, forward_flops
from megatron_depthattn.model.depth_weights import COLUMNS_BEFORE_WEIGHTS, DepthRecorder
from megatron_depthattn.model.flops import ForwardFlops
from megatron_depthattn.model.transformer_config import DepthAttentionConfig
from megatron_depthattn.train.history import DELIBERATE
from megatron_depthattn.train.step import RankStatus, StepResult
from megatron_depthattn.train.step_folders import Progress

MAX_POSITIONS = 256
"""Positions looked at of each sequence of a replica's first micro-batch, evenly spaced."""
COLLAPSED = 0.95
"""A key/value head has collapsed if the largest of its weights is at least this, in the mean over the tokens."""
DIGITS = 6
"""Decimals on record."""


def peak_tflops(config: RunConfig) -> float | None:
    """What MFU is a fraction of: the peak of this process's device; None for a device or precision that has none."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peaks = PEAK_TFLOPS_BF16 if config.precision.dtype == "bf16" else {}
    return next((peak for part, peak in peaks.items() if part in name), None)


def peak_memory_gb() -> float:
    """Most memory this process has held, in 10^9 bytes: the allocator's peak on a GPU, resident memory on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Meter:
    """Turns steps into the records of metrics.jsonl, and sums up what this process's part of the run has cost."""

    def __init__(self, config: RunConfig, world_size: int) -> None:
        self._config, self._world_size = config, world_size
        self._peak = peak_tflops(config)
        # Of a token: backward counts as two more forward passes.
        self._tflops_per_device = 3 * forward_flops(config).total / world_size / 1e12
        self._started, self._steps, self._tokens = time.monotonic(), 0, 0
        self._step_seconds = self._blocked_seconds = 0.0
        self._held_out: dict[str, list[tuple[int, float]]] = {}

    def record(
        self,
        progress: Progress,
        result: StepResult,
        *,
        samples: int,
        lr: float,
        seconds: float,
        blocked_seconds: float = 0.0,
    ) -> dict[str, Any]:
        """One line of metrics.jsonl; the loop fills in ``stream_samples``, ``eval_loss``, ``held_out`` and ``depth``.

        Memory is that of the rank that holds most of it. Loss and gradient norm are null where they are not finite.

        Args:
            progress: after the step.
            samples: of the step.
            blocked_seconds: how long the loop has waited for checkpoints since the process began.
        """
        tokens = samples * self._config.data.sequence_length
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens
        self._step_seconds += seconds
        before, self._blocked_seconds = self._blocked_seconds, blocked_seconds
        tflops = self._tflops_per_device * tokens / seconds
        ranks = [RankStatus(*status) for status in result.statuses]
        waits = [rank.data_seconds for rank in ranks]
        return {
            "step": progress.step,
            "loss": result.loss if math.isfinite(result.loss) else None,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "lr": lr,
            "tokens": progress.consumed_tokens,
            "predicted_tokens": result.tokens,
            "samples": progress.consumed_samples,
            "stream_samples": None,
            "step_seconds": seconds,
            "data_seconds": max(waits),
            "data_seconds_min": min(waits),
            "data_slowest_rank": waits.index(max(waits)),
            "tokens_per_second": tokens / seconds,
            "tflops_per_device": tflops,
            "mfu": tflops / self._peak if self._peak else None,
            "memory_gb": max(rank.memory_gb for rank in ranks),
            "checkpoint_seconds": blocked_seconds - before,
            "skipped_steps": progress.skipped_steps,
            "eval_loss": None,
            "held_out": None,
            "depth": None,
        }

    def add_held_out(self, step: int, losses: Mapping[str, float]) -> None:
        """Remember held-out losses, in nats per token, by the names of their splits."""
        for name, loss in losses.items():
            self._held_out.setdefault(name, []).append((step, loss))

    def closing_lines(self, progress: Progress, end: Mapping[str, Any]) -> list[str]:
        """What was trained, what it cost, what it brought and what to do next; ``end``: see `RunHistory.end`."""
        config = self._config
        if not self._steps and end["outcome"] in DELIBERATE:
            return [f"nothing to do: {config.run.dir} is at step {progress.step}; set train.steps higher to continue"]
        stopped = f"stopped by {end.get('signal')} at step {progress.step}"
        if not self._steps and end["outcome"] == "signal":
            return [f"{stopped}, nothing new to save: start the same command again"]
        lines = [
            f"trained {_counted(self._steps, 'step')} to step {progress.step}: {self._tokens / 1e6:.2f} M tokens on "
            f"{_counted(self._world_size, 'rank')} in {time.monotonic() - self._started:.0f} s "
            f"({self._tokens / max(self._step_seconds, 1e-9):,.0f} tokens/s in steps), "
            f"peak memory {peak_memory_gb():.2f} GB on rank 0"
        ]
        for name, losses in self._held_out.items():
            (first, before), (last, after) = losses[0], losses[-1]
            end_loss = f", {after:.4f} at step {last} (down {before - after:.2f})" if last != first else ""
            of = f" of {name}" if name else ""
            lines.append(f"held-out loss{of} in nats per token: {before:.4f} at step {first}{end_loss}")
        goodput = end["goodput"]
        lines.append(
            f"goodput: {100 * goodput['goodput']:.1f} % ({goodput['useful_seconds']:.0f} s in steps that count, of "
            f"{goodput['wall_seconds']:.0f} s over {_counted(goodput['starts'], 'start')})"
        )
        if progress.skipped_steps:
            lines.append(f"{progress.skipped_steps} steps of the run were not finite and changed nothing")
        if end["outcome"] == "signal":
            return [*lines, f"{stopped}, saved: start the same command again"]
        if end["outcome"] == "not finite":
            return lines
        return [*lines, f"record: {config.run.dir}/metrics.jsonl", "", *next_lines(config)]


def opening_lines(config: RunConfig, megatron: DepthAttentionConfig, world_size: int, start: str) -> list[str]:
    """The model, the layout, what every transfer between stages costs, the schedule, and where the run starts."""
    model, parallel = config.model, config.parallel
    loops = f" run {model.num_loops} times" if model.num_loops > 1 else ""
    sizes = ", ".join(map(str, chunk_layers(model, parallel)))
    layers = "" if is_even(parallel) else f"; layers of the chunks in model order {sizes}"
    rule = f"; loop_sources {model.depth_attention.loop_sources}" if loops and megatron.attends_over_depth else ""
    return [
        f"model: {decoder_shape(config).parameters / 1e6:.1f} M parameters, {model.num_layers} layers{loops} x "
        f"{model.hidden_size}, {model.num_attention_heads} heads / {model.num_query_groups} KV heads, "
        f"{config.precision.dtype}",
        _depth_line(megatron, forward_flops(config)) + rule,
        f"layout: {world_size} ranks = data {world_size // (parallel.tensor * parallel.pipeline * parallel.context)} x "
        f"tensor {parallel.tensor}{' (sequence parallel)' if parallel.sequence else ''} x context {parallel.context} x "
        f"pipeline {parallel.pipeline} ({_counted(parallel.virtual_pipeline, 'chunk')} a stage{layers})",
        *_transfer_lines(config, megatron),
        *schedule_lines(config),
        f"start: {start}",
    ]


def _depth_line(megatron: DepthAttentionConfig, flops: ForwardFlops) -> str:
    """What layers share and its arithmetic in one line."""
    cost = f"{100 * flops.mix / flops.total:.3f} % of the forward arithmetic"
    if definition := megatron.method_definition:
        settings = "".join(f", {key} {value}" for key, value in megatron.method_settings.items())
        return f"{definition.title}{settings}: {definition.num_parameters:,} additional parameters, {cost}"
    if not megatron.attends_over_depth:
        return "depth attention: off (vanilla)"
    plan = megatron.source_plan
    everyone = sorted({source for layer in range(plan.num_layers) for source in plan.sources(layer)})
    ablation = f"{megatron.depth_attention_weights} weights, mixes {megatron.depth_attention_mixes}, "
    return (
        f"depth attention: {'' if plan.kinds == ('key', 'value') else ablation}stride "
        f"{megatron.depth_attention_stride}, recent window {megatron.depth_attention_recent_window}; layers {everyone} "
        f"are sources; {cost}"
    )


def _transfer_lines(config: RunConfig, megatron: DepthAttentionConfig) -> list[str]:
    """For each pipeline edge the sources that cross it and the bytes of a micro-batch, one way; none for vanilla."""
    if not megatron.shares_over_layers:
        return []
    parallel = config.parallel
    positions = config.data.sequence_length // parallel.context // (parallel.tensor if parallel.sequence else 1)
    element = config.train.micro_batch_size * positions * (2 if config.precision.dtype == "bf16" else 4) / 2**20
    lines = []
    for i, edge in enumerate(megatron.source_plan.edges()):
        width = megatron.message_into(i + 1).width
        sources = f", sources of layers {list(edge)}" if edge else ""
        cost = f"{element * width:.2f} MiB a micro-batch each way ({width / megatron.hidden_size:.2f}x vanilla)"
        lines.append(f"hop {i} -> {i + 1}: {cost}{sources}")
    return lines


def next_lines(config: RunConfig) -> list[str]:
    """What to try after this run: commands that hold for its method and its folders."""
    run_dir, method = config.run.dir, config.model.effective_method
    tensorboard = Path(sys.executable).with_name("tensorboard")
    program = str(tensorboard) if tensorboard.exists() else f"{sys.executable} -m tensorboard.main"
    hints = {
        "curves": f"{program} --logdir {run_dir}",
        "export": f"depthattn convert to-hf --checkpoint {config.checkpoint_dir} --output {run_dir}/hf",
        "longer": f"train.steps={2 * config.train.steps} with the same run.dir and checkpoint.load=latest",
        "baseline": "model.method=vanilla",
    }
    if method == "vanilla":
        setting = "method=depth_attention" if config.model.method == method else "depth_attention.enabled=true"
        hints["baseline"] = f"this run; with Depth-Attention: model.{setting}"
    hints["compare"] = f"depthattn compare {run_dir} OTHER_RUN_DIR"
    if method == "depth_attention" and config.model.depth_attention.stride != 1:
        hints["denser"] = "model.depth_attention.stride=1 (every layer reads every earlier one)"
    return [
        "what to try next (one setting each; another run.dir for every run but a longer one):",
        *(f"  {name:<9} {hint}" for name, hint in hints.items()),
    ]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# ---- weights over depth


class DepthRecord:
    """What is on record of the weights over depth; every method is called on all ranks, in every step.

    Off the hot path: on steps that are not due nothing is computed and nothing is sent; on due ones each rank looks at
    a sample of its tokens, and one small collective adds up what all have seen.
    Due are the run's first step, its last, and every ``train.depth_interval``-th; never without Depth-Attention.

    Args:
        train: the run's section; which steps are due.
        megatron: the model's config; for its source plan and heads.
        sequence_length: tokens of a sample.
    """

    def __init__(self, train: TrainConfig, megatron: DepthAttentionConfig, sequence_length: int) -> None:
        self._plan = megatron.source_plan if megatron.attends_over_depth else None
        self._num_heads: int = megatron.num_query_groups
        self._interval, self._last_step = train.depth_interval, train.steps
        self._position_stride = -(-sequence_length // MAX_POSITIONS)
        self._recorder: DepthRecorder | None = None

    def recording(self, step: int) -> AbstractContextManager[None]:
        """Around the forward passes of ``step``, counted from 1."""
        is_due = self._interval is not None and (step in (1, self._last_step) or step % self._interval == 0)
        self._recorder = DepthRecorder(self._position_stride) if is_due and self._plan else None
        return self._recorder.recording() if self._recorder else nullcontext()

    def collect(self) -> dict[str, Any] | None:
        """What was recorded in the step, the mean over all data-parallel replicas, on every rank.

        Returns:
            ``tokens`` that were looked at and, by layer that has sources, means over tokens and key/value heads of the
            ``weights`` on its ``sources`` and, last, on itself, the mean ``entropy`` in nats, and the share of heads
            that have ``collapsed``. None on steps that are not due, and where a weight is not finite.
        """
        if self._recorder is None or self._plan is None:
            return None
        mixing = {i: sources for i in range(self._plan.num_layers) if (sources := self._plan.sources(i))}
        # `DepthRecorder.sums` of all layers and heads, [layers, heads, 3 + weights], summed over all ranks.
        columns = COLUMNS_BEFORE_WEIGHTS + max(map(len, mixing.values()), default=0) + 1
        shape = (self._plan.num_layers, self._num_heads, columns)
        totals = torch.zeros(shape, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
        size = parallel_state.get_tensor_model_parallel_world_size()
        first = parallel_state.get_tensor_model_parallel_rank() * self._num_heads // size
        for layer, sums in self._recorder.sums.items():
            totals[layer, first : first + sums.shape[0], : sums.shape[1]] = sums
        dist.all_reduce(totals)
        totals, self._recorder = totals.cpu(), None
        if not totals.isfinite().all():
            return None
        layers: dict[str, dict[str, Any]] = {}
        for layer, sources in mixing.items():
            means = totals[layer, :, 1:] / totals[layer, :, :1]
            entropy, *weights = means[:, [0, *range(2, 3 + len(sources))]].mean(dim=0).tolist()
            layers[str(layer)] = {
                "sources": list(sources),
                "weights": [round(weight, DIGITS) for weight in weights],
                "entropy": round(entropy, DIGITS),
                "collapsed": round(float((means[:, 1] >= COLLAPSED).double().mean()), DIGITS),
            }
        # Ranks that share a key/value head have seen the same tokens.
        copies = max(1, size // self._num_heads)
        return {"tokens": round(float(totals[:, 0, 0].max())) // copies, "layers": layers}
