"""What Depth-Attention and the other cross-layer methods refuse of Megatron's config, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_depthattn.methods.definitions import DEFINITIONS


class Refusal(NamedTuple):
    """One combination that is not supported, in the words that the user will read."""

    field: str
    applies: Callable[[TransformerConfig, Any], bool]
    reason: str
    remedy: str


def _is_set(_: TransformerConfig, value: Any) -> bool:
    return bool(value)


def _pipelined(config: TransformerConfig, value: Any) -> bool:
    return bool(value) and config.pipeline_model_parallel_size > 1


def _interleaved(config: TransformerConfig) -> bool:
    return (config.virtual_pipeline_model_parallel_size or 1) > 1


def refusal_of(config: TransformerConfig, method: str) -> str | None:
    """The first combination that ``method`` refuses, in the words that the user will read."""
    own = DEPTH_ATTENTION_REFUSALS if method == "depth_attention" else HIDDEN_STATE_REFUSALS
    for refusal in (*own, *REFUSALS):
        # Fields come and go between Megatron-Core versions: one that does not exist cannot be set wrongly.
        value = getattr(config, refusal.field, None)
        if refusal.applies(config, value):
            title = DEFINITIONS[method].title if method in DEFINITIONS else "Depth-Attention"
            return f"{title} refuses {refusal.field}={value!r}: {refusal.reason} {refusal.remedy}"
    return None


DEPTH_ATTENTION_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "fused_single_qkv_rope",
        _is_set,
        "the fused QKV-RoPE kernel never shows q, k and v apart, so there is no value to mix.",
        "Set fused_single_qkv_rope=False.",
    ),
    Refusal(
        "multi_latent_attention",
        _is_set,
        "keys and values of latent attention are not per-head tensors that another layer's query could score.",
        "Set multi_latent_attention=False.",
    ),
    Refusal(
        "experimental_attention_variant",
        _is_set,
        "these attention modules do not have the q, k, v seam that the mix uses.",
        "Set experimental_attention_variant=None.",
    ),
    Refusal(
        "attention_output_gate",
        _is_set,
        "the gated projection has not been tried with the mix.",
        "Set attention_output_gate=False.",
    ),
    Refusal(
        "softmax_scale",
        lambda config, value: value is not None,
        "the mix is defined with 1/sqrt(head size), and another temperature for the sequence leaves depth undefined.",
        "Set softmax_scale=None.",
    ),
    Refusal(
        "yarn_rotary_scaling_factor",
        lambda config, value: value is not None,
        "YaRN scales q and k inside RoPE; the mix, after RoPE in training and before it with a cache, would have two "
        "temperatures.",
        "Remove yarn_rotary_scaling_factor, or extend the context with a larger rotary base.",
    ),
    Refusal(
        "fp8_multi_head_attention",
        _is_set,
        "the QKV projection would hand out FP8 tensors, and the mix reads bf16 (precision.py says why).",
        "Set fp8_multi_head_attention=False; fp8_dot_product_attention casts after the mix.",
    ),
)
"""Because of the seam between the QKV projection and RoPE."""

HIDDEN_STATE_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "fp32_residual_connection",
        _is_set,
        "what later layers read of the residual stream has not been tried in another dtype than the layers'.",
        "Set fp32_residual_connection=False.",
    ),
    Refusal(
        "inference_fuse_tp_communication",
        _is_set,
        "the fused kernel adds the residual inside the sublayer, and the method reads a sublayer's output alone.",
        "Set inference_fuse_tp_communication=False.",
    ),
    Refusal(
        "fused_residual_rmsnorm",
        _is_set,
        "the norm would hand on the residual, and the method decides what is added to what.",
        "Set fused_residual_rmsnorm=False.",
    ),
)
"""Of the methods that work on the hidden state between sublayers."""

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "mtp_num_layers",
        _is_set,
        "multi-token-prediction layers stand outside the decoder's source plan and would read no source.",
        "Set mtp_num_layers=None.",
    ),
    Refusal(
        "num_moe_experts",
        _is_set,
        "the layer specs build the dense decoder; expert layers have not been tried with sources.",
        "Set num_moe_experts=None.",
    ),
    Refusal(
        "overlap_moe_expert_parallel_comm",
        _is_set,
        "that schedule runs a layer in pieces and bypasses its forward, where sources are received and sent.",
        "Set overlap_moe_expert_parallel_comm=False.",
    ),
    Refusal(
        "heterogeneous_block_specs",
        _is_set,
        "layers of different shapes cannot read each other's sources.",
        "Set heterogeneous_block_specs=False.",
    ),
    Refusal("fp4", _is_set, "FP4 layers have not been tried with sources yet.", "Set fp4=None."),
    Refusal(
        "overlap_p2p_comm_warmup_flush",
        _pipelined,
        "it posts receives before their shapes are known, and a message is wider than the hidden state.",
        "Set overlap_p2p_comm_warmup_flush=False.",
    ),
    Refusal(
        "use_ring_exchange_p2p",
        _pipelined,
        "the ring exchange does not ask for message shapes, and a message is wider than the hidden state.",
        "Set use_ring_exchange_p2p=False.",
    ),
    Refusal(
        "cuda_graph_impl",
        lambda config, value: value not in (None, "none"),
        "a captured layer neither receives nor returns the sources.",
        "Set cuda_graph_impl='none'.",
    ),
    Refusal(
        "enable_cuda_graph", _is_set, "a captured layer neither receives nor returns the sources.", "Set it to False."
    ),
    Refusal(
        "external_cuda_graph", _is_set, "a captured layer neither receives nor returns the sources.", "Set it to False."
    ),
    Refusal(
        "cpu_offloading",
        _is_set,
        "offloading decides layer by layer what to keep, but a source is read by many layers.",
        "Set cpu_offloading=False and use recompute_granularity instead.",
    ),
    Refusal(
        "fine_grained_activation_offloading",
        _is_set,
        "offloaded activations of a layer may still be sources of later ones; not tried.",
        "Set fine_grained_activation_offloading=False and use recompute_granularity instead.",
    ),
    Refusal(
        "distribute_saved_activations",
        _is_set,
        "it splits the first argument of a recomputed layer over tensor ranks in place, and that is a pipeline "
        "message here.",
        "Set distribute_saved_activations=False; sequence_parallel saves the same memory.",
    ),
    Refusal(
        "fp32_residual_connection",
        _pipelined,
        "a pipeline message has one dtype, and the sources are not fp32 when the residual stream is.",
        "Set fp32_residual_connection=False, or pipeline_model_parallel_size=1.",
    ),
    Refusal(
        "overlap_p2p_comm",
        lambda config, value: _interleaved(config) and not value,
        "without it the interleaved schedule batches two messages between the same two ranks, which mixed up gradients "
        "with two stages and hung with four.",
        "Set overlap_p2p_comm=True and batch_p2p_comm=False.",
    ),
    Refusal(
        "batch_p2p_comm",
        lambda config, value: _interleaved(config) and bool(value),
        "batched messages between the same two ranks cannot be told apart by the interleaved schedule.",
        "Set overlap_p2p_comm=True and batch_p2p_comm=False.",
    ),
)
"""Of all methods."""
