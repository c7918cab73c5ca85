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

from megatron_depthattn.train.step_folders import COMMON, LATEST, MANIFEST, checkpoints_of, find_damage, read_latest
from megatron_depthattn.train.step_reader import StepReader, read_common

METADATA = "metadata.json"
MASTERS = "optimizer.state.param."
"""What the names of the fp32 weights that the optimizer steps begin with."""
_VIA_HF = "export it to a Hugging Face folder with the program that made it, then use from-hf"
_FOREIGN = f"a Megatron-Core checkpoint of another program, which does not say which model it holds; {_VIA_HF}"
_OTHERS = f"of another program, such as Megatron-LM, DeepSpeed or torch's FSDP; {_VIA_HF}"
_KINDS = {
    # by what lies in the folder
    "config.json": "a Hugging Face model folder: give it as --model, to from-hf or verify",
    "adapter_config.json": "a LoRA adapter: merge it into its model first",
    "checkpoints/step_*": "a run folder: give its folder checkpoints",
    **dict.fromkeys(("latest_checkpointed_iteration.txt", "global_step*"), f"a folder of checkpoints {_OTHERS}"),
    **dict.fromkeys(
        ("mp_rank_*", "model_optim_rng.pt", "zero_to_fp32.py", "*.distcp"), f"a checkpoint, or a part of one, {_OTHERS}"
    ),
}


class MegatronCheckpoint:
    """The weights of one step folder.

    Args:
        folder: a step folder, or a folder of checkpoints with a `latest` file.

    Raises:
        ValueError: the folder holds no complete checkpoint of a run of this package, or its files are not as written.
    """

    def __init__(self, folder: Path) -> None:
        folder = find_step_folder(folder)
        if (folder / MANIFEST).is_file() and (damage := find_damage(folder)):
            raise ValueError(f"{folder} is damaged: {'; '.join(damage)}")
        self.folder = folder
        self._reader = StepReader(folder)
        try:
            stored = self._reader.read_metadata().state_dict_metadata
            self.common: dict[str, Any] = read_common(folder)
        except ValueError as error:
            # Megatron-LM keeps its arguments in a checkpoint, and how it was saved.
            if any(name in str(error) for name in ("argparse.Namespace", "checkpoint.planner.")):
                raise ValueError(f"{folder} is {_FOREIGN}") from error
            raise
        if "config" not in self.common:
            raise ValueError(f"{folder} is {_FOREIGN}: its {COMMON} has no 'config'")
        tensors = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
        self.weights = {name: entry for name, entry in tensors.items() if not name.startswith("optimizer.")}
        """Shape and dtype of every weight, by Megatron's name. Optimizer state and FP8 scaling state are no weights."""
        self.masters = {name: tensors[MASTERS + name] for name in self.weights if MASTERS + name in tensors}
        """The same of the fp32 weights that the optimizer steps, by the weight's name, as far as they are there."""

    def read(self, name: str, *, master: bool = False) -> Tensor:
        """The whole tensor, gathered from the shards that were saved; ``master``: the optimizer's of this weight.

        Raises:
            ValueError: the file that holds it is missing, truncated or damaged.
        """
        entry = self.masters[name] if master else self.weights[name]
        name = MASTERS + name if master else name
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


def find_step_folder(folder: Path) -> Path:
    """The folder itself, or the latest of a run or of its checkpoints.

    Raises:
        ValueError: it is neither.
    """
    folder = checkpoints_of(folder)
    if (folder / LATEST).is_file():
        name = read_latest(folder)
        if name is None:
            raise ValueError(f"{folder / LATEST} names no step folder: give one, such as {folder}/step_00000100")
        folder = folder / name
    if not (folder / METADATA).is_file():
        raise ValueError(f"{folder} is {_kind(folder)}")
    return folder


def _kind(folder: Path) -> str:
    """What a path that is no step folder is instead, and what to do."""
    if not folder.exists():
        return "no complete checkpoint: it does not exist"
    if not folder.is_dir():
        return "a file: give a step folder, such as checkpoints/step_00000100"
    for pattern, kind in _KINDS.items():
        if any(folder.glob(pattern)):
            return kind
    return "no complete checkpoint: give a step folder, such as checkpoints/step_00000100"
