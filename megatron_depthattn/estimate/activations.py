"""Bytes that one micro-batch keeps from forward to backward on one rank, from the shapes. Imports no torch.

What each operation keeps was read from torch's autograd formulas, Megatron-Core's modules and TransformerEngine's
sources. Small tensors (masks, reciprocal deviations, log-sum-exps) are left out. Tests hold the local layers on a CPU
within 5 % of what autograd saves, and FP8 copies to that of TransformerEngine's own Python over kernels in plain torch.
The ``reference`` implementation of the mix, which keeps fp32 copies, is counted as ``lean``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_depthattn.config import RunConfig
from megatron_depthattn.config.resolve import CPU, GPU, resolve
from megatron_depthattn.estimate.counts import (
    cross_layer_method,
    element_bytes,
    hidden_rows,
    layers_of_chunk,
    rows,
    source_plan,
)
from megatron_depthattn.methods.attnres.definition import AttentionResiduals
from megatron_depthattn.methods.definition import CrossLayerMethod
from megatron_depthattn.methods.denseformer.definition import DenseFormer
from megatron_depthattn.methods.mhc.definition import HyperConnections
from megatron_depthattn.model.activation_memory import BLOCK_ROWS
from megatron_depthattn.model.source_plan import CrossLayerPlan
from megatron_depthattn.switches import Kernels, resolved_switches
from megatron_depthattn.vocabulary import LOSS_CHUNK, padded_vocab_size


@dataclass(frozen=True)
class ChunkMemory:
    """Bytes of one pipeline chunk for one micro-batch."""

    activations: int
    """What forward leaves to backward, but for what follows."""
    sources: int
    """What layers leave to later ones, and what a method's own arithmetic keeps."""
    message_in: int
    message_out: int
    working: int
    """Largest temporary of backward: layers that are recomputed, gradients inside the MLP, or the output layer's."""


