"""A Megatron step folder as a mapping from names to tensors: no process groups, one tensor in memory at a time.

Both sides are torch's distributed checkpoint format, which stores every tensor under its name in the whole model with
its shape, whatever the layout that saved it. Like every file that torch unpickles, a step folder can hold code: convert
only what you trust.
"""

import functools
import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_depthattn.train.manifest import MANIFEST, find_damage
from megatron_depthattn.train.step_folders import COMMON, LATEST

COMMON_ENTRY = "common_state/shard_0_1"


class MegatronCheckpoint:
    """The weights of one step folder.

    Args:
        folder: a step folder, or a folder of checkpoints with a `latest` file.

    Raises:
        ValueError: the folder holds no complete checkpoint of a run of this package, or its files are not as written.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / LATEST).is_file():
            folder = folder / (folder / LATEST).read_text().strip()
        if not (folder / "metadata.json").is_file():
            raise ValueError(
                f"{folder} is no complete checkpoint: give a step folder, such as checkpoints/step_00000100"
            )
        if (folder / MANIFEST).is_file():
            _check_files(folder)
        self.folder = folder
        self._reader = _Reader(folder)
        try:
            stored = self._reader.read_metadata().state_dict_metadata
            self.common: dict[str, Any] = self._read_common()
        except (CheckpointException, OSError, EOFError, RuntimeError, pickle.UnpicklingError, AttributeError) as error:
            raise ValueError(f"{folder} cannot be read: {_first_line(error)}") from error
        if "config" not in self.common:
            raise ValueError(f"{folder} does not say which model it holds: its {COMMON} has no 'config'")
        self.weights: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        """Shape and dtype of every weight, by Megatron's name. Optimizer state and FP8 scaling state are no weights."""

    def _read_common(self) -> dict[str, Any]:
        """What is no tensor: megatron-core 0.16 has a file for it, 0.19 one more entry beside the tensors."""
        if (self.folder / COMMON).is_file():
            return torch.load(self.folder / COMMON, map_location="cpu", weights_only=True)
        entry: dict[str, Any] = {COMMON_ENTRY: io.BytesIO()}
        dcp.load(entry, storage_reader=self._reader, no_dist=True)
        stored = entry[COMMON_ENTRY]
        if isinstance(stored, io.BytesIO):
            stored.seek(0)
            stored = torch.load(stored, map_location="cpu", weights_only=True)
        return stored[0]

    def read(self, name: str) -> Tensor:
        """The whole tensor, gathered from the shards that were saved.

        Raises:
            ValueError: the file that holds it is missing, truncated or damaged.
        """
        entry = self.weights[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        except (CheckpointException, Exception) as error:  # the first is no Exception; damage raises anything
            files = {info.relative_path for index, info in self._reader.storage_data.items() if index.fqn == name}
            raise ValueError(
                f"{self.folder}: cannot read {name} from {', '.join(sorted(files)) or 'its file'}, which is missing or "
                "damaged: take another step folder"
            ) from error
        return tensor


def _check_files(folder: Path) -> None:
    try:
        damage = find_damage(folder)
    except OSError as error:
        damage = [str(error)]
    if damage:
        raise ValueError(f"{folder} is damaged: {'; '.join(damage)}")


class _Reader(dcp.FileSystemReader):
    """torch's reader, reading the metadata once instead of once a tensor."""

    @functools.cache  # noqa: B019 one reader lives as long as its checkpoint
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return super().read_metadata(*args, **kwargs)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
