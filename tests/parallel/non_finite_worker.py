"""One rank of a world in which single steps are made not finite; started by test_non_finite.py.

    python -m tests.parallel.non_finite_worker RESULTS.json LAYOUT...

Rank 0 writes, for every layout and case, what each rank saw.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_depthattn.config import ParallelConfig, RecomputeConfig, RunConfig
from megatron_depthattn.data.order import batch_positions
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.train.build import Chunks, build_model, build_optimizer
from megatron_depthattn.train.step import SAMPLE_IDS, Microbatch, StepResult, train_step
from tests.parallel.cases import MODEL, OPTIMIZER, SEQUENCE_LENGTH, TRAIN, group_sizes

SHAPE = (TRAIN.micro_batch_size, SEQUENCE_LENGTH)
LAYER, MICROBATCH = 5, 1
"""Where the poison goes: layer and microbatch, both from 0."""
FULL_RECOMPUTE = RecomputeConfig(granularity="full", method="uniform", num_layers=1)
LAYOUTS = {
    "dp2xpp2": (ParallelConfig(pipeline=2), RecomputeConfig(), 1),
    "pp4": (ParallelConfig(pipeline=4, pipeline_layout="E|t*4|t*4|L"), RecomputeConfig(), 1),
    "dp2xpp2xvpp2+recompute": (ParallelConfig(pipeline=2, virtual_pipeline=2), FULL_RECOMPUTE, 1),
    "dp2xpp2xvpp2+loops": (ParallelConfig(pipeline=2, virtual_pipeline=2), RecomputeConfig(), 2),
    "tp2xpp2+sp": (ParallelConfig(tensor=2, pipeline=2, sequence=True), RecomputeConfig(), 1),
}


def config_of(parallel: ParallelConfig, recompute: RecomputeConfig, num_loops: int = 1) -> RunConfig:
    """As many layers in all, whatever the number of loops."""
    model = dataclasses.replace(MODEL, num_layers=MODEL.num_layers // num_loops, num_loops=num_loops)
    return dataclasses.replace(
        RunConfig(optimizer=OPTIMIZER, train=TRAIN), model=model, parallel=parallel, recompute=recompute
    )


def microbatches(step: int) -> list[Microbatch]:
    """This data-parallel rank's rows of a global batch, with their ids on the first and the last stage."""
    start = step * TRAIN.global_batch_size
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, MODEL.vocab_size, (TRAIN.global_batch_size, SEQUENCE_LENGTH + 1), generator=generator)
    positions = batch_positions(
        start,
        global_batch_size=TRAIN.global_batch_size,
        micro_batch_size=TRAIN.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    stage, stages = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    ids = [torch.from_numpy(row.copy()) for row in positions]
    if stage not in (0, stages - 1):
        return [{} for _ in ids]
    mine = [(rows[one - start], one + 1000) for one in ids]
    return [{"tokens": row[:, :-1], "labels": row[:, 1:], SAMPLE_IDS: one} for row, one in mine]


def state_of(chunks: Chunks, optimizer: Any) -> list[Any]:
    """Copies of every weight and of everything that the optimizer holds."""
    state: list[Any] = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            state += [value for name, value in sorted(group.items()) if name != "params"]
            for parameter in group["params"]:
                state.append(parameter.detach().clone())
                moments = part.optimizer.state[parameter]
                state += [torch.as_tensor(moments[name]).clone() for name in sorted(moments)]
    return state


def same(one: list[Any], other: list[Any]) -> bool:
    """Bit for bit."""
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


def num_hooks(chunks: Chunks) -> int:
    modules = [module for model in chunks for module in model.modules()]
    hooks = [
        hooks
        for module in modules
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]
    return sum(map(len, hooks)) + sum(
        len(parameter._backward_hooks or ()) for chunk in chunks for parameter in chunk.parameters()
    )


# ---- poison: context managers over the layer, on the one rank that is to blame


@contextlib.contextmanager
def forward_overflow(layer: Any) -> Iterator[None]:
    """One linear layer's output is infinite in one microbatch, every time it is computed."""

    def poison(_: Any, __: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
        return (output[0] + torch.inf, output[1]) if layer.current_microbatch == MICROBATCH else None

    with contextlib.closing(_Removable(layer.mlp.linear_fc2.register_forward_hook(poison))):
        yield


@contextlib.contextmanager
def once_only(layer: Any) -> Iterator[None]:
    """The output is NaN the first time, and right when the step is run again."""
    calls = 0

    def poison(_: Any, __: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
        nonlocal calls
        calls += 1
        return (output[0] * torch.nan, output[1]) if calls == 1 else None

    with contextlib.closing(_Removable(layer.mlp.linear_fc2.register_forward_hook(poison))):
        yield


@contextlib.contextmanager
def backward_nan(layer: Any) -> Iterator[None]:
    """The loss is finite, and the gradient that enters the layer's MLP from behind is NaN in one microbatch."""
    seen: dict[float, int] = {}  # a recomputed layer has the same input, while Megatron's count has gone on

    def poison(_: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
        microbatch = seen.setdefault(float(inputs[0].detach().double().sum()), layer.current_microbatch)
        return (_NanBackward.apply(output[0]), output[1]) if microbatch == MICROBATCH else None

    with contextlib.closing(_Removable(layer.mlp.linear_fc2.register_forward_hook(poison))):
        yield


class _NanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


@contextlib.contextmanager
def nan_weight(layer: Any) -> Iterator[None]:
    """One number of one weight is NaN before the step; put right afterwards."""
    weight = layer.self_attention.linear_proj.weight.data
    before = weight[0, 0].clone()
    weight[0, 0] = torch.nan
    yield
    weight[0, 0] = before


@contextlib.contextmanager
def norm_overflow(layer: Any) -> Iterator[None]:
    """Every gradient is finite, and its square is not."""
    hook = layer.self_attention.linear_proj.weight.register_hook(lambda gradient: gradient * 1e30)
    with contextlib.closing(_Removable(hook)):
        yield


@dataclasses.dataclass
class _Removable:
    handle: Any

    def close(self) -> None:
        self.handle.remove()


Poison = Callable[[Any], contextlib.AbstractContextManager[None]]
CASES: dict[str, Poison] = {
    "clean": lambda _: contextlib.nullcontext(),
    "forward_overflow": forward_overflow,
    "backward_nan": backward_nan,
    "nan_weight": nan_weight,
    "once_only": once_only,
    "norm_overflow": norm_overflow,
}


def cases_of(layout: str) -> list[str]:
    """All in the first layout; in the others what depends on the schedule and the groups."""
    if layout == "dp2xpp2":
        return list(CASES)
    return ["forward_overflow"] if layout == "pp4" else ["forward_overflow", "backward_nan"]


def build(config: RunConfig, device: torch.device) -> tuple[Chunks, Any]:
    chunks = build_model(config, device)
    optimizer, _ = build_optimizer(config, chunks)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3  # in place of the schedule's first step, which is 0
    return chunks, optimizer


def undisturbed_run(config: RunConfig, device: torch.device) -> tuple[list[StepResult], list[Any]]:
    """The two clean steps of `run_case` by themselves: results and final state on this rank."""
    chunks, optimizer = build(config, device)
    return [train_step(chunks, optimizer, microbatches(step), SHAPE) for step in (0, 2)], state_of(chunks, optimizer)


def run_case(
    config: RunConfig, poison: Poison, device: torch.device, undisturbed: tuple[list[StepResult], list[Any]]
) -> dict[str, Any]:
    """A clean step, a poisoned one, a clean one: what this rank saw."""
    chunks, optimizer = build(config, device)
    layer = next((x for m in unwrap_model(chunks) for x in m.decoder.layers if x.layer_number == LAYER + 1), None)
    # The last replica and tensor rank that holds the layer is to blame.
    blamed = (
        layer is not None
        and parallel_state.get_data_parallel_rank() == parallel_state.get_data_parallel_world_size() - 1
        and parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_tensor_model_parallel_world_size() - 1
    )
    initial = state_of(chunks, optimizer)
    first = train_step(chunks, optimizer, microbatches(0), SHAPE)
    before, hooks = state_of(chunks, optimizer), num_hooks(chunks)
    with poison(layer) if blamed else contextlib.nullcontext():
        poisoned = train_step(chunks, optimizer, microbatches(1), SHAPE)
    untouched, hooks_left = same(state_of(chunks, optimizer), before), num_hooks(chunks) - hooks
    last = train_step(chunks, optimizer, microbatches(2), SHAPE)

    ids = [batch[SAMPLE_IDS].tolist() for batch in microbatches(1) if SAMPLE_IDS in batch]
    return {
        "rank": dist.get_rank(),
        "data_rank": parallel_state.get_data_parallel_rank(),
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "blamed": blamed,
        "ids": ids[MICROBATCH] if ids else None,
        "loss": str(poisoned.loss),
        "grad_norm": str(poisoned.grad_norm),
        "skipped": poisoned.skipped,
        "diagnosis": list(poisoned.diagnosis),
        "untouched": untouched,
        "first_step_changed_something": not same(initial, before),
        "hooks_left": hooks_left,
        "continues_as_without": undisturbed[0] == [first, last] and same(undisturbed[1], state_of(chunks, optimizer)),
    }


def main(file: Path, names: list[str]) -> None:
    device = initialize_distributed(launch_environment(), timeout=timedelta(minutes=1))
    results: dict[str, Any] = {}
    for name in names:
        parallel, recompute, num_loops = LAYOUTS[name]
        parallel_state.destroy_model_parallel()
        initialize_model_parallel(**group_sizes(parallel))
        config = config_of(parallel, recompute, num_loops)
        undisturbed = undisturbed_run(config, device)
        for case in cases_of(name):
            seen: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(seen, run_case(config, CASES[case], device, undisturbed))
            results[f"{name} {case}"] = seen
    if dist.get_rank() == 0:
        file.write_text(json.dumps(results))
    dist.barrier()
    shut_down()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # exit handlers would wait for the other ranks
