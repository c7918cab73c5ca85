"""Unfinished preparation: what is kept beside the output so that the same command continues, whatever stopped it.

    .OUTPUT.unfinished/lock           held by the process at work
    .OUTPUT.unfinished/progress.npz   settings, position in the corpus, counts; what fills no shard yet
    .OUTPUT.unfinished/corpus/        the corpus to be, which gets its name once it is complete

`progress.npz` is replaced in one step, and whatever it names is on disk before it is. Shards beyond those it names are
made again.
"""

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from megatron_depthattn.data.encode import Counts
from megatron_depthattn.data.pack import State
from megatron_depthattn.data.readers import START, Outcome, Position
from megatron_depthattn.durable import fsync_path


@dataclass
class Merged(Counts):
    """What has been merged so far: everything before `position`."""

    position: Position = START
    consumed_bytes: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    """Of the files that were not simply read."""

    @property
    def tokens(self) -> int:
        return sum(counts["tokens"] for counts in self.counts.values())


SplitState = tuple[list[dict[str, Any]], State]
"""Shards and arrays that a `SplitWriter` continues from."""


class Unfinished:
    """The folder beside the output. Construct it with `open_unfinished`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.corpus, self.progress = folder, folder / "corpus", folder / "progress.npz"

    def load(self, settings: Mapping[str, Any], *, overwrite: bool) -> tuple[Merged, dict[str, SplitState]] | None:
        """What the last process left, or None to start anew, with the folder emptied.

        Raises:
            ValueError: it was left by other settings, and not `overwrite`.
        """
        if self.can_continue:
            with np.load(self.progress) as file:
                arrays = dict(file)
            stored = json.loads(str(arrays.pop("state")))
            changed = changed_settings(stored["settings"], settings)
            if not changed:
                values = stored["merged"]
                values["position"] = Position(*values["position"])
                values["counts"] = {split: Counter(counts) for split, counts in values["counts"].items()}
                values["skipped"] = Counter(values["skipped"])
                values["outcomes"] = [Outcome(*outcome) for outcome in values["outcomes"]]
                splits: dict[str, SplitState] = {}
                for split, shards in stored["shards"].items():
                    own = {name: array for name, array in arrays.items() if name.startswith(f"{split}.")}
                    splits[split] = (shards, {name.partition(".")[2]: array for name, array in own.items()})
                return Merged(**values), splits
            if not overwrite:
                raise ValueError(
                    f"{self.folder} holds unfinished work with {changed}: finish it with its own settings, or pass "
                    "--overwrite to start again"
                )
        self.clear()
        return None

    def save(self, settings: Mapping[str, Any], merged: Merged, splits: Mapping[str, SplitState]) -> None:
        """Replace the progress file; shards and tokenizer must be on disk already."""
        shards = {split: of for split, (of, _) in splits.items()}
        state = json.dumps({"settings": settings, "merged": vars(merged), "shards": shards})
        staging = self.progress.with_suffix(".part")
        content = io.BytesIO()  # a zip file on a disk that fills up ends in complaints of its own
        arrays = {f"{split}.{name}": array for split, (_, own) in splits.items() for name, array in own.items()}
        np.savez(content, allow_pickle=False, state=state, **arrays)
        staging.write_bytes(content.getbuffer())
        fsync_path(staging)
        staging.replace(self.progress)
        fsync_path(self.folder)

    def clear(self) -> None:
        """Forget the work; the lock stays."""
        self.progress.unlink(missing_ok=True)  # first: without it the rest means nothing
        shutil.rmtree(self.corpus, ignore_errors=True)

    @property
    def can_continue(self) -> bool:
        return self.progress.is_file() and self.corpus.is_dir()


def unfinished_folder(output: Path) -> Path:
    """Exists while there is something to continue, or a process at work."""
    return output.with_name(f".{output.name}.unfinished")


def changed_settings(stored: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The settings that differ, as words; empty if none does."""
    return "; ".join(f"{key} {stored.get(key)!r}, not {new[key]!r}" for key in new if stored.get(key) != new[key])


@contextmanager
def open_unfinished(output: Path) -> Iterator[Unfinished]:
    """The unfinished work for `output`, held by this process alone; the folder goes when there is nothing to continue.

    Raises:
        ValueError: another process prepares `output`.
    """
    folder = unfinished_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = Unfinished(folder)
    try:
        with FileLock(folder / "lock", timeout=0):
            try:
                yield unfinished
            finally:
                if not unfinished.can_continue:
                    shutil.rmtree(folder, ignore_errors=True)
    except Timeout as error:
        raise ValueError(f"--output {output} is being prepared by another process: wait for it, or end it") from error
