"""What autograd keeps from forward to backward on one rank, counted from the shapes.

Pure: integers in, bytes out. The layers are walked as the model runs them, and every operation enters what it needs in
backward into a ledger (`Storages`). Which operation keeps what was read from torch's autograd formulas and from
Megatron-Core's modules; for ``spec="local"`` on a CPU it is held against measurement.

The ``reference`` implementation of the mix, which keeps fp32 copies, is counted as ``lean``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_depthattn.estimate import local_layers, te_layers
from megatron_depthattn.estimate.shapes import RankShape
from megatron_depthattn.estimate.storages import Storages
from megatron_depthattn.methods.attnres.definition import AttentionResiduals
from megatron_depthattn.methods.definition import CrossLayerMethod
from megatron_depthattn.methods.denseformer.definition import DenseFormer
from megatron_depthattn.methods.mhc.definition import SINKHORN_ITERATIONS, HyperConnections
from megatron_depthattn.model.source_plan import CrossLayerPlan
from megatron_depthattn.vocabulary import LOSS_CHUNK


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """What is recomputed in backward, as in the run's config."""

    granularity: str | None = None
    method: str | None = None
    num_layers: int | None = None

    def begins_group(self, place: int) -> bool:
        """Whether the layer at ``place`` of its chunk is the first of those that are recomputed together."""
        if self.granularity != "full" or self.num_layers is None:
            return False
        return place % self.num_layers == 0 if self.method == "uniform" else place < self.num_layers

    def holds(self, place: int) -> bool:
        """Whether the layer at ``place`` of its chunk is recomputed."""
        if self.granularity != "full" or self.num_layers is None:
            return False
        return self.method == "uniform" or place < self.num_layers


NO_RECOMPUTE = Recompute()


