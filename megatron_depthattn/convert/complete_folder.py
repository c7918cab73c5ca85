"""A folder that is complete or not there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from megatron_depthattn.durable import publish_folder, recover_folder, remove, write_error


@contextmanager
def complete_folder(
    output: Path, *, marker: str, source: Path, num_bytes: int, overwrite: bool = False
) -> Iterator[Path]:
    """A folder to write into that becomes ``output`` when the block ends well, and is removed when it does not.

    Args:
        output: the folder to make; a link is followed.
        marker: the file by which an existing ``output`` shows that it is of the kind that is written here.
        source: what is read: never overwritten, and nothing above it.
        num_bytes: about what will be written; an error before anything is, if the disk has less.
        overwrite: replace an existing folder, after the new one is complete.

    Raises:
        ValueError: ``output`` exists, is not to be replaced or cannot be made; the disk is too small or fills up.
    """
    output = output.resolve()
    if source.resolve().is_relative_to(output):
        raise ValueError(f"{output} holds what is converted: give another output")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists: give another output, or --overwrite to replace it")
    if output.exists() and not (output / marker).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} has no {marker}, so it is no earlier result and is not overwritten: give another")
    aside = output.with_name(f".{output.name}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < num_bytes:
            raise ValueError(f"{output.parent} has {free / 1e9:.2f} GB free, {num_bytes / 1e9:.2f} GB are needed")
        remove(aside)  # what a killed conversion left
        recover_folder(output)
        aside.mkdir()
        yield aside
        publish_folder(aside, output)
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:  # torch.save raises RuntimeError
        reason = write_error(error, aside)
        if reason is None and isinstance(error, RuntimeError):
            raise
        reason = reason or str(error).strip().splitlines()[-1]
        raise ValueError(f"{output} could not be written, and nothing new is left there: {reason}") from error
    finally:
        remove(aside)
