"""A transformer layer that receives sources, adds its own and hands on what later layers still read.

Between layers of a chunk the sources travel in ``context``, the argument and result that Megatron's block already
passes from layer to layer. Between chunks they travel inside the hidden state: the last layer of a chunk packs
``[hidden | key | value | ...]`` and the first of the next unpacks it, so Megatron's block, model and schedules stay
as they are.

Full recompute carries ``context`` as a tensor argument, because its backward runs through tensors only: there the
sources are one concatenated tensor. Otherwise they are kept as they are, without a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_depthattn.model.attention import DepthCall, Source
from megatron_depthattn.parallel.payload import HIDDEN, Payload, depth_payload

Sources = dict[int, Source]


class DepthAttentionLayer(TransformerLayer):
    """Megatron's transformer layer plus the traffic of sources; takes ``[s, b, h]`` or a payload, returns the same."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer_index = self.layer_number - 1
        plan = self.config.source_plan
        self.reads = plan.sources(self.layer_index)
        self.live_before = plan.live(self.layer_index)
        self.live_after = plan.live(self.layer_index + 1)
        self.enters_chunk = plan.enters_chunk(self.layer_index)
        self.leaves_chunk = plan.leaves_chunk(self.layer_index)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | Sources | None = None,
        attention_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | Sources | None]:
        """As Megatron's layer.

        Args:
            hidden_states: ``[s, b, h]``; for the first layer of a later pipeline chunk the payload ``[s, b, W]``.
            context: the live sources before this layer, as the layer before it returned them.

        Returns:
            The hidden state (for the last layer of a chunk, the payload) and the live sources after this layer.
        """
        self._refuse_pipelined_inference(kwargs.get("inference_context"))
        if self.enters_chunk:
            hidden_states, sources = self._unpack(hidden_states)
        else:
            sources = self._open(context)
        call = DepthCall({index: sources[index] for index in self.reads}, attention_bias)
        hidden_states, _ = super().forward(hidden_states, attention_mask, attention_bias=call, **kwargs)
        (sources[self.layer_index],) = call.made
        live = {index: sources[index] for index in self.live_after}
        if self.leaves_chunk:
            return self._pack(hidden_states, live), None
        if self._context_is_tensor and self.live_after == self.live_before and not self.enters_chunk:
            return hidden_states, context
        return hidden_states, self._close(live)

    # ---- between chunks: the payload

    def _payload(self, live: tuple[int, ...]) -> Payload:
        """The message that carries ``live`` on this rank."""
        attention = self.self_attention
        width = attention.num_query_groups_per_partition * attention.hidden_size_per_attention_head
        if self.config.sequence_parallel:
            width *= self.config.tensor_model_parallel_size
        return depth_payload(live, hidden_width=self.config.hidden_size, source_width=width)

    def _pack(self, hidden_states: Tensor, live: Sources) -> Tensor:
        parts = {HIDDEN: hidden_states}
        for index, source in live.items():
            parts[f"key.{index}"], parts[f"value.{index}"] = source
        return self._payload(tuple(live)).pack(parts)

    def _unpack(self, message: Tensor) -> tuple[Tensor, Sources]:
        parts = self._payload(self.live_before).unpack(message)
        rows, batch = message.shape[:2]
        if self.config.sequence_parallel:
            rows *= self.config.tensor_model_parallel_size
        shape = (rows, batch, -1, self.self_attention.hidden_size_per_attention_head)
        sources = {
            index: Source(parts[f"key.{index}"].reshape(shape), parts[f"value.{index}"].reshape(shape))
            for index in self.live_before
        }
        return parts[HIDDEN], sources

    # ---- between layers of a chunk: the context

    @property
    def _context_is_tensor(self) -> bool:
        return self.config.recompute_granularity == "full" and self.training

    def _open(self, context: Tensor | Sources | None) -> Sources:
        if isinstance(context, Tensor):
            heads = self.self_attention.num_query_groups_per_partition
            pieces = context.split(heads, dim=2)
            return {index: Source(*pieces[2 * i : 2 * i + 2]) for i, index in enumerate(self.live_before)}
        return dict(context or {})

    def _close(self, live: Sources) -> Tensor | Sources | None:
        if not live:
            return None
        if not self._context_is_tensor:
            return live
        return torch.cat([tensor for source in live.values() for tensor in source], dim=2)

    def _refuse_pipelined_inference(self, inference_context: Any) -> None:
        if inference_context is not None and self.config.pipeline_model_parallel_size > 1:
            raise ValueError(
                "inference was called with "
                f"pipeline_model_parallel_size={self.config.pipeline_model_parallel_size}: Megatron's "
                "inference buffers have room for the hidden state only, not for sources. Load the checkpoint "
                "with one pipeline stage."
            )
