"""Megatron's ``TransformerConfig`` with the fields of Depth-Attention and of loops, and everything that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_depthattn.model.source_plan import SourcePlan, default_stride
from megatron_depthattn.ops import DEPTH_MIX_IMPLEMENTATIONS
from megatron_depthattn.parallel.payload import Payload, depth_payload


@dataclass
class DepthAttentionConfig(TransformerConfig):
    """A ``TransformerConfig`` whose layers attend over depth.

    All of Megatron's fields keep their meaning; with ``depth_attention=False`` the model is Megatron's own.
    Construction raises ``ValueError`` for every combination in ``REFUSALS``, with the reason and what to set.
    """

    depth_attention: bool = True
    """Mix the values of earlier layers at the same token into the value that self-attention reads."""

    depth_attention_stride: int | None = None
    """Layers between sources; None: half the layers (the released models), 1: every earlier layer."""

    depth_attention_recent_window: int = 0
    """This many immediately preceding layers are sources as well."""

    depth_attention_op: str = "lean"
    """Implementation of the mix: ``lean`` (recomputes in backward), ``triton`` (the same in one GPU kernel each way, on
    GPUs only) or ``reference`` (plain autograd)."""

    num_loops: int = 1
    """Times the stack of layers is run with the same weights (loops.py). Megatron's ``num_layers`` counts effective
    layers, those of all loops; the first ``num_layers / num_loops`` hold the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_loops()
        if not self.depth_attention:
            return
        if self.depth_attention_stride is None:
            self.depth_attention_stride = default_stride(self.num_layers)
        self.validate()
        if self.pipeline_model_parallel_size > 1:
            # Messages differ in width from edge to edge; with this the schedules' communicator is asked for each shape:
            # ours knows it (parallel/schedule.py), Megatron's exchanges it with the neighbour.
            self.variable_seq_lengths = True

    @property
    def source_plan(self) -> SourcePlan:
        """Who reads whom under this config's pipeline layout."""
        assert self.depth_attention_stride is not None
        return SourcePlan(
            num_layers=self.num_layers,
            stride=self.depth_attention_stride,
            recent_window=self.depth_attention_recent_window,
            chunk_starts=pipeline_chunk_starts(self),
            num_ranks=self.pipeline_model_parallel_size,
        )

    def message_into(self, chunk: int) -> Payload:
        """What pipeline chunk ``chunk`` (in model order) receives, with the widths of one rank."""
        groups = max(1, self.num_query_groups // self.tensor_model_parallel_size)
        shares = self.tensor_model_parallel_size if self.sequence_parallel else 1
        return depth_payload(
            self.source_plan.entering(chunk),
            hidden_width=self.hidden_size,
            source_width=groups * self.kv_channels * shares,
        )

    def _check_loops(self) -> None:
        loops, layers, stages = self.num_loops, self.num_layers, self.pipeline_model_parallel_size
        if loops < 1 or layers % loops:
            raise ValueError(
                f"num_loops is {loops} and num_layers is {layers}, which counts the layers of all loops: set num_loops "
                "to 1 or more, and num_layers to a multiple of it."
            )
        if loops == 1 or stages == 1:
            return
        virtual = self.virtual_pipeline_model_parallel_size
        starts = pipeline_chunk_starts(self)
        if virtual != loops or [start * stages * loops for start in starts] != [layers * i for i in range(len(starts))]:
            raise ValueError(
                f"num_loops is {loops} with pipeline_model_parallel_size={stages} and "
                f"virtual_pipeline_model_parallel_size={virtual}, which cuts {layers} layers at {list(starts)}: a "
                "rank shares weights among its own chunks, so each has to hold the same part of one loop. Set "
                f"virtual_pipeline_model_parallel_size={loops}, num_layers to a multiple of {stages * loops}, and no "
                "uneven pipeline layout."
            )

    def validate(self) -> None:
        """Raise ``ValueError`` naming what was given, why Depth-Attention refuses it and what to set."""
        if self.depth_attention_op not in DEPTH_MIX_IMPLEMENTATIONS:
            raise ValueError(
                f"depth_attention_op is {self.depth_attention_op!r}; the implementations are "
                f"{sorted(DEPTH_MIX_IMPLEMENTATIONS)}."
            )
        for refusal in REFUSALS:
            # Fields come and go between Megatron-Core versions: one that does not exist cannot be set wrongly.
            value = getattr(self, refusal.field, None)
            if refusal.applies(self, value):
                raise ValueError(
                    f"Depth-Attention refuses {refusal.field}={value!r}: {refusal.reason} {refusal.remedy}"
                )
        _ = self.source_plan  # its constructor checks stride, window and the pipeline cut


def pipeline_chunk_starts(config: TransformerConfig) -> tuple[int, ...]:
    """First layer of every pipeline chunk in model order, as Megatron places them, uneven layouts included."""
    num_stages = config.pipeline_model_parallel_size
    if num_stages == 1:
        return (0,)
    virtual = config.virtual_pipeline_model_parallel_size
    places = [(v, p) for v in (range(virtual) if virtual else [None]) for p in range(num_stages)]
    return tuple(accumulate((_layers_of_chunk(config, *place) for place in places[:-1]), initial=0))


def _layers_of_chunk(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> int:
    layout = config.pipeline_model_parallel_layout
    if layout is not None:  # Megatron's own count answers for this process only, whatever rank it is asked about
        return layout.layout[pp_rank][vp_stage or 0].count(LayerType.decoder)
    return get_num_layers_to_build(config, vp_stage, pp_rank)


class Refusal(NamedTuple):
    """One combination that is not supported, in the words that the user will read."""

    field: str
    applies: Callable[[DepthAttentionConfig, Any], bool]
    reason: str
    remedy: str


def _is_set(_: DepthAttentionConfig, value: Any) -> bool:
    return bool(value)


def _pipelined(config: DepthAttentionConfig, value: Any) -> bool:
    return bool(value) and config.pipeline_model_parallel_size > 1


def _interleaved(config: DepthAttentionConfig) -> bool:
    return (config.virtual_pipeline_model_parallel_size or 1) > 1


REFUSALS: tuple[Refusal, ...] = (
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
        "heterogeneous_block_specs",
        _is_set,
        "layers of different shapes cannot score each other's keys.",
        "Set heterogeneous_block_specs=False.",
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
    Refusal("fp4", _is_set, "FP4 layers have not been tried with sources yet.", "Set fp4=None."),
    Refusal(
        "overlap_p2p_comm_warmup_flush",
        _pipelined,
        "it posts receives before their shapes are known, and messages differ in width from edge to edge.",
        "Set overlap_p2p_comm_warmup_flush=False.",
    ),
    Refusal(
        "use_ring_exchange_p2p",
        _pipelined,
        "the ring exchange does not ask for message shapes, and messages differ in width from edge to edge.",
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
