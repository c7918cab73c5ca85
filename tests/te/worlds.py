"""One rank of a world on TransformerEngine's layers: ``python -m tests.te.worlds FOLDER JOBS.json``.

TransformerEngine was imported before, as `PRELOADED` says. What it does with a list of jobs, and leaves in the folder,
is what tests/parallel/worker.py does.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads, param_and_grad_buffer
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.utils import unwrap_model
from transformer_engine.pytorch.module import layernorm_linear
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from megatron_depthattn.benchmarks import memory
from megatron_depthattn.config import validate
from megatron_depthattn.parallel.cpu_runtime import enter_cpu_runtime
from megatron_depthattn.train import build as train_build
from megatron_depthattn.train.build import Chunks, Fp8State, build_model, build_optimizer
from megatron_depthattn.train.step import run_microbatches, train_step
from megatron_depthattn.train.step_folders import Progress
from tests.checkpoints import load_checkpoint, save_checkpoint
from tests.parallel import cases, overlap, worker
from tests.te.kernels import computing
from tests.te.small import FUSED_NORMS
from tests.te.world_cases import Job

COALESCING = param_and_grad_buffer._coalescing_manager


def main(folder: Path, jobs: list[Job]) -> None:
    enter_cpu_runtime()  # before `computing` replaces functions that it replaces, too
    with computing():
        worker.work_off(folder, jobs, lambda job, device: _do(job, folder, device))


def _do(job: Job, folder: Path, device: torch.device) -> dict[str, Any]:
    FP8GlobalStateManager.reset()  # it knows the layers of every model of the process
    if job.overlap:  # with what waits for several collectives at once, as `computing` has it only for FP8 weights
        with patch.object(param_and_grad_buffer, "_coalescing_manager", COALESCING):
            return overlap.compare(job, folder, device, worker.microbatches)
    if job.memory:
        return _memory(job, device)
    with (worker.SABOTAGES | SABOTAGES).get(job.sabotage, contextlib.nullcontext)():
        return _work(job, folder, device)


def _work(job: Job, folder: Path, device: torch.device) -> dict[str, Any]:
    """Losses and norms of the job's steps, and of the first one's weights the gradients and delayed scaling's state."""
    config = job.config()
    validate(config, dist.get_world_size(), needs_data=False)
    chunks = build_model(config, device)
    weights = folder / (job.method if job.method in cases.METHODS else "vanilla")
    load_checkpoint(worker.common_weights(weights, chunks), chunks)
    optimizer, scheduler = build_optimizer(config, chunks)
    first = worker.microbatches(0, documents=job.documents, alone=job.alone)
    if job.recipe:  # until scales have seen every tensor
        run_microbatches(chunks, first, worker.SHAPE, forward_only=False)
        for chunk in chunks:
            chunk.zero_grad_buffer()
    with _counted_rolls() as mine:
        loss = run_microbatches(chunks, first, worker.SHAPE, forward_only=False)
    result: dict[str, Any] = {"losses": [loss], "grad_norms": [], "scales": _scales(chunks), "rolls": _gathered(mine)}
    if whole := worker.gather_gradients(chunks):
        result |= worker.compare_gradients(job, folder, *map(_local_names, whole))
    if job.fused:
        added = [p.grad_added_to_main_grad for c in chunks for n, p in c.named_parameters() if ".linear_" in n]
        assert any(added)
    run = _Run(chunks, optimizer, scheduler, Fp8State(chunks))
    for step in range(job.steps if job.steps > 1 else 0):
        run.step(step, result)
    if job.save:
        saved = save_checkpoint(folder / f"{job.name}-saved", Progress(), chunks, optimizer, scheduler, config={})
        chunks = build_model(config, device)
        again = _Run(chunks, *build_optimizer(config, chunks), Fp8State(chunks))
        load_checkpoint(saved, chunks, again.optimizer, again.scheduler)
        result["resumed"] = again.step(job.steps, {"losses": [], "grad_norms": []})
        run.step(job.steps, result)
    return result


