"""Data sets in a layout of the Hugging Face Hub, on the Hub or in a local folder, streamed by the `datasets` library.

The library finds configs, splits and data files (by the names of the files, or as the data set's card says), opens and
decodes them. Each data file is a `CorpusFile` whose rows are documents; order, progress and resuming are then those of
other files. A data set of the Hub is read at one commit, which the manifest names.
"""

import gzip
import importlib
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import zstandard

from megatron_depthattn.data.columns import check_column
from megatron_depthattn.data.documents import CorpusFile
from megatron_depthattn.data.file_bytes import DamagedFileError
from megatron_depthattn.paths import link_root

HUB = "hf:"
BATCH_ROWS = 256
FORMATS = ("parquet", "json", "arrow", "csv", "text")  # others of the library hold no texts, or unpack what they find
_DAMAGE = (pyarrow.ArrowException, ValueError, EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile)


class HubChoice(NamedTuple):
    """What is read of the data sets among the inputs."""

    split: str
    text_field: str
    revision: str | None
    """A commit, branch or tag; None: the newest commit of the main branch."""


class HubFile(NamedTuple):
    """A data file of a data set."""

    dataset: Any
    """`datasets.IterableDataset` of the whole split: one shard a data file."""
    number: int
    """Of the file in the split."""
    commit: str
    """NAME@COMMIT of a data set on the Hub; empty for a local one."""

    def tables(self) -> Iterator[pyarrow.Table]:
        """The file's rows."""
        one = self.dataset.shard(num_shards=self.dataset.num_shards, index=self.number)
        tables: Iterator[pyarrow.Table] = one.with_format("arrow").iter(BATCH_ROWS)
        return tables

    def batches(self, file: CorpusFile, name: str, start: int) -> Iterator[tuple[Any, int]]:
        """(column of consecutive rows from row `start` on, 0: bytes are not known before the end of the file).

        Raises:
            DamagedFileError: the file is damaged, or has no such column of strings.
            OSError: the connection was lost.
        """
        try:
            for table in self.tables():
                check_column(table.schema, name)
                for column in table.column(name).chunks:
                    if start < len(column):
                        yield column[max(start, 0) :], 0
                    start -= len(column)
        except DamagedFileError:
            raise
        except Exception as error:  # of five libraries, the network's among them
            is_local = not self.commit and isinstance(error, OSError) and error.errno is None
            if is_local or isinstance(error, _DAMAGE):
                raise DamagedFileError(f"datasets cannot read it ({_line(error)})") from error
            raise OSError(f"{file.path} cannot be read ({_line(error)})") from error


def hub_name(given: str) -> tuple[str, str | None]:
    """Name or folder, and config if there is one, of ``hf:NAME[:CONFIG]``; a folder that exists may hold a `:`."""
    rest = os.path.expanduser(given.removeprefix(HUB))
    if Path(rest).is_dir() or ":" not in rest:
        return rest, None
    name, _, config = rest.rpartition(":")
    return name, config


