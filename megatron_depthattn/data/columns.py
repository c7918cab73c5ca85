"""One column of text of a parquet file or an Arrow file (IPC file or stream form, as `datasets` writes them)."""

from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_depthattn.data.documents import CorpusFile, Format
from megatron_depthattn.data.file_bytes import DamagedFileError

BATCH_BYTES = 2 << 20  # of parquet decoded at a time, about


def column_rows(file: CorpusFile, name: str, start: int) -> Iterator[tuple[list[bytes | None], int]]:
    """(consecutive rows of the column from row `start` on, bytes on disk so far); not yet known to be UTF-8.

    Raises:
        DamagedFileError: the file is damaged, or has no such column of strings.
    """
    batches = _parquet_batches if file.format is Format.PARQUET else _arrow_batches
    try:
        for column, consumed in batches(file, name, start):
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            yield column.cast(pyarrow.large_binary()).to_pylist(), consumed
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the machine's error, not the file's
            raise
        raise DamagedFileError(f"the {file.format.value} data is damaged ({' '.join(str(error).split())})") from error


def _parquet_batches(file: CorpusFile, name: str, start: int) -> Iterator[tuple[Any, int]]:
    """(column of consecutive rows, bytes on disk so far)"""
    with pyarrow.parquet.ParquetFile(file.path, page_checksum_verification=True) as table:
        _check_column(table.schema_arrow, name)
        num_rows, first = max(table.metadata.num_rows, 1), 0
        for group in range(table.metadata.num_row_groups):
            info = table.metadata.row_group(group)
            skip = start - first
            first += info.num_rows
            if skip >= info.num_rows:
                continue
            rows = min(max(BATCH_BYTES * info.num_rows // max(info.total_byte_size, 1), 16), 1 << 16)
            row = first - info.num_rows
            for batch in table.iter_batches(rows, row_groups=[group], columns=[name], use_threads=False):
                row += batch.num_rows
                yield batch.column(0)[max(skip, 0) :], file.size * row // num_rows
                skip -= batch.num_rows


def _arrow_batches(file: CorpusFile, name: str, start: int) -> Iterator[tuple[Any, int]]:
    with pyarrow.memory_map(str(file.path)) as source:
        is_file_form = source.read(6) == b"ARROW1"
        source.seek(0)
        opened = pyarrow.ipc.open_file(source) if is_file_form else pyarrow.ipc.open_stream(source)
        _check_column(opened.schema, name)
        batches = (opened.get_batch(i) for i in range(opened.num_record_batches)) if is_file_form else opened
        skip = start
        for number, batch in enumerate(batches, start=1):
            consumed = file.size * number // opened.num_record_batches if is_file_form else source.tell()
            if skip < batch.num_rows:
                yield batch.column(name)[max(skip, 0) :], consumed
            skip -= batch.num_rows


def _check_column(schema: Any, name: str) -> None:
    if name not in schema.names:
        raise DamagedFileError(f'there is no column "{name}" (but {", ".join(schema.names)}): set --text-field')
    kind = schema.field(name).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(test(kind) for test in is_text):
        raise DamagedFileError(f'the column "{name}" holds {kind}, not strings: set --text-field')
