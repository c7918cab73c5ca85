"""Configuration of a Qwen3-style decoder with manifold-constrained hyper-connections, for transformers 4.57 and 5.

This file ships inside every exported folder, beside ``modeling_mhc.py``. It needs nothing but transformers.
"""

from typing import Any

from transformers import Qwen3Config

# Always written to config.json, also where they equal a default: other programs read them there.
METHOD_KEYS = ("mhc_num_streams",)


class MHCConfig(Qwen3Config):
    """Qwen3's configuration and the setting of manifold-constrained hyper-connections; None is its default.

    Args:
        mhc_num_streams: residual streams that flow from layer to layer.
        kwargs: Qwen3's own settings.

    Raises:
        ValueError: a setting is out of range, or asks for what this model cannot compute.
    """

    model_type = "mhc"
    # Several streams flow between layers: a pipeline that hands on one hidden state would lose the others.
    base_model_pp_plan = None

    def __init__(self, mhc_num_streams: int | None = 4, **kwargs: Any) -> None:
        # transformers 5 writes rope_parameters alone, transformers 4 reads rope_theta alone.
        rope = kwargs.get("rope_parameters") or {}
        if "rope_theta" in rope:
            kwargs.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            kwargs["rope_scaling"] = kwargs.get("rope_scaling") or rope
        super().__init__(**kwargs)
        self.mhc_num_streams = 4 if mhc_num_streams is None else mhc_num_streams
        if self.mhc_num_streams < 2:
            raise ValueError(f"mhc_num_streams={mhc_num_streams} must be at least 2: one stream has no other to mix")
        if any(kind != "full_attention" for kind in self.layer_types):
            raise ValueError("sliding-window layers are not supported: set use_sliding_window=false")

    def to_diff_dict(self) -> dict[str, Any]:
        """What ``save_pretrained`` writes: what differs from the defaults, and all of ``METHOD_KEYS``."""
        return {**super().to_diff_dict(), **{key: getattr(self, key) for key in METHOD_KEYS}}


__all__ = ["MHCConfig"]
