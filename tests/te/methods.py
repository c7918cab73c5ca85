"""DenseFormer, Attention Residuals and mHC under the TransformerEngine spec: weights and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.te.conversion import start_te
from tests.te.small import METHODS


def results(folder: Path) -> dict[str, Any]:
    """By method: load what ``folder`` holds under its name, write it back beside it."""
    return {method: _checkpoints(folder, method) for method in METHODS}


def _checkpoints(folder: Path, method: str) -> dict[str, Any]:
    run = start_te(method=method)
    found: dict[str, Any] = {"initial": run.parameters(), "weight_decay": run.weight_decay()}
    run.load(folder / method)
    found["loaded"] = run.parameters()
    (folder / f"te-{method}").mkdir()
    found["saved"] = str(run.save(folder / f"te-{method}"))
    fp8 = start_te(method=method, fp8="delayed")
    fp8.load(folder / method)
    found["loaded under FP8"] = fp8.parameters()
    return found
