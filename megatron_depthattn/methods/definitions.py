"""The methods by name, and each from the ``model`` section of a run's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
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


def effective_method(method: str, depth_attention: bool) -> str:
    """What layers share: ``method``, but Depth-Attention that is switched off is vanilla."""
    return "vanilla" if method == "depth_attention" and not depth_attention else method


def setting_names(method: str) -> list[str]:
    """The settings of one of `DEFINITIONS`."""
    return [field.name for field in fields(DEFINITIONS[method]) if field.name not in ("num_layers", "hidden_size")]


def define(method: str, *, num_layers: int, hidden_size: int, settings: Mapping[str, Any]) -> CrossLayerMethod:
    """The definition of one of `DEFINITIONS` on a model of a given size.

    Raises:
        ValueError: the method has no such setting, or it is out of range.
    """
    definition, known = DEFINITIONS[method], setting_names(method)
    if unknown := set(settings) - set(known):
        raise ValueError(
            f"model.{method} has no setting {', '.join(sorted(unknown))}: {definition.title} has {', '.join(known)}."
        )
    return definition(num_layers=num_layers, hidden_size=hidden_size, **settings)


def method_of(model: Mapping[str, Any]) -> CrossLayerMethod | None:
    """The method of a ``model`` section (a plain dict); None for vanilla and for Depth-Attention.

    Raises:
        ValueError: a setting of the method is out of range.
    """
    name = model.get("method", "depth_attention")
    if name not in DEFINITIONS:
        return None
    return define(name, num_layers=model["num_layers"], hidden_size=model["hidden_size"], settings=model[name])
