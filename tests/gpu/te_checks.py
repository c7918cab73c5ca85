"""What holds of a layer spec and of a precision: functions of a place that fail by assertion.

test_te.py runs them with TransformerEngine's layers, on a GPU or in tests/te/inside.py. Bounds are those of rounding:
bf16 was measured at 1.2 to 1.9 % of the logits on a CPU, FP8 at 11 to 15 % of bf16's, its loss at 0.004 nats, its
worst gradient at a cosine of 0.9.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from megatron_depthattn.model.documents import documents_of
from megatron_depthattn.parallel.microbatch_state import MicrobatchState
from tests.gpu.te_models import (
    BF16,
    FP32,
    METHODS_OWN,
    RECOMPUTE,
    VANILLA,
    Pass,
    Place,
    decoder_layers,
    largest_difference,
    linear_layers,
    relative_error,
    run,
    scaling_state,
    worst_cosine,
)

BF16_LOGITS, BF16_COSINE = 0.05, 0.99
FP8_LOGITS, FP8_COSINE, FP8_LOSS = 0.3, 0.8, 0.03
FP8_SHOWS = 0.02
"""FP8 logits differ from bf16's by more than this: bf16 rounds to 2**-9, FP8 to 2**-4 of a number."""
ROUNDED_SUMS = 0.15
"""Of gradients that differ in the order of one sum in bf16, behind layers in FP8; in bf16 alone a tenth of it."""
FP8_ATTENTION = ("precision.fp8_attention=true", "model.kv_channels=128")
"""With heads of 128: cuDNN's FP8 backward pass takes no others on compute capability 9.0."""
UNFUSED_ATTENTION = ("model.num_query_groups=4",)
"""As many as heads: the unfused attention keeps k and v once for every head."""
MIXING = {
    "vanilla": (VANILLA,),
    "stride 1": ("model.depth_attention.stride=1",),
    "stride 3": ("model.depth_attention.stride=3",),
    "looped": ("model.depth_attention.stride=3", "model.num_layers=3", "model.num_loops=2"),
    "denseformer": ("model.method=denseformer", "model.denseformer.dilation=2"),
    "attnres": ("model.method=attnres", "model.attnres.block_size=4"),
    "mhc": ("model.method=mhc", "model.mhc.num_streams=2"),
}
METHODS = ("denseformer", "attnres", "mhc")


def with_op(mixing: str, op: str) -> tuple[str, ...]:
    return (*MIXING[mixing], f"model.depth_attention.op={op}")


def check_bf16_parity(place: Place, mixing: str, op: str = "lean") -> dict[str, float]:
    """Against local layers in fp32 no worse than twice what local layers in bf16 are."""
    settings, tokens = with_op(mixing, op), place.tokens()
    truth = run(place.local.build(FP32, *settings), tokens)
    local, own = run(place.local.build(BF16, *settings), tokens), run(place.build(BF16, *settings), tokens)
    found = {
        "local": relative_error(local.logits, truth.logits),
        "own": relative_error(own.logits, truth.logits),
        "own, worst layer": worst_layer(place, settings, tokens),
        "local cosine": worst_cosine(local.gradients, truth.gradients),
        "own cosine": worst_cosine(own.gradients, truth.gradients),
    }
    assert found["own"] <= min(2 * found["local"], BF16_LOGITS), found
    assert found["own cosine"] >= max(1 - 4 * (1 - found["local cosine"]), BF16_COSINE), (
        found
    )  # 1 - cosine: error squared
    if mixing != "vanilla":
        off = run(place.build(BF16, VANILLA), tokens)
        found["control, mix off"] = relative_error(off.logits, truth.logits)
        assert found["control, mix off"] > 3 * BF16_LOGITS, found
        shared = off.gradients.keys() & truth.gradients.keys()
        sides = ({name: one.gradients[name] for name in shared} for one in (off, truth))
        assert worst_cosine(*sides) < BF16_COSINE - 0.1
    return found


def worst_layer(place: Place, settings: tuple[str, ...], tokens: Tensor) -> float:
    """What a layer hands on in bf16, each given its own predecessor's, against local layers in fp32."""
    truth = outputs_of(place.local.build(FP32, *settings), tokens)
    local, own = (outputs_of(each.build(BF16, *settings), tokens) for each in (place.local, place))
    errors = [[relative_error(x, y) for x, y in zip(each, truth, strict=True)] for each in (local, own)]
    assert all(mine <= 2 * theirs + 2**-8 for theirs, mine in zip(*errors, strict=True)), errors
    return max(errors[1])


