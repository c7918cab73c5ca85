"""Configuration of a Qwen3-style decoder with DenseFormer (arXiv:2402.02622), for transformers 4.57 and 5.

This file ships inside every exported folder, beside ``modeling_denseformer.py``. It needs nothing but transformers.
"""

from typing import Any

from transformers import Qwen3Config

# Always written to config.json, also where they equal a default: other programs read them there.
METHOD_KEYS = ("denseformer_period", "denseformer_dilation")


class DenseFormerConfig(Qwen3Config):
    """Qwen3's configuration and the settings of DenseFormer; a setting that is None has its default.

    Args:
        denseformer_period: blocks from one average over earlier hidden states to the next; 1: one after every block.
        denseformer_dilation: an average reads every dilation-th hidden state, counted back from its own.
        kwargs: Qwen3's own settings.

    Raises:
        ValueError: a setting is out of range, or asks for what this model cannot compute.
    """

    model_type = "denseformer"
    # Averages read any earlier layer: a pipeline that hands on one hidden state would lose the others.
    base_model_pp_plan = None

    def __init__(self, denseformer_period: int | None = 1, denseformer_dilation: int | None = 1, **kwargs: Any) -> None:
        # transformers 5 writes rope_parameters alone, transformers 4 reads rope_theta alone.
        rope = kwargs.get("rope_parameters") or {}
        if "rope_theta" in rope:
            kwargs.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            kwargs["rope_scaling"] = kwargs.get("rope_scaling") or rope
        super().__init__(**kwargs)
        self.denseformer_period = 1 if denseformer_period is None else denseformer_period
        self.denseformer_dilation = 1 if denseformer_dilation is None else denseformer_dilation
        for key in METHOD_KEYS:
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1: it counts blocks")
        if any(kind != "full_attention" for kind in self.layer_types):
            raise ValueError("sliding-window layers are not supported: set use_sliding_window=false")

    def averaged(self, state: int) -> list[int]:
        """The hidden states of which the average after ``state`` blocks is made, ascending, its own last.

        State 0 is the embedding, state t the output of block t; none where no average stands.
        """
        if state == 0 or state % self.denseformer_period:
            return []
        return list(range(state % self.denseformer_dilation, state + 1, self.denseformer_dilation))

    def to_diff_dict(self) -> dict[str, Any]:
        """What ``save_pretrained`` writes: what differs from the defaults, and all of ``METHOD_KEYS``."""
        return {**super().to_diff_dict(), **{key: getattr(self, key) for key in METHOD_KEYS}}


__all__ = ["DenseFormerConfig"]
