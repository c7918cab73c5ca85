"""Write a Megatron step folder of weights, one tensor in memory at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_depthattn.train.step_folders import COMMON, SAVED_METADATA


class _LazyPlanner(dcp.DefaultSavePlanner):
    """torch's planner, asking for a tensor when it is written and not before."""

    def __init__(self, produce: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._produce = produce

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._produce(index.fqn)


def write_megatron_checkpoint(
    folder: Path, weights: Mapping[str, Tensor], produce: Callable[[str], Tensor], common: Mapping[str, Any]
) -> None:
    """Write weights as Megatron would, into an existing empty folder.

    Args:
        weights: name to a tensor on the meta device: shape and dtype.
        produce: makes the tensor of a name; called once for each, just before it is written.
        common: what else the checkpoint holds.
    """
    # torch's writer holds all tensors of a file until the file is complete: a file each
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False)
    dcp.save(dict(weights), storage_writer=writer, planner=_LazyPlanner(produce), no_dist=True)
    torch.save({**common, "content_metadata": dict(SAVED_METADATA)}, folder / COMMON)
    save_config(CheckpointingConfig(sharded_backend="torch_dist"), str(folder))
