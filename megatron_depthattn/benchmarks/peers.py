"""What a model of ours is in transformers, the fastest baseline that a user has, and whether the two agree.

Vanilla's export is Qwen3. That of Depth-Attention mixes in plain torch operations, as its authors' model does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_depthattn.benchmarks.models import Model, random_microbatch
from megatron_depthattn.cli.common import check
from megatron_depthattn.config import RunConfig
from megatron_depthattn.vocabulary import VOCAB_MULTIPLE

IN_TRANSFORMERS = ", in transformers"
FLASH = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
BOUNDS = {
    "fp32": {"loss": 1e-6, "gradient norm": 1e-5},
    "bf16": {"loss": 1e-3, "gradient norm": 2e-2},
    "FP8": {"loss": 5e-3, "gradient norm": 1e-1},
}
"""Relative difference of two models with the same weights. In fp32 a model without the mix is far above (a test);
those of bf16 and FP8 are for what goes wrong grossly."""


def check_has_peer(config: RunConfig) -> None:
    """Raise ``ValueError`` if the model's loss cannot be compared with that in transformers."""
    vocabulary = config.model.vocab_size
    padded = f"--peers with model.vocab_size={vocabulary}: Megatron pads it and transformers does not"
    check((vocabulary % VOCAB_MULTIPLE > 0, f"{padded}, set a multiple of {VOCAB_MULTIPLE}"))


def runs_in_flash_alone(config: RunConfig) -> bool:
    """Whether the peer's attention is forced into the kernels of flash attention, which compute no fp32."""
    return torch.cuda.is_available() and config.precision.dtype == "bf16"


class Peer:
    """The export of ``ours`` with torch's AdamW, stepped as the users of transformers write it.

    Weights and optimizer are in fp32 where ours computes in fp32, else in bf16.
    """

    def __init__(self, ours: Model) -> None:
        from megatron_depthattn.train.build import build_schedule

        self.config = config = ours.config
        settings, is_half = config.optimizer, config.precision.dtype == "bf16"
        self._model = ours.exported(torch.bfloat16 if is_half else torch.float32).train()
        self._parameters, self._clip = [*self._model.parameters()], settings.grad_clip
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._parameters if p.dim() > 1]},
            {"params": [p for p in self._parameters if p.dim() <= 1], "wd_mult": 0.0},
        ]
        betas = (settings.beta1, settings.beta2)
        self._optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
        self._schedule = build_schedule(config, self._optimizer)
        self._batch = random_microbatch(config, ours.device)

    def update(self) -> float:
        """A whole training step; the mean loss."""
        self._schedule.step(increment=1)
        loss = self.gradients()
        if self._clip > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip, foreach=True)
        self._optimizer.step()
        return loss

    def gradients(self) -> float:
        """Forward and backward from gradients that are not there; the mean loss."""
        self._model.zero_grad(set_to_none=True)
        tokens, labels = self._batch["tokens"], self._batch["labels"]
        # With the mask that collators make, all ones, 4.57 attends by is_causal; without a mask and a cache it makes
        # one of [length, length] and repeats the keys: 0.94 of the time at 512 tokens, 0.71 at 2048.
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
        with self._attention():
            loss = self._model(**given, labels=labels, shift_labels=labels).loss
        loss.backward()
        return float(loss.detach())

    def _attention(self) -> AbstractContextManager[None]:
        """On a GPU in bf16 nothing but flash attention: with a mask, for example, torch then raises an error."""
        return sdpa_kernel(FLASH) if runs_in_flash_alone(self.config) else nullcontext()

    def gradient(self) -> dict[str, Tensor]:
        """What `gradients` left, by parameter."""
        return {name: p.grad for name, p in self._model.named_parameters() if p.grad is not None}


def compare(name: str, ours: Model, label: str, peer: Peer) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Loss and gradient norm of a model and of its twin, by these names, and in words what is over its bound."""
    precision = ours.config.precision
    if precision.fp8:  # scales of the first pass are not yet those of its tensors
        ours.gradients()
    found: dict[str, dict[str, float]] = {}
    twins: dict[str, Model | Peer] = {name: ours, label: peer}
    for each, model in twins.items():
        found[each] = {"loss": model.gradients()}
        found[each]["gradient norm"] = float(torch.nn.utils.get_total_norm([*model.gradient().values()]))
    over = []
    for what, bound in BOUNDS["FP8" if precision.fp8 else precision.dtype].items():
        own, other = found[name][what], found[label][what]
        if not abs(own / other - 1) <= bound:
            over.append(
                f"{what} of {name} is {own:.9g}, {other:.9g} of {label} with the same weights: they do not compute the "
                "same"
            )
    return found, over
