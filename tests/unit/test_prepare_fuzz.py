"""Files of every format, cut, joined, re-encoded, renamed and with wrong bytes: read whole, or something is counted.

What another reader makes of the same bytes is the measure. Where it finds a fault there must be a count; where it finds
none, and nothing is counted, its documents are ours.
"""

import gzip
import io
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_depthattn.data import columns, file_bytes, readers
from megatron_depthattn.data.documents import corpus_files
from megatron_depthattn.data.encode import Encoded, Piece, Recipe, parts
from megatron_depthattn.data.readers import START, Position, read_units
from tests.prepared import arrow_file_bytes, arrow_stream_bytes, parquet_bytes

RECIPE = Recipe("text", 0.5)
MARKED = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]  # that a file says of itself; the others it does not
ENCODINGS = [*MARKED, "utf-16-le", "utf-16-be", "latin-1", "cp1251", "shift-jis"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


class Case(NamedTuple):
    name: str
    data: bytes
    texts: list[str]
    """Of the file before it was spoilt."""
    is_marked: bool
    change: str

    @property
    def is_whole(self) -> bool:
        return self.is_marked and self.change == "none"


def records(texts: list[str]) -> list[dict[str, object]]:
    return [{"n": 10**60 + i, "text": text} for i, text in enumerate(texts)]


def lines(texts: list[str]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records(texts))


TEXT_FORMS: dict[str, Callable[[list[str]], str]] = {
    "a.txt": lambda texts: "\n".join(texts),
    "a.jsonl": lines,
    "lines.json": lambda texts: "\n" + lines(texts),
    "array.json": lambda texts: json.dumps(records(texts), ensure_ascii=False),
    "pretty.json": lambda texts: json.dumps(records(texts), ensure_ascii=False, indent=1),
    "object.json": lambda texts: json.dumps(records(texts or [""])[0], ensure_ascii=False, indent=1),
}
BINARY_FORMS: dict[str, Callable[[list[str]], bytes]] = {
    "a.parquet": lambda texts: parquet_bytes(texts, 4, compression="zstd"),
    "file.arrow": lambda texts: arrow_file_bytes(texts, 4, compression="uncompressed"),
    "stream.arrow": lambda texts: arrow_stream_bytes(texts, 4),
}
characters = st.characters(exclude_categories=["Cs", "Cc"], include_characters="\0\t\n\r")
texts_strategy = st.lists(st.text(characters, max_size=30), max_size=9)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    form = draw(st.sampled_from([*TEXT_FORMS, *BINARY_FORMS]))
    texts, encoding, ending = draw(texts_strategy), "utf-8", ""

    def file(texts: list[str]) -> bytes:
        if form in BINARY_FORMS:
            return BINARY_FORMS[form](texts)
        return COMPRESS[ending](TEXT_FORMS[form](texts).encode(encoding, errors="replace"))

    if form in TEXT_FORMS:
        encoding = draw(st.sampled_from(ENCODINGS))
        ending = draw(st.sampled_from(list(COMPRESS))) if not form.endswith(".json") else ""
    data, name = file(texts), form + ending
    change = draw(st.sampled_from(["none", "cut", "joined", "bytes", "zeros", "renamed"]))
    if change == "cut":
        data = data[: draw(st.integers(0, len(data)))]
    elif change == "joined":
        more = draw(texts_strategy)
        data, texts = data + file(more), texts + more
    elif change == "bytes":
        at, new = draw(st.integers(0, len(data))), draw(st.binary(max_size=9))
        data = data[:at] + new + data[at + draw(st.integers(0, 9)) :]
    elif change == "zeros":
        data += bytes(draw(st.integers(1, 2000)))
    elif change == "renamed":
        name = draw(st.sampled_from(["b.txt", "b.jsonl", "b.json", "b.parquet", "b.arrow", "b.txt.gz", "b.jsonl.zst"]))
    return Case(name, data, texts, encoding in MARKED, change)


# ---- the other reader ------------------------------------------------------------------------------------


def expected(case: Case) -> list[str] | None:
    """The documents; None if the bytes are at fault."""
    try:
        return [text for text in _expected(case) if text.encode().strip()]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, zlib.error, pyarrow.ArrowException):
        return None