def settled(chunk: torch.nn.Module, place: Place) -> Pass:
    """A pass once delayed scaling has seen its tensors twice; other recipes remember nothing."""
    if place.spec == "te":
        for seed in (2, 3):
            run(chunk, place.tokens(seed))
    return run(chunk, place.tokens())


def check_recipe(place: Place, recipe: str, mixing: str = "stride 3", *more: str) -> dict[str, float]:
    """Forward and backward: finite, near bf16, and really in FP8; ``more``: other settings of the FP8 model."""
    shape = tuple(setting for setting in more if not setting.startswith("precision."))
    settings, tokens = (*with_op(mixing, "lean"), *shape), place.tokens()
    half = run(place.build(BF16, *settings), tokens)
    chunk = place.build(BF16, *settings, f"precision.fp8={recipe}", *more)
    own = settled(chunk, place)
    assert all(x.isfinite().all() for x in (own.logits, *own.gradients.values()))
    assert all(module.fp8 for linears in linear_layers(chunk) for module in linears), "a linear layer stayed in bf16"
    moved = [bool(scale.ne(1).any()) for scale in scaling_state(chunk)[::2]] if recipe == "delayed" else []
    assert all(moved), "a scale is not updated"
    found = {
        "logits": relative_error(own.logits, half.logits),
        # FP8's error of hidden states is large beside the differences between those that a method compares
        "cosine": worst_cosine(own.gradients, half.gradients, but=METHODS_OWN),
        "loss": own.loss - half.loss,
    }
    assert FP8_SHOWS < found["logits"] <= FP8_LOGITS, found
    assert found["cosine"] >= FP8_COSINE, found
    assert abs(found["loss"]) <= FP8_LOSS, found
    off = settled(place.build(BF16, *shape, VANILLA, f"precision.fp8={recipe}"), place)
    found["control, mix off"] = relative_error(off.logits, half.logits)
    assert found["control, mix off"] > min(FP8_LOGITS, 1.5 * found["logits"]), found
    return found


def check_recompute(
    place: Place, recipe: str | None, bound: float, mixing: str = "stride 1", mode: str = "uniform-1"
) -> dict[str, float]:
    """Full recompute changes nothing: logits and every gradient, those through sources among them.

    Args:
        bound: largest relative difference of a gradient; on a GPU not 0, as sums into the embedding's gradient have no
            order there.
    """
    settings = (BF16, *with_op(mixing, "lean"), *([f"precision.fp8={recipe}"] if recipe else []))
    plain = settled(place.build(*settings), place)
    chunk = place.build(*settings, *RECOMPUTE[mode])
    passes = noted_passes(chunk) if recipe else Counter()
    recomputed = settled(chunk, place)
    found = {"logits": relative_error(recomputed.logits, plain.logits)}
    found["recomputed"] = largest_difference(recomputed, plain)
    assert found["logits"] <= (0 if place.device == "cpu" else 1e-3) and found["recomputed"] <= bound, found
    if recipe:  # TransformerEngine knows every layer's second pass for one, in which scales are those of the first
        again = {"uniform-1": 6, "uniform-2": 6, "block-2": 2}[mode]
        assert passes == {(True, False): 3 * 6, (True, True): 3 * again}, passes
    if mixing in ("vanilla", "mhc"):
        return found  # no sources
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MicrobatchState, "detach_for_reuse", without_gradient)
        detached = settled(place.build(*settings, *RECOMPUTE[mode]), place)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    found["control, sources detached"] = relative_error(detached.gradients[name], plain.gradients[name])
    assert found["control, sources detached"] > max(1.5 * bound, 1e-2), found
    return found


def without_gradient(state: MicrobatchState, parts: dict[str, Tensor], hidden_states: Tensor) -> Tensor:
    """The control's `MicrobatchState.detach_for_reuse`: nobody fetches what readers would pay."""
    state._detached |= {name: tensor.detach() for name, tensor in parts.items()}
    return hidden_states


def noted_passes(chunk: torch.nn.Module) -> Counter[tuple[bool, bool]]:
    """Counts, from now on, a layer's passes by whether FP8 is on and TransformerEngine recomputes."""
    passes: Counter[tuple[bool, bool]] = Counter()

    def note(*_: object) -> None:
        from transformer_engine.pytorch.distributed import in_fp8_activation_recompute_phase
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        passes[FP8GlobalStateManager.is_fp8_enabled(), in_fp8_activation_recompute_phase()] += 1

    for layer in decoder_layers(chunk):
        layer.register_forward_pre_hook(note)
    return passes


