"""One rank of a world that works off a list of jobs; started by launch.py.

    python -m tests.parallel.worker FOLDER JOBS.json

``FOLDER`` holds the results (NAME.json, written by rank 0), the references' gradients (NAME.pt) and the
checkpoints. A rank that fails writes NAME.error and dies: ranks may be out of step by then, so launch.py starts
the rest of the jobs in a new world.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import distributed_data_parallel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from megatron_depthattn.benchmarks.checkpoint import gathered_state
from megatron_depthattn.benchmarks.hop import recorded_sends, sent_between_stages
from megatron_depthattn.config import to_dict, validate
from megatron_depthattn.data.loader import PADDING, START, micro_batches
from megatron_depthattn.data.order import batch_positions
from megatron_depthattn.methods.parameters import method_parameters
from megatron_depthattn.model import gpt, transformer_config
from megatron_depthattn.model.attention import DepthSelfAttention
from megatron_depthattn.model.cross_layer import CrossLayerLayer, SourceTensors
from megatron_depthattn.model.initialization import globally_named_parameters
from megatron_depthattn.model.loops import share_weights
from megatron_depthattn.model.norm import RMSNorm
from megatron_depthattn.model.transformer_config import DepthAttentionConfig
from megatron_depthattn.parallel.groups import (
    check_same_on_all_ranks,
    connect_groups,
    initialize_distributed,
    initialize_model_parallel,
    shut_down,
)
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.parallel.microbatch_state import MicrobatchState
from megatron_depthattn.parallel.schedule import PlannedCommunicator
from megatron_depthattn.train import build
from megatron_depthattn.train import step as training
from megatron_depthattn.train.build import Chunks, build_model, build_optimizer
from megatron_depthattn.train.checkpoint import RNG, sharded_rng_state
from megatron_depthattn.train.metrics import DepthRecord
from megatron_depthattn.train.muon import muon_fields
from megatron_depthattn.train.save import CheckpointSaver
from megatron_depthattn.train.step import Microbatch, run_microbatches, train_step
from megatron_depthattn.train.step_folders import Progress, step_folder
from tests.checkpoints import load_checkpoint, save_checkpoint
from tests.parallel import overlap
from tests.parallel.cases import METHODS, MODEL, NO_GRADIENT, RAMP, SAVE_AFTER, SEQUENCE_LENGTH, TRAIN, Job, group_sizes
from tests.parallel.compare import relative_errors

SHAPE = (TRAIN.micro_batch_size, SEQUENCE_LENGTH)
PATIENCE = timedelta(minutes=2)


def main(folder: Path, jobs: list[Job]) -> None:
    def do(job: Job, device: torch.device) -> dict[str, Any]:
        if job.overlap:
            return overlap.compare(job, folder, device, microbatches)
        with sabotage(job.sabotage):
            return agreement() if job.agreement else work(job, folder, device)

    work_off(folder, jobs, do)


def work_off(folder: Path, jobs: Sequence[Any], do: Callable[[Any, torch.device], dict[str, Any]]) -> None:
    """In every process of a world: do the jobs in turn, each under its layout; leave rank 0's result or an error."""
    device = initialize_distributed(launch_environment(), timeout=PATIENCE)
    layout, connected = "", list[str]()
    for job in jobs:
        try:
            if layout != job.layout:  # new groups only when needed: Megatron leaves the old ones open
                parallel_state.destroy_model_parallel()
                initialize_model_parallel(**group_sizes(job.config().parallel))
                connected.clear()
                connect_groups(device, connected.append)
                layout = job.layout
            start = time.monotonic()
            result = do(job, device)
            if dist.get_rank() == 0:
                result |= {"seconds": time.monotonic() - start, "connected": connected}
                write(folder / f"{job.name}.json", json.dumps(result))
        except BaseException:
            error = f"rank {dist.get_rank()} of {dist.get_world_size()}:\n{traceback.format_exc()}"
            if not (folder / f"{job.name}.error").exists():  # the first tells why; the others lose their peer
                write(folder / f"{job.name}.error", error)
            print(error, file=sys.stderr, flush=True)
            os._exit(1)  # not through Megatron's and gloo's exit handlers: they would wait for the other ranks
    dist.barrier()
    shut_down()


