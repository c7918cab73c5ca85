"""The checkpoint that a run has begun with, of another run or of an imported model: what is on record and in the log.

A branch is a run of its own: identity, folder, seed, data and schedule are its config's, its steps and samples count
from 0. It takes over the weights and, with ``checkpoint.start_optimizer``, the optimizer's state.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from megatron_depthattn.train.step_folders import GENERATION, MANIFEST, file_hash, newest_checkpoint


class Parent(NamedTuple):
    """Where a branch has begun; in its history and its checkpoints as an object with these names."""

    run_id: str | None
    """None: an imported model."""
    step: int
    folder: str
    digest: str | None
    """Of the folder's manifest, which holds the hash of every file; None: it has none."""
    position: int
    """Samples of the shuffled order that were behind it: those it passed over, and those it had read."""
    tokens: int
    """That its weights were trained on, by its own parents as well."""
    optimizer: bool
    """Whether the optimizer's state was taken over."""
    given: str
    """``checkpoint.start_from`` as an absolute path, or the folder."""


def parent_of(folder: Path, common: dict[str, Any], config: dict[str, Any], *, takes_optimizer: bool) -> Parent:
    """The parent of a run with this config; ``common``: see `step_reader.read_common`."""
    progress = common.get("progress", {})
    return Parent(
        common.get("run_id"),
        progress.get("step", 0),
        str(folder.absolute()),
        _digest(folder),
        common["config"].get("data", {}).get("skip_samples", 0) + progress.get("consumed_samples", 0),
        progress.get("consumed_tokens", 0) + (common.get("parent") or {}).get("tokens", 0),
        takes_optimizer,
        os.path.abspath(config["checkpoint"]["start_from"] or folder),
    )


def check_parent(start_from: str | None, parent: Parent | None, run_dir: Path) -> None:
    """Let through a resumed run whose ``checkpoint.start_from`` is what it has begun with, or null.

    Raises:
        ValueError: it is another one, which would be ignored.
    """
    if start_from is None or (parent and parent.given == os.path.abspath(start_from)):
        return
    with suppress(ValueError, OSError):  # a parent that was moved
        if parent and _digest(newest_checkpoint(Path(start_from))) == parent.digest:
            return
    raise ValueError(
        f"checkpoint.start_from={start_from}, but the run in {run_dir} has begun with "
        f"{parent.folder if parent else 'initial weights'} and has checkpoints of its own: set another run.dir for a "
        "new branch, or checkpoint.start_from=null to resume this one."
    )


def takeover_lines(parent: Parent, common: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """What a branch takes over and what begins anew."""
    steps = f" after {parent.step} steps" if parent.step else ""
    taken = ["weights"]
    if parent.optimizer:
        taken.append("optimizer (its fp32 weights, moments and count of steps)")
    if common["config"].get("precision", {}).get("fp8") == config["precision"]["fp8"] == "delayed":
        taken.append("FP8 scales")
    taken += ["generation config"] if common.get(GENERATION) else []
    anew = ["step 0", "schedule", *([] if parent.optimizer else ["optimizer"])]
    anew.append(f"samples from {config['data']['skip_samples']:,} of the order of seed {config['run']['seed']}")
    who = f"run {parent.run_id}" if parent.run_id else "an imported model"
    return [f"start: of {who}{steps}: {', '.join(taken)}", f"start: anew: {', '.join(anew)}"]


def data_notes(
    parent: Parent, common: dict[str, Any], config: dict[str, Any], corpus: str, tokenizer: str | None
) -> list[str]:
    """What to know about a branch's data beside its parent's; ``corpus``, ``tokenizer``: digests of the branch's."""
    if None not in (known := common.get("tokenizer"), tokenizer) and known != tokenizer:
        return ["note: the data has another tokenizer than the parent's: its tokens stand for other text"]
    if common.get("corpus") is None:
        return []
    if common["corpus"] != corpus:
        return ["note: the data is not the parent's"]
    skipped = config["data"]["skip_samples"]
    if _order(common["config"]) == _order(config) and skipped < parent.position:
        return [
            f"note: the samples begin at {skipped:,} of an order of which the parent has read {parent.position:,}: "
            f"data.skip_samples={parent.position} begins behind them"
        ]
    return []


def stages_passed_over(common: dict[str, Any], config: dict[str, Any]) -> list[list[Any]] | None:
    """In which proportions a branch passes over the first ``data.skip_samples`` of the order, as `Loaded.stages`.

    In those in which the parent has read them: so every stream begins where the parent has left it, whatever its
    proportions are in the branch.
    """
    skipped = config["data"]["skip_samples"]
    if not skipped or common.get("corpus") is None or _order(common["config"]) != _order(config):
        return None
    own, known = _proportions(config), common.get("stages") or [[0, 0, _proportions(common["config"])]]
    passed = [[0, first, shares] for _, first, shares in known if first < skipped]
    return passed if passed[-1][2] == own else [*passed, [0, skipped, own]]


def _order(config: dict[str, Any]) -> list[Any]:
    """What decides the order of the samples of each stream of a corpus."""
    return [config["run"]["seed"], config["data"]["shuffle"], len(_proportions(config))]


def _proportions(config: dict[str, Any]) -> list[float]:
    return [each["proportion"] for each in config["data"].get("streams") or []] or [1.0]


def _digest(folder: Path) -> str | None:
    return file_hash(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
