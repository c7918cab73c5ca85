"""Configurations of Qwen3-style decoders with DenseFormer, Attention Residuals or mHC, for transformers 4.57 and 5.

This file ships inside exported folders, beside ``modeling_cross_layer.py``.
"""

from typing import Any

from .configuration_depthattn import CrossLayerConfig


class DenseFormerConfig(CrossLayerConfig):
    """Qwen3's configuration and the settings of DenseFormer (arXiv:2402.02622); a setting that is None has its default.

    Args:
        denseformer_period: blocks from one average over earlier hidden states to the next; 1: one after every block.
        denseformer_dilation: an average reads every dilation-th hidden state, counted back from its own.
        kwargs: Qwen3's own settings.

    Raises:
        ValueError: a setting is out of range, or asks for what this model cannot compute.
    """

    model_type = "denseformer"
    method_keys = ("denseformer_period", "denseformer_dilation")

    def __init__(self, denseformer_period: int | None = 1, denseformer_dilation: int | None = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.denseformer_period = 1 if denseformer_period is None else denseformer_period
        self.denseformer_dilation = 1 if denseformer_dilation is None else denseformer_dilation
        self.check_at_least(1, "it counts blocks")

    def averaged(self, state: int) -> list[int]:
        """The hidden states of which the average after ``state`` blocks is made, ascending, its own last.

        State 0 is the embedding, state t the output of block t; none where no average stands.
        """
        if state == 0 or state % self.denseformer_period:
            return []
        return list(range(state % self.denseformer_dilation, state + 1, self.denseformer_dilation))


class AttnResConfig(CrossLayerConfig):
    """Qwen3's configuration and the setting of Attention Residuals in block form; None is its default.

    Args:
        attnres_block_size: sublayers, two a layer, from one snapshot of the residual stream to the next; snapshots are
            taken between layers, so that an odd size counts as the next even one.
        kwargs: Qwen3's own settings.

    Raises:
        ValueError: a setting is out of range, or asks for what this model cannot compute.
    """

    model_type = "attnres"
    method_keys = ("attnres_block_size",)

    def __init__(self, attnres_block_size: int | None = 12, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.attnres_block_size = 12 if attnres_block_size is None else attnres_block_size
        self.check_at_least(1, "it counts sublayers")

    def is_snapshot(self, layer: int) -> bool:
        """Whether the residual stream before ``layer`` is kept; ``num_hidden_layers`` stands for behind the last."""
        return layer % -(-self.attnres_block_size // 2) == 0


class MHCConfig(CrossLayerConfig):
    """Qwen3's configuration and the setting of manifold-constrained hyper-connections; None is its default.

    Args:
        mhc_num_streams: residual streams that flow from layer to layer.
        kwargs: Qwen3's own settings.

    Raises:
        ValueError: a setting is out of range, or asks for what this model cannot compute.
    """

    model_type = "mhc"
    method_keys = ("mhc_num_streams",)

    def __init__(self, mhc_num_streams: int | None = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mhc_num_streams = 4 if mhc_num_streams is None else mhc_num_streams
        self.check_at_least(2, "one stream has no other to mix")


__all__ = ["AttnResConfig", "DenseFormerConfig", "MHCConfig"]
