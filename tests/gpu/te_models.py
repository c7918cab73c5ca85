"""Small models for the checks of a layer spec and a precision: built, run and compared alike on a GPU and on a CPU.

Everything comes from a run's config through `train.build`, so what is checked is what trains. Shapes: b batch, s
positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_depthattn.config import RunConfig, load_config
from megatron_depthattn.train.build import build_model
from tests.te.small import FUSED_NORMS

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
NUM_LAYERS, VOCAB, SEQUENCE, BATCH = 6, 512, 128, 2
SHAPE = {
    "parallel.pipeline": 1,
    "model.num_layers": NUM_LAYERS,
    "model.hidden_size": 256,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 2,
    "model.kv_channels": 64,  # the released models'; cuDNN's attention takes it in bf16
    "model.ffn_hidden_size": 512,
    "model.vocab_size": VOCAB,
    "data.sequence_length": SEQUENCE,
    "train.micro_batch_size": BATCH,
    "train.global_batch_size": BATCH,
}
BF16, FP32 = "precision.dtype=bf16", "precision.dtype=fp32"
VANILLA = "model.method=vanilla"
RECOMPUTE = {
    mode: ("recompute.granularity=full", f"recompute.method={mode[:-2]}", f"recompute.num_layers={mode[-1]}")
    for mode in ("uniform-1", "uniform-2", "block-2")
}
NO_GRADIENT = "decoder.layers.0.attention_aggregator."
"""Of Attention Residuals: its two candidates are equal, so what is left of its gradient is rounding."""


@dataclass(frozen=True)
class Place:
    """Where the checks run, and whose layers are checked."""

    device: str
    spec: str

    def config(self, *settings: str) -> RunConfig:
        """The small model's config; ``settings`` are ``a.b=c``."""
        shape = [f"{key}={value}" for key, value in SHAPE.items()]
        backends = (f"model.spec={self.spec}", "model.depth_attention.op=lean")
        return load_config(CONFIG, [*shape, *backends, *settings])

    @property
    def local(self) -> Place:
        """The same device with the local layers."""
        return Place(self.device, "local")

    def build(self, *settings: str) -> torch.nn.Module:
        """The whole model in its data-parallel wrapper; the same weights whatever spec and precision."""
        (chunk,) = build_model(self.config(*settings), torch.device(self.device))
        leave_initial_values(chunk)
        return chunk.train()

    def tokens(self, seed: int = 1) -> Tensor:
        """Random tokens ``[b, s]``."""
        return torch.randint(VOCAB, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(seed)).to(self.device)


def named_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters by the names that they have in local layers."""
    (model,) = unwrap_model([chunk])
    for name, parameter in model.named_parameters():
        for local, fused in FUSED_NORMS.items():
            name = name.replace(fused, local)
        yield name, parameter


@torch.no_grad()
def leave_initial_values(chunk: torch.nn.Module) -> None:
    """Norm weights near one, not one, where a norm in the wrong place would not show; and a method that mixes."""
    for name, parameter in named_parameters(chunk):
        if parameter.dim() == 1:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


class Pass(NamedTuple):
    """One forward and backward pass."""

    loss: float
    """Mean cross entropy, nats."""
    logits: Tensor
    """``[b, s, V]``, fp32."""
    gradients: dict[str, Tensor]
    """Of the summed loss, fp32, by local name."""


def run(
    chunk: torch.nn.Module, tokens: Tensor, labels: Tensor | None = None, *, is_first: bool = True, **given: object
) -> Pass:
    """Forward and backward from zeroed gradients; by default predicts the next token of the same row."""
    chunk.zero_grad_buffer()
    if is_first:
        chunk.set_is_first_microbatch()  # as Megatron's schedules do: FP8 copies of the weights are made anew
    logits = chunk(tokens, None, None, **given).float()
    labels = tokens.roll(-1, dims=1) if labels is None else labels
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    losses.backward()
    gradients = {
        name: parameter.main_grad.detach().clone()
        for name, parameter in named_parameters(chunk)
        if not name.startswith(NO_GRADIENT)
    }
    return Pass(float(losses.detach()) / tokens.numel(), logits.detach(), gradients)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; infinite if not finite."""
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    return error if error == error else float("inf")


METHODS_OWN = ("_aggregator.", "_connector.", "_averag")
"""In the names of what a method adds to a layer."""


def worst_cosine(actual: dict[str, Tensor], expected: dict[str, Tensor], *, but: tuple[str, ...] = ()) -> float:
    """Of the gradients of any parameter, but for those with one of these in their names and for those of a few numbers,
    which may be sums of large terms that cancel."""
    assert actual.keys() == expected.keys()
    flat, chosen = torch.nn.functional.cosine_similarity, [n for n in expected if not any(part in n for part in but)]
    return min(
        float(flat(actual[n].double().flatten(), expected[n].double().flatten(), dim=0))
        for n in chosen
        if expected[n].numel() >= 64
    )


def largest_difference(actual: Pass, expected: Pass) -> float:
    """Of logits and of any parameter's gradient, relative."""
    pairs = [(actual.logits, expected.logits), *((actual.gradients[n], x) for n, x in expected.gradients.items())]
    return max(relative_error(*pair) for pair in pairs)


def decoder_layers(chunk: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder's layers, without the wrappers around the model."""
    (model,) = unwrap_model([chunk])
    return model.decoder.layers


def linear_layers(chunk: torch.nn.Module) -> list[list[torch.nn.Module]]:
    """Of each decoder layer the four modules that hold a matrix."""
    found = [
        [module for name, module in layer.named_modules() if name.rpartition(".")[2].startswith("linear_")]
        for layer in decoder_layers(chunk)
    ]
    assert all(len(linears) == 4 for linears in found)
    return found


def scaling_state(chunk: torch.nn.Module) -> list[Tensor]:
    """Scales and histories of delayed scaling, of every linear layer, in turn."""
    metas = [module.fp8_meta for linears in linear_layers(chunk) for module in linears]
    states = [meta[f"scaling_{way}"] for meta in metas for way in ("fwd", "bwd")]
    return [x.clone() for state in states for x in (state.scale, state.amax_history)]