def check_weights_are_cast_anew(place: Place, recipe: str, bound: float) -> dict[str, float]:
    """FP8 copies of weights, transposed ones too, are made at a step's first microbatch, so they follow the weights."""
    settings = (BF16, *MIXING["stride 3"], f"precision.fp8={recipe}")
    fresh, chunk = (place.build(*settings) for _ in range(2))
    run(chunk, place.tokens())
    for model in (fresh, chunk):
        for weight in (module.weight for linears in linear_layers(model) for module in linears):
            weight.data = weight.detach().roll(1, 0)
    expected = run(fresh, place.tokens())
    found = {"first microbatch": largest_difference(run(chunk, place.tokens()), expected)}
    assert found["first microbatch"] <= bound, found
    for weight in (module.weight for linears in linear_layers(chunk) for module in linears):
        weight.data.neg_()
    found["later one"] = largest_difference(run(chunk, place.tokens(), is_first=False), expected)
    assert found["later one"] <= bound, f"control: it has the copies of before, {found}"
    return found


def check_fp8_attention(place: Place, recipe: str) -> dict[str, float]:
    """Core attention in FP8 too."""
    found = check_recipe(place, recipe, "stride 3", *FP8_ATTENTION)
    half = settled(place.build(BF16, f"precision.fp8={recipe}", *FP8_ATTENTION[1:]), place)
    own = settled(place.build(BF16, f"precision.fp8={recipe}", *FP8_ATTENTION), place)
    found["attention"] = relative_error(own.logits, half.logits)
    assert found["attention"] > 1e-3, "attention stayed in bf16"
    return found


def check_bf16_layers(place: Place, recipe: str) -> dict[str, float]:
    """The first and the last layer compute in bf16, the first to the bit as in a bf16 model; the others do not."""
    settings, tokens = (BF16, *MIXING["stride 3"]), place.tokens()
    kept = ("precision.bf16_first_layers=1", "precision.bf16_last_layers=1")
    half = outputs_of(place.build(*settings), tokens)
    chunk = place.build(*settings, f"precision.fp8={recipe}", *kept)
    own = outputs_of(chunk, tokens)
    assert torch.equal(own[0], half[0])
    in_fp8 = [{getattr(module, "fp8", False) for module in linears} for linears in linear_layers(chunk)]
    assert in_fp8 == [{False}, {True}, {True}, {True}, {True}, {False}]
    whole = outputs_of(place.build(*settings, f"precision.fp8={recipe}"), tokens)
    found = {"second layer": relative_error(own[1], half[1]), "control": relative_error(whole[0], half[0])}
    assert min(found.values()) > 1e-3, found
    return found


@torch.no_grad()
def outputs_of(chunk: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
    """What each layer hands on, ``[s, b, h]``."""
    seen: list[Tensor] = []
    for layer in decoder_layers(chunk):
        layer.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    chunk(tokens, None, None)
    return seen


def check_packed(place: Place, lengths: list[int], bound: float, *settings: str) -> dict[str, float]:
    """A packed batch of documents is each document alone, in logits and gradients; without borders it is not.

    Args:
        bound: of the relative difference of logits; of any gradient ten times that, but its direction stays.
    """
    chunk = place.build(*MIXING["stride 1"], *settings)
    tokens = place.tokens().flatten()[: sum(lengths)][None]
    labels = place.tokens(2).flatten()[: sum(lengths)][None]
    alone = [run(chunk, *each) for each in zip(tokens.split(lengths, 1), labels.split(lengths, 1), strict=True)]
    logits = torch.cat([each.logits for each in alone], dim=1)
    gradients = {name: sum(each.gradients[name] for each in alone) for name in alone[0].gradients}
    together, whole = (
        run(chunk, tokens, labels, packed_seq_params=documents_of(torch.tensor(ends), thd=True, device=place.device))
        for ends in ([0, *accumulate(lengths)], [0, sum(lengths)])
    )
    found = {
        "logits": relative_error(together.logits, logits),
        "gradients": max(relative_error(together.gradients[name], x) for name, x in gradients.items()),
        "control, no borders": relative_error(whole.logits, logits),
    }
    found["cosine"] = worst_cosine(together.gradients, gradients)
    assert found["logits"] <= bound and found["gradients"] <= 10 * bound and found["cosine"] >= FP8_COSINE, found
    assert found["control, no borders"] > max(2 * bound, 0.5), found
    return found
