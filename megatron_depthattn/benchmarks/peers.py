"""What a model of ours is in transformers, the fastest baseline that a user has, and whether the two agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_depthattn.benchmarks.models import Model, random_microbatch
from megatron_depthattn.cli.common import check
from megatron_depthattn.vocabulary import VOCAB_MULTIPLE

IN_TRANSFORMERS = ", in transformers"
BOUNDS = {"loss": 1e-6, "gradient norm": 1e-5}
"""Relative difference of two models with the same weights in fp32; a model with the mix is far above (a test)."""


class Peer:
    """The export of ``ours`` with torch's AdamW, stepped as the users of transformers write it.

    Raises:
        ValueError: the model's loss cannot be compared with that in transformers.
    """

    def __init__(self, ours: Model) -> None:
        from megatron_depthattn.train.build import build_schedule

        config, settings = ours.config, ours.config.optimizer
        precision, vocabulary = config.precision.fp8 or config.precision.dtype, config.model.vocab_size
        padded = f"--peers with model.vocab_size={vocabulary}: Megatron pads it and transformers does not"
        check(
            (precision != "fp32", f"--peers in {precision}: losses are compared, set precision.dtype=fp32"),
            (vocabulary % VOCAB_MULTIPLE > 0, f"{padded}, set a multiple of {VOCAB_MULTIPLE}"),
        )
        self._model = ours.exported(torch.float32).train()
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
        loss = self._model(**given, labels=labels, shift_labels=labels).loss
        loss.backward()
        return float(loss.detach())

    def gradient(self) -> dict[str, Tensor]:
        """What `gradients` left, by parameter."""
        return {name: p.grad for name, p in self._model.named_parameters() if p.grad is not None}


def require_agreement(pairs: Mapping[str, tuple[Model, Peer]]) -> dict[str, dict[str, float]]:
    """Loss and gradient norm of every model.

    Raises:
        ValueError: one of ours is further from its twin than its bound, so the two do not compute the same.
    """
    found: dict[str, dict[str, float]] = {}
    for name, (ours, peer) in pairs.items():
        twins: dict[str, Model | Peer] = {name: ours, name + IN_TRANSFORMERS: peer}
        for label, model in twins.items():
            found[label] = {"loss": model.gradients()}
            found[label]["gradient norm"] = float(torch.nn.utils.get_total_norm([*model.gradient().values()]))
        for what, bound in BOUNDS.items():
            own, other = found[name][what], found[name + IN_TRANSFORMERS][what]
            if not abs(own / other - 1) <= bound:
                raise ValueError(
                    f"{what} of {name} is {own:.9g}, {other:.9g} in transformers with the same weights: they do not "
                    "compute the same, so nothing is measured"
                )
    return found
