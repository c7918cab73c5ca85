"""What holds of the engine with a layer spec and a precision: saving and resuming, the optimizer's weights, memory.

As te_checks.py: functions of a place that fail by assertion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_depthattn.benchmarks import memory
from megatron_depthattn.estimate.activations import chunk_memory
from megatron_depthattn.train import step
from megatron_depthattn.train.build import Fp8State
from megatron_depthattn.train.engine import MegatronEngine
from megatron_depthattn.train.save import CheckpointSaver
from megatron_depthattn.train.step import run_microbatches
from megatron_depthattn.train.step_folders import Progress
from tests.gpu.te_checks import FP8_LOSS, MIXING
from tests.gpu.te_models import (
    BATCH,
    BF16,
    FP32,
    RECOMPUTE,
    SEQUENCE,
    Place,
    decoder_layers,
    linear_layers,
    named_parameters,
    relative_error,
    scaling_state,
)

STEPS_BEFORE, STEPS_AFTER = (1, 2, 1), (2, 1)
"""Seeds of each step's tokens; two batches in turn are soon learnt, so it shows whether a run was resumed."""


def engine_of(place: Place, *settings: str) -> MegatronEngine:
    config = place.config(*MIXING["stride 3"], "train.steps=20", "optimizer.lr=1e-3", *settings)
    return MegatronEngine(config, torch.device(place.device))


def microbatch(place: Place, seed: int) -> dict[str, Tensor]:
    tokens = place.tokens(seed)
    return {"tokens": tokens, "labels": tokens.roll(-1, dims=1)}


def save(engine: MegatronEngine, folder: Path) -> Path:
    """The step folder of a checkpoint after `STEPS_BEFORE`."""
    saver = CheckpointSaver(folder)
    saver.save(Progress(step=len(STEPS_BEFORE)), engine.checkpoint_state())
    outcome = saver.take_outcome()
    assert outcome is not None and outcome.error is None, outcome
    return outcome.folder


BeforeStep = Callable[[MegatronEngine, Place], object]


def train(engine: MegatronEngine, place: Place, seeds: Iterable[int], before: BeforeStep = lambda *_: None) -> Tensor:
    """Losses of some steps, fp64."""
    losses = []
    for seed in seeds:
        before(engine, place)
        engine.advance_schedule(1)
        losses.append(engine.train_step([microbatch(place, seed)]).loss)
    return torch.tensor(losses, dtype=torch.float64)


def evaluate(engine: MegatronEngine, place: Place) -> float:
    with engine.evaluating():
        return engine.loss([microbatch(place, 7)]).mean


def check_resume(place: Place, folder: Path, recipe: str | None, bound: float, *more: str) -> dict[str, float]:
    """A run that was saved and loaded continues as one that was not; local layers in bf16 take the checkpoint, too.

    Args:
        bound: largest relative difference of a loss; 0 on CPU.
        more: other settings of both runs.
    """
    settings = (BF16, *([f"precision.fp8={recipe}"] if recipe else []), *more)
    whole = engine_of(place, *settings)
    train(whole, place, STEPS_BEFORE)
    saved = save(whole, folder)
    state = scaling_state(*whole._chunks) if recipe == "delayed" else []
    evaluated = evaluate(whole, place)
    if recipe == "delayed":
        pairs = zip(scaling_state(*whole._chunks), state, strict=True)
        assert all(torch.equal(now, before) for now, before in pairs), "an evaluation has moved the scaling state"
    after = train(whole, place, STEPS_AFTER)

    resumed = engine_of(place, *settings)
    assert resumed.load(saved).progress.step == len(STEPS_BEFORE)
    if recipe == "delayed":
        assert any(x.any() for x in state)
        assert all(
            torch.equal(now, saved) for now, saved in zip(scaling_state(*resumed._chunks), state, strict=True)
        ), "scaling state is not what was saved"
    evaluate(resumed, place)
    found = {"resumed": relative_error(train(resumed, place, STEPS_AFTER), after)}
    assert found["resumed"] <= bound, found
    found["control, not loaded"] = relative_error(train(engine_of(place, *settings), place, STEPS_AFTER), after)
    assert found["control, not loaded"] > max(5 * bound, 1e-3), found

    local = engine_of(place.local, BF16, *(setting for setting in more if setting.startswith("optimizer.")))
    local.load(saved)
    found["local layers"] = evaluate(local, place) - evaluated
    assert abs(found["local layers"]) <= (FP8_LOSS if recipe else 3e-3), found
    return found


def check_other_spec(place: Place, folder: Path) -> dict[str, float]:
    """What local layers have begun and saved, `place`'s resume: weights, optimizer and schedule; in bf16."""
    first = engine_of(place.local, BF16)
    train(first, place, STEPS_BEFORE)
    saved = save(first, folder)
    runs = {}
    for spec, each in (("local", place.local), ("own", place)):
        engine = engine_of(each, BF16)
        assert engine.load(saved).progress.step == len(STEPS_BEFORE)
        runs[spec] = train(engine, place, STEPS_AFTER)
    found = {"resumed": relative_error(runs["own"], runs["local"])}
    assert found["resumed"] <= 1e-3, found
    found["control, not loaded"] = relative_error(train(engine_of(place, BF16), place, STEPS_AFTER), runs["local"])
    assert found["control, not loaded"] > 1e-2, found
    return found


