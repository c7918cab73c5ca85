"""The memory of every pipeline stage of a layout: what the planner predicts beside what one process measures.

The process is one rank after the other of a world that sends nothing (`fake_world`), so any layout can be measured on
one machine without a GPU: real modules, buffers, optimizer and schedule.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from megatron_depthattn.parallel.microbatch_state import MicrobatchState
from tools.benchmarks.live import LiveBytes
from tools.benchmarks.result import Result
from tools.benchmarks.saved import saved_tensors
from tools.benchmarks.shapes import SHAPES, precision_text

if TYPE_CHECKING:
    from megatron_depthattn.config import RunConfig

CPU = torch.device("cpu")


def add_rank_memory(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("rank-memory", help="memory of every stage of a layout, predicted beside measured")
    parser.add_argument("--shape", choices=SHAPES, default="cpu", help="default: cpu")
    parser.add_argument("--layout", nargs="+", action="append", metavar="a.b=c", help="keys of one layout; repeatable")
    parser.add_argument("--data", type=int, default=1, metavar="N", help="model replicas; default: 1")
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=c", help="keys of every layout")
    parser.set_defaults(measure=measure_rank_memory)


class Measured(NamedTuple):
    """Of one stage, in bytes but for the first."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    """On its first data-parallel rank."""
    kept: int
    """What one micro-batch leaves to backward in all of the stage's chunks."""
    held: int
    """Most that was alive at the end of a forward pass, above what is there between steps."""
    peak: int
    """Most that was alive at any moment of a step, above what is there between steps."""


def measure_rank_memory(given: argparse.Namespace) -> Result:
    from megatron_depthattn.config import load_config

    result = Result(
        title="Memory of pipeline stages, predicted / measured",
        columns=["layout", "stage", *Measured._fields],
        notes=[
            "parameters in numbers, the rest in bytes: predicted / measured, off by; kept: storages behind the tensors "
            "that autograd saves for one micro-batch, and the message that the schedule holds",
            "held: tensors alive at the end of a forward pass (activations, sources and messages of all micro-batches "
            "in flight); peak: at any moment (held and working)",
            "one process as every stage's first rank, over torch's fake backend",
        ],
    )
    for layout in given.layout or [[]]:
        backends = ("model.spec=local", "model.depth_attention.op=lean")  # it is built on the CPU
        config = load_config(SHAPES[given.shape], [*backends, *layout, *given.set])
        parallel = config.parallel
        world_size = given.data * parallel.tensor * parallel.context * parallel.pipeline
        name = " ".join(layout) or "one rank"
        result.notes += [f"{name}: {precision_text(config)}, world of {world_size}"] if layout else []
        for stage in range(parallel.pipeline):
            _add_row(result, name, stage, predicted(config, world_size, stage), measured(config, world_size, stage))
    return result


def predicted(config: RunConfig, world_size: int, stage: int) -> Measured:
    """What the planner says of the same."""
    from megatron_depthattn.estimate.memory import chunk_activations, rank_memory

    memory = rank_memory(config, world_size, pipeline_rank=stage, device="cpu", data_rank=0)
    held = memory.activations + memory.sources + memory.payload_buffers
    return Measured(
        memory.parameters,
        memory.weights,
        memory.gradients,
        memory.optimizer,
        sum(chunk_activations(config, chunk, device="cpu").kept().total for chunk in _chunks(config, stage)),
        held,
        held + memory.working,
    )


def measured(config: RunConfig, world_size: int, stage: int) -> Measured:
    """Build what the stage's first rank has, and run a step of it."""
    from megatron.core.utils import unwrap_model

    from megatron_depthattn.train.build import build_model, build_optimizer
    from tools.benchmarks.fake_world import fake_rank, rank_of_stage

    with fake_rank(config, rank_of_stage(config, stage, world_size), world_size):
        chunks = build_model(config, CPU)
        optimizer, _ = build_optimizer(config, chunks)
        for chunk in chunks:
            chunk.train()
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        weights = storages(parameters)
        gradients = storages(buffer.grad_data for chunk in chunks for buffer in chunk.buffers)
        kept = _kept(config, [unwrap_model(chunk) for chunk in chunks], stage)
        _step(config, chunks, world_size)  # lazily made buffers
        held, peak = _step(config, chunks, world_size)
        optimizer.prepare_grads()
        optimizer.step_with_ready_grads()
        states = {key: size for key, size in storages(_states(optimizer)).items() if key not in weights}
        return Measured(
            parameters=sum(parameter.numel() for parameter in parameters),
            weights=sum(weights.values()),
            gradients=sum(gradients.values()),
            optimizer=sum(states.values()),
            kept=kept,
            held=held,
            peak=peak,
        )


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the distinct storages behind ``tensors``."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _states(optimizer: Any) -> Iterable[Tensor]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter
                yield from filter(torch.is_tensor, part.optimizer.state[parameter].values())


def _kept(config: RunConfig, chunks: list[Any], stage: int) -> int:
    """Forward through the stage's chunks, with random input where another stage's message would come."""
    megatron, train = chunks[0].config, config.train
    length = config.data.sequence_length // config.parallel.context
    rows = length // (config.parallel.tensor if config.parallel.sequence else 1)
    tokens = torch.randint(config.model.vocab_size, (train.micro_batch_size, length))
    state = MicrobatchState()
    given = {"extra_block_kwargs": {"attention_bias": state}} if megatron.shares_over_layers else {}
    outputs = []
    with saved_tensors(torch.nn.ModuleList(chunks), state) as saved:
        for chunk, place in zip(chunks, _chunks(config, stage), strict=True):
            if place:
                width = megatron.message_into(place).width if megatron.shares_over_layers else megatron.hidden_size
                message = torch.randn(rows, train.micro_batch_size, width, dtype=megatron.params_dtype)
                chunk.set_input_tensor(message.requires_grad_())
                saved.add(message)
            outputs.append(chunk(tokens, None, None, labels=tokens, **given))
    return saved.num_bytes


def _step(config: RunConfig, chunks: list[Any], world_size: int) -> tuple[int, int]:
    """Forward and backward of a global batch: most bytes alive at the end of a forward, and at any moment."""
    from megatron_depthattn.config import validate
    from megatron_depthattn.parallel.schedule import run_schedule
    from megatron_depthattn.train.step import forward_step

    train, length = config.train, config.data.sequence_length
    ends: list[int] = []
    tokens = torch.randint(config.model.vocab_size, (train.micro_batch_size, length))
    count = validate(config, world_size, needs_data=False).num_microbatches
    with LiveBytes() as live:

        def step(work: Any, model: torch.nn.Module) -> Any:
            done = forward_step(work, model)
            ends.append(live.now)
            return done

        run_schedule(
            step,
            [{"tokens": tokens, "labels": tokens}] * count,
            chunks,
            micro_batch_size=train.micro_batch_size,
            sequence_length=length,
            forward_only=False,
        )
    return max(ends), live.peak


def _chunks(config: RunConfig, stage: int) -> range:
    parallel = config.parallel
    return range(stage, parallel.pipeline * parallel.virtual_pipeline, parallel.pipeline)


def _add_row(result: Result, layout: str, stage: int, ours: Measured, theirs: Measured) -> None:
    cells = [f"{a:,} / {b:,}, {100 * (a / b - 1):+.2f} %" for a, b in zip(ours, theirs, strict=True)]
    result.rows.append([layout, str(stage), *cells])
    result.figures[f"{layout}, stage {stage}"] = {
        "predicted": ours._asdict(),
        "measured": theirs._asdict(),
    }
