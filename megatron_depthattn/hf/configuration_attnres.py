"""Configuration of a Qwen3-style decoder with Attention Residuals in block form, for transformers 4.57 and 5.

This file ships inside every exported folder, beside ``modeling_attnres.py``. It needs nothing but transformers.
"""

from typing import Any

from transformers import Qwen3Config

# Always written to config.json, also where they equal a default: other programs read them there.
METHOD_KEYS = ("attnres_block_size",)


class AttnResConfig(Qwen3Config):
    """Qwen3's configuration and the setting of Attention Residuals; None is its default.

    Args:
        attnres_block_size: sublayers, two a layer, from one snapshot of the residual stream to the next; snapshots are
            taken between layers, so that an odd size counts as the next even one.
        kwargs: Qwen3's own settings.

    Raises:
        ValueError: a setting is out of range, or asks for what this model cannot compute.
    """

    model_type = "attnres"
    # Every layer reads the snapshots: a pipeline that hands on the residual stream alone would lose them.
    base_model_pp_plan = None

    def __init__(self, attnres_block_size: int | None = 12, **kwargs: Any) -> None:
        # transformers 5 writes rope_parameters alone, transformers 4 reads rope_theta alone.
        rope = kwargs.get("rope_parameters") or {}
        if "rope_theta" in rope:
            kwargs.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            kwargs["rope_scaling"] = kwargs.get("rope_scaling") or rope
        super().__init__(**kwargs)
        self.attnres_block_size = 12 if attnres_block_size is None else attnres_block_size
        if self.attnres_block_size < 1:
            raise ValueError(f"attnres_block_size={attnres_block_size} must be at least 1: it counts sublayers")
        if any(kind != "full_attention" for kind in self.layer_types):
            raise ValueError("sliding-window layers are not supported: set use_sliding_window=false")

    def is_snapshot(self, layer: int) -> bool:
        """Whether the residual stream before ``layer`` is kept; ``num_hidden_layers`` stands for behind the last."""
        return layer % -(-self.attnres_block_size // 2) == 0

    def to_diff_dict(self) -> dict[str, Any]:
        """What ``save_pretrained`` writes: what differs from the defaults, and all of ``METHOD_KEYS``."""
        return {**super().to_diff_dict(), **{key: getattr(self, key) for key in METHOD_KEYS}}


__all__ = ["AttnResConfig"]
