"""A transformer layer that receives sources, adds its own and hands on what later layers still read.

Between the layers of a rank the sources travel in the micro-batch's state: by itself in ``context``, the argument
and result that Megatron's block already passes from layer to layer; or, when the caller hands one in, in
``attention_bias``, which Megatron's block gives to every layer untouched. Full recompute and interleaved pipelining
need the latter: a recomputed layer takes and returns nothing but tensors, and a rank's chunks are called one by one.

Between ranks the sources travel inside the hidden state: the last layer of a chunk packs
``[hidden | key | value | ...]`` and the first of the next unpacks it, so Megatron's block, model and schedules stay
as they are.

What a source is, and what a layer does with those it reads, is its method's: `run_layer` of a subclass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_depthattn.parallel.microbatch_state import MicrobatchState
from megatron_depthattn.parallel.payload import HIDDEN, source_parts

SourceTensors = tuple[Tensor, ...]
"""What one layer leaves to later layers: a tensor of each of its plan's ``kinds``."""


class CrossLayerLayer(TransformerLayer):
    """Megatron's transformer layer plus the traffic of sources; takes ``[s, b, h]`` or a payload, returns the same."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        index = self.layer_index = self.layer_number - 1
        plan = self.config.source_plan
        chunk = plan.chunk_of(index)
        self.kinds = plan.kinds
        self.reads = plan.sources(index)
        self.enters_chunk, self.leaves_chunk = plan.enters_chunk(index), plan.leaves_chunk(index)
        if self.enters_chunk:
            self.receives, self.message_in = plan.entering(chunk), self.config.message_into(chunk)
        if self.leaves_chunk:
            self.sends, self.message_out = plan.entering(chunk + 1), self.config.message_into(chunk + 1)
        self.held = plan.held(index)
        self.kept = plan.kept(chunk)

    # ---- what a method says

    @abstractmethod
    def run_layer(
        self, hidden_states: Tensor, sources: Mapping[int, Any], attention_bias: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, SourceTensors]:
        """The layer itself.

        Args:
            hidden_states: ``[s, b, h]``, of all streams where there are several.
            sources: what the layers that this one reads have left, by their index.
            kwargs: as for Megatron's layer, without ``context``.

        Returns:
            The hidden state and what this layer leaves to later ones, of every one of ``kinds``.
        """

    def source_of_message(self, parts: SourceTensors) -> SourceTensors:
        """A source from what arrived of it, each part ``[rows, b, width]``."""
        return parts

    def vanilla_forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Megatron's own layer: ``[s, b, h]`` to ``[s, b, h]``."""
        hidden_states, _ = super().forward(hidden_states, **kwargs)
        return hidden_states

    # ---- the traffic

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
        if kwargs.get("inference_context") is not None and self.config.pipeline_model_parallel_size > 1:
            raise ValueError(
                f"inference with pipeline_model_parallel_size={self.config.pipeline_model_parallel_size}: Megatron's "
                "inference buffers have room for the hidden state only, not for sources. Load the checkpoint with one "
                "pipeline stage."
            )
        if isinstance(attention_bias, MicrobatchState):
            state, attention_bias = attention_bias, None
        else:
            if self._is_recomputed:
                raise ValueError(
                    "recompute_granularity='full' and no MicrobatchState was given: a recomputed layer takes and "
                    "returns nothing but tensors. Build the model with build_gpt_model, or pass "
                    "extra_block_kwargs={'attention_bias': MicrobatchState()} to GPTModel."
                )
            state = context = context or MicrobatchState()
        if self.enters_chunk:
            hidden_states, received = self._unpack(hidden_states)
            hidden_states = self._leave(received, hidden_states, state)
        sources = {index: self._source(index, state) for index in self.reads}
        hidden_states, own = self.run_layer(
            hidden_states, sources, attention_bias, attention_mask=attention_mask, **kwargs
        )
        made = {self.layer_index: own}
        if self.layer_index in self.held:
            hidden_states = self._leave(made, hidden_states, state)
        if self.leaves_chunk:
            hidden_states = self._pack(hidden_states, made, state)
        state.keep_only(name for index in self.held for name in source_parts(index, self.kinds))
        return hidden_states, context

    @property
    def _is_recomputed(self) -> bool:
        return self.training and self.config.recompute_granularity == "full"

    # ---- between layers of a rank: the micro-batch's state

    def _leave(self, sources: Mapping[int, SourceTensors], hidden_states: Tensor, state: MicrobatchState) -> Tensor:
        """Leave ``sources`` to later layers of this rank; returns what to use in place of ``hidden_states``."""
        kept = self.kept if torch.is_grad_enabled() else ()
        detached: dict[str, Tensor] = {}
        left: dict[str, Tensor] = {}
        for index, source in sources.items():
            (detached if self._is_recomputed or index in kept else left).update(self._named(index, source))
        state.publish(left)
        return state.detach_for_reuse(detached, hidden_states) if detached else hidden_states

    def _source(self, index: int, state: MicrobatchState) -> SourceTensors:
        return tuple(state[name] for name in source_parts(index, self.kinds))

    def _named(self, index: int, source: SourceTensors) -> dict[str, Tensor]:
        return dict(zip(source_parts(index, self.kinds), source, strict=True))

    # ---- between ranks: the payload

    def _pack(self, hidden_states: Tensor, made: Mapping[int, SourceTensors], state: MicrobatchState) -> Tensor:
        parts = {HIDDEN: hidden_states}
        for index in self.sends:
            parts |= self._named(index, made.get(index) or self._source(index, state))
        return self.message_out.pack(parts)

    def _unpack(self, message: Tensor) -> tuple[Tensor, dict[int, SourceTensors]]:
        parts = self.message_in.unpack(message)
        sources = {
            index: self.source_of_message(tuple(parts[name] for name in source_parts(index, self.kinds)))
            for index in self.receives
        }
        return parts[HIDDEN], sources
