"""What one forward pass keeps for backward: Depth-Attention above vanilla, measured, beside the plan's prediction."""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_depthattn.benchmarks.checkpoint import counts_most_memory, resident_bytes
from megatron_depthattn.benchmarks.models import (
    add_model_arguments,
    document_borders,
    mixing_configs,
    run_config,
    shape_text,
)
from megatron_depthattn.benchmarks.result import Result, failed, progress
from megatron_depthattn.benchmarks.world import joined_world
from megatron_depthattn.cli.common import check
from megatron_depthattn.config import RunConfig
from megatron_depthattn.estimate.activations import chunk_memory
from megatron_depthattn.estimate.counts import element_bytes, source_plan
from megatron_depthattn.estimate.layouts import RECOMPUTE
from megatron_depthattn.model.documents import documents_of
from megatron_depthattn.model.source_plan import SourcePlan
from megatron_depthattn.parallel.microbatch_state import MicrobatchState

LENGTHS = (512, 1024, 2048, 4096, 8192)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--documents", type=int, metavar="N", help="against sequence length, cut into documents of N tokens or not"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="N", help="with --documents")
    parser.add_argument("--recompute", nargs="+", choices=RECOMPUTE, default=[*RECOMPUTE], help="default: all")


def measure(given: argparse.Namespace) -> Result:
    """Bytes per token above vanilla, of all layers together; the prediction beside them."""
    if given.documents:
        return _of_documents(given)
    with joined_world() as device:
        first = run_config(given, device.type)
        result = Result(
            title=f"Kept for backward by one forward pass: {shape_text(first, given)}, layers: {first.model.spec}",
            columns=[
                *("model", "recompute", "vanilla, B/token", "above vanilla", "predicted", "the sources alone"),
                *("all, predicted / measured", "allocator: above vanilla", "peak with backward: above vanilla"),
            ],
            notes=[
                "bytes per token, all layers together: distinct storages of the tensors that autograd saves "
                "(saved-tensor hooks), parameters left out; the allocator's columns on a GPU only",
                "predicted: megatron_depthattn/estimate/activations.py, of all with embedding and logits; the sources "
                "alone: key and mixed value of every layer that is read",
            ],
        )
        for mode in given.recompute:
            keys = {f"recompute.{key}": value for key, value in RECOMPUTE[mode].items()}
            configs = mixing_configs(given, device.type, ["auto"], keys)
            try:
                vanilla = kept(configs.pop("vanilla"), device)
                for name, config in configs.items():
                    _add_row(result, name, mode, config, kept(config, device), vanilla)
            except Exception as error:  # out of memory without recompute, for one, and the next mode may fit
                failure = failed(error)
                result.failures[mode] = failure.traceback
                result.rows.append(["all", mode, failure.said, *[""] * (len(result.columns) - 3)])
            torch.cuda.empty_cache()
            progress(given, f"recompute {mode} done", lambda: result)
    return result


def _of_documents(given: argparse.Namespace) -> Result:
    """Of one forward and backward pass: without borders, with documents, and with a mask of the same documents."""
    check(
        (given.documents < 1, "--documents: set 1 or more tokens"),
        (bool(given.sequence_length or given.micro_batch), "--documents: --lengths are the sequences, one a step"),
        (len(given.strides or [1]) > 1, "--documents measures one stride: set one --strides, or none for half"),
    )
    keys = {"model.depth_attention.stride": given.strides[0]} if given.strides else {}
    given.micro_batch, kinds = 1, ("whole", f"documents of {given.documents}", "the same by a mask")
    with joined_world() as device:
        result = Result(
            title="",
            columns=["tokens", *(f"{kind}: kept, peak (MB)" for kind in kinds)],
            notes=[
                "kept: distinct storages of the tensors that autograd saves in one forward pass; peak: of forward and "
                "backward, "
                + ("by the allocator" if device.type == "cuda" else "what the process holds above the weights (VmHWM)")
            ],
        )
        for length in given.lengths:
            given.sequence_length = length
            config = run_config(given, device.type, keys)
            result.title = f"Memory of documents: {shape_text(config, given)}"
            found = [kept(config, device, given.documents, by_mask=by_mask) for by_mask in (None, False, True)]
            cells = [f"{own.saved / 1e6:,.1f}, {(own.peak or 0) / 1e6:,.1f}" for own in found]
            result.rows.append([f"{length:,}", *cells])
            result.figures[str(length)] = {kind: own._asdict() for kind, own in zip(kinds, found, strict=True)}
            progress(given, f"{length} tokens done", lambda: result)
    return result


