"""Layer specs: Megatron's own, with the layer of Depth-Attention or of another method in place of the stock one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_depthattn.methods.attnres.layer import with_attention_residuals
from megatron_depthattn.methods.denseformer.layer import with_denseformer
from megatron_depthattn.methods.mhc.layer import with_hyper_connections
from megatron_depthattn.model.attention import DepthSelfAttention
from megatron_depthattn.model.core_attention import SDPAttention
from megatron_depthattn.model.layer import DepthAttentionLayer
from megatron_depthattn.model.norm import RMSNorm
from megatron_depthattn.model.transformer_config import DepthAttentionConfig, layers_of_chunk


def depth_attention_block_spec(
    config: DepthAttentionConfig, backend: str = "local", vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """What ``GPTModel`` takes as ``transformer_layer_spec``: this chunk's layers and the final norm.

    Args:
        config, backend: as for `depth_attention_layer_spec`.
        vp_stage: the chunk's virtual pipeline stage; None without interleaving.
        pp_rank: the pipeline rank to build for; None: this process's, from Megatron's parallel state.
    """
    layer = depth_attention_layer_spec(config, backend)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * layers_of_chunk(config, vp_stage, pp_rank), layer_norm=_final_norm(backend)
    )


def depth_attention_layer_spec(config: DepthAttentionConfig, backend: str = "local") -> ModuleSpec:
    """The spec of one decoder layer.

    Args:
        config: decides on q/k norm and on the method; of a vanilla model it is Megatron's own spec,
            with norms and core attention that also run under sequence and context parallel.
        backend: ``local`` (plain torch modules, any device) or ``te`` (TransformerEngine, GPU). Both take documents in
            one row (`model.documents`).

    Raises:
        ValueError: unknown backend, ``te`` without TransformerEngine, or a norm or a precision that the local backend
            does not have.
    """
    if backend == "local":
        spec = _local_spec(config)
    elif backend == "te":
        spec = _transformer_engine_spec(config)
    else:
        raise ValueError(f"backend is {backend!r}; the layer specs are 'local' and 'te'.")
    return WITH_METHOD[config.effective_method](spec)


def with_depth_attention(spec: ModuleSpec) -> ModuleSpec:
    """A copy of a dense decoder layer's spec that attends over depth."""
    attention = dataclasses.replace(spec.submodules.self_attention, module=DepthSelfAttention)
    submodules = dataclasses.replace(spec.submodules, self_attention=attention)
    return dataclasses.replace(spec, module=DepthAttentionLayer, submodules=submodules)


WITH_METHOD: Mapping[str, Callable[[ModuleSpec], ModuleSpec]] = {
    "vanilla": lambda spec: spec,
    "depth_attention": with_depth_attention,
    "denseformer": with_denseformer,
    "attnres": with_attention_residuals,
    "mhc": with_hyper_connections,
}
"""The spec of a vanilla layer to that of each method's."""


def _local_spec(config: DepthAttentionConfig) -> ModuleSpec:
    if config.normalization != "RMSNorm":
        raise ValueError(
            f"normalization is {config.normalization!r}: the local layer spec has RMSNorm only. Set "
            "normalization='RMSNorm' or use the TransformerEngine backend."
        )
    if config.fp8:
        raise ValueError(
            f"fp8={config.fp8!r}: the local layer spec has no FP8 layers and would compute in {config.params_dtype}. "
            "Set fp8=None or use the TransformerEngine backend."
        )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    attention: Any = spec.submodules.self_attention.submodules
    attention.core_attention = SDPAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    return spec


def _transformer_engine_spec(config: DepthAttentionConfig) -> ModuleSpec:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "the TransformerEngine layer spec was asked for, but transformer_engine cannot be imported here "
            f"({error}). pip install --no-build-isolation 'transformer-engine[pytorch]', or set model.spec=local."
        ) from error
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    if config.document_mask and config.context_parallel_size > 1:
        spec.submodules.self_attention.submodules.core_attention = SDPAttention
    return spec


def _final_norm(backend: str) -> Any:
    if backend == "local":
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
