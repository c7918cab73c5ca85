"""Self-attention that reads a value mixed over depth.

The seam is ``SelfAttention.get_query_key_value_tensors``: there q, k and v exist apart, normed, before RoPE and
before the inference cache. What it returns in place of v reaches core attention, packed sequences and every cache
without further work.

Scores are the same before and after RoPE, because query and key of one token are turned by the same rotation. In
training RoPE is applied here, before the mix, so that the q and k kept for its backward are the very tensors that
core attention keeps: no second copy of either. With an inference cache or sequences packed as ``thd`` RoPE stays where
Megatron has it, after the mix.

Shape suffixes: S positions, B micro-batch, H query heads and G key/value heads of this rank, D head size, T tensor
ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_depthattn.model.depth_weights import recorder
from megatron_depthattn.ops import depth_mix, uniform_mix

Source = Mapping[str, Tensor]
"""What a layer leaves to later layers, each ``[S, B, G, D]``: its ``key``, and its mixed ``value`` (an ablation:
``mixed_key``). In one forward pass all keys and queries are on the same side of RoPE."""


@dataclass
class DepthCall:
    """One call's envelope from a layer to its self-attention and back.

    ``TransformerLayer`` hands ``attention_bias`` to self-attention untouched, under every Megatron-Core version
    supported, so the envelope rides there and nothing is ever left on a module (a tensor left there inside a
    recomputed forward would have no gradient). A bias proper stays possible: it travels inside.
    """

    sources: Mapping[int, Source]
    attention_bias: Tensor | None = None
    rotary_pos_emb: Tensor | None = None
    """Angles to turn q and k by before the mix; None: not here."""
    made: list[Source] = field(default_factory=list)


class DepthSelfAttention(SelfAttention):
    """Megatron's self-attention with the depth mix between the QKV projection and everything after it."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None, *, attention_bias: DepthCall, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's, with the call's envelope in ``attention_bias``."""
        if self._turns_before_mix(**kwargs):
            attention_bias.rotary_pos_emb = kwargs.pop("rotary_pos_emb")
        # key_value_states is Megatron's argument for cross-attention; self-attention passes it on to the method
        # below unread.
        return super().forward(
            hidden_states,
            attention_mask,
            key_value_states=attention_bias,
            attention_bias=attention_bias.attention_bias,
            **kwargs,
        )

    def get_query_key_value_tensors(  # type: ignore[override]
        self, hidden_states: Tensor, key_value_states: DepthCall, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``[S, B, H, D]``, key ``[S, B, G, D]`` and the mixed value ``[S, B, G, D]``; an ablation mixes the key.

        What later layers read also goes into the envelope, as this layer's source.
        """
        call = key_value_states
        query, key, value = super().get_query_key_value_tensors(hidden_states, None, **kwargs)
        if (angles := call.rotary_pos_emb) is not None:
            query, key = (
                apply_rotary_pos_emb(t, angles, config=self.config, cp_group=self.pg_collection.cp)
                for t in (query, key)
            )
        # The value is a view of the fused projection: whoever keeps it keeps all of that alive, (H + 2G) D numbers for
        # G D. A source must not; the mix may, where the norm of k does so anyway.
        if not call.sources or not self._norm_keeps_projection(value):
            value = value.contiguous()
        own = {"key": key, "mixed_key": key, "value": value}
        if call.sources:
            own |= self._mix(list(call.sources.values()), query, own)
        call.made.append(own)
        return query, own["mixed_key"], own["value"]

    def _mix(self, sources: Sequence[Source], query: Tensor, own: Source) -> dict[str, Tensor]:
        """What the layer mixes of ``own``, by kind: the value, or what an ablation mixes."""
        states = {kind: [source[kind] for source in sources] for kind in sources[0]}
        keys, key = states.pop("key", None), own["key"]
        if keys is None:  # nothing is scored
            if (active := recorder()) is not None:
                active.record(self.layer_number - 1, query, [key] * len(sources), key, 0.0)
            return {kind: uniform_mix(given, own[kind]) for kind, given in states.items()}
        query, scale = self.group_queries(query), self.hidden_size_per_attention_head**-0.5
        if (active := recorder()) is not None:
            active.record(self.layer_number - 1, query, keys, key, scale)
        # An ablation that mixes both scores twice: its two results keep nothing for each other.
        op = self.config.depth_attention_op
        return {
            kind: depth_mix(query, keys, given, key, own[kind], scale, implementation=op)
            for kind, given in states.items()
        }

    def _norm_keeps_projection(self, value: Tensor) -> bool:
        """Whether the norm of k keeps its input, a view of the projection; torch's does, but in bf16 not on CPU."""
        return isinstance(self.k_layernorm, torch.nn.RMSNorm) and (value.is_cuda or value.dtype is torch.float32)

    def _turns_before_mix(
        self,
        rotary_pos_emb: Any = None,
        inference_context: Any = None,
        inference_params: Any = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> bool:
        """Whether q and k are turned here: one rotation for every layer, position and token of the pass.

        Not with a cache, which Megatron fills before RoPE; nor with ``thd``, whose angles are a document's; nor with
        layers that skip RoPE: their keys would be on the other side.
        """
        is_thd = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        is_plain = inference_context is None and inference_params is None and not is_thd
        return is_plain and isinstance(rotary_pos_emb, Tensor) and not self.config.no_rope_freq

    def group_queries(self, query_SBHD: Tensor) -> Tensor:
        """The query heads whose mean scores each key/value head of this rank.

        With at least as many key/value heads as tensor ranks these are the rank's own heads. With fewer, a group's
        heads are spread over ``T / G`` neighbouring ranks that all hold the same key/value head: their means are
        gathered, so that every rank scores with the mean over the whole group. The gather's backward sums what the
        ranks contribute.

        Returns ``[S, B, H, D]``, or ``[S, B, 1, D]`` (the mean itself) when groups are spread.
        """
        num_groups = self.config.num_query_groups
        if num_groups >= self.world_size:
            return query_SBHD
        sequence, batch, _, head_size = query_SBHD.shape
        ranks_per_group = self.world_size // num_groups
        first = self.tp_group.rank() // ranks_per_group * ranks_per_group
        # In fp32 like the mean that the op takes by itself, so that bf16 scores do not depend on the layout.
        mean_SBD = query_SBHD.mean(dim=2, dtype=torch.promote_types(query_SBHD.dtype, torch.float32))
        means = all_gather_last_dim_from_tensor_parallel_region(mean_SBD, group=self.tp_group)
        means_SBTD = means.view(sequence, batch, self.world_size, head_size)
        return means_SBTD[:, :, first : first + ranks_per_group].mean(dim=2, keepdim=True)