def _memory(job: Job, device: torch.device) -> dict[str, Any]:
    models: list[Any] = []
    build = train_build.build_chunk
    with patch.object(train_build, "build_chunk", lambda *args: models.append(build(*args)) or models[0]):
        saved = memory.kept(job.config(), device).saved
    copies = [copy for m in models[0].modules() for copy in getattr(m, "_fp8_workspaces", {}).values()]
    return {"saved": saved, "copies": sum(part.nbytes for copy in copies for part in memory._parts(copy))}


class _Run(NamedTuple):
    chunks: Chunks
    optimizer: Any
    scheduler: Any
    fp8: Fp8State

    def step(self, index: int, result: dict[str, Any]) -> dict[str, Any]:
        self.scheduler.step(1)
        done = train_step(self.chunks, self.optimizer, worker.microbatches(index), worker.SHAPE, self.fp8)
        result["losses"].append(done.loss)
        result["grad_norms"].append(done.grad_norm)
        result["skipped"] = result.get("skipped", 0) + done.skipped
        return result


def _local_names(found: dict[str, Any]) -> dict[str, Any]:
    def local(name: str) -> str:
        for ours, fused in FUSED_NORMS.items():
            name = name.replace(fused, ours)
        return name

    return {local(name): value for name, value in found.items()}


@contextlib.contextmanager
def _counted_rolls() -> Iterator[list[float]]:
    """How often this rank's histories are rolled in a microbatch: forward, backward."""
    counted: Counter[bool] = Counter()
    own = FP8GlobalStateManager.reduce_and_update_fp8_tensors

    def update(forward: bool = True) -> None:
        counted[forward] += 1
        own(forward=forward)

    found: list[float] = []
    with patch.object(FP8GlobalStateManager, "reduce_and_update_fp8_tensors", update):
        yield found
    passes = len(worker.microbatches(0))
    found += [counted[True] / passes, counted[False] / passes]


def _scales(chunks: Chunks) -> list[dict[str, list[float]]]:
    """By rank and linear layer: of its input, its weight and the gradient of its output."""
    mine = {}
    for layer in (layer for model in unwrap_model(chunks) for layer in model.decoder.layers):
        for name, module in layer.named_modules():
            states = [getattr(module, "fp8_meta", {}).get(f"scaling_{way}") for way in ("fwd", "bwd")]
            if ".linear_" in name and hasattr(states[0], "amax_history"):
                forward, backward = (state.scale.tolist() for state in states)
                mine[f"{layer.layer_number}.{name}"] = [*forward[:2], backward[0]]
    return _gathered(mine)


def _gathered(mine: Any) -> list[Any]:
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return everyones


# ---- deliberate mistakes


def _amax_not_reduced() -> Any:
    """Every rank scales by what it has seen itself."""
    return patch.object(FP8GlobalStateManager, "reduce_tensor_across_group_op_max", lambda *_, **__: None)


def _norms_not_reduced() -> Any:
    """Under sequence parallel every tensor rank keeps the gradient of its own positions."""
    module = sys.modules[finalize_model_grads.__module__]
    return patch.object(module, "_allreduce_non_tensor_model_parallel_grads", lambda *_, **__: None)


def _amax_of_own_positions() -> Any:
    """Under sequence parallel every tensor rank scales its positions by themselves, and they are gathered as one."""
    return patch.object(layernorm_linear, "set_quantizer_amax_reduction_group", lambda *_: None)


def _dtypes_gathered_together() -> Any:
    """Weights in FP8 and in bf16 by one call, as NCCL does: gloo gives them out under each other's bytes."""
    return patch.object(param_and_grad_buffer, "_coalescing_manager", COALESCING)


def _infinite_attention() -> Any:
    """An entry of what every core attention hands on, and nothing in what its backward pass computes."""
    own = TEDotProductAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = own(self, *args, **kwargs)
        first = torch.zeros_like(output, dtype=torch.bool)
        first[0, 0, 0] = True
        return output.masked_fill(first, float("inf"))

    return patch.object(TEDotProductAttention, "forward", forward)


SABOTAGES = {
    "dtypes_gathered_together": _dtypes_gathered_together,
    "infinite_attention": _infinite_attention,
    "amax_not_reduced": _amax_not_reduced,
    "amax_of_own_positions": _amax_of_own_positions,
    "norms_not_reduced": _norms_not_reduced,
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Job(**job) for job in json.loads(Path(sys.argv[2]).read_text())])