class SavedTensors:
    """What was saved within `saved_tensors`, without the parameters of the model and their FP8 copies.

    Only what goes through autograd or a micro-batch's state is seen: not what a module or a closure holds on to (on a
    GPU the allocator reports that too), and of what is recomputed only the inputs of the recomputation.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.all: list[Tensor] = []  # holds them, so that no address is used twice

    @property
    def tensors(self) -> list[Tensor]:
        """Each one once, however often it was saved."""
        copies = (copy for m in self._model.modules() for copy in getattr(m, "_fp8_workspaces", {}).values())
        weights = (part for weight in chain(self._model.parameters(), copies) for part in _parts(weight))
        own = {tensor.untyped_storage().data_ptr() for tensor in weights}
        others = (t for t in self.all if t.untyped_storage().data_ptr() not in own)
        return [*{(t.data_ptr(), t.dtype, tuple(t.shape), t.stride()): t for t in others}.values()]

    @property
    def num_bytes(self) -> int:
        """Bytes of the distinct storages: a saved view keeps all of what it is a view of."""
        storages = (t.untyped_storage() for t in self.tensors)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _parts(weight: Any) -> list[Tensor]:
    """An FP8 weight's bytes, by row and by column."""
    is_fp8 = hasattr(weight, "get_data_tensors")
    return [part for part in weight.get_data_tensors() if part is not None] if is_fp8 else [weight]


@contextmanager
def saved_tensors(model: torch.nn.Module, state: MicrobatchState) -> Iterator[SavedTensors]:
    """Record what is saved for backward inside the block, and what is left in ``state`` at its end."""
    saved = SavedTensors(model)

    def pack(tensor: Tensor) -> Tensor:
        saved.all.append(tensor.detach())  # with its graph, an operation's output would keep that alive for ever
        return saved.all[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    saved.all += state.tensors()


class Kept(NamedTuple):
    """Of one forward pass, in bytes; of a CPU ``peak`` alone, and only where it was asked for."""

    saved: int
    """Storages behind the tensors that autograd saved."""
    allocated: int | None = None
    """More allocated after forward than before, the loss still alive."""
    peak: int | None = None
    """Most allocated during forward and backward, above what was before."""


def kept(config: RunConfig, device: torch.device, documents: int | None = None, *, by_mask: bool | None = None) -> Kept:
    """Build one model, run it forward and backward on random tokens.

    Args:
        documents: the length of those in a row, or None; then the host's peak is measured, too.
        by_mask: whether they get a square mask in place of borders; None: neither.
    """
    from megatron_depthattn.train.build import build_chunk, initialize, transformer_config

    megatron = transformer_config(config)
    model = build_chunk(config, megatron).to(device)
    initialize(model, config)
    model = (model.bfloat16() if megatron.bf16 else model).train()
    shape = (config.train.micro_batch_size, config.data.sequence_length)
    tokens = torch.randint(config.model.vocab_size, shape, device=device)

    mask, borders = None, {}
    if documents and by_mask:
        number = torch.arange(shape[1], device=device) // documents
        mask = ((number[:, None] != number) | torch.ones(shape[1], shape[1], device=device).triu(1).bool())[None, None]
    elif documents and by_mask is not None:
        row = documents_of(document_borders(*shape, documents), thd=False, device=device)
        borders = {"packed_seq_params": row}

    def loss(**given: Any) -> Tensor:
        return model(tokens, None, mask, labels=tokens, **borders, **given).float().mean()

    state = MicrobatchState()
    with saved_tensors(model, state) as saved:
        total = loss(extra_block_kwargs={"attention_bias": state}) if megatron.shares_over_layers else loss()
    num_bytes = saved.num_bytes
    del saved, total, state
    if device.type != "cuda":
        if not documents:
            return Kept(num_bytes)
        loss().backward()  # gradients are there
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is freed is given back
        resident = resident_bytes("VmRSS") if counts_most_memory() else None
        loss().backward()
        return Kept(num_bytes, None, None if resident is None else resident_bytes("VmHWM") - resident)
    loss().backward()  # gradients are there, and lazily made buffers
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    total = loss()
    allocated = torch.cuda.memory_allocated() - before
    total.backward()
    return Kept(num_bytes, allocated, torch.cuda.max_memory_allocated() - before)


def _add_row(result: Result, name: str, mode: str, config: RunConfig, own: Kept, vanilla: Kept) -> None:
    tokens = config.train.micro_batch_size * config.data.sequence_length
    more, allocated, peak = (
        None if mine is None or theirs is None else (mine - theirs) / tokens
        for mine, theirs in zip(own, vanilla, strict=True)
    )
    counted, plan = chunk_memory(config, 0, on_gpu=torch.cuda.is_available()), source_plan(config)
    assert isinstance(plan, SourcePlan)
    read = {source for layer in range(plan.num_layers) for source in plan.sources(layer)}
    key = element_bytes(config) * config.model.num_query_groups * config.model.kv_channels
    predicted, sources = counted.sources // tokens, len(plan.kinds) * key * len(read)
    whole = (counted.activations + counted.sources) / tokens
    result.rows.append(
        [
            *(name, mode, f"{vanilla.saved / tokens:,.0f}", f"{more:+,.0f}", f"{predicted:+,}", f"{sources:,}"),
            f"{whole:,.0f} / {own.saved / tokens:,.0f}",
            *("" if value is None else f"{value:+,.0f}" for value in (allocated, peak)),
        ]
    )
    result.figures[f"{name}, {mode}"] = {
        "bytes_per_token_above_vanilla": more,
        "vanilla_bytes_per_token": vanilla.saved / tokens,
        "whole_predicted": whole,
        "predicted": predicted,
        "sources": sources,
        "allocated_above_vanilla": allocated,
        "peak_above_vanilla": peak,
    }
