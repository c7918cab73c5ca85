"""What holds of the engine with a layer spec and a precision: saving and resuming, the optimizer's weights, memory.

As te_checks.py: functions of a place that fail by assertion, for a GPU with TransformerEngine and for CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_depthattn.benchmarks import memory
from megatron_depthattn.train.engine import MegatronEngine
from megatron_depthattn.train.save import CheckpointSaver
from megatron_depthattn.train.step_folders import Progress
from tests.gpu.te_checks import FP8_LOSS, MIXING
from tests.gpu.te_models import BF16, FP32, FULL_RECOMPUTE, Place, decoder_layers, linear_layers, relative_error

STEPS_BEFORE, STEPS_AFTER = (1, 2, 1, 2), (1, 2, 1)
"""Seeds of each step's tokens; two batches in turn are soon learnt, so it shows whether a run was resumed."""


def engine_of(place: Place, *settings: str) -> MegatronEngine:
    config = place.config(*MIXING["stride 3"], "train.steps=20", "optimizer.lr=1e-3", *settings)
    return MegatronEngine(config, torch.device(place.device))


def microbatch(place: Place, seed: int) -> dict[str, Tensor]:
    tokens = place.tokens(seed)
    return {"tokens": tokens, "labels": tokens.roll(-1, dims=1)}


def train(engine: MegatronEngine, place: Place, seeds: Iterable[int]) -> Tensor:
    """Losses of some steps, fp64."""
    losses = []
    for seed in seeds:
        engine.advance_schedule()
        losses.append(engine.train_step([microbatch(place, seed)]).loss)
    return torch.tensor(losses, dtype=torch.float64)


def evaluate(engine: MegatronEngine, place: Place) -> float:
    with engine.evaluating():
        return engine.loss([microbatch(place, 7)])


def scaling_state(engine: MegatronEngine) -> list[Tensor]:
    """Scales and histories of delayed scaling, of every linear layer."""
    (chunk,) = engine._chunks
    metas = [module.fp8_meta for linears in linear_layers(chunk) for module in linears]
    states = [meta[f"scaling_{way}"] for meta in metas for way in ("fwd", "bwd")]
    return [x.clone() for state in states for x in (state.scale, state.amax_history)]


def check_resume(place: Place, folder: Path, recipe: str | None, bound: float, *more: str) -> dict[str, float]:
    """A run that was saved and loaded continues as one that was not; local layers in bf16 take the checkpoint, too.

    Args:
        bound: largest relative difference of a loss; 0 on CPU.
        more: other settings of both runs.
    """
    settings = (BF16, *([f"precision.fp8={recipe}"] if recipe else []), *more)
    whole = engine_of(place, *settings)
    train(whole, place, STEPS_BEFORE)
    saver = CheckpointSaver(folder)
    saver.save(Progress(step=len(STEPS_BEFORE)), whole.checkpoint_state())
    outcome = saver.take_outcome()
    assert outcome is not None and outcome.error is None, outcome
    state = scaling_state(whole) if recipe == "delayed" else []
    evaluated = evaluate(whole, place)
    if recipe == "delayed":
        pairs = zip(scaling_state(whole), state, strict=True)
        assert all(torch.equal(now, before) for now, before in pairs), "an evaluation has moved the scaling state"
    after = train(whole, place, STEPS_AFTER)

    resumed = engine_of(place, *settings)
    assert resumed.load(outcome.folder).progress.step == len(STEPS_BEFORE)
    if recipe == "delayed":
        assert any(x.any() for x in state)
        assert all(torch.equal(now, saved) for now, saved in zip(scaling_state(resumed), state, strict=True)), (
            "scaling state is not what was saved"
        )
    evaluate(resumed, place)
    found = {"resumed": relative_error(train(resumed, place, STEPS_AFTER), after)}
    assert found["resumed"] <= bound, found
    found["control, not loaded"] = relative_error(train(engine_of(place, *settings), place, STEPS_AFTER), after)
    assert found["control, not loaded"] > max(10 * bound, 1e-3), found

    local = engine_of(place.local, BF16)
    local.load(outcome.folder)
    found["local layers"] = evaluate(local, place) - evaluated
    assert abs(found["local layers"]) <= (FP8_LOSS if recipe else 3e-3), found
    return found


def check_masters(place: Place, recipe: str | None) -> dict[str, float]:
    """The optimizer's fp32 weights begin as they were drawn, to bf16's rounding, though the model's may be FP8."""
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
    before = decoder_layers(chunk)[0].mlp.linear_fc2.weight.main_param.clone()
    assert train(engine, place, [1, 2, 3]).isfinite().all()
    assert not torch.equal(decoder_layers(chunk)[0].mlp.linear_fc2.weight.main_param, before)
    return found


def check_memory(place: Place, share: float, *settings: str, recompute: bool = False) -> dict[str, float]:
    """Bytes kept for backward above vanilla are the plan's, as autograd's storages and, on a GPU, in the allocator.

    Args:
        share: of the prediction, by which they may differ.
    """
    mode = FULL_RECOMPUTE if recompute else ("recompute.granularity=null",)
    vanilla, depth = (place.config(*mixing, *mode, *settings) for mixing in (MIXING["vanilla"], MIXING["stride 3"]))
    device = torch.device(place.device)
    theirs, own = memory.kept(vanilla, device), memory.kept(depth, device)
    tokens = depth.train.micro_batch_size * depth.data.sequence_length
    numbers, _ = memory.predicted_elements(depth, place.device)
    predicted = numbers * tokens * (2 if depth.precision.dtype == "bf16" else 4)
    found = {"predicted": float(predicted), "saved": float(own.saved - theirs.saved)}
    if own.allocated is not None and theirs.allocated is not None:
        found["allocated"] = float(own.allocated - theirs.allocated)
    for name, value in found.items():
        assert abs(value - predicted) <= share * predicted, (name, found)
    return found
