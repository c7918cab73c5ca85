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


_CAPTURED = "a captured layer neither receives nor returns the sources"
FIELDS = {
    MIX: {
        "fused_single_qkv_rope": "the fused kernel never shows q, k and v apart, so there is no value to mix",
        "multi_latent_attention": "its keys and values are not per-head tensors that another layer's query could score",
        "experimental_attention_variant": "these attention modules do not have the q, k, v seam that the mix uses",
        "attention_output_gate": "the gated projection has not been tried with the mix",
        "softmax_scale": "the mix is defined with 1/sqrt(head size); with two temperatures depth is undefined",
        "yarn_rotary_scaling_factor": "YaRN scales q and k inside RoPE, and the mix with a cache is before RoPE",
        "fp8_multi_head_attention": "the mix reads bf16, and fp8_dot_product_attention casts only after it",
    },
    OTHERS: {
        "fp32_residual_connection": "a residual stream of another dtype than the layers' has not been tried",
        "inference_fuse_tp_communication": "the fused kernel adds the residual, and the method reads the output alone",
        "fused_residual_rmsnorm": "the norm would hand on the residual, and the method decides what is added to what",
    },
    EVERY: {
        "mtp_num_layers": "multi-token-prediction layers stand outside the source plan and would read no source",
        "num_moe_experts": "the layer specs build the dense decoder; expert layers have not been tried with sources",
        "overlap_moe_expert_parallel_comm": "that schedule bypasses a layer's forward, where sources are passed on",
        "heterogeneous_block_specs": "layers of different shapes cannot read each other's sources",
        "fp4": "FP4 layers have not been tried with sources yet",
        "cuda_graph_impl": _CAPTURED,
        "enable_cuda_graph": _CAPTURED,
        "external_cuda_graph": _CAPTURED,
        "cpu_offloading": "a source is read by many layers; recompute_granularity saves memory as well",
        "fine_grained_activation_offloading": "activations may be sources of later layers; not tried",
        "distribute_saved_activations": "it splits a pipeline message; sequence_parallel saves the same memory",
    },
}
PIPELINED = {
    "overlap_p2p_comm_warmup_flush": "it posts receives before the shapes of messages are known",
    "use_ring_exchange_p2p": "the ring exchange does not ask for the shapes of messages",
    "fp32_residual_connection": "a message has one dtype, and the sources are not fp32 when the residual stream is",
}
INTERLEAVED = {
    "overlap_p2p_comm": (False, "two messages between the same ranks would be batched: wrong gradients, or a hang"),
    "batch_p2p_comm": (True, "the schedule cannot distinguish batched messages between the same two ranks"),
}


def _check(section: str, where: str, field: str, why: str, is_where: Callable[[Any], bool] = lambda _: True) -> Check:
    """A field that has another value than Megatron's; one that this Megatron-Core lacks is not set."""
    default = getattr(TransformerConfig, field, False if field == "fused_residual_rmsnorm" else None)  # new in 0.19

    def applies(config: TransformerConfig, _: None) -> bool:
        return getattr(config, field, None) not in (None, False, default) and is_where(config)

    return Check(section, f"{{{field}=}}{where}", applies, why, f"set {field}={default!r}")


def _interleaved(field: str, wrong: bool, why: str) -> Check:
    def applies(config: TransformerConfig, _: None) -> bool:
        return (config.virtual_pipeline_model_parallel_size or 1) > 1 and getattr(config, field) is wrong

    remedy = "set overlap_p2p_comm=True and batch_p2p_comm=False"
    return Check(EVERY, f"{{{field}=}} in the interleaved schedule", applies, why, remedy)


MEGATRON_CHECKS = (
    *(_check(section, "", field, why) for section, fields in FIELDS.items() for field, why in fields.items()),
    *(
        _check(EVERY, " with pipeline stages", field, why, lambda config: config.pipeline_model_parallel_size > 1)
        for field, why in PIPELINED.items()
    ),
    *(_interleaved(field, wrong, why) for field, (wrong, why) in INTERLEAVED.items()),
)
