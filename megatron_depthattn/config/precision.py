"""Precision: which number is held in which format, why, and what that needs; checks.py has what is unsupported.

**bf16.** Weights, activations and pipeline messages are bf16; the optimizer's weights and moments, gradient sums and
losses are fp32.

**FP8.** Only the matrix products of the decoder's linear layers run in FP8: E4M3 forward (3 bits of mantissa, up to
448), E5M2 for gradients (up to 57,344; hybrid), or E4M3 for both where scales are per block. Inputs and weights are
scaled so that their largest entry fits; the recipes differ in how many numbers share a scale and in where it comes
from (`RECIPES`). Norms, RoPE, core attention, residual stream, embedding and output layer stay bf16; the weights
themselves are kept in bf16, or with `fp8_params` in FP8 beside the optimizer's fp32 copy.

**The mix stays out of FP8**, with bf16 inputs and an fp32 softmax, under every recipe:
- there is nothing to gain. The mix is under 0.05 % of a layer's arithmetic and bound by memory; q, k and v arrive in
  bf16, so a cast to FP8 would be one more pass over them;
- there is much to lose. The value that a layer mixes is a source of every later layer, so the error of a cast would be
  mixed again at every depth; with stride 1 the last layer would read values rounded dozens of times. One rounding to
  E4M3 is 16 times as coarse as one to bf16 (4 bits of significand against 8);
- the scores decide between layers and are often close to each other: differences of bf16 products, summed in fp32,
  survive an fp32 softmax, not a bf16 one.
So the QKV projection must hand out bf16 (`fp8_multi_head_attention` is unsupported), and FP8 attention, if asked for,
casts q, k and the mixed value *after* the mix: sources and pipeline messages are never FP8.

What the other methods add (`methods/`) stays out of it too: torch's arithmetic, in fp32 on bf16 hidden states, between
TransformerEngine's modules. Their parameters are no module's of TransformerEngine, so bf16 also with `fp8_params`.

**Recompute.** With full recompute under FP8 Megatron checkpoints layers through TransformerEngine, which remembers the
scales of the first pass so that the second one computes the same numbers. Sources reach a recomputed layer through the
micro-batch's state, whoever checkpoints (`parallel/microbatch_state.py`). Inside such a layer the other methods
recompute their own mix by torch's checkpoint, in which nothing is FP8.

Sources: TransformerEngine's `quantization.py` and `attention/dot_product_attention/utils.py` (2.20), Megatron-Core's
`fp8_utils.py` and `transformer_config.py` (0.16, 0.19). Figures: docs/precision.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_depthattn.config.schema import PrecisionConfig

Version = tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """How FP8 scales are chosen, and what that needs."""

    gpus: tuple[Version, Version]
    """Compute capability from ... to below ..."""
    transformer_engine: Version
    """Least version through which Megatron-Core builds the recipe."""
    cuda: Version
    """Least version of the CUDA that torch was built with."""
    multiple: int = 16
    """Every dimension of every matrix product is a multiple of this."""
    fp8_format: str = "hybrid"
    """Megatron's name of the formats forward and backward."""
    attention_gpus: tuple[Version, Version] | None = None
    """Compute capability on which core attention can run in FP8; None: nowhere."""


NO_LIMIT = (99, 0)
RECIPES: dict[str, Recipe] = {
    # One scale a tensor, from the largest entry of the passes before.
    "delayed": Recipe(((8, 9), NO_LIMIT), (1, 6), (12, 1), attention_gpus=((9, 0), (12, 0))),
    # One scale a tensor, from the largest entry of this one.
    "tensorwise": Recipe(((8, 9), NO_LIMIT), (2, 2), (12, 1), attention_gpus=((10, 0), (12, 0))),
    # One scale for 128 activations, or 128 x 128 weights.
    "blockwise": Recipe(((9, 0), (12, 0)), (2, 3), (12, 9), fp8_format="e4m3"),
    # One scale, a power of two, for 32 entries.
    "mxfp8": Recipe(((10, 0), (12, 0)), (2, 1), (12, 8), multiple=32, fp8_format="e4m3"),
}


# ---- the run's keys in Megatron's terms


def transformer_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of Megatron's ``TransformerConfig``, but for dtypes."""
    if precision.fp8 is None:
        return {}
    fields: dict[str, Any] = {
        "fp8": RECIPES[precision.fp8].fp8_format,
        "fp8_recipe": precision.fp8,
        "fp8_param": precision.fp8_params,
        "fp8_dot_product_attention": precision.fp8_attention,
    }
    if precision.fp8 == "delayed":
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}  # TransformerEngine's defaults
    if precision.bf16_first_layers or precision.bf16_last_layers:
        fields |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": precision.bf16_first_layers,
            "num_layers_at_end_in_bf16": precision.bf16_last_layers,
        }
    return fields


def data_parallel_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of Megatron's ``DistributedDataParallelConfig``."""
    return {"fp8_param_gather": precision.fp8_params}


def optimizer_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of Megatron's ``OptimizerConfig``, but for dtypes."""
    return {"fp8_recipe": precision.fp8} if precision.fp8 else {}