def write(path: Path, text: str) -> None:
    """All at once: launch.py looks for the file while this writes."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.rename(path)


def work(job: Job, folder: Path, device: torch.device) -> dict[str, Any]:
    """Losses and gradient norms of the job's steps and, from the common weights, the first step's gradients."""
    config = job.config()
    validate(config, dist.get_world_size(), needs_data=False)
    chunks = build_model(config, device)
    optimizer, scheduler = build_optimizer(config, chunks)
    result: dict[str, Any] = {}
    first, batches = 0, RAMP if job.ramp else [TRAIN.global_batch_size] * job.steps

    def batches_of(step: int) -> list[Microbatch]:
        return microbatches(step, batches[step], documents=job.documents, alone=job.alone)

    if job.resume:
        saved = step_folder(folder / job.checkpoint, SAVE_AFTER)
        more = {"config": to_dict(config), "is_parent": True} if job.branch else {}
        progress = load_checkpoint(saved, chunks, optimizer, scheduler, **more).progress
        assert progress == (Progress() if job.branch else progress_after(SAVE_AFTER))
        first = SAVE_AFTER
        scheduler.step(first - progress.step)
    else:
        load_checkpoint(common_weights(folder / (job.method if job.method in METHODS else "vanilla"), chunks), chunks)
        depth = DepthRecord(config.train, get_model_config(chunks[0]), config.data.sequence_length)
        with recorded_sends() as sent, depth.recording(1):
            first_loss = run_microbatches(chunks, batches_of(0), SHAPE, forward_only=False)
        result |= {"first_loss": first_loss, "depth": depth.collect()}
        if job == job.reference:  # what the second of two data-parallel ranks begins with
            with depth.recording(1), torch.no_grad():
                run_microbatches(chunks, batches_of(0)[1:], SHAPE, forward_only=True)
            result["depth_of_second"] = depth.collect()
        stages = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
        result["sent"] = sent_between_stages(sent, stages)
        result["microbatches"] = len(batches_of(0))
        whole_gradients = gather_gradients(chunks)
        if whole_gradients is not None:
            result |= compare_gradients(job, folder, *whole_gradients)
        if job.steps == 1:
            return result | {"losses": [first_loss], "grad_norms": []}
    result["losses"], result["grad_norms"] = [], []
    for step in range(first, job.steps):
        scheduler.step(batches[step] if job.ramp else 1)
        last = max((entry["record_id"] for entry in recorded()), default=-1)
        done = train_step(chunks, optimizer, batches_of(step), SHAPE)
        sizes = {name: group.size() for group, name in dist.distributed_c10d._world.pg_names.items()}
        used = {tuple(each["process_group"]) for each in recorded() if each["record_id"] > last}
        result["groups"] = sorted(description for name, description in used if sizes[name] > 1)
        result["losses"].append(done.loss)
        result["grad_norms"].append(done.grad_norm)
        if job.save and step + 1 == SAVE_AFTER:
            parts = progress_after(SAVE_AFTER), chunks, optimizer, scheduler
            save_checkpoint(folder / job.checkpoint, *parts, config=to_dict(config))
            if job.optimizer == "adamw":
                gathered = dataclasses.replace(job, gathered=True)
                save_gathered(folder / gathered.checkpoint, chunks, optimizer, scheduler)
    return result


def save_gathered(folder: Path, chunks: Chunks, optimizer: Any, scheduler: Any) -> None:
    """The same checkpoint as Megatron makes it: optimizer state gathered on the first data-parallel rank, whole."""
    state = gathered_state(chunks, optimizer) | {"config": {}, "scheduler": scheduler.state_dict()}
    saver = CheckpointSaver(folder)
    saver.save(progress_after(SAVE_AFTER), state | {RNG: sharded_rng_state()})
    outcome = saver.take_outcome()
    assert outcome is not None and outcome.error is None, outcome


def recorded() -> list[dict[str, Any]]:
    """What torch's flight recorder keeps of this rank's collectives."""
    entries: list[dict[str, Any]] = pickle.loads(torch._C._distributed_c10d._dump_fr_trace(True, False))["entries"]
    return entries


def progress_after(step: int) -> Progress:
    samples = step * TRAIN.global_batch_size
    return Progress(step, samples, samples * SEQUENCE_LENGTH)


def common_weights(folder: Path, chunks: Chunks) -> Path:
    """The checkpoint that every job starts from; the first job of the first world, a single process, writes it."""
    weights = step_folder(folder / "weights", 0)
    if not weights.exists():
        assert dist.get_world_size() == 1
        with torch.no_grad():  # norms at one would hide a norm that is applied twice, or not at all
            generator = torch.Generator().manual_seed(0)
            for parameter in chunks[0].parameters():
                if parameter.dim() == 1:  # or values that a method begins with, and that make it vanilla
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        save_checkpoint(folder / "weights", Progress(), chunks, None, None, config={})
    return weights


def microbatches(
    step: int,
    batch_size: int = TRAIN.global_batch_size,
    rows: int = TRAIN.micro_batch_size,
    documents: str = "",
    alone: bool = False,
) -> list[Microbatch]:
    """This data-parallel rank's samples of a global batch that is a function of the step and its size alone."""
    generator = torch.Generator().manual_seed(step)
    shape = batch_size, SEQUENCE_LENGTH + 1
    tokens = torch.randint(0, MODEL.vocab_size, shape, generator=generator)
    positions = torch.from_numpy(
        batch_positions(
            0,
            global_batch_size=batch_size,
            micro_batch_size=rows,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
        )
    )
    if not documents:
        return [{"tokens": row[:, :-1], "labels": row[:, 1:]} for row in tokens[positions]]
    starts = torch.rand(shape, generator=generator) < 0.1
    padding = [(0, 0, 27, 0, 9, 0, 1, 31)[(row + step) % 8] for row in range(batch_size)]
    marks = starts * START
    for row, count in enumerate(padding):
        marks[row, SEQUENCE_LENGTH + 1 - count :] = PADDING
        marks[row, SEQUENCE_LENGTH + 1 - count : SEQUENCE_LENGTH + 2 - count] = PADDING | START
    if not alone:
        return micro_batches(tokens[positions], marks[positions].byte(), positions, document_mask=documents == "mask")
    texts = []
    for row, count in enumerate(padding):
        text = tokens[row, : SEQUENCE_LENGTH + 1 - count]
        begins = (starts[row, 1 : len(text)].nonzero()[:, 0] + 1).tolist() if documents == "mask" else []
        texts += text[None].tensor_split(begins, dim=1)
    return [{"tokens": text[:, :-1], "labels": text[:, 1:]} for text in texts if text.size(1) > 1]


