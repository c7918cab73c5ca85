"""The Qwen3-style decoder of the released models: RMSNorm, no biases, per-head q/k norm, RoPE, SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_depthattn.model.documents import DocumentGPTModel
from megatron_depthattn.model.layer_specs import depth_attention_block_spec
from megatron_depthattn.model.loops import share_weights
from megatron_depthattn.model.transformer_config import DepthAttentionConfig
from megatron_depthattn.parallel.microbatch_state import MicrobatchState
from megatron_depthattn.vocabulary import VOCAB_MULTIPLE, padded_vocab_size


def qwen3_style_config(**overrides: Any) -> DepthAttentionConfig:
    """A ``DepthAttentionConfig`` with the decoder style of the released models; ``overrides`` are its other fields.

    Fusions that compile at first use are off: they change nothing but speed, and TransformerEngine brings its own.
    """
    style: dict[str, Any] = {
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    return DepthAttentionConfig(**(style | overrides))


class DepthGPTModel(DocumentGPTModel):
    """Megatron's ``GPTModel``; gives every call a micro-batch state of its own unless the caller brings one."""

    def forward(self, *args: Any, extra_block_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """As Megatron's; under interleaved pipelining see `parallel.schedule.run_schedule`."""
        given = dict(extra_block_kwargs or {})
        given.setdefault("attention_bias", MicrobatchState())
        return super().forward(*args, extra_block_kwargs=given, **kwargs)


def build_gpt_model(
    config: DepthAttentionConfig,
    *,
    vocab_size: int,
    max_sequence_length: int,
    rotary_base: float = 10000,
    tie_embeddings: bool = False,
    backend: str = "local",
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    earlier_chunks: Sequence[GPTModel] = (),
) -> GPTModel:
    """One pipeline chunk of the decoder; without pipelining the whole model.

    Args:
        vocab_size: tokens of the tokenizer; padded to a multiple of ``VOCAB_MULTIPLE``.
        max_sequence_length: positions that RoPE is prepared for.
        pre_process: this chunk holds the embedding.
        post_process: this chunk holds the final norm and the output layer.
        vp_stage: the chunk's virtual pipeline stage; None without interleaving.
        earlier_chunks: this rank's chunks before this one, in order and without wrappers: of a looped model
            (``config.num_loops``) those of later loops use the weights of the first loop's.

    Raises:
        ValueError: the padded vocabulary cannot be split over the tensor ranks, or a looped model's later chunk was
            not given those before it.
    """
    rows = padded_vocab_size(vocab_size)
    if rows % config.tensor_model_parallel_size:
        raise ValueError(
            f"tensor_model_parallel_size={config.tensor_model_parallel_size} does not divide the padded vocabulary of "
            f"{rows} rows (vocab_size={vocab_size} padded to a multiple of {VOCAB_MULTIPLE}): set a power of two."
        )
    if config.num_loops > 1 and len(earlier_chunks) < (vp_stage or 0):
        raise ValueError(
            f"virtual pipeline stage {vp_stage} of a model with num_loops={config.num_loops} uses the weights of its "
            f"rank's earlier chunks, and {len(earlier_chunks)} were given: build those before, and give them as "
            "earlier_chunks."
        )
    model_class = DepthGPTModel if config.shares_over_layers else DocumentGPTModel
    model = model_class(
        config=config,
        transformer_layer_spec=depth_attention_block_spec(config, backend, vp_stage),
        vocab_size=rows,
        max_sequence_length=max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=tie_embeddings,
        position_embedding_type="rope",
        rotary_base=rotary_base,
        vp_stage=vp_stage,
    )
    if config.num_loops > 1:
        share_weights([*earlier_chunks, model], num_loops=config.num_loops)
    return model
