"""The files of a corpus and what they are; the split of a document; where a long document is cut.

A document goes to train or val by a hash of its bytes, whatever the order of the files; copies of a document therefore
land on the same side.

Nothing but the standard library is behind it: every encoding process imports this file.
"""

import errno
import hashlib
import json
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_depthattn.paths import leads_out, link_root

BUILTIN_STDLIB = "builtin:python-stdlib"
PIECE_BYTES = 2 << 20  # a longer document is encoded in pieces, which bounds memory and lets all cores work on it
SAFE_CUT_WINDOW = 1 << 16  # how far before that the best place to cut is looked for

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ARCHIVES = frozenset(
    [".bz2", ".xz", ".lz4", ".lzma", ".br", ".zip", ".tar", ".tgz", ".tbz2", ".txz", ".tzst", ".7z", ".rar"]
)


# How a file is read; "json" holds records, one a line or in an array, or a text, which is known once it is opened.
# A hub file is one that `hub.py` opens.
# The last four are not read, and are counted: metadata are what `datasets.save_to_disk` and its cache put beside the
# Arrow files; special is a link to a folder, a broken link, a socket, a pipe; links out of a folder given as input,
# which may come from anywhere, are no way to other files.
Format = Literal[
    "text",
    "json lines",
    "json",
    "parquet",
    "arrow",
    "hub",
    "archive",
    "dataset metadata",
    "special",
    "link out of the folder",
]
ENDINGS: dict[str, Format] = {".json": "json", ".jsonl": "json lines", ".ndjson": "json lines"}
ENDINGS |= {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}


class CorpusFile(NamedTuple):
    path: Path
    name: str
    """Relative to its input."""
    size: int
    modified_ns: int
    format: Format
    compression: str = ""
    """gzip, zstd, or nothing."""
    hub: Any = None
    """`HubFile`, of a hub file."""


# ---- files -----------------------------------------------------------------------------------------------


def corpus_files(inputs: Sequence[str], opened: Mapping[str, Sequence[CorpusFile]] | None = None) -> list[CorpusFile]:
    """Every file of the inputs, in a fixed order: that of the inputs, then a folder's files by name, then its folders.

    Args:
        opened: inputs whose files are known already: data sets (`hub.py`).

    Raises:
        ValueError: an input does not exist, is an archive, or is an unknown builtin.
        OSError: a folder cannot be listed.
    """
    files: list[CorpusFile] = []
    for given in inputs:
        path = Path(given)
        if given == BUILTIN_STDLIB:
            skip = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
            found = _walk(Path(sysconfig.get_paths()["stdlib"]), skip)
            files += [f for f in found if f.path.suffix == ".py" and f.format == "text"]
        elif opened and given in opened:
            files += opened[given]
        elif path.is_dir():
            files += _walk(path, set())
        elif not path.is_file():
            raise ValueError(f"--input {given} does not exist: give files, folders, hf:NAME, or {BUILTIN_STDLIB}")
        else:
            file = _corpus_file(path, path.name)
            if file.format == "archive":
                raise ValueError(f"--input {given} is an archive, or not compressed as .gz or .zst: unpack it")
            files.append(file)
    return files


def _walk(root: Path, skip_folders: set[str]) -> Iterator[CorpusFile]:
    stays_in = link_root(root)
    for folder, folders, names in os.walk(root, onerror=_raise):
        links = [name for name in folders if Path(folder, name).is_symlink()]  # not followed: they can form loops
        folders[:] = sorted(set(folders) - skip_folders)
        data_files = _saved_dataset_files(Path(folder), names)
        for name in sorted(names + links) if data_files is None else [*data_files, *sorted(set(names) - {*data_files})]:
            path = Path(folder, name)
            file = _corpus_file(path, path.relative_to(root).as_posix())
            if file.format != "special" and leads_out(path, stays_in):
                file = file._replace(format="link out of the folder", size=0, modified_ns=0)
            elif name == "dataset_dict.json" or (data_files is not None and name not in data_files):
                file = file._replace(format="dataset metadata")
            yield file


def _raise(error: OSError) -> None:
    """What `os.walk` does with a folder that it cannot list; without this it leaves the folder out."""
    raise error


def _saved_dataset_files(folder: Path, names: Sequence[str]) -> list[str] | None:
    """The Arrow files, in their order, of a folder that `datasets.save_to_disk` wrote; None for any other folder."""
    if not {"state.json", "dataset_info.json"} <= {*names}:
        return None
    try:
        state = json.loads((folder / "state.json").read_bytes())
        listed = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        return None  # of another program
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / 'state.json'} is damaged ({error}): copy the data set again") from error
    missing = [name for name in listed if name not in names]
    if missing:
        raise ValueError(f"{folder / 'state.json'} names {missing[0]}, which is not there: copy the data set again")
    return listed


def _corpus_file(path: Path, name: str) -> CorpusFile:
    try:
        status = path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):  # a link to nowhere or to itself
            raise
        return CorpusFile(path, name, 0, 0, "special")
    if not stat.S_ISREG(status.st_mode):
        return CorpusFile(path, name, 0, 0, "special")
    ending, compression = path.suffix.lower(), ""
    if ending in COMPRESSIONS:
        compression = COMPRESSIONS[ending]
        ending = Path(path.stem).suffix.lower()
    format: Format = "archive" if ending in ARCHIVES else ENDINGS.get(ending, "text")
    if compression and format == "json":
        format = "json lines"  # .json.gz and .json.zst are only in use for data sets, which are lines
    elif compression and format in ("parquet", "arrow"):
        format = "archive"  # they are read from their end, or in place
    return CorpusFile(path, name, status.st_size, status.st_mtime_ns, format, compression)


# ---- documents -------------------------------------------------------------------------------------------


def is_validation(document: bytes, fraction: float) -> bool:
    """Whether a document belongs to val: its SHA-256, read as a number in [0, 1), is below `fraction`."""
    return digest_is_validation(hashlib.sha256(document).digest(), fraction)


def digest_is_validation(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def pieces(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """A document in parts of at most `PIECE_BYTES`; `blocks` are its bytes, and how they are cut does not matter.

    A cut is made after a line end between two characters that are no white space, where the usual pre-tokenizers
    (GPT-2's, Llama 3's, Qwen's) cut as well: the tokens are then those of the uncut document. Without such a place
    near the limit it is made after the last line end, else between two characters.
    """
    rest = b""
    for block in blocks:
        rest += block
        while len(rest) > PIECE_BYTES:
            cut = _cut(rest)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _cut(data: bytes) -> int:
    """Where to cut, in [1, PIECE_BYTES]; a function of the first PIECE_BYTES + 1 bytes alone."""
    last = end = data.rfind(b"\n", 0, PIECE_BYTES)
    while end > max(0, PIECE_BYTES - SAFE_CUT_WINDOW):
        if not data[end - 1 : end].isspace() and not data[end + 1 : end + 2].isspace():
            return end + 1
        end = data.rfind(b"\n", 0, end)
    return last + 1 if last >= 0 else character_start(data, PIECE_BYTES)


def character_start(data: bytes, position: int) -> int:
    """`position`, or up to three bytes before it, if it lies inside a UTF-8 character."""
    for start in range(position, max(position - 4, 0), -1):
        if data[start] & 0xC0 != 0x80:
            return start
    return 0 if position < 4 else position