# ---- gradients


def gather_gradients(chunks: Chunks) -> tuple[dict[str, Tensor], dict[str, float]] | None:
    """On rank 0 every parameter's whole gradient, and how far its copies on other ranks are from it; else None."""
    mine: dict[str, tuple[Tensor, int]] = {}
    for chunk, model in zip(chunks, unwrap_model(chunks), strict=True):
        for group in chunk.bucket_groups:
            for bucket in group.buckets:  # reduce-scattered: every data-parallel rank holds its share of a bucket
                shares = group.intra_distributed_optimizer_instance_group
                own = bucket.grad_data.chunk(shares.size())[shares.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=shares)
        for name, parameter in globally_named_parameters(model):
            split = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else -1
            mine[name] = parameter.main_grad.clone(), split
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(
        (parallel_state.get_tensor_model_parallel_rank(), mine), gathered if dist.get_rank() == 0 else None
    )
    if dist.get_rank() > 0:
        return None
    shards: dict[str, dict[int, tuple[Tensor, int]]] = {}
    spread: dict[str, float] = {}
    for tensor_rank, gradients in gathered:
        for name, (gradient, split) in gradients.items():
            by_rank = shards.setdefault(name, {})
            copy_of = 0 if split < 0 and by_rank else tensor_rank
            if copy_of in by_rank:
                spread |= {name: max(spread.get(name, 0.0), distance(gradient, by_rank[copy_of][0]))}
            else:
                by_rank[copy_of] = gradient, split
    return {name: whole(name, by_rank) for name, by_rank in shards.items()}, spread


def whole(name: str, by_rank: dict[int, tuple[Tensor, int]]) -> Tensor:
    """The whole gradient of tensor ranks' shares."""
    pieces, split = [by_rank[rank][0] for rank in sorted(by_rank)], by_rank[min(by_rank)][1]
    if len(pieces) == 1:
        return pieces[0]
    if name.endswith("linear_fc1.weight"):  # a share holds its part of the gate, then its part of up
        halves = [piece.chunk(2, dim=split) for piece in pieces]
        return torch.cat([half[i] for i in range(2) for half in halves], dim=split)
    return torch.cat(pieces, dim=split)


def distance(gradient: Tensor, reference: Tensor) -> float:
    return float((gradient - reference).norm() / reference.norm())


