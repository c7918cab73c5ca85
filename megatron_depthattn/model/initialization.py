"""Initial weights that depend on the seed, each parameter's name and the kind of device, and on nothing else.

Megatron draws weights in the order in which a rank builds them, so the same seed gives another model under another
layout. Here every parameter has a generator of its own, seeded by its name in the whole model, and every tensor
rank draws the whole tensor and keeps its share. The same seed is the same model under every tensor, pipeline and
virtual pipeline layout.

The rule is that of the released models: normal with one standard deviation for every matrix, no scaling with depth,
norms at one; muP scales some (mup.py). Parameters that a method adds and that are no matrices begin at the values that
it defines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_depthattn.model.mup import initial_factor


def globally_named_parameters(model: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """``(name, parameter)`` of a chunk, with layers named by their index in the whole model."""
    for name, parameter in model.named_parameters():
        yield global_name(model, name), parameter


def global_name(model: GPTModel, path: str) -> str:
    """The path of a chunk's module or parameter, with layers numbered in the whole model, from 0."""
    parts = path.split(".")
    if parts[:2] == ["decoder", "layers"] and len(parts) > 2:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)


@torch.no_grad()
def initialize_weights(model: GPTModel, *, seed: int, init_std: float, width_multiplier: float = 1.0) -> None:
    """Fill a chunk's parameters in place.

    Args:
        model: a pipeline chunk, before it is wrapped for data parallel.
        seed: the run's seed.
        init_std: standard deviation of every matrix, at muP's base width.
        width_multiplier: width over that base width.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in globally_named_parameters(model):
        if (initial := getattr(parameter, "initial", None)) is not None:  # a method's own, see methods/parameters.py
            parameter.copy_(initial(tuple(parameter.shape)))
            continue
        factor = initial_factor(name, parameter, width_multiplier)
        if parameter.dim() == 1:
            parameter.fill_(factor)
            continue
        if model.share_embeddings_and_output_weights and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"  # the last stage's copy of the tied embedding
        split = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
        shape = list(parameter.shape)
        if split >= 0:
            shape[split] *= size
        generator = torch.Generator(device=parameter.device).manual_seed(_seed_of(name, seed))
        whole = torch.empty(shape, device=parameter.device).normal_(0.0, init_std * factor, generator=generator)
        share = _share(whole, name, split, rank, size)
        parameter.copy_(share)
        if hasattr(parameter, "get_high_precision_init_val"):  # kept in FP8: the optimizer begins with these instead
            parameter.get_high_precision_init_val().copy_(share)


def _share(whole: Tensor, name: str, split: int, rank: int, size: int) -> Tensor:
    """This rank's part of a whole tensor, cut the way Megatron reads it."""
    if split < 0 or size == 1:
        return whole
    if name.endswith("linear_fc1.weight"):  # SwiGLU: gate and up are halves of one matrix, each split by itself
        return torch.cat([half.chunk(size, dim=split)[rank] for half in whole.chunk(2, dim=0)], dim=0)
    return whole.chunk(size, dim=split)[rank]


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
