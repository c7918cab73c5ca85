"""One training run of the precision protocol: bytes as tokens, a loop over `train_step`, export and evaluation."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_depthattn.data.documents import BUILTIN_STDLIB, corpus_files

if TYPE_CHECKING:
    from megatron_depthattn.config import RunConfig
    from megatron_depthattn.train.build import Chunks
    from megatron_depthattn.train.step import Microbatch

HELD_OUT_EVERY = 20
"""Of so many files, one is held out."""


class ByteStream:
    """The Python standard library's source files, a byte a token: real text that every machine has."""

    def __init__(self) -> None:
        files = [file.path.read_bytes() for file in corpus_files([BUILTIN_STDLIB])]
        held_out = files[::HELD_OUT_EVERY]
        train = [file for number, file in enumerate(files) if number % HELD_OUT_EVERY]
        self._train, self._held_out = (np.frombuffer(b"".join(part), np.uint8) for part in (train, held_out))
        self.digest = hashlib.sha256(b"".join(files)).hexdigest()[:16]

    def batch(self, config: RunConfig, device: torch.device, *, seed: int, step: int) -> list[Microbatch]:
        """Microbatches of one step: sequences that begin anywhere in the training part, by seed and step alone."""
        draws = np.random.default_rng([seed, step])
        length = config.data.sequence_length
        starts = draws.integers(len(self._train) - length, size=config.train.global_batch_size)
        return _microbatches(self._train, starts, config, device)

    def held_out(self, config: RunConfig, device: torch.device) -> list[list[Microbatch]]:
        """``train.eval_batches`` global batches, spread evenly over the held-out part."""
        sequences = config.train.eval_batches * config.train.global_batch_size
        starts = np.linspace(0, len(self._held_out) - config.data.sequence_length - 1, sequences).astype(int)
        batches = starts.reshape(config.train.eval_batches, -1)
        return [_microbatches(self._held_out, starts, config, device) for starts in batches]


def _microbatches(tokens: np.ndarray, starts: np.ndarray, config: RunConfig, device: torch.device) -> list[Microbatch]:
    length = config.data.sequence_length
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    parts = torch.from_numpy(rows).to(device).split(config.train.micro_batch_size)
    return [{"tokens": part[:, :-1].contiguous(), "labels": part[:, 1:].contiguous()} for part in parts]


@dataclass
class Run:
    """What one run leaves. Losses are in nats per token."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    held_out: float | None = None
    """In training precision, after the last step."""
    exported: float | None = None
    """Of the exported model, loaded and evaluated in bf16."""
    failure: str | None = None
    """Why the run did not reach its end."""
    gradient: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step, by parameter."""


def run(config: RunConfig, stream: ByteStream, device: torch.device, *, seed: int) -> Run:
    """Train from initial weights; a run that cannot be built or stops being finite says so in its ``failure``.

    Args:
        seed: of the batches; that of the weights is ``run.seed``.
    """
    result = Run()
    chunks: Chunks = []
    try:
        chunks = _train(config, stream, device, seed, result)
        if result.failure is None:
            result.held_out = _held_out_loss(config, stream, device, chunks)
            result.exported = _exported_loss(config, stream, device, chunks) if can_export() else None
    except (RuntimeError, ValueError, ImportError, AssertionError) as error:  # out of memory, or what a library refuses
        result.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    del chunks
    _forget(device)
    return result


def can_export() -> bool:
    """Whether there are transformers to load an exported model with."""
    return importlib.util.find_spec("transformers") is not None


def _train(config: RunConfig, stream: ByteStream, device: torch.device, seed: int, result: Run) -> Chunks:
    from megatron_depthattn.train.build import build_model, build_optimizer
    from megatron_depthattn.train.step import train_step

    chunks = build_model(config, device)
    optimizer, schedule = build_optimizer(config, chunks)
    shape = (config.train.micro_batch_size, config.data.sequence_length)
    for step in range(config.train.steps):
        schedule.step(increment=1)
        taken = train_step(chunks, optimizer, stream.batch(config, device, seed=seed, step=step), shape)
        if taken.skipped:
            result.failure = f"step {step + 1}: {taken.diagnosis[0]}"
            break
        result.losses.append(taken.loss)
        result.grad_norms.append(taken.grad_norm)
        if step == 0:
            result.gradient = _gradient(chunks)
    return chunks


def _gradient(chunks: Chunks) -> dict[str, Tensor]:
    """What the step left in the gradient buffers: fp32; a factor that clipping may have left in is in no cosine."""
    from megatron.core.utils import unwrap_model

    (model,) = unwrap_model(chunks)
    return {name: parameter.main_grad.detach().clone() for name, parameter in model.named_parameters()}


def _held_out_loss(config: RunConfig, stream: ByteStream, device: torch.device, chunks: Chunks) -> float:
    from megatron_depthattn.train.step import evaluation_mode, run_microbatches

    shape = (config.train.micro_batch_size, config.data.sequence_length)
    batches = stream.held_out(config, device)
    with evaluation_mode(chunks):
        losses = [run_microbatches(chunks, batch, shape, forward_only=True) for batch in batches]
    return math.fsum(losses) / len(losses)


def _exported_loss(config: RunConfig, stream: ByteStream, device: torch.device, chunks: Chunks) -> float:
    """Save, export, load in bf16, and score the same held-out tokens."""
    from megatron_depthattn.config import to_dict
    from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
    from megatron_depthattn.convert.to_hf import export
    from megatron_depthattn.hf.loading import load_causal_lm
    from megatron_depthattn.train.checkpoint import checkpoint_state
    from megatron_depthattn.train.megatron_state import MegatronState
    from megatron_depthattn.train.save import CheckpointSaver
    from megatron_depthattn.train.step_folders import Progress, step_folder

    with tempfile.TemporaryDirectory() as work:
        progress = Progress(step=config.train.steps)
        state = checkpoint_state(MegatronState(chunks, None), None, config=to_dict(config))
        CheckpointSaver(Path(work) / "checkpoints").save(progress, state)
        export(MegatronCheckpoint(step_folder(Path(work) / "checkpoints", progress.step)), Path(work) / "exported")
        model = load_causal_lm(Path(work) / "exported", dtype=torch.bfloat16).to(device)
    losses = []
    with torch.inference_mode():
        for batch in (part for parts in stream.held_out(config, device) for part in parts):
            logits = model(input_ids=batch["tokens"], use_cache=False).logits.float()
            losses.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())))
    return math.fsum(losses) / len(losses)


def _forget(device: torch.device) -> None:
    """Nothing of a run is left for the next: no model in memory, no FP8 scales in TransformerEngine."""
    if "transformer_engine.pytorch" in sys.modules:
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
