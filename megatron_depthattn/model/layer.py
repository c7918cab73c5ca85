"""A transformer layer that receives sources, adds its own and hands on what later layers still read.

Between the layers of a rank the sources travel in the micro-batch's state: by itself in ``context``, the argument
and result that Megatron's block already passes from layer to layer; or, when the caller hands one in, in
``attention_bias``, which Megatron's block gives to every layer untouched. Full recompute and interleaved pipelining
need the latter: a recomputed layer takes and returns nothing but tensors, and a rank's chunks are called one by one.

Between ranks the sources travel inside the hidden state: the last layer of a chunk packs
``[hidden | key | value | ...]`` and the first of the next unpacks it, so Megatron's block, model and schedules stay
as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_depthattn.model.attention import DepthCall, Source
from megatron_depthattn.model.flops import mix_flops
from megatron_depthattn.parallel.microbatch_state import MicrobatchState
from megatron_depthattn.parallel.payload import HIDDEN, source_parts


class DepthAttentionLayer(TransformerLayer):
    """Megatron's transformer layer plus the traffic of sources; takes ``[s, b, h]`` or a payload, returns the same."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        index = self.layer_index = self.layer_number - 1
        plan = self.config.source_plan
        chunk = plan.chunk_of(index)
        self.reads = plan.sources(index)
        self.enters_chunk, self.leaves_chunk = plan.enters_chunk(index), plan.leaves_chunk(index)
        if self.enters_chunk:
            self.receives, self.message_in = plan.entering(chunk), self.config.message_into(chunk)
        if self.leaves_chunk:
            self.sends, self.message_out = plan.entering(chunk + 1), self.config.message_into(chunk + 1)
        self.held = plan.held(index)
        self.kept = plan.kept(chunk)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: MicrobatchState | None = None,
        attention_bias: Tensor | MicrobatchState | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, MicrobatchState | None]:
        """As Megatron's layer.

        Args:
            hidden_states: ``[s, b, h]``; for the first layer of a later pipeline chunk the payload ``[s, b, W]``.
            context: the micro-batch's state, as the layer before it returned it; None for the first layer.
            attention_bias: the micro-batch's state in the hands of the caller, or Megatron's bias.

        Returns:
            The hidden state (for the last layer of a chunk, the payload) and the context of the next layer.
        """
        self._refuse_pipelined_inference(kwargs.get("inference_context"))
        if isinstance(attention_bias, MicrobatchState):
            state, attention_bias = attention_bias, None
        else:
            self._refuse_recompute_without_state()
            state = context = context or MicrobatchState()
        if self.enters_chunk:
            hidden_states, received = self._unpack(hidden_states)
            hidden_states = self._leave(received, hidden_states, state)
        sources = {index: self._source(index, state) for index in self.reads}
        call = DepthCall(sources, attention_bias)
        hidden_states, _ = super().forward(hidden_states, attention_mask, attention_bias=call, **kwargs)
        made = {self.layer_index: call.made.pop()}
        if self.layer_index in self.held:
            hidden_states = self._leave(made, hidden_states, state)
        if self.leaves_chunk:
            hidden_states = self._pack(hidden_states, made, state)
        state.keep_only(name for index in self.held for name in source_parts(index))
        return hidden_states, context

    def forward_flops(self) -> dict[str, int]:
        """The mix's operations per token, over all tensor ranks; `module_flops` counts everything else."""
        config = self.config
        sizes = (config.num_attention_heads * config.kv_channels, config.num_query_groups * config.kv_channels)
        return {"mix": mix_flops(*sizes, num_sources=len(self.reads))}

    # ---- between layers of a rank: the micro-batch's state

    def _leave(self, sources: Mapping[int, Source], hidden_states: Tensor, state: MicrobatchState) -> Tensor:
        """Leave ``sources`` to later layers of this rank; returns what to use in place of ``hidden_states``."""
        kept = self.kept if torch.is_grad_enabled() else ()
        lent: dict[str, Tensor] = {}
        left: dict[str, Tensor] = {}
        for index, source in sources.items():
            (lent if self._is_recomputed or index in kept else left).update(_named(index, source))
        state.leave(left)
        return state.lend(lent, hidden_states) if lent else hidden_states

    def _source(self, index: int, state: MicrobatchState) -> Source:
        return Source(*(state[name] for name in source_parts(index)))

    # ---- between ranks: the payload

    def _pack(self, hidden_states: Tensor, made: Mapping[int, Source], state: MicrobatchState) -> Tensor:
        parts = {HIDDEN: hidden_states}
        for index in self.sends:
            parts |= _named(index, made.get(index) or self._source(index, state))
        return self.message_out.pack(parts)

    def _unpack(self, message: Tensor) -> tuple[Tensor, dict[int, Source]]:
        parts = self.message_in.unpack(message)
        rows, batch = message.shape[:2]
        if self.config.sequence_parallel:
            rows *= self.config.tensor_model_parallel_size
        shape = (rows, batch, -1, self.self_attention.hidden_size_per_attention_head)
        sources = {
            index: Source(*(parts[name].reshape(shape) for name in source_parts(index))) for index in self.receives
        }
        return parts[HIDDEN], sources

    # ---- refusals

    @property
    def _is_recomputed(self) -> bool:
        return self.training and self.config.recompute_granularity == "full"

    def _refuse_recompute_without_state(self) -> None:
        if self._is_recomputed:
            raise ValueError(
                "recompute_granularity='full' and no MicrobatchState was given: a recomputed layer takes and returns "
                "nothing but tensors. Build the model with build_gpt_model, or pass "
                "extra_block_kwargs={'attention_bias': MicrobatchState()} to GPTModel."
            )

    def _refuse_pipelined_inference(self, inference_context: Any) -> None:
        if inference_context is not None and self.config.pipeline_model_parallel_size > 1:
            raise ValueError(
                "inference was called with "
                f"pipeline_model_parallel_size={self.config.pipeline_model_parallel_size}: Megatron's "
                "inference buffers have room for the hidden state only, not for sources. Load the checkpoint "
                "with one pipeline stage."
            )


def _named(index: int, source: Source) -> dict[str, Tensor]:
    return dict(zip(source_parts(index), source, strict=True))