def check_no_trace(place: Place, bound: float, *settings: str) -> dict[str, float]:
    """Delayed scaling after another build of the seed, with an evaluation before every step, with skipped steps: the
    same losses, scales and histories.

    Args:
        bound: largest relative difference of a loss; where it is 0, scales and histories are bit-equal too, elsewhere
            as near as rounding leaves them.
    """
    settings = (BF16, "precision.fp8=delayed", *settings)

    def losses_and_state(before: BeforeStep = lambda *_: None) -> tuple[Tensor, list[Tensor]]:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()  # it knows the layers of every model of the process
        engine = engine_of(place, *settings)
        losses = train(engine, place, (1, 2, 1, 2), before)
        return losses, scaling_state(*engine._chunks)

    losses, state = losses_and_state()

    def moved(its_state: list[Tensor]) -> float:
        return max(relative_error(mine, expected) for mine, expected in zip(its_state, state, strict=True))

    found = {}
    for name, before in {"again": lambda *_: None, "evaluated": evaluate, "skipped": skip}.items():
        other, its_state = losses_and_state(before)
        found[name] = relative_error(other, losses)
        assert found[name] <= bound, found
        found[f"{name}, scales"] = moved(its_state)
        assert found[f"{name}, scales"] <= (0.05 if bound else 0), found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fp8State, "restore", lambda self: None)
        found["control, not restored"] = moved(losses_and_state(evaluate)[1])
    assert found["control, not restored"] > 0.1, found  # a line of a history is another pass's
    return found


def skip(engine: MegatronEngine, place: Place) -> None:
    """A step whose loss is not finite on another rank."""
    with pytest.MonkeyPatch.context() as patch:
        nan = float("nan")
        patch.setattr(step, "exchange", lambda mine, device: [[nan, 1.0, nan, *mine]])  # loss, tokens, norm
        assert engine.train_step([microbatch(place, 9)]).skipped


def check_fused_gradients(place: Place) -> dict[str, float]:
    """Products that add to the gradient sum the same two microbatches, in fp32; single ones are rounded to bf16."""
    sums = []
    for fused in ("false", "true"):
        engine = engine_of(place, BF16, f"model.fused_gradient_accumulation={fused}")
        run_microbatches(
            engine._chunks, [microbatch(place, seed) for seed in (1, 2)], (BATCH, SEQUENCE), forward_only=False
        )
        (chunk,) = engine._chunks
        sums.append({name: parameter.main_grad.clone() for name, parameter in named_parameters(chunk)})
    apart, fused = sums
    found = {name: relative_error(fused[name], gradient) for name, gradient in apart.items()}
    assert max(found.values()) < 1e-2, found
    differing = {name.rpartition(".linear_")[2] for name, error in found.items() if error}
    assert {"qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"} <= differing, differing
    return {"largest": max(found.values())}


def check_masters(place: Place, recipe: str | None) -> dict[str, float]:
    """The optimizer's fp32 weights begin as they were drawn, to bf16's rounding, though the model's may be FP8; and as
    they were loaded, in a run that begins with the weights of another."""
    drawn = dict(unwrap_model(engine_of(place.local, FP32)._chunks)[0].named_parameters())
    fp8 = (f"precision.fp8={recipe}", "precision.fp8_params=true") if recipe else ()
    engine = engine_of(place, BF16, *fp8)
    (chunk,) = engine._chunks
    found = {"master": 0.0, "weight": 1.0}
    for index, linears in enumerate(linear_layers(chunk)):
        for module in linears:
            weight, name = module.weight, next(n for n, m in chunk.named_modules() if m is module)
            exact = drawn[f"decoder.layers.{index}.{name.partition(f'layers.{index}.')[2]}.weight"].detach().float()
            assert is_float8tensor(weight) == bool(recipe), name
            error = (weight.main_param.view_as(exact) - exact).abs()
            found["master"] = max(found["master"], float((error / exact.abs().clamp(min=1e-6)).max()))
            found["weight"] = min(found["weight"], relative_error(weight.detach().float(), exact))
    assert found["master"] <= 2**-8, found
    assert found["weight"] > 2**-6 or not recipe, f"control: an FP8 weight is rounded far more, {found}"
    (other,) = unwrap_model(engine_of(place, BF16)._chunks)
    given = {name: 1.5 * x for name, x in other.state_dict().items() if not name.endswith("_extra_state")}
    engine._state.take_weights({"model0": given})
    for name, module in unwrap_model([chunk])[0].named_modules():
        if any(module is each for linears in linear_layers(chunk) for each in linears):
            assert torch.equal(module.weight.main_param, given[f"{name}.weight"].float().flatten()), name
    before = decoder_layers(chunk)[0].mlp.linear_fc2.weight.main_param.clone()
    assert train(engine, place, [1, 2, 3]).isfinite().all()
    assert not torch.equal(decoder_layers(chunk)[0].mlp.linear_fc2.weight.main_param, before)
    return found


def check_memory(place: Place, share: float, *settings: str, recompute: bool = False) -> dict[str, float]:
    """Bytes kept for backward above vanilla are the plan's, as autograd's storages and, on a GPU, in the allocator.

    Args:
        share: of the prediction, by which they may differ.
    """
    mode = RECOMPUTE["uniform-1"] if recompute else ("recompute.granularity=null",)
    vanilla, depth = (place.config(*mixing, *mode, *settings) for mixing in (MIXING["vanilla"], MIXING["stride 3"]))
    device = torch.device(place.device)
    theirs, own = memory.kept(vanilla, device), memory.kept(depth, device)
    predicted = chunk_memory(depth, 0).sources
    found = {"predicted": float(predicted), "saved": float(own.saved - theirs.saved)}
    if own.allocated is not None and theirs.allocated is not None:
        found["allocated"] = float(own.allocated - theirs.allocated)
    for name, value in found.items():
        assert abs(value - predicted) <= share * predicted, (name, found)
    return found
