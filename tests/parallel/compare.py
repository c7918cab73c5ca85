"""The comparison that every parity case passes and every control fails."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

BOUND = 1e-5
"""Relative, for the loss of every step and for the gradient of every parameter; fp32 rounds at 6e-8."""
CANCELLING = ("_bias", "_scale", "stream_readout.weight")
"""How names of parameters end whose gradient is a sum over all tokens that may cancel."""


def relative_errors(gradients: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> dict[str, float]:
    """``||g - g_ref|| / ||g_ref||`` of every parameter.

    Of those in ``CANCELLING``, biases and scales of a method, ``||g_ref||`` is not taken as less than a thousandth of
    the whole gradient's: where the sum over all tokens cancels, roundings are left.

    Raises:
        ValueError: other parameters or shapes than the reference's, or a reference of zero, which would show nothing.
    """
    shapes, expected = ({name: tuple(g.shape) for name, g in side.items()} for side in (gradients, references))
    if shapes != expected:
        odd = set(shapes.items()) ^ set(expected.items())
        raise ValueError(f"parameters differ from the reference's: {sorted(odd)}")
    if zeros := [name for name, reference in references.items() if not reference.any()]:
        raise ValueError(f"the reference gradient of {zeros} is zero")
    errors, whole = {}, math.hypot(*(float(reference.norm()) for reference in references.values()))
    for name, reference in references.items():
        norm = float(reference.double().norm())
        if name.endswith(CANCELLING):
            norm = max(norm, 1e-3 * whole)
        errors[name] = float((gradients[name].double() - reference.double()).norm()) / norm
    return errors


def worst_loss_error(losses: Sequence[float], references: Sequence[float]) -> float:
    """The largest relative error of the steps that were run."""
    return max(abs(loss - reference) / abs(reference) for loss, reference in zip(losses, references, strict=False))


def worst_gradient_error(result: Mapping[str, Any]) -> float:
    """The largest over parameters, copies of one parameter on several ranks included."""
    return max(*result["gradient_errors"].values(), *result["copy_errors"].values(), 0.0)


def violations(result: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """What is out of bounds, one line each."""
    found = []
    for step, (loss, expected) in enumerate(zip(result["losses"], reference["losses"], strict=False)):
        if not abs(loss - expected) <= BOUND * abs(expected):
            found.append(f"loss of step {step}: {loss!r}, single process {expected!r}")
    for kind in ("gradient_errors", "copy_errors"):
        for name, error in result.get(kind, {}).items():
            if not (math.isfinite(error) and error <= BOUND):
                found.append(f"{kind} of {name}: {error:.2e}")
    return found


DEPTH_BOUND = 2e-6
"""Of numbers that are on record with six decimals."""


def worst_depth_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of any number of two records with the same layers."""
    assert one["layers"].keys() == other["layers"].keys()
    differences = [0.0]
    for layer, ours in one["layers"].items():
        theirs = other["layers"][layer]
        assert ours["sources"] == theirs["sources"]
        pairs = [*zip(ours["weights"], theirs["weights"], strict=True)]
        pairs += [(ours[name], theirs[name]) for name in ("entropy", "collapsed")]
        differences += [abs(a - b) for a, b in pairs]
    return max(differences)
