"""A step folder's contents, read without running what a stranger may have put there; needs no Megatron.

torch pickles three things in a step folder: `.metadata`, which says where each tensor lies, the common state, and the
objects beside the tensors (generators, FP8 scales). A pickle can name any function and have it called. Here `.metadata`
may name nothing but the few classes that it consists of, and the rest is read by torch's ``weights_only``.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Iterable
from pathlib import Path, PosixPath
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import _get_layout

from megatron_depthattn.hf.model_config import CHOICES
from megatron_depthattn.train.step_folders import COMMON

COMMON_ENTRY = "common_state/shard_0_1"
_METADATA_CLASSES = (
    *(dcp_metadata.Metadata, dcp_metadata.MetadataIndex, dcp_metadata.StorageMeta, dcp_metadata.TensorProperties),
    *(dcp_metadata.TensorStorageMetadata, dcp_metadata.BytesStorageMetadata, dcp_metadata.ChunkStorageMetadata),
    *(dcp_metadata._MEM_FORMAT_ENCODING, _StorageInfo),
)
_Names = dict[tuple[str, str], Any]
_DTYPES: _Names = {("torch", str(each)[6:]): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
_METADATA_NAMES: _Names = _DTYPES | {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("pathlib", "PosixPath"): PosixPath,  # where it was saved, which nobody asks for
    ("pathlib._local", "PosixPath"): PosixPath,  # the same by Python 3.13
    **{(each.__module__, each.__qualname__): each for each in _METADATA_CLASSES},
}


class _Frozen(type):
    """Of classes that a pickle cannot change."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError(f"a pickle sets {name} of a class")


class _Stub(metaclass=_Frozen):
    """Stands for what is only looked at, and need not be built."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


class _Storage(_Stub):
    """A tensor's values: in a pickle they are bytes, which are loaded in their turn."""

    def __init__(self, content: bytes) -> None:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


_FP8_NAMES: _Names = _DTYPES | {
    ("collections", "OrderedDict"): dict,
    ("torch._utils", "_rebuild_tensor_v2"): _Stub,
    ("torch.storage", "_load_from_bytes"): _Storage,
    ("megatron.core.safe_globals", "safe_load_from_bytes"): _Storage,  # megatron-core 0.19 puts its own there
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"): _Stub,
    **{
        ("transformer_engine.common.recipe", name): _Stub
        for name in ("DelayedScaling", "Format", "_FormatHelper", "MMParams", "QParams")
    },
}


class _Unpickler(pickle.Unpickler):
    """Unpickles what consists of plain values and of the objects that ``names`` gives.

    Args:
        content: the pickle.
        names: what stands for each (module, name).
    """

    def __init__(self, content: BinaryIO, names: _Names) -> None:
        super().__init__(content)
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")  # torch's own words, see `_reason`
        return self._names[module, name]


class StepReader(dcp.FileSystemReader):
    """torch's reader of a step folder: it reads the metadata once, runs nothing in it and stays in the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self._metadata: dcp_metadata.Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> dcp_metadata.Metadata:
        """See torch.

        Raises:
            ValueError: it is damaged, or no checkpoint would say that.
        """
        if self._metadata is None:
            path = self._folder / ".metadata"
            try:
                with path.open("rb") as file:
                    metadata = _Unpickler(file, _METADATA_NAMES).load()
                _check(metadata)
            except Exception as error:
                raise ValueError(f"{path} {_reason(error)}") from error
            metadata.storage_meta = dcp_metadata.StorageMeta(load_id=self.load_id)
            self._metadata = metadata
        return self._metadata

    def read_objects(self, names: Iterable[str]) -> dict[str, Any]:
        """What is stored beside the tensors under these names.

        Raises:
            ValueError: the folder holds something else there, or what torch's ``weights_only`` does not load.
        """
        state: dict[str, Any] = {name: io.BytesIO() for name in names}
        self.read_metadata()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that this process loads alone, as it is asked to
                dcp.load(state, storage_reader=self, planner=_WeightsOnly(), no_dist=True)
        except CheckpointException as error:
            cause = next((each for each, _ in error.failures.values()), error)
            raise ValueError(f"{self._folder} {_reason(cause)}") from error
        return state


class _WeightsOnly(dcp.DefaultLoadPlanner):
    """torch's planner, which would unpickle objects with whatever code they name."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


def read_common(folder: Path) -> dict[str, Any]:
    """What is no tensor: megatron-core 0.16 has a file for it, 0.19 one more entry beside the tensors.

    A config that is older than a key of `CHOICES` gets what was meant then.

    Raises:
        ValueError: it cannot be read, or was not written by this package.
    """
    path = folder / COMMON
    if path.is_file():
        try:
            stored = [torch.load(path, map_location="cpu", weights_only=True)]
        except Exception as error:
            raise ValueError(f"{path} {_reason(error)}") from error
    else:
        stored = StepReader(folder).read_objects([COMMON_ENTRY])[COMMON_ENTRY]
    if not isinstance(stored, list) or not stored or not isinstance(stored[0], dict):
        raise ValueError(f"{folder} says nothing about its run: it was not written by this package")
    match stored[0]:
        case {"config": {"model": {"depth_attention": dict(depth)}}}:
            depth.update(CHOICES | depth)
    return stored[0]


def check_fp8_state(name: str, state: Any) -> None:
    """Let through what TransformerEngine saves as the FP8 scaling state of a module: a pickle, in a tensor of bytes.

    Raises:
        ValueError: it is something else.
    """
    if state is None:  # of a layer that is not TransformerEngine's
        return
    if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
        raise ValueError(f"{name} of the checkpoint is no FP8 scaling state: take a step folder of this package")
    if state.numel():
        try:
            _Unpickler(io.BytesIO(state.cpu().numpy().tobytes()), _FP8_NAMES).load()
        except Exception as error:
            raise ValueError(f"{name} of the checkpoint {_reason(error)}") from error


def _check(metadata: Any) -> None:
    if not isinstance(metadata, dcp_metadata.Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise TypeError("no metadata")
    for name, entry in metadata.state_dict_metadata.items():
        # Under another name it would stand for a tensor, and be unpickled in its place.
        if isinstance(entry, dcp_metadata.BytesStorageMetadata) and "/shard_" not in name:
            raise ValueError(f"{name} is no tensor")
    for index, place in metadata.storage_data.items():
        if PosixPath(place.relative_path).name != place.relative_path or place.relative_path == "..":
            raise ValueError(f"{index.fqn} is in {place.relative_path!r}, which is no file of this folder")
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{index.fqn} is compressed, which is not supported")


def _reason(error: BaseException) -> str:
    """What is wrong with a file, after its name; torch says it in pages."""
    text = str(error).strip()
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"refers to {found[1]}, which could run as code and which no checkpoint of this package holds: take a step "
            "folder that this package has written"
        )
    first, *_ = text.splitlines() or [""]
    return f"cannot be read: {type(error).__name__}: {first}"
