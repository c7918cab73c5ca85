"""One column of text of a parquet file or an Arrow file (IPC file or stream form, as `datasets` writes them)."""

import mmap
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_depthattn.data.documents import CorpusFile
from megatron_depthattn.data.file_bytes import DamagedFileError

BATCH_BYTES = 2 << 20  # of rows decoded at a time, about
MAX_BATCH_ROWS = 1 << 14
INDEX_BYTES = 16  # a row of parquet with fewer is an index into a dictionary
_BYTES = {
    pyarrow.string(): pyarrow.binary(),
    pyarrow.large_string(): pyarrow.large_binary(),
    pyarrow.string_view(): pyarrow.binary_view(),
}


def column_rows(file: CorpusFile, name: str, start: int) -> Iterator[tuple[list[bytes | None], int]]:
    """(consecutive rows of the column from row `start` on, bytes on disk so far); not yet known to be UTF-8.

    Raises:
        DamagedFileError: the file is damaged, or has no such column of strings.
    """
    batches = file.hub.batches if file.hub else _parquet_batches if file.format == "parquet" else _arrow_batches
    try:
        for column, consumed in batches(file, name, start):
            for rows in _rows(column):
                yield rows, consumed
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and (error.errno is not None or file.hub):  # not the file's error
            raise
        raise DamagedFileError(f"the {file.format} data is damaged ({' '.join(str(error).split())})") from error


def _rows(column: Any) -> Iterator[list[bytes | None]]:
    """The bytes of strings, a few rows at a time: a file may be one batch.

    Offsets and indices that point outside of their buffers are an ArrowInvalid.
    """
    if pyarrow.types.is_dictionary(column.type):
        # The words once, not for every row: a few bytes of indices can stand for gigabytes.
        words = [word for rows in _rows(column.dictionary) for word in rows]
        for part in _slices(column.indices):
            indices = part.to_pylist()
            if any(i is not None and not 0 <= i < len(words) for i in indices):
                raise pyarrow.ArrowInvalid("an index is outside of the dictionary")
            yield [None if i is None else words[i] for i in indices]
    else:
        for part in _slices(column.view(_BYTES[column.type])):  # without a check for UTF-8, which comes later
            yield part.cast(pyarrow.large_binary()).to_pylist()


def _slices(column: Any) -> Iterator[Any]:
    column.validate(full=True)
    rows = min(max(BATCH_BYTES * len(column) // max(column.nbytes, 1), 16), MAX_BATCH_ROWS)
    return (column.slice(first, rows) for first in range(0, len(column), rows))


def _parquet_batches(file: CorpusFile, name: str, start: int) -> Iterator[tuple[Any, int]]:
    """(column of consecutive rows, bytes on disk so far)"""
    metadata = pyarrow.parquet.read_metadata(file.path)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]  # not their columns: damaged, they abort
    if sum(max(group.num_rows, 0) for group in groups) != metadata.num_rows:
        raise DamagedFileError("the parquet data is damaged (its row groups have not the rows of the file)")
    # A few bytes a row are indices of words, which `_rows` expands; elsewhere that would be slower.
    is_indices = sum(group.total_byte_size for group in groups) < INDEX_BYTES * metadata.num_rows
    words = [name] if is_indices and name in metadata.schema.names else []
    with pyarrow.parquet.ParquetFile(file.path, page_checksum_verification=True, read_dictionary=words) as table:
        check_column(table.schema_arrow, name)
        _check_single(file, b"PAR1")
        num_rows, first = max(metadata.num_rows, 1), 0
        for number, group in enumerate(groups):
            skip = start - first
            first += group.num_rows
            if skip >= group.num_rows:
                continue
            rows = min(max(BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1), 16), MAX_BATCH_ROWS)
            row = first - group.num_rows
            for batch in table.iter_batches(rows, row_groups=[number], columns=[name], use_threads=False):
                row += batch.num_rows
                yield batch.column(0)[max(skip, 0) :], file.size * row // num_rows
                skip -= batch.num_rows
            if row != first:
                raise pyarrow.ArrowInvalid(f"row group {number} ends at row {row} and not {first}")


def _check_single(file: CorpusFile, magic: bytes) -> None:
    """Raise for files that were joined: the last one's index would find the first one's rows.

    A file ends with the size of its index and a magic word, the next begins with that word.
    """
    with file.path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(magic * 2)
        while at >= 0:
            if 0 < int.from_bytes(data[at - 4 : at], "little") < at:  # else it is text
                raise DamagedFileError(f"it is several {file.format} files joined: take them apart")
            at = data.find(magic * 2, at + 1)


def _arrow_batches(file: CorpusFile, name: str, start: int) -> Iterator[tuple[Any, int]]:
    with pyarrow.memory_map(str(file.path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            opened = pyarrow.ipc.open_file(source)
            _check_single(file, b"ARROW1")
        count = opened.num_record_batches if is_file else 0
        batches = ((opened.get_batch(i), file.size * (i + 1) // count) for i in range(count))
        for batch, consumed in batches if is_file else _streams(source):
            check_column(batch.schema, name)
            if start < batch.num_rows:
                yield batch.column(name)[max(start, 0) :], consumed
            start -= batch.num_rows


def _streams(source: Any) -> Iterator[tuple[Any, int]]:
    """(batch, bytes on disk so far) of the stream form; streams may follow each other."""
    while source.tell() < source.size():
        for batch in pyarrow.ipc.open_stream(source):
            yield batch, source.tell()


def check_column(schema: Any, name: str) -> None:
    """Raise DamagedFileError unless there is one column `name`, of strings."""
    if schema.names.count(name) != 1:
        found = f'{schema.names.count(name)} columns "{name}" among {", ".join(schema.names)}'
        raise DamagedFileError(f"there are {found}: set --text-field")
    kind = schema.field(name).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if kind not in _BYTES:
        raise DamagedFileError(f'the column "{name}" holds {kind}, not strings: set --text-field')
