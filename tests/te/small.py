"""A small run under either layer spec, on CPU with real weights, its checkpoints written and loaded as by a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_depthattn.config import RunConfig, from_dict, to_dict
from megatron_depthattn.model.initialization import globally_named_parameters
from megatron_depthattn.train.build import Chunks, build_model, build_optimizer
from megatron_depthattn.train.checkpoint import Loaded
from megatron_depthattn.train.step_folders import Progress
from tests.checkpoints import load_checkpoint, save_checkpoint
from tests.e2e.small_run import MODEL

PROGRESS = Progress(step=2, consumed_samples=4, consumed_tokens=64)


METHODS: dict[str, dict[str, int]] = {
    "denseformer": {"dilation": 2},
    "attnres": {"block_size": 4},
    "mhc": {"num_streams": 2},
}
"""The other methods, with settings that make something of a few layers."""


def small_config(
    spec: str,
    *,
    method: str = "depth_attention",
    fp8: str | None = None,
    fp8_params: bool = False,
    length: int = 16,
    num_layers: int = MODEL["num_layers"],
    num_loops: int = 1,
    **parallel: Any,
) -> RunConfig:
    """A few layers, bf16."""
    values = {
        "model": MODEL
        | METHODS
        | {"spec": spec, "num_layers": num_layers, "num_loops": num_loops, "method": method}
        | {"depth_attention": MODEL["depth_attention"] | {"op": "lean"}},  # its tensors lie on the CPU
        "precision": {"dtype": "bf16", "fp8": fp8, "fp8_params": fp8_params},
        "parallel": parallel,
        "data": {"path": "unused", "sequence_length": length},
    }
    return from_dict(values, "tests/te")


class Run(NamedTuple):
    """One process's run, before a step or after a load."""

    config: RunConfig
    chunks: Chunks
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def save(self, directory: Path) -> Path:
        """The folder of a checkpoint of the run, optimizer and all."""
        return save_checkpoint(directory, PROGRESS, *self[1:], config=to_dict(self.config))

    def load(self, folder: Path) -> Loaded:
        return load_checkpoint(folder, *self[1:], config=to_dict(self.config))

    def parameters(self) -> dict[str, Tensor]:
        """By name in this process's model."""
        (model,) = unwrap_model(self.chunks)
        return {name: parameter.detach().clone() for name, parameter in globally_named_parameters(model)}

    def moments(self) -> list[dict[str, Tensor]]:
        """Adam's fp32 weights and moments, in the order of the parameters, which is not that of another spec."""
        (part,) = self.optimizer.chained_optimizers
        return [dict(state) for state in part.optimizer.state.values()]

    def weight_decay(self) -> dict[float, int]:
        """Number of elements by the factor of weight decay."""
        groups = self.optimizer.param_groups
        return {group["wd_mult"]: sum(parameter.numel() for parameter in group["params"]) for group in groups}


def start(spec: str, **options: Any) -> Run:
    """A run at step 0, in a world of one."""
    config = small_config(spec, **options)
    chunks = build_model(config, torch.device("cpu"))
    return Run(config, chunks, *build_optimizer(config, chunks))


def restarted(folder: Path, **options: Any) -> Run:
    """A run of the local spec that continues from ``folder``."""
    run = start("local", **options)
    run.load(folder)
    return run


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names with the same bits."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def train_blindly(run: Run) -> None:
    """Two steps along random gradients: every number of weights and optimizer becomes one of its own."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        for parameter in run.chunks[0].parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        run.optimizer.step()
        run.scheduler.step(1)


FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Parameters of a layer that have another name under TransformerEngine."""


def under_te(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the local spec by their names under TransformerEngine."""
    renamed = {}
    for name, parameter in parameters.items():
        for local, fused in FUSED_NORMS.items():
            name = name.replace(local, fused)
        renamed[name] = parameter
    return renamed
