"""What lies in a Hugging Face model folder: its config, and its safetensors files by the tensor."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_depthattn.hf.model_config import check_settings
from megatron_depthattn.paths import leads_out, link_root

CONFIG, SINGLE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES_SHOWN = 3
AGAIN = "copy or export the model again"


class HFFolder:
    """The config and the weights of a Hugging Face folder; its files are whole and hold what the index says.

    transformers 4 takes the index's word for what a shard holds, and loads a model without noticing what it lacks.

    Attributes:
        config: ``config.json``.
        shapes: by tensor name.
        dtypes: by tensor name; floating-point tensors only. Others, such as masks, are listed but cannot be imported.

    Raises:
        ValueError: the folder, its config.json, its index or one of its files is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / CONFIG).is_file():
            fault = f"has no {CONFIG}" if folder.is_dir() else "does not exist"
            raise ValueError(f"model folder {folder} {fault}: give a Hugging Face model folder")
        self.config = read_json(folder / CONFIG)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Path] = {}
        if (folder / SINGLE_FILE).is_file():  # transformers, too, prefers it to an index
            self._add_file(folder / SINGLE_FILE)
        elif (folder / INDEX).is_file():
            self._add_indexed_files()
        else:
            raise ValueError(f"{folder} has neither {SINGLE_FILE} nor {INDEX}: save the model as safetensors")
        try:
            check_settings(self.config, num_tensors=len(self.shapes))
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from error

    def _add_indexed_files(self) -> None:
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{self.folder / INDEX} has no weight_map: {AGAIN}")
        for file in sorted({str(file) for file in weight_map.values()}):
            path = self.folder / plain_name(file, self.folder / INDEX)
            if not path.is_file():
                raise ValueError(f"{path} is missing ({INDEX} names it): {AGAIN}")
            held = self._add_file(path)
            placed = {name for name, its_file in weight_map.items() if its_file == file}
            for verb, names in (("lacks", placed - held), ("has", held - placed)):
                if names:
                    raise ValueError(f"{path} {verb} {some_names(names)}, but {INDEX} says otherwise: {AGAIN}")

    def _add_file(self, path: Path) -> set[str]:
        """The names of its tensors. Reads no data, but safetensors compares the header with the file's length."""
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                for name in names:
                    part = file.get_slice(name)
                    self.shapes[name] = tuple(part.get_shape())
                    if part.get_dtype() in _DTYPES:
                        self.dtypes[name] = _DTYPES[part.get_dtype()]
                    self._files[name] = path
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} does not load ({error}): it is cut short or damaged; {AGAIN}") from error
        return names

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own: pages of a mapped file would count as the process's memory.

        Raises:
            ValueError: its bytes cannot be read.
        """
        try:
            with safe_open(self._files[name], framework="pt") as file:
                return file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self._files[name]}: cannot read {name} ({error}); {AGAIN}") from error

    def file_bytes(self) -> int:
        """Size of all its weight files."""
        return sum(file.stat().st_size for file in set(self._files.values()))

    def num_bytes(self, name: str) -> int:
        """Size of a tensor."""
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize


def some_names(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - _NAMES_SHOWN
    return ", ".join(ordered[:_NAMES_SHOWN]) + (f" and {more} more tensors" if more > 0 else "")


def plain_name(name: str, named_in: Path) -> str:
    """The name of a file or folder beside the file that names it.

    Raises:
        ValueError: it leads elsewhere.
    """
    if name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"{named_in} names {name!r}, which is no plain name of a file in its folder")
    return name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the folder.

    Raises:
        ValueError: the file is a link to one elsewhere, cannot be read or holds something else.
    """
    if leads_out(path, link_root(path.parent)):
        raise ValueError(f"{path} is a link out of its folder, which is not followed: copy the file itself there")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        raise ValueError(f"{path} cannot be read ({error}): {AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: {AGAIN}")
    return content
