"""Megatron's ``TransformerConfig`` with the fields of loops and of the cross-layer methods, Depth-Attention first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, get_args, get_type_hints

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_depthattn.config.schema import DepthConfig
from megatron_depthattn.methods.definition import CrossLayerMethod
from megatron_depthattn.methods.definitions import DEFINITIONS, define, effective_method
from megatron_depthattn.model.source_plan import CrossLayerPlan, ListedPlan, SourcePlan, default_stride, source_kinds
from megatron_depthattn.model.unsupported import unsupported_by
from megatron_depthattn.ops import DEPTH_MIX_IMPLEMENTATIONS
from megatron_depthattn.parallel.payload import Payload, cross_layer_payload


@dataclass
class DepthAttentionConfig(TransformerConfig):
    """A ``TransformerConfig`` whose layers attend over depth, or share something else.

    All of Megatron's fields keep their meaning; with ``depth_attention=False`` or ``method="vanilla"`` the model is
    Megatron's own.
    Construction raises ``ValueError`` for every combination in `unsupported.py`, with the reason and what to set.
    """

    depth_attention: bool = True
    """Mix the values of earlier layers at the same token into the value that self-attention reads. Read where
    ``method`` is ``depth_attention``."""

    depth_attention_stride: int | None = None
    """Layers between sources; None: half the layers that it counts (the released models), 1: every earlier layer."""

    depth_attention_recent_window: int = 0
    """This many immediately preceding layers are sources as well."""

    depth_attention_loop_sources: str = "same_layer"
    """With ``num_loops`` above 1: ``same_layer`` (stride and window count the layers of one loop; a layer's earlier
    selves are its sources as well) or ``unrolled`` (they count through all loops)."""

    depth_attention_weights: str = "softmax"
    """Weights over a layer's sources and itself: ``softmax`` or ``uniform``."""

    depth_attention_mixes: str = "value"
    """What self-attention reads mixed: ``value``, ``key`` or ``key_value``."""

    depth_attention_op: str = "lean"
    """Implementation of the mix: ``lean`` (recomputes in backward), ``triton`` (the same in one GPU kernel each way, on
    GPUs only) or ``reference`` (plain autograd)."""

    method: str = "depth_attention"
    """What layers share: ``depth_attention`` (if that is switched on), ``vanilla`` (nothing), or one of
    `methods.definitions.DEFINITIONS`."""

    method_settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings of one of the latter, by the names of its definition's fields."""

    num_loops: int = 1
    """Times the stack of layers is run with the same weights (loops.py). Megatron's ``num_layers`` counts effective
    layers, those of all loops; the first ``num_layers / num_loops`` hold the weights."""

    document_mask: bool = False
    """Rows hold documents that do not see each other. Under context parallel TransformerEngine's layers then have the
    core attention of the local ones: its own ring wants every document padded to a multiple of twice the ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_loops()
        if not self.shares_over_layers:
            return
        if self.attends_over_depth and self.depth_attention_stride is None:
            self.depth_attention_stride = default_stride(self.layers_per_loop or self.num_layers)
        self.validate()
        if self.pipeline_model_parallel_size > 1:
            # Messages differ in width from edge to edge; with this the schedules' communicator is asked for each shape:
            # ours knows it (parallel/schedule.py), Megatron's exchanges it with the neighbour.
            self.variable_seq_lengths = True

    @property
    def layers_per_loop(self) -> int | None:
        """Layers that stride and window count, where these are those of one loop; None: all."""
        is_per_loop = self.num_loops > 1 and self.depth_attention_loop_sources == "same_layer"
        return self.num_layers // self.num_loops if is_per_loop else None

    @property
    def effective_method(self) -> str:
        """``method``, but Depth-Attention that is switched off is vanilla."""
        return effective_method(self.method, self.depth_attention)

    @property
    def shares_over_layers(self) -> bool:
        """Whether layers share anything but the hidden state; False: vanilla."""
        return self.effective_method != "vanilla"

    @property
    def attends_over_depth(self) -> bool:
        """Whether this is a model with Depth-Attention."""
        return self.effective_method == "depth_attention"

    @property
    def method_definition(self) -> CrossLayerMethod | None:
        """The method's definition; None for vanilla and for Depth-Attention."""
        if self.method not in DEFINITIONS:
            return None
        sizes = {"num_layers": self.num_layers, "hidden_size": self.hidden_size}
        return define(self.method, **sizes, settings=self.method_settings)

    @property
    def source_plan(self) -> CrossLayerPlan:
        """Who reads whom under this config's pipeline layout."""
        cut: dict[str, Any] = {
            "chunk_starts": pipeline_chunk_starts(self),
            "num_ranks": self.pipeline_model_parallel_size,
        }
        if definition := self.method_definition:
            return ListedPlan(tuple(map(definition.sources, range(self.num_layers))), **cut)
        assert self.depth_attention_stride is not None
        return SourcePlan(
            self.num_layers,
            self.depth_attention_stride,
            self.depth_attention_recent_window,
            layers_per_loop=self.layers_per_loop,
            kinds=source_kinds(self.depth_attention_weights, self.depth_attention_mixes),
            **cut,
        )

    @property
    def hidden_width(self) -> int:
        """Numbers per token that flow from layer to layer."""
        definition = self.method_definition
        return self.hidden_size * (definition.num_streams if definition else 1)

    @property
    def part_width(self) -> int:
        """Numbers per token of one part of a source on one rank."""
        if not self.attends_over_depth:
            return self.hidden_size
        return max(1, self.num_query_groups // self.tensor_model_parallel_size) * self.kv_channels

    def message_into(self, chunk: int) -> Payload:
        """What pipeline chunk ``chunk`` (in model order) receives, with the widths of one rank."""
        # Under sequence parallel a rank has all positions of its own heads, but its share of the hidden state's.
        spread = self.tensor_model_parallel_size if self.sequence_parallel and self.attends_over_depth else 1
        plan = self.source_plan
        return cross_layer_payload(
            plan.entering(chunk),
            plan.kinds,
            hidden_width=self.hidden_width if plan.is_inside(chunk) else self.hidden_size,
            part_width=self.part_width * spread,
        )

    def _check_loops(self) -> None:
        loops, layers, stages = self.num_loops, self.num_layers, self.pipeline_model_parallel_size
        if loops < 1 or layers % loops:
            raise ValueError(
                f"num_loops is {loops} and num_layers is {layers}, which counts the layers of all loops: set num_loops "
                "to 1 or more, and num_layers to a multiple of it."
            )
        if loops > 1 and self.method in DEFINITIONS:
            raise ValueError(
                f"num_loops is {loops} with method={self.method!r}, which has weights of its own for every place in "
                "depth: set num_loops=1, or method to 'depth_attention' or 'vanilla'."
            )
        if loops == 1 or stages == 1:
            return
        virtual = self.virtual_pipeline_model_parallel_size or 1
        starts = pipeline_chunk_starts(self)
        a_loop = len(starts) // loops
        are_alike = all(starts[i] == starts[i - a_loop] + layers // loops for i in range(a_loop, len(starts)))
        if virtual % loops or not are_alike:
            step = stages * max(virtual // loops * loops, loops)
            raise ValueError(
                f"num_loops is {loops} with pipeline_model_parallel_size={stages} and "
                f"virtual_pipeline_model_parallel_size={virtual}, which cuts {layers} layers at {list(starts)}: a "
                "rank shares weights among its own chunks, so it has to hold the same part of every loop. Set "
                f"virtual_pipeline_model_parallel_size to {loops} or a multiple of it, num_layers to a multiple of "
                f"{step}, or an uneven layout that repeats itself with every loop."
            )

    def validate(self) -> None:
        """Raise ``ValueError`` naming what was given, why the method does not support it and what to set."""
        words = get_type_hints(DepthConfig)
        choices = {key: list(get_args(words[key])) for key in ("loop_sources", "weights", "mixes")}
        for key, known in ({"op": sorted(DEPTH_MIX_IMPLEMENTATIONS)} | choices).items():
            if (given := getattr(self, f"depth_attention_{key}")) not in known:
                raise ValueError(f"depth_attention_{key} is {given!r}; set one of {known}.")
        if self.method not in ("depth_attention", "vanilla", *DEFINITIONS):
            raise ValueError(
                f"method is {self.method!r}; the methods are {['depth_attention', 'vanilla', *DEFINITIONS]}."
            )
        if message := unsupported_by(self, self.method):
            raise ValueError(message)
        _ = self.source_plan  # its constructor checks stride, window, the method's settings and the pipeline cut


def pipeline_chunk_starts(config: TransformerConfig) -> tuple[int, ...]:
    """First layer of every pipeline chunk in model order, as Megatron places them, uneven layouts included."""
    num_stages = config.pipeline_model_parallel_size
    if num_stages == 1:
        return (0,)
    virtual = config.virtual_pipeline_model_parallel_size
    places = [(v, p) for v in (range(virtual) if virtual else [None]) for p in range(num_stages)]
    return tuple(accumulate((layers_of_chunk(config, *place) for place in places[:-1]), initial=0))


def layers_of_chunk(config: TransformerConfig, vp_stage: int | None, pp_rank: int | None) -> int:
    """Layers of a chunk; with ``pp_rank`` None of this process's, by Megatron's parallel state."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None and pp_rank is not None:  # Megatron's own count is that of this process, whatever the rank
        return layout.layout[pp_rank][vp_stage or 0].count(LayerType.decoder)
    return get_num_layers_to_build(config, vp_stage, pp_rank)