def _expected(case: Case) -> list[str]:
    data, name = case.data, Path(case.name)
    if name.suffix == ".parquet":
        assert_fault(case.change == "joined")
        column = pyarrow.parquet.read_table(io.BytesIO(data), columns=["text"]).column("text")
        return _strings(column)
    if name.suffix == ".arrow":
        assert_fault(case.change == "joined" and data.startswith(b"ARROW1"))
        return [text for batch in _batches(data) for text in _strings(batch.column("text"))]
    if name.suffix == ".gz":
        data, name = gzip.decompress(data), name.with_suffix("")
    elif name.suffix == ".zst":
        with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
            data, name = stream.read(), name.with_suffix("")
    marks = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8-sig")
    text = data.decode(encoding)
    if name.suffix == ".txt":
        assert_fault("\0" in text)
        return [text]
    if name.suffix == ".json":
        try:
            value = json.loads(text)
            return [record["text"] for record in (value if isinstance(value, list) else [value])]
        except json.JSONDecodeError:  # lines
            pass
    return [json.loads(line.removeprefix("\ufeff"))["text"] for line in text.split("\n") if line.strip()]


def assert_fault(is_fault: bool) -> None:
    if is_fault:
        raise ValueError


def _strings(column: pyarrow.Array) -> list[str]:
    column.validate(full=True)
    return [text or "" for text in column.to_pylist()]


def _batches(data: bytes) -> Iterator[pyarrow.RecordBatch]:
    if data.startswith(b"ARROW1"):
        opened = pyarrow.ipc.open_file(data)
        yield from (opened.get_batch(i) for i in range(opened.num_record_batches))
        return
    source = pyarrow.BufferReader(data)
    while source.tell() < len(data):
        yield from pyarrow.ipc.open_stream(source)


# ---- ours ------------------------------------------------------------------------------------------------


def read(folder: Path, start: Position) -> tuple[bytes, list[str], list[Position]]:
    """(the documents, joined; what is counted; where units end)"""
    found: list[Piece] = []
    counted, ends = [], []
    for unit in read_units(corpus_files([str(folder)]), RECIPE, start):
        encoded = Encoded()
        found += parts(unit.content, RECIPE, encoded)
        counted += [kind for _, kind, *_ in encoded.left_out] + ["record"] * encoded.skipped["damaged_records"]
        counted += [unit.outcome.kind] if unit.outcome else []
        ends.append(unit.end)
    counted += ["repaired" for piece in found if piece.is_repaired]
    return b"".join(piece.data for piece in found), counted, ends


@pytest.fixture(scope="module", autouse=True)
def small_units() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((readers, "UNIT_BYTES"), (columns, "BATCH_BYTES")):
            patch.setattr(module, name, 100)
        patch.setattr(file_bytes, "BLOCK_BYTES", 64)
        patch.setattr(file_bytes, "COMPRESSED_BLOCK_BYTES", 50)
        yield


@settings(
    max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(cases(), st.integers(0, 99))
def test_a_corpus_is_whole_or_something_is_counted(case: Case, start: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, case.name).write_bytes(case.data)
        documents, counted, ends = read(Path(folder), START)
        rest, _, _ = read(Path(folder), ends[start % len(ends)])
    right = expected(case)
    if right is None:
        assert counted
    elif not counted:
        assert documents == "".join(right).encode(), right
    if case.is_whole and "\0" not in "".join(case.texts):
        assert not counted, counted
    if case.is_marked and case.change == "cut" and not {"json as text", "repaired"} & {*counted}:
        whole = "\n" if case.name.startswith("a.txt") else ""
        assert whole.join(case.texts).encode().startswith(documents)
    assert documents.endswith(rest)
