"""Average the weights of several checkpoints of a run into a step folder: to export, to score, to start a run from.

A decision between runs, or on when to decay, should not hang on the noise of the last steps, and an average has less of
it. It is taken in fp64, tensor by tensor, of the optimizer's fp32 weights where all checkpoints have them and of the
model's otherwise, and rounded once, to the dtype of the newest checkpoint's weights.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_depthattn.convert.complete_folder import complete_folder
from megatron_depthattn.convert.from_hf import write_megatron_checkpoint
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint, find_step_folder
from megatron_depthattn.convert.to_hf import megatron_groups
from megatron_depthattn.hf.model_config import to_hf_config
from megatron_depthattn.train.lease import lease
from megatron_depthattn.train.step_folders import (
    GENERATION,
    MANIFEST,
    Progress,
    digest_files,
    file_hash,
    is_run_checkpoint,
    write_manifest,
)

RECORD = "average.json"
PART = 1 << 22
"""Elements that are converted to fp64 at a time."""


def average(
    folders: Sequence[Path], output: Path, *, decay: float | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the average of step folders, whatever layouts saved them, into the step folder ``output``.

    Args:
        decay: of an exponential average over the checkpoints in the order of their steps; None: all weigh the same.

    Returns:
        The record of what was averaged, which is in the folder as well.

    Raises:
        ValueError: they are fewer than two, or not of one model; one is missing or damaged; the output exists or cannot
            be written.
    """
    if is_run_checkpoint(output.resolve()):
        raise ValueError(f"{output} would be a checkpoint of the run that saves in {output.parent}: give another")
    if inside := [folder for folder in folders if folder.resolve().is_relative_to(output.resolve())]:
        raise ValueError(f"{output} holds {inside[0]}, which is averaged: give another output")
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(lease(find_step_folder(folder)))
        checkpoints = sorted(map(MegatronCheckpoint, folders), key=_step)
        if len(steps := {_step(each) for each in checkpoints}) < max(2, len(checkpoints)):
            raise ValueError(f"an average needs two checkpoints or more, each of another step; these are of {steps}")
        newest = checkpoints[-1]
        for other in checkpoints[:-1]:
            _require_same_model(other, newest)
        shares, formula = _shares(len(checkpoints), decay)
        averager = _Averager(checkpoints, shares)
        record = {
            "formula": formula,
            "decay": decay,
            "averaged": averager.source,
            "checkpoints": [_about(*each) for each in zip(checkpoints, shares, strict=True)],
        }
        meta = {
            name: torch.empty(e.size, dtype=e.properties.dtype, device="meta") for name, e in newest.weights.items()
        }
        kept = ("config", GENERATION, "parent", "tokenizer", "corpus")
        common = {key: newest.common[key] for key in kept if key in newest.common}
        common |= {"progress": newest.common.get("progress", dataclasses.asdict(Progress())), "average": record}
        num_bytes = sum(each.nbytes for each in meta.values())
        with complete_folder(
            output, marker=MANIFEST, source=newest.folder, num_bytes=num_bytes, overwrite=overwrite
        ) as folder:
            write_megatron_checkpoint(folder, meta, averager.tensor, common)
            (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            write_manifest(folder, digest_files(folder, [path.name for path in folder.iterdir()]))
    return record


class _Averager:
    """Averages tensors of checkpoints, one tensor of one checkpoint in memory beside the sum."""

    def __init__(self, checkpoints: Sequence[MegatronCheckpoint], shares: Sequence[float]) -> None:
        self._checkpoints, self._shares = checkpoints, shares
        names = checkpoints[0].weights
        self._masters = {name for name in names if all(name in each.masters for each in checkpoints)}
        count = f"{len(self._masters)} of {len(names)} tensors the optimizer's fp32 weights, of the others the model's"
        kinds = {0: "the model's weights", len(names): "the optimizer's fp32 weights"}
        self.source = kinds.get(len(self._masters), f"of {count}")

    def tensor(self, name: str) -> Tensor:
        """The average under this name, in the dtype of the newest checkpoint.

        Raises:
            ValueError: it cannot be read, or is not finite.
        """
        entry = self._checkpoints[-1].weights[name]
        total = torch.zeros(math.prod(entry.size), dtype=torch.float64)
        for checkpoint, share in zip(self._checkpoints, self._shares, strict=True):
            _add(total, checkpoint.read(name, master=name in self._masters).view(-1), share)
        if not torch.isfinite(total).all():
            raise ValueError(f"{name} has values that are not finite in one of the checkpoints")
        return total.to(entry.properties.dtype).view(entry.size)


def _add(total: Tensor, values: Tensor, share: float) -> None:
    """Add a share of a checkpoint's tensor, which nothing holds any more when the next one is read."""
    for part, more in zip(total.split(PART), values.split(PART), strict=True):
        part.add_(more, alpha=share)


def _shares(count: int, decay: float | None) -> tuple[list[float], str]:
    """How much each checkpoint weighs, the oldest first, and the formula."""
    if decay is None:
        return [1 / count] * count, "average = sum of the checkpoints / their number"
    shares = [(1 - decay) * decay ** (count - 1 - k) for k in range(count)]
    shares[0] = decay ** (count - 1)
    return shares, "average = the first; then for each next one: average = decay * average + (1 - decay) * the next one"


def _step(checkpoint: MegatronCheckpoint) -> int:
    return int(checkpoint.common.get("progress", {}).get("step", 0))


def _require_same_model(one: MegatronCheckpoint, other: MegatronCheckpoint) -> None:
    """Raise ValueError unless both hold weights of one function."""
    ours, theirs = (
        to_hf_config(each.common["config"]["model"], dtype="", special_tokens={}) | {"max_position_embeddings": None}
        for each in (one, other)
    )
    keys = [key for key in (ours | theirs) if ours.get(key) != theirs.get(key)]
    shapes = [
        {group.megatron: each.weights[group.megatron].size for group in megatron_groups(each)} for each in (one, other)
    ]
    keys += [name for name in (shapes[0] | shapes[1]) if shapes[0].get(name) != shapes[1].get(name)]
    if keys:
        differs = f"{keys[0]} is {ours.get(keys[0])} and {theirs.get(keys[0])}" if keys[0] in ours | theirs else keys[0]
        raise ValueError(
            f"{one.folder} and {other.folder} are of two models ({differs}): average checkpoints of one run"
        )


def _about(checkpoint: MegatronCheckpoint, share: float) -> dict[str, Any]:
    manifest = checkpoint.folder / MANIFEST
    return {
        "step": _step(checkpoint),
        "weight": share,
        "folder": str(checkpoint.folder.absolute()),
        "run_id": checkpoint.common.get("run_id"),
        "manifest_xxh3_128": file_hash(manifest) if manifest.is_file() else None,
    }