@dataclass(frozen=True, kw_only=True)
class ChunkActivations:
    """One pipeline chunk of a model for one micro-batch.

    Args:
        shape: of the micro-batch on this rank.
        layers: of this chunk, in the numbers of the whole model.
        num_layers: of the whole model; loops count.
        plan: who reads whom; None for vanilla.
        method: its definition; None for vanilla and Depth-Attention.
        recompute: what is recomputed.
    """

    shape: RankShape
    layers: range
    num_layers: int
    plan: CrossLayerPlan | None = None
    method: CrossLayerMethod | None = None
    recompute: Recompute = NO_RECOMPUTE

    @property
    def chunk(self) -> int:
        """Its place in model order."""
        return self.layers[0] // len(self.layers)

    def vanilla(self) -> ChunkActivations:
        """The same without what its layers share."""
        return replace(self, plan=None, method=None)

    def message_bytes(self, chunk: int) -> int:
        """Of what ``chunk`` receives; 0 for the model's first and for what is behind its last."""
        if not 0 < chunk * len(self.layers) < self.num_layers:
            return 0
        received = self.plan.entering(chunk) if self.plan else ()
        return self._hidden_bytes + len(received) * self._source_bytes

    # ---- a chunk

    def kept(self) -> Storages:
        """What forward leaves to backward."""
        kept = Storages()
        self._enter(kept)
        for place, layer in enumerate(self.layers):
            if self.recompute.begins_group(place):
                kept.keep(f"hidden.{layer}")
                kept.keep_new("angles", 4 * self.shape.query_length * self.shape.head_size)
            with kept.paused(self.recompute.holds(place)):
                self._layer(kept, layer)
        kept.keep(*(f"{kind}.{source}" for source in self._lent for kind in self._kinds))
        if self.layers.stop == self.num_layers:
            self._leave(kept)
        return kept

    def made_again(self) -> int:
        """Bytes of the largest group of layers, or of one core attention, that exist once more during backward."""
        again = Storages()
        if self.recompute.granularity == "full":
            self._enter(again)
            size = (self.recompute.num_layers or 1) if self.recompute.method == "uniform" else 1
            for layer in self.layers[:size]:
                self._layer(again, layer)
        elif self.recompute.granularity == "selective" and self.shape.spec == "local":
            names = [again.make(name, 0) for name in ("query", "key", "value")]
            local_layers.core_attention(again, self.shape, 0, *names)
        kept = self.kept().kept
        return sum(size for name, size in again.kept.items() if name not in kept)

    def working(self) -> int:
        """Bytes of the largest temporary of backward, to within a few per cent of the peak: gradients inside the MLP,
        or with recomputation what is made again and the gradients of lent sources; in the output layer a gradient of
        the weight, or a chunk of logits in fp32 (under the fused loss that gradient and the logits')."""
        shape = self.shape
        inside = 4 * shape.element * shape.tokens * shape.ffn_size
        if self.recompute.granularity == "full":
            inside += len(self._lent) * self._source_bytes
        layers = self.made_again() + self._mix_made_again() + inside
        if self.layers.stop < self.num_layers:
            return layers
        logits, weight = shape.tokens * shape.vocab_size, shape.element * shape.vocab_size * shape.hidden_size
        if shape.fused_loss:
            return max(layers, shape.element * logits + weight)
        chunk = 4 * min(LOSS_CHUNK["cpu" if shape.on_cpu else "cuda"], logits) if shape.element == 2 else 0
        return max(layers, chunk, weight)

    def _mix_made_again(self) -> int:
        """Bytes of what a method's own recomputation (`methods.parameters.recomputed`) makes, mostly in fp32."""
        rows, copies = 4 * self.shape.rows, int(self.shape.element == 2)
        wide = rows * self.shape.hidden_size
        match self.method:
            case DenseFormer():
                one = copies * wide * max(len(self.method.averaged(layer + 1)) for layer in self.layers)
                count = 1
            case AttentionResiduals():
                one = 2 * copies * wide * max(1 + len(self.method.snapshots(layer)) for layer in self.layers)
                count = 2
            case HyperConnections(num_streams=n):
                one = (2 + 2 * copies) * n * wide + 2 * SINKHORN_ITERATIONS * rows * (n * n + 2 * n)
                count = 2
            case _:
                return 0
        within = self.recompute.granularity == "full" and self.recompute.method == "uniform"
        return one * count * (self.recompute.num_layers or 1) if within else one

    # ---- its ends

    @property
    def _kinds(self) -> tuple[str, ...]:
        return ("hidden",) if self.method else ("key", "value")

    @property
    def _hidden_bytes(self) -> int:
        """Of what flows from layer to layer."""
        return self.shape.hidden_bytes * (self.method.num_streams if self.method else 1)

    @property
    def _source_bytes(self) -> int:
        return self.shape.hidden_bytes if self.method else 2 * self.shape.key_bytes

    def _enter(self, kept: Storages) -> None:
        first = self.layers[0]
        received = self.plan.entering(self.chunk) if self.plan and first else ()
        for source in range(first):  # of an earlier chunk of this rank, which keeps it
            for kind in self._kinds:
                kept.make(f"{kind}.{source}", 0)
        if first == 0:
            kept.keep_new("tokens", 8 * self.shape.tokens)
            if self.shape.tensor > 1:  # tokens of other ranks' rows
                kept.keep_new("token_mask", self.shape.tokens)
            kept.make("hidden.0", self.shape.hidden_bytes)
            return
        kept.keep_new("message", self.message_bytes(self.chunk))
        kept.view(f"hidden.{first}", of="message")
        for source in received:
            for kind in self._kinds:
                kept.view(f"{kind}.{source}", of="message")

    @property
    def _lent(self) -> set[int]:
        """Sources made here that stay for layers whose backward runs apart: recomputed ones, or a later chunk's."""
        if not self.plan:
            return set()
        lent = set(self.plan.kept(self.chunk))
        if self.recompute.granularity == "full":
            lent |= {layer for layer in self.layers if layer in self.plan.held(layer)}
        return lent.intersection(self.layers)

    def _leave(self, kept: Storages) -> None:
        """Final norm, output layer and cross entropy: `model.cross_entropy`, or Megatron's fused one."""
        shape = self.shape
        kept.keep(self._norm(kept, "decoder_output", "output_input"))
        kept.keep_new("target_mask", shape.tokens)
        kept.keep_new("targets", 8 * shape.tokens)
        kept.keep_new("logits", (4 if shape.fused_loss else shape.element) * shape.tokens * shape.vocab_size)
        if shape.fused_loss:
            return
        kept.keep_new("maxima", 4 * shape.tokens)
        kept.keep_new("sums", 4 * shape.tokens * (2 if shape.tensor > 1 else 1))  # summed over ranks with the targets'

    # ---- a layer

    def _layer(self, kept: Storages, layer: int) -> None:
        match self.method:
            case AttentionResiduals():
                made = self._attention_residuals(kept, layer, self.method)
            case HyperConnections():
                made = self._hyper_connections(kept, layer)
            case _:
                made = self._residual_layer(kept, layer)
        if layer + 1 == self.num_layers:
            kept.view("decoder_output", of=made)

    def _residual_layer(self, kept: Storages, layer: int) -> str:
        """Vanilla, Depth-Attention and DenseFormer."""
        size, given = self.shape.hidden_bytes, f"hidden.{layer}"
        if isinstance(self.method, DenseFormer) and (states := self.method.averaged(layer)):
            self._keep_inputs(kept, states)
            given = kept.make(f"average.{layer}", size)
        self._attention(kept, layer, given)
        self._mlp(kept, layer, kept.make(f"middle.{layer}", size))
        made = kept.make(f"hidden.{layer + 1}", size)
        is_last = layer + 1 == self.num_layers
        if is_last and isinstance(self.method, DenseFormer) and (states := self.method.averaged(layer + 1)):
            self._keep_inputs(kept, states)
            return kept.make("final_average", size)
        return made

    def _attention_residuals(self, kept: Storages, layer: int, method: AttentionResiduals) -> str:
        size = self.shape.hidden_bytes
        self._keep_inputs(kept, (*method.snapshots(layer), layer))
        self._attention(kept, layer, kept.make(f"attention_aggregate.{layer}", size))
        kept.keep_new(f"middle.{layer}", size)
        self._mlp(kept, layer, kept.make(f"mlp_aggregate.{layer}", size))
        made = kept.make(f"hidden.{layer + 1}", size)
        if not method.is_last(layer):
            return made
        self._keep_inputs(kept, (*method.snapshots(layer + 1), layer + 1))
        return kept.make("final_aggregate", size)

    def _hyper_connections(self, kept: Storages, layer: int) -> str:
        size, wide, n = self.shape.hidden_bytes, self._hidden_bytes, self.method.num_streams if self.method else 1
        streams = kept.make("streams.0", wide) if layer == 0 else f"hidden.{layer}"
        kept.keep(streams)
        self._attention(kept, layer, kept.make(f"attention_read.{layer}", size))
        middle = kept.make(f"middle.{layer}", wide)
        kept.keep(middle)
        self._mlp(kept, layer, kept.make(f"mlp_read.{layer}", size))
        for sublayer in ("attention", "mlp"):
            kept.keep_new(f"{sublayer}_result.{layer}", size)
            kept.keep_new(f"{sublayer}_write.{layer}", 4 * n * self.shape.rows)
            kept.keep_new(f"{sublayer}_mix.{layer}", 4 * n * n * self.shape.rows)
        made = kept.make(f"hidden.{layer + 1}", wide)
        if layer + 1 < self.num_layers:
            return made
        kept.keep(made)
        return kept.make("readout", size)

    def _keep_inputs(self, kept: Storages, layers: tuple[int, ...]) -> None:
        kept.keep(*(f"hidden.{layer}" for layer in layers))

    # ---- its sublayers

    def _norm(self, kept: Storages, given: str, made: str, *, width: int = 0, count: int = 0) -> str:
        """Of the hidden state, or of ``count`` vectors of ``width`` numbers."""
        shape = self.shape
        size = {"width": width or shape.hidden_size, "count": count or shape.rows}
        if shape.spec == "te":
            return te_layers.norm(kept, shape, given, made, **size, is_view=width > 0 and kept.is_view(given))
        return local_layers.norm(kept, shape, given, made, **size)

    def _attention(self, kept: Storages, layer: int, given: str) -> None:
        shape, size = self.shape, self.shape.head_size
        is_te = shape.spec == "te"
        normed = self._norm(kept, given, f"attention_input.{layer}")
        if is_te:
            te_layers.linear_input(kept, shape, normed, shape.rows * shape.hidden_size)
        else:
            kept.keep(normed)
        projection = kept.make(f"projection.{layer}", shape.element * shape.tokens * shape.projection_size)
        query, own_key, own_value = f"own_query.{layer}", f"own_key.{layer}", f"own_value.{layer}"
        for name in (own_key, own_value):
            kept.view(name, of=projection)
        if shape.num_groups in (1, shape.num_heads):
            kept.view(query, of=projection)
        else:
            kept.make(query, shape.query_bytes)
        self._norm(kept, query, f"normed_query.{layer}", width=size, count=shape.tokens * shape.num_heads)
        self._norm(kept, own_key, f"normed_key.{layer}", width=size, count=shape.tokens * shape.num_groups)
        if is_te:  # fused: the angles only
            kept.keep_new("angles", 4 * shape.query_length * size)
        else:
            local_layers.rope(kept, shape, layer)
        query, key = kept.make(f"query.{layer}", shape.query_bytes), kept.make(f"key.{layer}", shape.key_bytes)
        value = self._value(kept, layer, query, key, own_value)
        output = kept.make(f"attention_output.{layer}", shape.query_bytes)
        if self.recompute.granularity == "selective":
            kept.keep(query, key, value)
            kept.keep_new(f"mask_type.{layer}", 4)
        else:
            (te_layers if is_te else local_layers).core_attention(kept, shape, layer, query, key, value)
        if is_te:
            te_layers.linear_input(kept, shape, output, shape.tokens * shape.num_heads * size)
        else:
            kept.keep(output)

    def _value(self, kept: Storages, layer: int, query: str, key: str, own: str) -> str:
        """What core attention reads as value, and what the mix keeps; see `DepthSelfAttention`."""
        if not self.plan or self.method:
            return own
        sources = self.plan.sources(layer)
        keeps_projection = self.shape.spec == "local" and not (self.shape.on_cpu and self.shape.element == 2)
        if not sources:
            return kept.make(f"value.{layer}", self.shape.key_bytes)
        if not keeps_projection:
            own = kept.make(f"unmixed_value.{layer}", self.shape.key_bytes)
        if self.shape.spreads_groups:  # their mean is gathered, in fp32
            query = kept.make(f"query_mean.{layer}", 4 * self.shape.tokens * self.shape.head_size)
        kept.keep(query, key, own)
        for source in sources:
            kept.keep(f"key.{source}", f"value.{source}")
        return kept.make(f"value.{layer}", self.shape.key_bytes)

    def _mlp(self, kept: Storages, layer: int, given: str) -> None:
        normed = self._norm(kept, given, f"mlp_input.{layer}")
        (te_layers if self.shape.spec == "te" else local_layers).mlp(kept, self.shape, layer, normed)