def compare_gradients(job: Job, folder: Path, gradients: dict[str, Tensor], spread: dict[str, float]) -> dict[str, Any]:
    """Relative errors against the reference's file, which the reference itself writes."""
    file = folder / f"{job.reference.name}.pt"
    if job == job.reference:
        torch.save(gradients, file)
    reference = torch.load(file)
    for name in [name for name in reference if name.startswith(NO_GRADIENT)]:
        largest = max(float(gradient.norm()) for gradient in reference.values())
        assert max(float(side.pop(name).norm()) for side in (gradients, reference)) < 1e-6 * largest, name
        spread.pop(name, None)
    return {"gradient_errors": relative_errors(gradients, reference), "copy_errors": spread}


# ---- agreement


def agreement() -> dict[str, Any]:
    """What ``check_same_on_all_ranks`` says on every rank when all agree, and when the last rank does not."""
    check_same_on_all_ranks("plans", "same")
    try:
        check_same_on_all_ranks("plans", "odd" if dist.get_rank() == dist.get_world_size() - 1 else "same")
        message = None
    except ValueError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return {"messages": messages}


# ---- deliberate mistakes


def sabotage(name: str) -> Any:
    """A context in which the named mistake is made."""
    return SABOTAGES[name]() if name else contextlib.nullcontext()


def _detached(sources: Mapping[int, SourceTensors]) -> dict[int, SourceTensors]:
    return {index: tuple(tensor.detach() for tensor in source) for index, source in sources.items()}


def _received(change: Callable[[dict[int, SourceTensors]], dict[int, SourceTensors]]) -> Any:
    """Every chunk gets something else than the sources that it received."""
    unpack = CrossLayerLayer._unpack

    def wrong(self: Any, message: Tensor) -> tuple[Tensor, dict[int, SourceTensors]]:
        hidden_states, sources = unpack(self, message)
        return hidden_states, change(sources)

    return mock.patch.object(CrossLayerLayer, "_unpack", wrong)


def _payload_gradient_dropped() -> Any:
    return _received(_detached)


def _two_sources_swapped() -> Any:
    """The first and the last: a layer that reads both mixes the same set, and only layers that read one notice."""

    def swap(sources: dict[int, SourceTensors]) -> dict[int, SourceTensors]:
        first, last = min(sources), max(sources)
        assert first != last
        return sources | {first: sources[last], last: sources[first]}

    return _received(swap)


def _source_dropped() -> Any:
    """The first that arrives is all zeros."""

    def drop(sources: dict[int, SourceTensors]) -> dict[int, SourceTensors]:
        first = min(sources)
        return sources | {first: tuple(torch.zeros_like(tensor) for tensor in sources[first])}

    return _received(drop)


def _stream_dropped() -> Any:
    """Of the hidden states side by side, the last does not arrive."""
    unpack = CrossLayerLayer._unpack

    def wrong(self: Any, message: Tensor) -> tuple[Tensor, dict[int, SourceTensors]]:
        streams, sources = unpack(self, message)
        kept = streams[..., : -self.config.hidden_size]
        return torch.nn.functional.pad(kept, (0, self.config.hidden_size)), sources

    return mock.patch.object(CrossLayerLayer, "_unpack", wrong)


def _method_parameters_not_reduced() -> Any:
    """Under sequence parallel every tensor rank keeps the gradient of its own positions."""

    def wrong(config: Any, *args: Any, **kwargs: Any) -> Any:
        made = method_parameters(config, *args, **kwargs)
        for parameter in made.values():
            parameter.sequence_parallel = False
        return made

    return mock.patch("megatron_depthattn.methods.mhc.layer.method_parameters", wrong)


def _shared_gradient_dropped() -> Any:
    """What a later chunk, or a recomputed layer, found out about a source it shares is thrown away."""
    collect = MicrobatchState.collect
    return mock.patch.object(MicrobatchState, "collect", lambda self, name: torch.zeros_like(collect(self, name)))


def _mean_query_of_own_heads() -> Any:
    return mock.patch.object(DepthSelfAttention, "group_queries", lambda self, query: query)


def _last_rank_mixes_values_alone() -> Any:
    mix = DepthSelfAttention._mix

    def wrong(self: Any, *args: Any) -> dict[str, Tensor]:
        mixed = mix(self, *args)
        return {"value": mixed["value"]} if dist.get_rank() == dist.get_world_size() - 1 else mixed

    return mock.patch.object(DepthSelfAttention, "_mix", wrong)


