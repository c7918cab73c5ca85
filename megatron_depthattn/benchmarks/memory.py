"""What one forward pass keeps for backward: Depth-Attention above vanilla, measured, beside the plan's prediction."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.saved import saved_tensors
from megatron_depthattn.benchmarks.shapes import add_model_arguments, run_config, shape_text
from megatron_depthattn.parallel.microbatch_state import MicrobatchState

if TYPE_CHECKING:
    from megatron_depthattn.config import RunConfig

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {"recompute__granularity": None, "recompute__method": None, "recompute__num_layers": None},
    "selective": {"recompute__granularity": "selective"},
    "full": {"recompute__granularity": "full", "recompute__method": "uniform", "recompute__num_layers": 1},
}


def add_memory(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("memory", help="activations kept for backward, above vanilla, beside the prediction")
    add_model_arguments(parser)
    parser.add_argument("--strides", nargs="+", type=int, metavar="N", help="default: half the layers, and 1")
    parser.add_argument("--recompute", nargs="+", choices=RECOMPUTE, default=[*RECOMPUTE], help="default: all")
    parser.add_argument("--ops", nargs="+", default=["lean"], metavar="OP", help="default: lean")
    parser.set_defaults(measure=measure_memory)


class Kept(NamedTuple):
    """Of one forward pass, in bytes; the last two on a GPU only."""

    saved: int
    """Storages behind the tensors that autograd saved."""
    allocated: int | None = None
    """More allocated after forward than before, the loss still alive."""
    peak: int | None = None
    """Most allocated during forward and backward, above what was before."""


def measure_memory(given: argparse.Namespace) -> Result:
    """Bytes per token above vanilla, of all layers together; the prediction beside them."""
    from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
    from megatron_depthattn.parallel.launch_env import launch_environment

    device = initialize_distributed(launch_environment())
    try:
        initialize_model_parallel()
        return _measure(given, device)
    finally:
        shut_down()


def _measure(given: argparse.Namespace, device: torch.device) -> Result:
    first = run_config(given, device.type)
    result = Result(
        title=f"Kept for backward by one forward pass: {shape_text(first, given)}, layers: {first.model.spec}",
        columns=[
            *("model", "recompute", "vanilla, B/token", "above vanilla", "predicted", "the sources alone"),
            *("all, predicted / measured", "off by"),
            *("above, elements per layer", "allocator: above vanilla", "peak with backward: above vanilla"),
        ],
        notes=[
            "bytes per token, all layers together: distinct storages of the tensors that autograd saves "
            "(saved-tensor hooks), parameters left out; the allocator's columns on a GPU only",
            "predicted: megatron_depthattn/model/activation_memory.py; the sources alone: key and mixed value of every "
            "layer that is read; all: megatron_depthattn/estimate/activations.py, embedding and logits included",
        ],
    )
    layers = first.model.num_layers * first.model.num_loops
    for mode in given.recompute:
        options = RECOMPUTE[mode]
        vanilla = kept(run_config(given, device.type, **options, model__depth_attention__enabled=False), device)
        for stride in given.strides or dict.fromkeys((max(1, layers // 2), 1)):
            for op in given.ops:
                depth = {"model__depth_attention__stride": stride, "model__depth_attention__op": op}
                config = run_config(given, device.type, **options, **depth)
                predicted = predicted_elements(config, device.type)
                _add_row(result, f"stride {stride}, {op}", mode, config, kept(config, device), vanilla, predicted)
    return result


def kept(config: RunConfig, device: torch.device) -> Kept:
    """Build one model, run it forward and backward on random tokens."""
    from megatron_depthattn.model.initialization import initialize_weights
    from megatron_depthattn.train.build import build_chunk, transformer_config

    megatron = transformer_config(config)
    model = build_chunk(config, megatron).to(device)
    initialize_weights(model, seed=config.run.seed, init_std=config.model.init_std)
    if megatron.bf16:
        model = model.bfloat16()
    model.train()
    shape = (config.train.micro_batch_size, config.data.sequence_length)
    tokens = torch.randint(config.model.vocab_size, shape, device=device)

    def loss(**given: Any) -> torch.Tensor:
        return model(tokens, None, None, labels=tokens, **given).float().mean()

    state = MicrobatchState()
    with saved_tensors(model, state) as saved:
        total = loss(extra_block_kwargs={"attention_bias": state}) if megatron.shares_over_layers else loss()
    num_bytes = saved.num_bytes
    del saved, total, state
    if device.type != "cuda":
        return Kept(num_bytes)
    loss().backward()  # gradients are there, and lazily made buffers
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    total = loss()
    allocated = torch.cuda.memory_allocated() - before
    total.backward()
    return Kept(num_bytes, allocated, torch.cuda.max_memory_allocated() - before)


def predicted_elements(config: RunConfig, kind: str) -> tuple[int, int]:
    """Elements per token above vanilla, and those of the sources alone; ``kind`` of device, cpu or cuda."""
    from megatron_depthattn.model.activation_memory import depth_activations, source_numbers
    from megatron_depthattn.model.source_plan import SourcePlan, default_stride

    model, recompute = config.model, config.recompute
    num_layers = model.num_layers * model.num_loops
    plan = SourcePlan(
        num_layers=num_layers,
        stride=model.depth_attention.stride or default_stride(num_layers),
        recent_window=model.depth_attention.recent_window,
    )
    key_size = model.num_query_groups * model.kv_channels
    predicted = depth_activations(
        plan,
        key_size=key_size,
        norm_keeps_projection=model.spec == "local" and (kind == "cuda" or config.precision.dtype == "fp32"),
        recomputed=recompute.granularity == "full",
    )
    return predicted.total, source_numbers(plan, key_size=key_size)


def predicted_bytes(config: RunConfig) -> int:
    """All that one micro-batch keeps, as the planner counts it."""
    from megatron_depthattn.estimate.activations import chunk_memory

    found = chunk_memory(config, 0, on_gpu=torch.cuda.is_available())
    return found.activations + found.sources


def _add_row(
    result: Result, name: str, mode: str, config: RunConfig, own: Kept, vanilla: Kept, numbers: tuple[int, int]
) -> None:
    tokens = config.train.micro_batch_size * config.data.sequence_length
    size = 2 if config.precision.dtype == "bf16" else 4
    more = (own.saved - vanilla.saved) / tokens
    whole = predicted_bytes(config)
    predicted, sources = (size * number for number in numbers)
    allocated, peak = (
        None if mine is None or theirs is None else (mine - theirs) / tokens
        for mine, theirs in zip(own[1:], vanilla[1:], strict=True)
    )
    result.rows.append(
        [
            *(name, mode, f"{vanilla.saved / tokens:,.0f}", f"{more:+,.0f}", f"{predicted:+,}", f"{sources:,}"),
            *(f"{whole / tokens:,.0f} / {own.saved / tokens:,.0f}", f"{100 * (whole / own.saved - 1):+.2f} %"),
            f"{more / size / (config.model.num_layers * config.model.num_loops):,.1f}",
            *("" if value is None else f"{value:+,.0f}" for value in (allocated, peak)),
        ]
    )
    result.figures[f"{name}, {mode}"] = {
        "bytes_per_token_above_vanilla": more,
        "vanilla_bytes_per_token": vanilla.saved / tokens,
        "whole_bytes_per_token": own.saved / tokens,
        "whole_predicted": whole / tokens,
        "predicted": predicted if "lean" in name else None,
        "sources": sources,
        "allocated_above_vanilla": allocated,
        "peak_above_vanilla": peak,
    }
