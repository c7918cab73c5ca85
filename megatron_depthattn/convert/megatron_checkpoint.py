"""A Megatron step folder as a mapping from names to tensors: no process groups, one tensor in memory at a time.

Both sides are torch's distributed checkpoint format, which stores every tensor under its name in the whole model with
its shape, whatever the layout that saved it. Nothing in it is run, see `train/step_reader.py`.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_depthattn.train.manifest import MANIFEST, find_damage
from megatron_depthattn.train.step_folders import COMMON, LATEST, read_latest
from megatron_depthattn.train.step_reader import StepReader, read_common


class MegatronCheckpoint:
    """The weights of one step folder.

    Args:
        folder: a step folder, or a folder of checkpoints with a `latest` file.

    Raises:
        ValueError: the folder holds no complete checkpoint of a run of this package, or its files are not as written.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / LATEST).is_file():
            name = read_latest(folder)
            if name is None:
                raise ValueError(f"{folder / LATEST} names no step folder: give one, such as {folder}/step_00000100")
            folder = folder / name
        if not (folder / "metadata.json").is_file():
            raise ValueError(
                f"{folder} is no complete checkpoint: give a step folder, such as checkpoints/step_00000100"
            )
        if (folder / MANIFEST).is_file():
            _check_files(folder)
        self.folder = folder
        self._reader = StepReader(folder)
        stored = self._reader.read_metadata().state_dict_metadata
        self.common: dict[str, Any] = read_common(folder)
        if "config" not in self.common:
            raise ValueError(f"{folder} does not say which model it holds: its {COMMON} has no 'config'")
        self.weights: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        """Shape and dtype of every weight, by Megatron's name. Optimizer state and FP8 scaling state are no weights."""

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
