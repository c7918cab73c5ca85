"""Configuration of a Qwen3-style decoder with Depth-Attention (arXiv:2606.05014), for transformers 4.57 and 5.

This file ships inside every exported folder, beside ``modeling_depthattn.py``. It needs nothing but transformers.
"""

from typing import Any

from transformers import Qwen3Config


class CrossLayerConfig(Qwen3Config):
    """Qwen3's configuration under transformers 4 and 5; models that read earlier layers add ``method_keys`` to it."""

    # Layers read earlier ones: a pipeline that hands on hidden states alone would lose them.
    base_model_pp_plan = None
    method_keys = tuple[str, ...]()
    num_loops = 1

    def __init__(self, **kwargs: Any) -> None:
        # transformers 5 writes rope_parameters alone, transformers 4 reads rope_theta alone.
        rope = kwargs.get("rope_parameters") or {}
        if "rope_theta" in rope:
            kwargs.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            kwargs["rope_scaling"] = kwargs.get("rope_scaling") or rope
        super().__init__(**kwargs)
        if any(kind != "full_attention" for kind in self.layer_types):
            raise ValueError("sliding-window layers are not supported: set use_sliding_window=false")

    def check_at_least(self, least: int, reason: str, keys: tuple[str, ...] = ()) -> None:
        """Raise ValueError for a method's setting below ``least``, of ``keys`` or all."""
        for key in keys or self.method_keys:
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {least}: {reason}")

    def to_diff_dict(self) -> dict[str, Any]:
        """What ``save_pretrained`` writes: what differs from the defaults, and all of ``method_keys``."""
        return {**super().to_diff_dict(), **{key: getattr(self, key) for key in self.method_keys}}


# By key: what it may be. The first is meant where config.json, written before there was a choice, does not say.
CHOICES = {
    "depth_attention_loop_sources": ("unrolled", "same_layer"),
    "depth_attention_weights": ("softmax", "uniform"),
    "depth_attention_mixes": ("value", "key", "key_value"),
}


class DepthAttnConfig(CrossLayerConfig):
    """Qwen3's configuration and the settings of Depth-Attention; a setting that is None has its default.

    Counting layers from 0, layer ``l`` reads the layers ``i < l`` with ``i % depth_attention_stride == 0`` or
    ``i >= l - depth_attention_recent_window``.

    Args:
        use_depth_attention: mix values over depth; False: a vanilla decoder (looped if ``num_loops > 1``).
        depth_attention_stride: every stride-th layer is a source of all later layers; None: half the layers counted.
        depth_attention_recent_window: this many layers just before a layer are its sources as well.
        depth_attention_loop_sources: with ``num_loops > 1`` "same_layer" counts the layers of one loop, and a layer
            reads itself in every loop before as well; "unrolled" (where config.json says neither) counts through all.
        depth_attention_weights: "softmax", or "uniform": every source and the layer itself weigh alike.
        depth_attention_mixes: what attention reads mixed: "value", "key" or "key_value".
        depth_attention_k_norm_after_rope: normalise keys after the rotary embedding (queries before), as the
            checkpoints released with the paper do; False: both before, as Qwen3 does. Needs ``use_depth_attention``.
        num_loops: times the stack of layers is run, with the same weights; each pass has its own cache slots.
        kwargs: Qwen3's own settings.

    Raises:
        ValueError: a setting is out of range, or asks for what this model cannot compute.
    """

    model_type = "depthattn"
    method_keys = (
        "use_depth_attention",
        "depth_attention_stride",
        "depth_attention_recent_window",
        *CHOICES,
        "depth_attention_k_norm_after_rope",
        "num_loops",
    )

    def __init__(
        self,
        use_depth_attention: bool | None = True,
        depth_attention_stride: int | None = None,
        depth_attention_recent_window: int | None = 0,
        depth_attention_loop_sources: str | None = None,
        depth_attention_weights: str | None = None,
        depth_attention_mixes: str | None = None,
        depth_attention_k_norm_after_rope: bool | None = False,
        num_loops: int | None = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_loops = 1 if num_loops is None else num_loops
        self.depth_attention_loop_sources = depth_attention_loop_sources
        self.depth_attention_weights, self.depth_attention_mixes = depth_attention_weights, depth_attention_mixes
        for key, choices in CHOICES.items():
            if getattr(self, key) is None:
                setattr(self, key, choices[0])
            elif getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)!r} must be one of {', '.join(choices)}")
        counted = self.num_counted_layers
        stride = max(1, counted // 2) if depth_attention_stride is None else depth_attention_stride
        self.use_depth_attention = True if use_depth_attention is None else use_depth_attention
        self.depth_attention_stride, self.depth_attention_recent_window = stride, depth_attention_recent_window or 0
        self.depth_attention_k_norm_after_rope = bool(depth_attention_k_norm_after_rope)
        self.check_at_least(1, "null is the default", ("num_loops", "depth_attention_stride"))
        self.check_at_least(0, "it counts layers", ("depth_attention_recent_window",))
        if self.depth_attention_k_norm_after_rope and not self.use_depth_attention:
            raise ValueError("depth_attention_k_norm_after_rope=true needs use_depth_attention=true")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}")

    @property
    def num_effective_layers(self) -> int:
        """Layers that a token passes: ``num_loops`` times those that hold weights. Each has its own cache slot."""
        return self.num_loops * self.num_hidden_layers

    @property
    def num_counted_layers(self) -> int:
        """Layers that stride and window count: of one loop, or of all."""
        return (
            self.num_hidden_layers if self.depth_attention_loop_sources == "same_layer" else self.num_effective_layers
        )

    @property
    def source_kinds(self) -> tuple[str, ...]:
        """What a layer leaves to those that read it: the key that they score, if they do, and what they mix."""
        kinds = {"value": ("value",), "key": ("mixed_key",), "key_value": ("mixed_key", "value")}
        mixed = kinds[str(self.depth_attention_mixes)]
        return mixed if self.depth_attention_weights == "uniform" else ("key", *mixed)

    def depth_sources(self, layer: int) -> list[int]:
        """The effective layers that ``layer`` reads, in ascending order."""
        if not self.use_depth_attention:
            return []
        stride, window = self.depth_attention_stride, self.depth_attention_recent_window
        in_loop = layer % self.num_counted_layers
        start = layer - in_loop
        own_loop = (start + i for i in range(in_loop) if i % stride == 0 or i >= in_loop - window)
        return [*range(in_loop, start, self.num_counted_layers), *own_loop]


__all__ = ["CrossLayerConfig", "DepthAttnConfig"]
