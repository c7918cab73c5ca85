"""Writing a Hugging Face model folder: shard by shard, complete or not there."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_depthattn import hf
from megatron_depthattn.hf.weights_folder import CONFIG, INDEX

MAX_SHARD_BYTES = 500 << 20  # what is held in memory at a time, about twice


@contextmanager
def complete_folder(output: Path, *, num_bytes: int, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes ``output`` when the block ends well, and is removed when it does not.

    Args:
        num_bytes: about what will be written; refused before anything is, if the disk has less.
        overwrite: replace an existing folder, after the new one is complete.

    Raises:
        ValueError: ``output`` exists, or the disk is too small or fills up.
    """
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists: give another output, or --overwrite to replace it")
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < num_bytes:
        raise ValueError(f"{output.parent} has {free / 1e9:.2f} GB free, {num_bytes / 1e9:.2f} GB are needed")
    aside = output.with_name(f".{output.name}.part")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed conversion left
    try:
        aside.mkdir()
        yield aside
        replaced = output.with_name(f".{output.name}.old")
        if output.exists():
            output.rename(replaced)
        aside.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{output} could not be written, and nothing is left of it: {reason}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_weights(
    folder: Path, sizes: Mapping[str, int], produce: Callable[[str], Iterable[tuple[str, Tensor]]]
) -> None:
    """Write safetensors files of at most ``MAX_SHARD_BYTES`` and, if there are several, their index.

    Args:
        sizes: bytes of each unit: tensors that are made together and stay in one file.
        produce: names and tensors of a unit; called once for each, in order.
    """
    plan = split_state_dict_into_shards_factory(
        dict(sizes),  # type: ignore[arg-type] # sizes stand for the tensors
        get_storage_size=lambda num_bytes: num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_BYTES,
    )
    weight_map: dict[str, str] = {}
    for filename, units in plan.filename_to_tensors.items():
        # copies: safetensors refuses tensors that share memory, such as the parts of one Megatron tensor
        tensors = {name: tensor.clone() for unit in units for name, tensor in produce(unit)}
        save_file(tensors, folder / filename, metadata={"format": "pt"})
        shutil.copymode(folder / CONFIG, folder / filename)  # safetensors makes files that only their owner reads
        weight_map |= dict.fromkeys(tensors, filename)
        del tensors  # before the next file's are made
    if len(plan.filename_to_tensors) > 1:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": weight_map})


def copy_model_files(folder: Path) -> None:
    """Put the code of Depth-Attention beside the weights, so that they load without this package."""
    for name in ("configuration_depthattn.py", "modeling_depthattn.py"):
        shutil.copyfile(Path(hf.__path__[0]) / name, folder / name)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as Hugging Face's files are: indented, with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