class _Layers:
    """Sizes in bytes of one rank's tensors, and what they add up to."""

    def __init__(self, config: RunConfig, on_gpu: bool) -> None:
        resolved = resolve(config, GPU if on_gpu else CPU).config
        self.config = resolved_switches(resolved, 1, Kernels(on_gpu, None, adds_gradients=True))
        model, tensor = self.config.model, config.parallel.tensor
        self.is_te, self.is_fp8 = model.spec == "te", config.precision.fp8 is not None
        self.element, self.tokens, self.rows = element_bytes(config), rows(config), hidden_rows(config)
        self.hidden = self.element * self.rows * model.hidden_size
        token_bytes = self.element * self.tokens
        self.query = token_bytes * model.num_attention_heads // tensor * model.kv_channels
        groups = max(1, model.num_query_groups // tensor)
        self.key = token_bytes * groups * model.kv_channels
        gathered = model.num_query_groups < tensor
        self.projection = token_bytes * (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
        self.projection //= 1 if gathered else tensor
        self.inner = token_bytes * model.ffn_hidden_size // tensor
        self.logits = self.tokens * padded_vocab_size(model.vocab_size) // tensor
        self.query_is_view = groups in (1, model.num_attention_heads // tensor)
        self.scaled = 0 if on_gpu else 4  # torch's RMSNorm on a CPU keeps an fp32 tensor as well
        self.device = "cuda" if on_gpu else "cpu"

    def norm(self, size: int) -> int:
        """Input of an RMSNorm of ``size`` bytes."""
        return size + self.scaled * size // self.element

    def linear(self, size: int) -> int:
        """Input of a linear layer of TransformerEngine or torch: an FP8 copy has one byte an element."""
        return size // self.element if self.is_te and self.is_fp8 else size

    @property
    def core_attention(self) -> int:
        """Inputs and output of core attention without the value, which vanilla layers keep as a view."""
        context = self.config.parallel.context
        if context == 1 or (self.is_te and not self.config.data.document_mask):
            return 2 * self.query + self.key
        block = min(self.tokens // self.config.train.micro_batch_size // 2, BLOCK_ROWS)
        mask = self.element * block * (self.config.data.sequence_length + block)
        return 3 * self.query + 2 * context * self.key + mask  # gathered keys and values, queries block by block

    @property
    def attention(self) -> int:
        """Input norm, projections, norms of q and k, RoPE and core attention of a vanilla layer."""
        head = self.norm(self.query) + self.norm(self.key)
        if not self.is_te:  # q and k are views of the projection, which is kept whole
            views = (self.query if self.query_is_view else 0) + self.key
            angles = 4 * self.element * self.tokens // self.config.train.micro_batch_size
            head += self.projection - views + angles * self.config.model.kv_channels
        value = self.key if self.is_te else 0
        kept = self.core_attention
        if self.config.recompute.granularity == "selective":
            kept = 2 * self.query + self.key
        # Other recipes cast core attention's output once more in the backward pass: megatron.core's attention.py.
        output = self.linear(self.query) if self.is_te and self.config.precision.fp8 == "delayed" else 0
        return self.norm(self.hidden) + self.linear(self.hidden) + head + value + kept + output

    @property
    def mlp(self) -> int:
        """Input norm, SwiGLU and the inputs of both linear layers."""
        between = 2 * self.inner if self.config.model.fused_swiglu else 4 * self.inner
        return self.norm(self.hidden) + self.linear(self.hidden) + between + self.linear(self.inner)

    def method(self, method: CrossLayerMethod, layer: int) -> int:
        """What another method's layer keeps above a vanilla one."""
        match method:
            case DenseFormer():
                return self.hidden * bool(method.averaged(layer))
            case AttentionResiduals():
                return 2 * self.hidden
            case HyperConnections(num_streams=n):
                return (2 * (n + 1) + n * method.is_last(layer)) * self.hidden + 8 * self.rows * (n + n * n)
        return 0

    @property
    def end(self) -> int:
        """Final norm, output layer, which is not in FP8, and loss."""
        logits = (4 if self.config.model.fused_cross_entropy else self.element) * self.logits
        return self.norm(self.hidden) + self.hidden + logits + 16 * self.tokens

    def end_working(self) -> int:
        """The logits' gradient under the fused loss, else a chunk of them in fp32; or the output weight's gradient."""
        model, tensor = self.config.model, self.config.parallel.tensor
        weight = self.element * padded_vocab_size(model.vocab_size) // tensor * model.hidden_size
        if model.fused_cross_entropy:
            return self.element * self.logits + weight
        return max(4 * min(LOSS_CHUNK[self.device], self.logits) if self.element == 2 else 0, weight)


def chunk_memory(config: RunConfig, chunk: int, *, on_gpu: bool = True) -> ChunkMemory:
    """What one pipeline chunk, in model order, needs for one micro-batch."""
    sizes, recompute = _Layers(config, on_gpu), config.recompute
    layers, num_chunks = layers_of_chunk(config, chunk), config.parallel.pipeline * config.parallel.virtual_pipeline
    plan, method = source_plan(config), cross_layer_method(config.model)
    group = (recompute.num_layers or 1) if recompute.method == "uniform" else 1
    is_full = recompute.granularity == "full"
    recomputed = len(layers) if recompute.method == "uniform" else min(len(layers), recompute.num_layers or 0)
    again = layers[:recomputed] if is_full else range(0)
    streams = method.num_streams if method else 1

    whole, source = sizes.attention + sizes.mlp, sizes.hidden if method else len(plan.kinds if plan else ()) * sizes.key
    first = -(-len(again) // group) * sizes.hidden * streams
    if again and again[0] == 0:
        first -= sizes.hidden * (streams - 1)  # the embedding is one stream
    kept_layers = [layer for layer in layers if layer not in again]
    activations = first + len(kept_layers) * whole
    sources = sum(_layer_sources(sizes, plan, method, layer) for layer in kept_layers)
    received = plan.entering(chunk) if plan and chunk else ()
    sources += len(received) * source
    if plan:  # of recomputed layers, whose readers' backward runs apart
        made = [layer for layer in again if layer in plan.held(layer) or layer in plan.kept(chunk)]
        sources += sum(source for layer in made if not (method and (layer - again[0]) % group == 0))
    if chunk == num_chunks - 1:
        activations += sizes.end

    working = 4 * sizes.inner if layers else 0
    if is_full:
        working += (min(group, len(again)) * whole) + sum(
            _layer_sources(sizes, plan, method, layer) for layer in again[:group]
        )
        working += len(plan.held(layers[-1]) if plan and layers else ()) * source
    elif recompute.granularity == "selective" and not sizes.is_te:
        working += sizes.core_attention - 2 * sizes.query - sizes.key
    if method and layers:
        read = max(len(plan.sources(layer)) for layer in layers) if plan else 0
        working += sizes.rows * 4 * config.model.hidden_size * 2 * (streams + read)
    if chunk == num_chunks - 1:
        working = max(working, sizes.end_working())

    def message(into: int) -> int:
        if not 0 < into < num_chunks:
            return 0
        width = sizes.hidden * (streams if plan and plan.is_inside(into) else 1)
        return width + (len(plan.entering(into)) * source if plan else 0)

    return ChunkMemory(activations, sources, message(chunk), message(chunk + 1), working)


def _layer_sources(sizes: _Layers, plan: CrossLayerPlan | None, method: CrossLayerMethod | None, layer: int) -> int:
    """Bytes above a vanilla layer: one more tensor of a value's size for each kind that it mixes, or if it is read.

    Core attention keeps the q, k and v that it is given, in vanilla too. But there the value is a view of the fused QKV
    projection. Where the norm of k keeps that projection alive in both models (torch's norm does), the own value that
    the mix keeps is such a view, and a mixed value is memory of its own. TransformerEngine's norm does not, and its
    core attention copies a value that is a view: the mixed value takes the place of that copy, and the own value is a
    copy that only the mix keeps.
    """
    if plan is None:
        return 0
    if method:
        return sizes.method(method, layer)
    if plan.sources(layer):
        # A uniform mix does not keep what it mixed: the mixed key takes the key's place, and the mixed value that of
        # TransformerEngine's copy of the value.
        is_scored = "key" in plan.kinds
        # In the format thd RoPE comes after the mix, which keeps q and k as they were before it.
        is_thd = sizes.is_te and sizes.config.data.document_mask and sizes.config.parallel.context == 1
        unturned = sizes.query + sizes.key if is_thd and is_scored else 0
        return unturned + sizes.key * sum(
            is_scored or (k == "value" and not sizes.is_te) for k in plan.kinds if k != "key"
        )
    is_read = any(layer in plan.sources(later) for later in range(layer + 1, plan.num_layers))
    return sizes.key * (is_read and not sizes.is_te)
