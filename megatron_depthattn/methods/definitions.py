"""The methods by name, and each from the ``model`` section of a run's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_depthattn.methods.attnres.definition import AttentionResiduals
from megatron_depthattn.methods.definition import CrossLayerMethod
from megatron_depthattn.methods.denseformer.definition import DenseFormer
from megatron_depthattn.methods.mhc.definition import HyperConnections

DEFINITIONS: Mapping[str, type[CrossLayerMethod]] = {
    "denseformer": DenseFormer,
    "attnres": AttentionResiduals,
    "mhc": HyperConnections,
}


def method_of(model: Mapping[str, Any]) -> CrossLayerMethod | None:
    """The method of a ``model`` section (a plain dict); None for vanilla and for Depth-Attention.

    Raises:
        ValueError: a setting of the method is out of range.
    """
    name = model.get("method", "depth_attention")
    if name not in DEFINITIONS:
        return None
    sizes = {key: model[key] for key in ("num_layers", "hidden_size")}
    return DEFINITIONS[name](**sizes, **model[name])
