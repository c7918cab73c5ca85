"""What Depth-Attention and the other cross-layer methods do not support of Megatron's config, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_depthattn.config.check import Check
from megatron_depthattn.methods.definitions import DEFINITIONS

EVERY, MIX, OTHERS = "all methods", "Depth-Attention", "DenseFormer, Attention Residuals, mHC"


def unsupported_by(config: TransformerConfig, method: str) -> str | None:
    """The first combination that ``method`` does not support: what was given, why not and what to set."""
    title = DEFINITIONS[method].title if method in DEFINITIONS else MIX
    for check in MEGATRON_CHECKS:
        if check.section != (MIX if method in DEFINITIONS else OTHERS) and (
            message := check.message(config, show=repr)
        ):
            return f"{title} does not support {message}"
    return None


def _field(section: str, field: str, why: str, remedy: str, is_wrong: Callable[[Any], Any] = bool) -> Check:
    """One field; those that this version of Megatron-Core does not have cannot be set wrongly."""
    return Check(section, f"{{{field}=}}", lambda config, _: is_wrong(getattr(config, field, None)), why, remedy)


def _pipelined(field: str, why: str, remedy: str) -> Check:
    def applies(config: TransformerConfig, _: None) -> bool:
        return bool(getattr(config, field, None)) and config.pipeline_model_parallel_size > 1

    return Check(EVERY, f"{{{field}=}} with pipeline stages", applies, why, remedy)


def _interleaved(field: str, wrong: bool, why: str) -> Check:
    def applies(config: TransformerConfig, _: None) -> bool:
        interleaved = (config.virtual_pipeline_model_parallel_size or 1) > 1
        return interleaved and bool(getattr(config, field, None)) is wrong

    remedy = "set overlap_p2p_comm=True and batch_p2p_comm=False"
    return Check(EVERY, f"{{{field}=}} in the interleaved schedule", applies, why, remedy)


MEGATRON_CHECKS = (
    _field(
        MIX,
        "fused_single_qkv_rope",
        "the fused QKV-RoPE kernel never shows q, k and v apart, so there is no value to mix",
        "set fused_single_qkv_rope=False",
    ),
    _field(
        MIX,
        "multi_latent_attention",
        "keys and values of latent attention are not per-head tensors that another layer's query could score",
        "set multi_latent_attention=False",
    ),
    _field(
        MIX,
        "experimental_attention_variant",
        "these attention modules do not have the q, k, v seam that the mix uses",
        "set experimental_attention_variant=None",
    ),
    _field(
        MIX,
        "attention_output_gate",
        "the gated projection has not been tried with the mix",
        "set attention_output_gate=False",
    ),
    _field(
        MIX,
        "softmax_scale",
        "the mix is defined with 1/sqrt(head size), and another temperature for the sequence leaves depth undefined",
        "set softmax_scale=None",
        lambda value: value is not None,
    ),
    _field(
        MIX,
        "yarn_rotary_scaling_factor",
        "YaRN scales q and k inside RoPE; the mix, after RoPE in training and before it with a cache, would have two "
        "temperatures",
        "remove yarn_rotary_scaling_factor, or extend the context with a larger rotary base",
        lambda value: value is not None,
    ),
    _field(
        MIX,
        "fp8_multi_head_attention",
        "the QKV projection would hand out FP8 tensors, and the mix reads bf16 (precision.py says why)",
        "set fp8_multi_head_attention=False; fp8_dot_product_attention casts after the mix",
    ),
    _field(
        OTHERS,
        "fp32_residual_connection",
        "what later layers read of the residual stream has not been tried in another dtype than the layers'",
        "set fp32_residual_connection=False",
    ),
    _field(
        OTHERS,
        "inference_fuse_tp_communication",
        "the fused kernel adds the residual inside the sublayer, and the method reads a sublayer's output alone",
        "set inference_fuse_tp_communication=False",
    ),
    _field(
        OTHERS,
        "fused_residual_rmsnorm",
        "the norm would hand on the residual, and the method decides what is added to what",
        "set fused_residual_rmsnorm=False",
    ),
    _field(
        EVERY,
        "mtp_num_layers",
        "multi-token-prediction layers stand outside the decoder's source plan and would read no source",
        "set mtp_num_layers=None",
    ),
    _field(
        EVERY,
        "num_moe_experts",
        "the layer specs build the dense decoder; expert layers have not been tried with sources",
        "set num_moe_experts=None",
    ),
    _field(
        EVERY,
        "overlap_moe_expert_parallel_comm",
        "that schedule runs a layer in pieces and bypasses its forward, where sources are received and sent",
        "set overlap_moe_expert_parallel_comm=False",
    ),
    _field(
        EVERY,
        "heterogeneous_block_specs",
        "layers of different shapes cannot read each other's sources",
        "set heterogeneous_block_specs=False",
    ),
    _field(EVERY, "fp4", "FP4 layers have not been tried with sources yet", "set fp4=None"),
    _pipelined(
        "overlap_p2p_comm_warmup_flush",
        "it posts receives before their shapes are known, and a message is wider than the hidden state",
        "set overlap_p2p_comm_warmup_flush=False",
    ),
    _pipelined(
        "use_ring_exchange_p2p",
        "the ring exchange does not ask for message shapes, and a message is wider than the hidden state",
        "set use_ring_exchange_p2p=False",
    ),
    _field(
        EVERY,
        "cuda_graph_impl",
        "a captured layer neither receives nor returns the sources",
        "set cuda_graph_impl='none'",
        lambda value: value not in (None, "none"),
    ),
    _field(
        EVERY,
        "enable_cuda_graph",
        "a captured layer neither receives nor returns the sources",
        "set enable_cuda_graph=False",
    ),
    _field(
        EVERY,
        "external_cuda_graph",
        "a captured layer neither receives nor returns the sources",
        "set external_cuda_graph=False",
    ),
    _field(
        EVERY,
        "cpu_offloading",
        "offloading decides layer by layer what to keep, but a source is read by many layers",
        "set cpu_offloading=False and use recompute_granularity instead",
    ),
    _field(
        EVERY,
        "fine_grained_activation_offloading",
        "offloaded activations of a layer may still be sources of later ones; not tried",
        "set fine_grained_activation_offloading=False and use recompute_granularity instead",
    ),
    _field(
        EVERY,
        "distribute_saved_activations",
        "it splits the first argument of a recomputed layer over tensor ranks in place, and that is a pipeline "
        "message here",
        "set distribute_saved_activations=False; sequence_parallel saves the same memory",
    ),
    _pipelined(
        "fp32_residual_connection",
        "a pipeline message has one dtype, and the sources are not fp32 when the residual stream is",
        "set fp32_residual_connection=False, or pipeline_model_parallel_size=1",
    ),
    _interleaved(
        "overlap_p2p_comm",
        False,
        "without it the interleaved schedule batches two messages between the same two ranks, which mixed up "
        "gradients with two stages and hung with four",
    ),
    _interleaved(
        "batch_p2p_comm",
        True,
        "batched messages between the same two ranks cannot be distinguished by the interleaved schedule",
    ),
)