def _norms_not_reduced() -> Any:
    init = RMSNorm.__init__

    def wrong(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, config, *args, **kwargs)
        self.weight.sequence_parallel = False

    return mock.patch.object(RMSNorm, "__init__", wrong)


def _plan_of_an_even_cut() -> Any:
    starts = tuple(range(0, MODEL.num_layers, MODEL.num_layers // 4))
    return mock.patch.object(transformer_config, "pipeline_chunk_starts", return_value=starts)


def _shapes_exchanged() -> Any:
    return mock.patch.object(PlannedCommunicator, "_communicate_shapes", P2PCommunicator._communicate_shapes)


def _later_loop_gradient_dropped() -> Any:
    """A rank's last chunk computes with the weights of an earlier one, and has no part in their gradient."""

    def wrong(chunks: Sequence[Any], *, num_loops: int) -> None:
        share_weights(chunks, num_loops=num_loops)
        for module in chunks[-1].modules() if len(chunks) > 1 else ():
            for name, value in vars(module).items():
                if isinstance(value, torch.nn.Parameter):
                    vars(module)[name] = value.detach()

    return mock.patch.object(gpt, "share_weights", wrong)


def _another_rule_on_one_rank() -> Any:
    """The last rank counts sources through all loops. What is on record of its weights would have other columns."""
    mistake = contextlib.ExitStack()
    if dist.get_rank() == dist.get_world_size() - 1:
        mistake.enter_context(mock.patch.object(DepthAttentionConfig, "layers_per_loop", None))
    mistake.enter_context(mock.patch.object(DepthRecord, "recording", return_value=contextlib.nullcontext()))
    return mistake


def _muon(**fields: Any) -> Any:
    """Megatron's optimizer is built with other settings."""
    return mock.patch.object(build, "muon_fields", lambda *args: muon_fields(*args) | fields)


def _mean_of_means() -> Any:
    """Each micro-batch counts as one, whatever it holds."""
    sums = training.sum_of_losses

    def wrong(losses: Tensor, mask: Tensor | None = None) -> Any:
        total, tokens, _ = sums(losses, mask)
        mean, one = total / tokens.clamp(min=1), torch.ones_like(tokens)
        return mean, one, training.LossSum(mean.detach(), one)

    return mock.patch.object(training, "sum_of_losses", wrong)


def _border_leaks_a_token() -> Any:
    """The second document of every row begins with the last token of the first."""
    right = training.documents_of

    def wrong(borders: Tensor, **options: Any) -> Any:
        return right(torch.cat([borders[:1], borders[1:2] - 1, borders[2:]]), **options)

    return mock.patch.object(training, "documents_of", wrong)


def _matrices_first(**more: bool) -> Any:
    """No mistake: the order of TransformerEngine's layers, which name a matrix before a norm."""
    partition = distributed_data_parallel.partition_buckets

    def reordered(buffers: list[Any], **settings: Any) -> Any:
        return partition(buffers[::-1], **settings | more)

    return mock.patch.object(distributed_data_parallel, "partition_buckets", reordered)


SABOTAGES = {
    "mean_of_means": _mean_of_means,
    "border_leaks_a_token": _border_leaks_a_token,
    "blockwise": functools.partial(_muon, muon_tp_mode="blockwise"),
    "unsplit_qkv": functools.partial(_muon, muon_split_qkv=False),
    "matrices_first": _matrices_first,
    "matrices_and_norms_in_one_group": functools.partial(_matrices_first, force_single_bucket_group=True),
    "another_rule_on_one_rank": _another_rule_on_one_rank,
    "later_loop_gradient_dropped": _later_loop_gradient_dropped,
    "plan_of_an_even_cut": _plan_of_an_even_cut,
    "payload_gradient_dropped": _payload_gradient_dropped,
    "shared_gradient_dropped": _shared_gradient_dropped,
    "shapes_exchanged": _shapes_exchanged,
    "source_dropped": _source_dropped,
    "stream_dropped": _stream_dropped,
    "method_parameters_not_reduced": _method_parameters_not_reduced,
    "two_sources_swapped": _two_sources_swapped,
    "mean_query_of_own_heads": _mean_query_of_own_heads,
    "last_rank_mixes_values_alone": _last_rank_mixes_values_alone,
    "norms_not_reduced": _norms_not_reduced,
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Job(**job) for job in json.loads(Path(sys.argv[2]).read_text())])
