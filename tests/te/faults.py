"""Each fault planted here, in TransformerEngine's stand-in or in what calls it, must fail a check of tests/gpu.

Runs in inside.py, where the same checks pass without the fault.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_depthattn.train import build
from tests.gpu import te_checks, te_engine_checks
from tests.gpu.te_models import BF16, Place
from tests.te.extension import attention, casts, norms, products

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")
PLACE = Place("cpu", "te")
Plant = Callable[[pytest.MonkeyPatch], None]
tex = sys.modules["transformer_engine_torch"]


def stale_copy_by_column(patch: pytest.MonkeyPatch) -> None:
    def fill(x: Tensor, quantizer: Any, output: Any, own: Any = casts._fill) -> None:
        kept = output._transpose
        first = kept is None or bool((kept == casts.NOT_WRITTEN).all())
        if not first:
            output._transpose = None
        own(x, quantizer, output)
        output._transpose = kept

    patch.setattr(casts, "_fill", fill)


def scales_not_updated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tex, "fused_amax_and_scale_update_after_reduction", lambda *_: None)


def scales_of_rows_for_columns(patch: pytest.MonkeyPatch) -> None:
    def fill(x: Tensor, quantizer: Any, output: Any, own: Any = casts._fill_blocks) -> None:
        own(x, quantizer, output)
        if output._columnwise_scale_inv is not None:
            output._columnwise_scale_inv.fill_(float(output._columnwise_scale_inv.nanmedian()))

    patch.setattr(casts, "_fill_blocks", fill)


def optimizer_begins_with_fp8_weights(patch: pytest.MonkeyPatch) -> None:
    def initialize(model: Any, own: Any = build.initialize_weights, **options: Any) -> None:
        own(model, **options)
        for parameter in model.parameters():
            if hasattr(parameter, "get_high_precision_init_val"):
                parameter.get_high_precision_init_val().copy_(parameter.dequantize())

    patch.setattr(build, "initialize_weights", initialize)


def positions_turned_on_backward(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tex, "fused_rope_backward", norms.fused_rope_forward)


def documents_cut_in_wrong_places(patch: pytest.MonkeyPatch) -> None:
    def cut(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, borders, *rest: own(x, torch.cat((borders[:1], borders[1:-1] + 8, borders[-1:])), *rest)

    for convert in (attention.convert_thd_to_bshd, attention.convert_bshd_to_thd):
        patch.setattr(tex, convert.__name__, cut(convert))


def second_microbatch_replaces_the_first(patch: pytest.MonkeyPatch) -> None:
    def product(*given: Any, **more: Any) -> Any:
        return products.generic_gemm(*given[:14], False, *given[15:], **(more | {"beta": None}))

    patch.setattr(tex, "generic_gemm", product)


def history_not_in_the_checkpoint(patch: pytest.MonkeyPatch) -> None:
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    def set_extra_state(self: Any, state: Any, own: Any = TransformerEngineBaseModule.set_extra_state) -> None:
        own(self, state)
        self.fp8_meta["scaling_fwd"].amax_history.zero_()

    patch.setattr(TransformerEngineBaseModule, "set_extra_state", set_extra_state)


def resumed(tmp_path: Any) -> None:
    te_engine_checks.check_resume(PLACE, tmp_path, "delayed", 0.0)


FAULTS: dict[str, tuple[Plant, str, Callable[[Any], object]]] = {
    "stale copy": (
        stale_copy_by_column,
        "{'first microbatch': ",
        lambda _: te_checks.check_weights_are_cast_anew(PLACE, "tensorwise", 0.0),
    ),
    "no scales": (scales_not_updated, "a scale is not updated", lambda _: te_checks.check_recipe(PLACE, "delayed")),
    "columns' scales": (
        scales_of_rows_for_columns,
        "'cosine': ",
        lambda _: te_checks.check_recipe(PLACE, "blockwise"),
    ),
    "FP8 masters": (
        optimizer_begins_with_fp8_weights,
        "{'master': ",
        lambda _: te_engine_checks.check_masters(PLACE, "tensorwise"),
    ),
    "RoPE": (
        positions_turned_on_backward,
        "'own cosine': ",
        lambda _: te_checks.check_bf16_parity(PLACE, "stride 3"),
    ),
    "borders": (
        documents_cut_in_wrong_places,
        "'control, no borders': ",
        lambda _: te_checks.check_packed(PLACE, [48, 64, 16], te_checks.BF16_LOGITS, BF16),
    ),
    "sums": (
        second_microbatch_replaces_the_first,
        "linear_qkv.weight': ",
        lambda _: te_engine_checks.check_fused_gradients(PLACE),
    ),
    "history lost": (history_not_in_the_checkpoint, "scaling state is not what was saved", resumed),
}
"""What each breaks, what the check then says, and the check."""


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_fails_its_check(name, monkeypatch, tmp_path):
    plant, says, check = FAULTS[name]
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=re.escape(says)):
        check(tmp_path)