def hub_files(given: str, choice: HubChoice) -> list[CorpusFile]:
    """The data files of a split, in their order; `given` is ``hf:NAME[:CONFIG]``.

    Raises:
        ValueError: there is no such data set, config, split or column of strings, or the Hub cannot be reached.
    """
    name, config = hub_name(given)
    is_local = bool(name) and Path(name).is_dir()
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        install = "pip install 'megatron-depthattn[hub]', or pip install datasets"
        raise ValueError(f"--input {given} needs datasets, which does not import ({error}): {install}") from error
    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):  # each failure is one line of ours
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        if not is_local and (Path(name).exists() or name.startswith((".", os.sep)) or name.count("/") != 1):
            raise ValueError("there is no such folder, and a data set on the Hub is named ORG/NAME")
        path = os.path.abspath(name) if is_local else name
        builder = _builder(datasets, path, config, choice.revision)
        if (kind := type(builder).__module__.rpartition(".")[2]) not in FORMATS:
            raise ValueError(f"its files are read as {kind}, which is none of {', '.join(FORMATS)}")
        files = dict(builder.config.data_files or {})
        if choice.split not in files:
            hint = " (a slice needs the whole split: set --max-tokens)" if "[" in choice.split else ""
            raise ValueError(f"there is no --split {choice.split} among {', '.join(map(str, files)) or 'none'}{hint}")
        # What a card names elsewhere would not be of the commit, nor perhaps of the user's choice.
        root = os.path.realpath(path) if is_local else f"hf://datasets/{name}@{builder.hash}"
        paths = [str(file) for file in files[choice.split]]
        for file in paths:
            is_inside = file.startswith(f"{root}/") and ".." not in file.split("/")
            if not is_inside or (is_local and not Path(os.path.realpath(file)).is_relative_to(link_root(Path(root)))):
                raise ValueError(f"it names {file}, which lies outside of it: give that as an input")
        dataset = builder.as_streaming_dataset(choice.split)
        if dataset.num_shards != len(paths):
            raise ValueError(f"{builder.name} streams {dataset.num_shards} parts of {len(paths)} files")
        known = dataset.features  # else the first file says
        schema = known.arrow_schema if known else next(HubFile(dataset, 0, "").tables()).schema
        check_column(schema, choice.text_field)
        dataset = dataset.select_columns([choice.text_field])
        sizes = _remote_sizes(paths) if not is_local else {}
    except Exception as error:  # of five libraries, the network's among them
        advice = "" if is_local else _advice(datasets, name, error)
        raise ValueError(f"--input {given}: {_line(error)}{advice}") from error
    commit = "" if is_local else f"{name}@{builder.hash}"
    found = []
    for index, file in enumerate(paths):
        relative, hub = file[len(root) + 1 :], HubFile(dataset, index, commit)
        if is_local:
            status = os.stat(file)
            found.append(CorpusFile(Path(file), relative, status.st_size, status.st_mtime_ns, "hub", hub=hub))
        else:
            found.append(CorpusFile(Path(HUB + commit, relative), f"{name}/{relative}", sizes[file], 0, "hub", hub=hub))
    return found


def _builder(datasets: Any, path: str, config: str | None, revision: str | None) -> Any:
    try:
        return datasets.load_dataset_builder(path, config, revision=revision)
    except ValueError as error:
        configs: list[str] = []
        with suppress(Exception):  # then the first error says more
            configs = datasets.get_dataset_config_names(path, revision=revision)
        if not configs or config in configs or (configs == ["default"] and not config):
            raise
        what = f"there is no config {config}" if config else "no config is given"
        raise ValueError(f"{what}: set --input hf:NAME:CONFIG with one of {', '.join(configs)}") from error


def _remote_sizes(paths: list[str]) -> dict[str, int]:
    """One request a folder, not one a file."""
    fsspec = importlib.import_module("fsspec")
    system, _ = fsspec.core.url_to_fs(paths[0])
    sizes: dict[str, int] = {}
    for folder in {path.rpartition("/")[0] for path in paths}:
        sizes |= {f"hf://{entry['name']}": int(entry["size"] or 0) for entry in system.ls(folder, detail=True)}
    return sizes


def _line(error: BaseException) -> str:
    if isinstance(error, StopIteration):
        return "its first file holds no rows, or is cut off"
    return " ".join(str(error).split()).removesuffix(".") or type(error).__name__


def _advice(datasets: Any, name: str, error: Exception) -> str:
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return "; a private or gated one needs its terms accepted on its page, and `hf auth login` or HF_TOKEN"
    if isinstance(error, (datasets.exceptions.DatasetsError, DamagedFileError, ValueError, RuntimeError)):
        return ""
    return f"; without a network: `hf download --repo-type dataset {name} --local-dir DIR`, then --input hf:DIR"
