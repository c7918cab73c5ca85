"""Full recompute through TransformerEngine's checkpoint function, around local layers, which compute on CPU.

Megatron takes that function where FP8 is on. So FP8 is switched on in the config of a model that is already built:
block, checkpoint function, autocast contexts and the state that they remember are the real ones; the layers have
nothing in FP8 to do.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformer_engine.pytorch import distributed as te_distributed
from transformer_engine.pytorch import quantization

from megatron_depthattn.parallel.microbatch_state import MicrobatchState
from tests.megatron_weights import leave_initial_values
from tests.te.small import METHODS
from tests.unit.test_recompute import RECOMPUTE, build, loss_of

PLANS: dict[str, dict[str, Any]] = {
    "stride 2, window 1": {"depth_attention_stride": 2, "depth_attention_recent_window": 1},
    "stride 1": {"depth_attention_stride": 1},
}
OTHERS = {method: {"method": method, "method_settings": settings} for method, settings in METHODS.items()}
MODES = [mode for mode, options in RECOMPUTE.items() if options["recompute_granularity"] == "full"]
OTHERS_MODES = ["uniform-1", "uniform-2"]
NONE, CONTROL = "none", "control"


class PlainSources(MicrobatchState):
    """The control: sources are left as they are, without a gradient of their own."""

    def detach_for_reuse(self, parts: dict[str, Tensor], hidden_states: Tensor) -> Tensor:
        self._detached |= {name: tensor.detach() for name, tensor in parts.items()}
        return hidden_states


def results() -> dict[str, dict[str, Any]]:
    """By plan and mode: ``loss``, ``gradients`` by name, ``calls`` of the checkpoint function, ``passes``.

    ``passes``: how often a layer ran forward, by whether FP8 was on and TransformerEngine was recomputing.
    """
    # One generator is both the "CPU" and the "CUDA" one, as in parallel/cpu_runtime.py.
    te_distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    te_distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    found = {}
    for plan, options in (PLANS | OTHERS).items():
        modes = MODES if plan in PLANS else OTHERS_MODES
        found[plan] = {NONE: _run(options)} | {mode: _run(options | RECOMPUTE[mode], fp8=True) for mode in modes}
        found[plan][CONTROL] = _run(options | RECOMPUTE["uniform-1"], fp8=True, state=PlainSources())
    return found


def _run(options: dict[str, Any], *, fp8: bool = False, state: MicrobatchState | None = None) -> dict[str, Any]:
    model = build(**options)
    if "method" in options:
        leave_initial_values(model)
    model.config.fp8 = "hybrid" if fp8 else None
    checkpoint = te_distributed.checkpoint
    passes: Counter[tuple[bool, bool]] = Counter()

    def note(*_: Any) -> None:
        is_on = quantization.FP8GlobalStateManager.is_fp8_enabled()
        passes[is_on, te_distributed.in_fp8_activation_recompute_phase()] += 1

    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(note)
    with patch.object(te_distributed, "checkpoint", wraps=checkpoint) as counted:
        loss = loss_of(model, state)
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "gradients": gradients, "calls": counted.call_count, "passes": dict(passes)}
