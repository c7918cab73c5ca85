"""Training in delayed FP8 scaling: what evaluations, skipped steps and other builds leave behind. Looped models. And
runs that one spec begins and the other resumes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from megatron_depthattn.train import step
from megatron_depthattn.train.build import Fp8State
from megatron_depthattn.train.engine import MegatronEngine
from megatron_depthattn.train.save import CheckpointSaver
from megatron_depthattn.train.step_folders import Progress
from tests.te.kernels import computing
from tests.te.small import small_config

LENGTH = 32
BeforeStep = Callable[[MegatronEngine, int], None]
SPECS = ("local", "te")
PARAMETERS = {"weights in bf16": False, "weights in FP8": True}


def results() -> dict[str, Any]:
    """By how weights are kept: a plain run, one again, one with evaluations, with skipped steps, and the control.

    And the losses of a looped model under each spec, and of runs resumed under both.
    """
    from tests.te import switches

    found: dict[str, Any] = {}
    with computing():
        for name, fp8_params in PARAMETERS.items():
            found[name] = {
                "plain": _trained(fp8_params),
                "again": _trained(fp8_params),
                "evaluated": _trained(fp8_params, before_step=_evaluate),
                "skipped": _trained(fp8_params, before_step=_skip),
            }
            with patch.object(Fp8State, "restore", lambda self: None):
                found[name]["control"] = _trained(fp8_params, before_step=_evaluate)
        found["loops"] = {spec: _looped(spec) for spec in SPECS}
        found["resumed"] = {spec: _resumed(spec) for spec in SPECS}
        found["gradients"] = {fused: switches.gradients(fused=fused) for fused in (False, True)}
    return found


def _looped(spec: str) -> list[float]:
    """Losses of a model in bf16 whose layers are run twice."""
    return _losses(MegatronEngine(small_config(spec, num_loops=2, length=LENGTH), torch.device("cpu")))


def _resumed(first: str) -> dict[str, list[float]]:
    """Losses after the checkpoint of a run of the spec ``first``, by the spec that resumes it; and of a run that does
    not load it."""

    def engine(spec: str) -> MegatronEngine:
        return MegatronEngine(small_config(spec, length=LENGTH), torch.device("cpu"))

    run = engine(first)
    _losses(run)
    found = {}
    with tempfile.TemporaryDirectory() as work:
        saver = CheckpointSaver(Path(work))
        saver.save(Progress(step=4), run.checkpoint_state())
        outcome = saver.take_outcome()
        assert outcome and not outcome.error, outcome
        for spec in SPECS:
            resumed = engine(spec)
            assert resumed.load(outcome.folder).progress.step == 4
            found[spec] = _losses(resumed)
    return found | {"control": _losses(engine(first))}


def _trained(fp8_params: bool, *, before_step: BeforeStep = lambda *_: None) -> dict[str, Any]:
    """Losses of some steps, scales and histories of all layers before the first (``initial``) and after the last."""
    FP8GlobalStateManager.reset()  # it knows the layers of every model of the process
    config = small_config("te", fp8="delayed", fp8_params=fp8_params, length=LENGTH)
    engine = MegatronEngine(config, torch.device("cpu"))
    initial = _state(engine)
    return {"initial": initial, "losses": _losses(engine, before_step), "final": _state(engine)}


def _losses(engine: MegatronEngine, before_step: BeforeStep = lambda *_: None) -> list[float]:
    losses: list[float] = []
    for seed in (1, 2, 1, 2):
        before_step(engine, len(losses))
        engine.advance_schedule()
        losses.append(engine.train_step([_microbatch(seed)]).loss)
    return losses


def _evaluate(engine: MegatronEngine, _: int) -> None:
    with engine.evaluating():
        engine.loss([_microbatch(7)])


def _skip(engine: MegatronEngine, done: int) -> None:
    """Before the first step and before the third."""
    if done in (0, 2):
        with patch.object(step, "exchange", _not_finite):
            assert engine.train_step([_microbatch(9)]).skipped


def _not_finite(numbers: Sequence[float], on_device: Tensor) -> list[list[float]]:
    return [[float("nan")] * (len(numbers) + len(on_device))]


def _microbatch(seed: int) -> dict[str, Tensor]:
    tokens = torch.randint(384, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"tokens": tokens, "labels": tokens.roll(-1, dims=1)}


def _state(engine: MegatronEngine) -> list[Tensor]:
    layers = [m for chunk in engine._chunks for m in chunk.modules() if isinstance(m, TransformerEngineBaseModule)]
    states = [layer.fp8_meta.get(f"scaling_{way}") for layer in layers for way in ("fwd", "bwd")]
    return [x.clone() for state in states if state is not None for x in (state.scale, state.amax_history)]
