"""What the TransformerEngine spec makes of checkpoints that it did not write, and what it writes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from transformer_engine.common.recipe import DelayedScaling
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

from megatron_depthattn.train.build import build_chunk, transformer_config
from megatron_depthattn.train.checkpoint import load_weights
from tests.e2e.small_run import MODEL
from tests.te.small import Run, small_config, start

LOCAL, IMPORTED, TE, FP8 = "local", "imported", "te", "fp8"
"""Folders of checkpoints: of the local spec and an imported one, given; of the TransformerEngine spec, written here."""


def results(folder: Path) -> dict[str, Any]:
    """Load what lies in ``folder``, write what is named above beside it."""
    found: dict[str, Any] = {}
    run = start_te()
    found["initial"] = run.parameters()
    found["weight_decay"] = run.weight_decay()
    for name in (LOCAL, IMPORTED):
        run = start_te()
        progress = run.load(folder / name).progress
        found[name] = {"step": progress.step, "parameters": run.parameters(), "groups": _steps(run)}
        if name == LOCAL:
            (folder / TE).mkdir()
            found["optimizer"] = type(run.optimizer.chained_optimizers[0].optimizer).__qualname__
            found[TE] = str(run.save(folder / TE))
    run = start_te(fp8="delayed")
    run.load(folder / LOCAL)
    _scale(run)
    found[FP8] = {"folder": str(run.save(folder / FP8)), "saved": _scales(run)}
    again = start_te(fp8="delayed")
    again.load(Path(found[FP8]["folder"]))
    found[FP8] |= {"loaded": _scales(again), "parameters": again.parameters()}
    bf16 = start_te()
    bf16.load(Path(found[FP8]["folder"]))
    found[FP8]["loaded without FP8"] = _scales(bf16)
    found["missing weight"] = _error_of_a_missing_layer(folder / LOCAL)
    return found


def _error_of_a_missing_layer(folder: Path) -> str:
    """The error of a model with one layer more than the checkpoint has."""
    with patch("torch.cuda.is_available", lambda: True):
        config = small_config("te", num_layers=MODEL["num_layers"] + 1)
        model = build_chunk(config, transformer_config(config))
    try:
        load_weights(folder, [model])
    except CheckpointException as error:
        return str(error)
    return ""


def start_te(**options: Any) -> Run:
    """A run of the TransformerEngine spec at step 0, whose constructors believe that there is a GPU."""
    with patch("torch.cuda.is_available", lambda: True):
        return start("te", **options)


def _steps(run: Run) -> list[Any]:
    return [group.get("step") for group in run.optimizer.param_groups]


def _modules(run: Run) -> dict[str, TransformerEngineBaseModule]:
    (model,) = unwrap_model(run.chunks)
    return {name: module for name, module in model.named_modules() if isinstance(module, TransformerEngineBaseModule)}


def _scale(run: Run) -> None:
    """Bring every layer's FP8 state to where passes in delayed scaling bring it: made by the layer, then filled."""
    generator = torch.Generator().manual_seed(3)
    for module in _modules(run).values():
        module.fp8_meta |= {"fp8_checkpoint": True, "recipe": DelayedScaling(amax_history_len=4), "num_gemms": 1}
        module.init_fp8_meta_tensors(module.fp8_meta["recipe"])
        for way in ("scaling_fwd", "scaling_bwd"):
            for tensor in (module.fp8_meta[way].scale, module.fp8_meta[way].amax_history):
                tensor.copy_(torch.rand(tensor.shape, generator=generator))


def _scales(run: Run) -> dict[str, Tensor]:
    """Every tensor in the layers' FP8 states, as they save them."""
    states = {name: module.get_extra_state() for name, module in _modules(run).items()}
    return {
        f"{name}.{key}": value
        for name, state in states.items()
        if state.numel()
        for key, value in pickle.loads(state.numpy().tobytes()).items()
        if isinstance(value, Tensor)
    }
