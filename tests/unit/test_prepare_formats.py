"""Every format holds the same corpus; what is damaged, empty or of no known format has a stated outcome."""

import gzip
import io
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from megatron_depthattn.data import columns, documents, file_bytes, readers
from megatron_depthattn.data.documents import corpus_files
from megatron_depthattn.data.encode import Encoded, JsonLines, Piece, Recipe, Rows, parts
from megatron_depthattn.data.encode_pool import EncodePool
from megatron_depthattn.data.prepare import prepare_corpus
from megatron_depthattn.data.readers import read_units
from megatron_depthattn.data.tokenizer import Encoder, load_tokenizer
from tests.prepared import (
    FRACTION,
    TEXTS,
    arrow_file_bytes,
    arrow_stream_bytes,
    assert_holds,
    halves,
    json_lines,
    make_documents,
    make_settings,
    parquet_bytes,
    shards,
    table,
    write_texts,
)

RECIPE = Recipe("text", FRACTION)


def saved_data_set(folder: Path) -> None:
    data = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"all": data}).save_to_disk(folder / "set", num_shards={"all": 3})
    (folder / "set" / "all" / "cache-0123.arrow").write_bytes(b"not of the data set")


# Each writes TEXTS below a folder, in one or more files.
FORMATS: dict[str, Callable[[Path], object]] = {
    "jsonl": lambda f: (f / "a.jsonl").write_bytes(json_lines(TEXTS)),
    "no last line end": lambda f: (f / "a.ndjson").write_bytes(json_lines(TEXTS).rstrip()),
    "json": lambda f: (f / "a.JSON").write_bytes(json_lines(TEXTS)),
    "jsonl.gz": lambda f: (f / "a.jsonl.gz").write_bytes(halves(TEXTS, gzip.compress) + bytes(100)),
    "json.gz": lambda f: (f / "a.json.gz").write_bytes(gzip.compress(json_lines(TEXTS))),
    "jsonl.zst": lambda f: (f / "a.jsonl.zst").write_bytes(halves(TEXTS, zstandard.compress)),
    "txt.gz": lambda f: write_texts(f, gzip.compress, ".gz"),
    "txt.zst": lambda f: write_texts(f, zstandard.compress, ".zst"),
    "parquet": lambda f: (f / "a.parquet").write_bytes(parquet_bytes(TEXTS)),
    "parquet, dictionary": lambda f: pyarrow.parquet.write_table(
        table(TEXTS, pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string())), f / "a.parquet", compression="zstd"
    ),
    "arrow, file form": lambda f: (f / "a.feather").write_bytes(arrow_file_bytes(TEXTS)),
    "arrow, stream form": lambda f: (f / "a.arrow").write_bytes(arrow_stream_bytes(TEXTS)),
    "datasets": saved_data_set,
    "several": lambda f: [
        (f / "a.txt").write_text(TEXTS[0]),
        (f / "b.jsonl").write_bytes(json_lines(TEXTS[1:40])),
        (f / "c.parquet").write_bytes(parquet_bytes(TEXTS[40:80])),
        (f / "d.jsonl.zst").write_bytes(zstandard.compress(json_lines(TEXTS[80:]))),
    ],
}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_bytes_of_the_text_files(
    format: str, plain: dict[str, bytes], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((readers, "UNIT_BYTES"), (file_bytes, "BLOCK_BYTES"), (file_bytes, "COMPRESSED_BLOCK_BYTES")):
        monkeypatch.setattr(module, name, 2000)
    (tmp_path / "in").mkdir()
    FORMATS[format](tmp_path / "in")
    manifest = prepare_corpus(make_settings(tmp_path / "in", tokenizer, tmp_path / "out")).manifest
    assert shards(tmp_path / "out") == plain
    metadata = manifest["skipped"].pop("dataset_metadata_files_skipped")
    assert metadata == (4 if format == "datasets" else 0)
    assert not any(manifest["skipped"].values())


@pytest.mark.parametrize("format", FORMATS)
def test_reading_starts_at_any_unit(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((readers, "UNIT_BYTES"), (file_bytes, "BLOCK_BYTES"), (columns, "BATCH_BYTES")):
        monkeypatch.setattr(module, name, 1000)
    monkeypatch.setattr(documents, "PIECE_BYTES", 300)
    (tmp_path / "z.txt").write_text("\n".join(TEXTS))  # a document of many pieces
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress("\n".join(TEXTS).encode()))
    FORMATS[format](tmp_path)
    files = corpus_files([str(tmp_path)])
    units = list(read_units(files, RECIPE))
    assert len(units) > 100
    for i, unit in enumerate(units):
        if isinstance(unit.content, JsonLines):  # the number that an error message would name
            (line, *_), number = unit.content.lines.split(b"\n"), unit.content.first_line
            assert line == json_lines(TEXTS).split(b"\n")[number - 1] or format == "several"
        if i % 7 == 0 or i < 40:
            assert contents(read_units(files, RECIPE, unit.end)) == contents(units[i + 1 :])


def contents(units: Iterable[readers.Unit]) -> tuple[list[Piece], list[readers.Outcome]]:
    """Documents and pieces, and what is said of files; how they are grouped may depend on where reading began."""
    units = list(units)
    return (
        [part for unit in units for part in parts(unit.content, RECIPE, Encoded())],
        [unit.outcome for unit in units if unit.outcome],
    )


def test_a_text_field_of_another_name(plain: dict[str, bytes], tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(json_lines(TEXTS[:50], "content"))
    renamed = table(TEXTS[50:]).rename_columns(["id", "content", "meta"])
    pyarrow.parquet.write_table(renamed, tmp_path / "in" / "b.parquet")
    prepare_corpus(make_settings(tmp_path / "in", tokenizer, tmp_path / "out", text_field="content"))
    assert shards(tmp_path / "out") == plain


# ---- damage ----------------------------------------------------------------------------------------------


def truncated(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def flipped(data: bytes, at: int | None = None) -> bytes:
    at = len(data) // 2 if at is None else at
    return data[:at] + bytes(b ^ 0xFF for b in data[at : at + 20]) + data[at + 20 :]


def zstd_blocks(texts: list[str]) -> bytes:
    """One frame of many blocks; nothing of a block can be read before its end."""
    compressor = zstandard.ZstdCompressor().compressobj()
    blocks = [
        compressor.compress(json_lines(texts[i : i + 5])) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        for i in range(0, len(texts), 5)
    ]
    return b"".join(blocks) + compressor.flush()


PARQUET = parquet_bytes(TEXTS, 10, use_dictionary=False)


def flipped_column() -> bytes:
    """Damage in the text's page of the sixth row group: fifty whole rows come before it."""
    chunk = pyarrow.parquet.ParquetFile(io.BytesIO(PARQUET)).metadata.row_group(5).column(1)
    return flipped(PARQUET, chunk.data_page_offset + chunk.total_compressed_size // 2)


def without_column(write: Callable[[pyarrow.Table, io.BytesIO], object]) -> bytes:
    write(table(TEXTS).select(["id"]), sink := io.BytesIO())
    return sink.getvalue()


BAD_LINE = b'{"text": "fine"\n'
NO_RECORDS = b'{"content": "no"}\n{"text": 3}\n[]\n'
NO_STRING = ' is not a JSON object with a string field "text"'
# name -> (file, its bytes, what the error says after the file's name, how many of TEXTS are kept: None if that is not
# known beforehand; all if records are damaged, and not the file)
DAMAGED: dict[str, tuple[str, bytes, str, int | None]] = {
    "truncated gzip": (
        "a.jsonl.gz",
        truncated(gzip.compress(json_lines(TEXTS))),
        r": the gzip data is truncated: it ends at byte \d+, too early",
        None,
    ),
    "truncated zstd": (
        "a.jsonl.zst",
        truncated(zstd_blocks(TEXTS)),
        r": the zstd data is truncated: it ends at byte \d+, too early",
        None,
    ),
    "damaged gzip": (
        "a.jsonl.gz",
        flipped(gzip.compress(json_lines(TEXTS))),
        r": the gzip data is damaged between byte \d+ and \d+ \(",
        None,
    ),
    "truncated gzip of one text": (
        "a.txt.gz",
        truncated(gzip.compress("".join(TEXTS).encode())),
        ": the gzip data is truncated",
        0,
    ),
    "empty gzip": ("a.jsonl.gz", b"", ": the gzip data is truncated", 0),
    "truncated parquet": ("a.parquet", truncated(PARQUET), ": after row 0, the pa", 0),
    "damaged parquet": ("a.parquet", flipped_column(), r": after row 50, the parquet data is damaged \(", 50),
    "truncated arrow": (
        "a.arrow",
        truncated(arrow_stream_bytes(TEXTS)),
        ": after row 50, the arrow data is damaged",
        50,
    ),
    "no such column": (
        "a.feather",
        without_column(pyarrow.feather.write_feather),
        ': after row 0, there are 0 columns "text" among id: set --text-field',
        0,
    ),
    "not JSON": (
        "a.jsonl",
        json_lines(TEXTS[:50]) + b"\n" + BAD_LINE + json_lines(TEXTS[50:]),
        rf", line 52{NO_STRING} \(--text-field\)",
        120,
    ),
    "no such field": ("a.jsonl.gz", gzip.compress(NO_RECORDS + json_lines(TEXTS)), f", line 1{NO_STRING}", 120),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_an_error_or_counted(
    case: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_bytes, "COMPRESSED_BLOCK_BYTES", 500)
    name, data, message, expected = DAMAGED[case]
    counted = "records" if expected == len(TEXTS) else "files"
    source = tmp_path / "in"
    source.mkdir()
    (source / name).write_bytes(data)
    more = make_documents(40, seed=5)
    (source / "b.jsonl").write_bytes(json_lines(more))
    with pytest.raises(ValueError, match=f"in/{re.escape(name)}{message}.*; repair it, or pass --on-corrupt skip"):
        prepare_corpus(make_settings(source, tokenizer, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    given = make_settings(source, tokenizer, tmp_path / "out", on_corrupt="skip", workers=2)
    manifest = prepare_corpus(given).manifest
    skipped = {key: n for key, n in manifest["skipped"].items() if n}
    assert skipped == {f"damaged_{counted}": 3 if case == "no such field" else 1}
    kept = sum(split["documents"] for split in manifest["splits"].values()) - len(more)
    assert 10 < kept < 110 if expected is None else kept == expected
    assert_holds(tmp_path / "out", TEXTS[:kept] + more, tokenizer)
    source_lines = [json.loads(line) for line in (tmp_path / "out" / "sources.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in source_lines] == ["damaged" if counted == "files" else "read", "read"]
    with pytest.raises(ValueError, match=r"leaves out \d damaged files and \d damaged records: pass --on-corrupt skip"):
        prepare_corpus(make_settings(source, tokenizer, tmp_path / "out"))


def test_what_else_is_passed_over_is_counted(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    lines = json_lines([*TEXTS, "", " \n", "d\ud800e"]) + b'{"text": null}\n{"text": "caf\xe9"}\n'
    (source / "a.jsonl").write_bytes(lines)
    (source / "b.zip").write_bytes(b"PK")
    (source / "c.tar.gz").write_bytes(b"\x1f\x8b")
    (source / "d.txt.gz").write_bytes(gzip.compress(b"a\0b"))
    (source / "e.json").write_text(json.dumps({"name": "settings"}, indent=2))
    (source / "f.txt").write_bytes("naïve".encode("latin-1"))
    (source / "folder").mkdir()
    (source / "g").symlink_to(source / "folder")
    (source / "h").symlink_to(source / "nowhere")
    os.mkfifo(source / "i")
    (tmp_path / "secret").write_text("of another folder")
    (source / "k").symlink_to(tmp_path / "secret")
    (source / "l.txt").write_bytes("Все счастливые семьи похожи друг на друга".encode("cp1251"))
    pyarrow.parquet.write_table(table([None, "from a column"]), source / "j.parquet")
    manifest = prepare_corpus(make_settings(source, tokenizer, tmp_path / "out")).manifest
    assert {key: n for key, n in manifest["skipped"].items() if n} == {
        "archive_files_skipped": 2,
        "binary_files_skipped": 1,
        "undecodable_files_skipped": 1,
        "special_files_skipped": 3,
        "links_out_of_the_folder_skipped": 1,
        "json_files_read_as_text": 1,
        "empty_documents": 4,
    }
    assert sum(split["documents_with_replaced_utf8"] for split in manifest["splits"].values()) == 3
    texts = [*TEXTS, "d?e", "caf\ufffd", json.dumps({"name": "settings"}, indent=2), "na\ufffdve", "from a column"]
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(texts)
    assert manifest["sources"]["files"] == 12
    lines = [json.loads(line) for line in (tmp_path / "out" / "sources.jsonl").read_text().splitlines()]
    assert {line["name"]: line["outcome"] for line in lines if line["name"] in "kl.txt"} == {
        "k": "link out of the folder",
        "l.txt": "undecodable",
    }


# ---- one file's documents --------------------------------------------------------------------------------


def read(folder: Path, recipe: Recipe = RECIPE) -> tuple[list[str], list[str], str]:
    """(documents, what is counted, the first message)"""
    documents: list[str] = []
    counted: list[str] = []
    messages: list[str] = []
    for unit in read_units(corpus_files([str(folder)]), recipe):
        encoded = Encoded()
        for part in parts(unit.content, recipe, encoded):
            documents += [part.data.decode(errors="replace")] if part.is_first else []
            counted += ["repaired"] * (part.is_repaired and part.is_first)
        counted += [kind for _, kind, *_ in encoded.left_out] + ["record"] * encoded.skipped["damaged_records"]
        messages += [encoded.first_damage] if encoded.first_damage else []
        if unit.outcome:
            counted.append(unit.outcome.kind)
            messages.append(unit.outcome.message)
    return documents, counted, next(iter(messages), "")


MARK = b"\xef\xbb\xbf"
CHINESE = "近日有关部门发布了新的通知要求各地加强管理，确保安全生产。专家表示这些举措将有助于提高效率并降低成本"
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
RECORDS = [{"n": i, "text": text} for i, text in enumerate(["one", "zwölf"])]
RECORD_LINES = json_lines(["one", "zwölf"])
LONG = "9" * 5000
# name -> (file, its bytes, its documents, what is counted, a part of the message)
FILES: dict[str, tuple[str, bytes, list[str], list[str], str]] = {
    "mark": ("a.txt", MARK + b"text", ["text"], [], ""),
    "mark, gzip": ("a.txt.gz", gzip.compress(MARK + b"text"), ["text"], [], ""),
    "mark, two members": ("a.jsonl.gz", gzip.compress(MARK + b'{"text": "a"}\n') * 2, ["a", "a"], [], ""),
    "mark and a bad byte": (
        "a.jsonl",
        MARK + b'{"text": "caf\xe9 au lait"}\n',
        ["caf\ufffd au lait"],
        ["repaired"],
        "",
    ),
    "UTF-16": ("a.txt", "naïve 火".encode("utf-16"), ["naïve 火"], [], ""),
    "UTF-16, big-endian, zstd": ("a.txt.zst", zstandard.compress("\ufeff火".encode("utf-16-be")), ["火"], [], ""),
    "UTF-32": ("a.jsonl", RECORD_LINES.decode().encode("utf-32"), ["one", "zwölf"], [], ""),
    "UTF-16, cut": ("a.txt", "text".encode("utf-16")[:-1], [], ["undecodable"], ""),
    "UTF-16 lines, cut": ("a.jsonl", "\ufefftext".encode("utf-16-le")[:-1], [], ["damaged"], "mark says utf-16-le"),
    "UTF-16 without a mark": ("a.txt", CHINESE.encode("utf-16-le"), [], ["undecodable"], ""),
    "Japanese UTF-16 without a mark": ("a.txt", JAPANESE.encode("utf-16-be"), [], ["undecodable"], ""),
    "a bad byte in Chinese": ("a.txt", CHINESE.encode()[:-1], [CHINESE[:-1] + "\ufffd"], ["repaired"], ""),
    "Latin-1 with a mark": (
        "a.txt",
        MARK + "un été au café".encode("latin-1"),
        ["un \ufffdt\ufffd au caf\ufffd"],
        ["repaired"],
        "",
    ),
    "a record in another encoding": (
        "a.jsonl",
        '{"text": "семьи"}\n'.encode("cp1251"),
        [],
        ["record"],
        "line 1 is mostly",
    ),
    "a blank first line": ("a.json", b"\n \n" + RECORD_LINES, ["one", "zwölf"], [], ""),
    "another field": (
        "a.json",
        RECORD_LINES.replace(b"text", b"body"),
        [],
        ["record"] * 2,
        "line 1 is not a JSON object with",
    ),
    "a damaged first line": ("a.json", BAD_LINE + RECORD_LINES, ["one", "zwölf"], ["record"], "line 1 is not a JSON"),
    "an array": ("a.json", json.dumps(RECORDS).encode(), ["one", "zwölf"], [], ""),
    "a pretty array": ("a.json", MARK + json.dumps(RECORDS, indent=1).encode(), ["one", "zwölf"], [], ""),
    "an array, another field": (
        "a.json",
        b'[{"body": "a"}, 3]',
        ['[{"body": "a"}, 3]'],
        ["json as text"],
        'it has no field "text"',
    ),
    "an array, the field in some": (
        "a.json",
        b'[{"text": "a"}, {"body": "b"}]',
        ["a"],
        ["record"],
        "record 2 is not a JSON object with",
    ),
    "an array with comments": ("a.json", b"[ // n\n1,\n]", ["[ // n\n1,\n]"], ["json as text"], "it is no JSON"),
    "a cut array": (
        "a.json",
        json.dumps(RECORDS, indent=1).encode()[:-9],
        [],
        ["damaged"],
        "begins as a JSON array and is",
    ),
    "a pretty object": ("a.json", json.dumps(RECORDS[1], indent=1).encode(), ["zwölf"], [], ""),
    "an object of columns": ("a.json", b'{"text":\n["a", "b"]}', [], ["record"], "record 1 is not a JSON object with"),
    "pretty objects": ("a.json", b'{\n"text": "a"}\n{\n"text": "b"}', [], ["damaged"], "holds several JSON values"),
    "settings": ("a.json", b'{"tabs": 4}\n', ['{"tabs": 4}\n'], ["json as text"], 'it has no field "text"'),
    "settings with comments": ("a.json", b'{\n// n\n"a": 4}', ['{\n// n\n"a": 4}'], ["json as text"], "it is no JSON"),
    "a long integer": ("a.jsonl", f'{{"id": {LONG}, "text": "a"}}\n'.encode(), ["a"], [], ""),
    "a long integer in an array": ("a.json", f'[{{"id": -{LONG},\n"text": "a"}}]'.encode(), ["a"], [], ""),
    "other numbers": ("a.jsonl", b'{"a": NaN, "b": 1e999, "text": "a", "text": "b"}\n', ["b"], [], ""),
    "a number": ("a.jsonl", b'{"text": 12}\n', [], ["record"], "line 1 is not a JSON object with a string field"),
    "half a pair": ("a.json", b'[{"text": "a\\ud800"}\n]', ["a?"], ["repaired"], ""),
    "deep": ("a.jsonl", b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b', "text": "a"}\n', [], ["record"], "line 1 is not"),
    "joined parquet": ("a.parquet", PARQUET * 2, [], ["damaged"], "several parquet files joined"),
    "parquet without the column": (
        "a.parquet",
        without_column(pyarrow.parquet.write_table),
        [],
        ["damaged"],
        'there are 0 columns "text" among id: set --text-field',
    ),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("unit_bytes", [10, 1 << 20])
def test_a_file_has_these_documents(
    case: str, unit_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is longer than a unit, which is read in another way."""
    monkeypatch.setattr(readers, "UNIT_BYTES", unit_bytes)
    name, data, documents, counted, message = FILES[case]
    (tmp_path / name).write_bytes(data)
    found = read(tmp_path)
    assert found[:2] == (documents, counted)
    assert message in found[2]


# ---- folders from elsewhere ------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    """Its path is too long to be opened: the only such fault that stops root as well."""
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=folder)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(OSError, match=r"File name too long: '/.*ddd"):
        corpus_files([str(tmp_path)])


def test_links_may_not_lead_out_of_a_folder(tmp_path: Path) -> None:
    source, cache = tmp_path / "in", tmp_path / "datasets--a--b" / "snapshots" / "0123"
    for folder in (source / "sub", cache, tmp_path / "datasets--a--b" / "blobs"):
        folder.mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "datasets--a--b" / "blobs" / "00").write_bytes(json_lines(["a"]))
    for link, end in {
        source / "a.txt": "../secret.txt",
        source / "b.txt": "sub/b.txt",
        source / "c.txt": "c.txt",
        source / "sub" / "d.txt": str(tmp_path / "secret.txt"),
        cache / "e.jsonl": "../../blobs/00",
        cache / "f.jsonl": "../../../secret.txt",
    }.items():
        link.symlink_to(end)
    (source / "sub" / "b.txt").write_text("b")
    named = [source / "a.txt", source, cache]  # what the user names is read
    found = {(file.path.name, file.format) for file in corpus_files([str(path) for path in named])}
    assert found == {
        ("a.txt", "text"),
        ("a.txt", "link out of the folder"),
        ("b.txt", "text"),
        ("c.txt", "special"),
        ("d.txt", "link out of the folder"),
        ("e.jsonl", "json lines"),
        ("f.jsonl", "link out of the folder"),
    }
    (tmp_path / "set").mkdir()
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / "set" / name).write_text('{"_data_files": [{"filen')
    with pytest.raises(ValueError, match=r"set/state\.json is damaged \(.*\): copy the data set again"):
        corpus_files([str(tmp_path)])


# ---- what is far longer than its file --------------------------------------------------------------------


def test_what_expands_comes_in_units_of_the_usual_size(tmp_path: Path) -> None:
    lines, text = b'{"text": "aaaaaaaaaa"}\n' * 400_000, b"a" * (8 << 20)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 20_000
    units = [unit.content for unit in read_units(corpus_files([str(tmp_path)]), RECIPE)]
    found = [content.lines if isinstance(content, JsonLines) else content.data for content in units if content != ([],)]
    assert b"".join(found) == lines + text
    assert max(map(len, found)) <= readers.UNIT_BYTES + file_bytes.BLOCK_BYTES


def test_of_a_long_text_no_more_than_max_bytes_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"a" * (60 << 20)))
    expanded, file_blocks = 0, file_bytes.file_blocks

    def counted(*arguments: object) -> Iterable[tuple[bytes, int]]:
        nonlocal expanded
        for block in file_blocks(*arguments):
            expanded += len(block[0])
            yield block

    for module in (readers, file_bytes):
        monkeypatch.setattr(module, "file_blocks", counted)
    unit = next(read_units(corpus_files([str(tmp_path)]), RECIPE._replace(max_bytes=1000)))
    assert isinstance(unit.content, Piece)
    assert expanded <= 3 * (readers.UNIT_BYTES + file_bytes.BLOCK_BYTES)


def test_of_a_long_record_no_more_than_max_bytes_is_encoded(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(["a" * (3 << 20)])))
    units = read_units(corpus_files([str(tmp_path)]), RECIPE)
    with EncodePool(1, Encoder(load_tokenizer(str(tokenizer))), RECIPE) as pool:
        assert [encoded.bytes for _, encoded in pool.encode_in_order(units, 1000)] == [1000, 0]


def test_a_record_has_a_greatest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 3 << 20)
    data = RECORD_LINES + json_lines(["a" * (5 << 20), "lost"])
    messages = {}
    for name, content in {
        "a.jsonl.gz": gzip.compress(data),
        "b.json": data.split(b"\n")[2],
        "c.json": json.dumps([{"text": "a" * 100}] * 40_000, indent=1).encode(),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(content)
        documents, counted, messages[name] = read(tmp_path / name)
        assert (documents, counted) == (["one", "zwölf"] if name == "a.jsonl.gz" else [], ["damaged"])
    assert messages == {
        "a.jsonl.gz": "line 3 is longer than 3,145,728 bytes",
        "b.json": "line 1 is longer than 3,145,728 bytes",
        "c.json": "it is one JSON value of over 3,145,728 bytes: write it as lines",
    }


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_words_of_a_dictionary_are_not_repeated_in_memory(format: str, tmp_path: Path) -> None:
    """50 kB, or 0.8 MB, of indices to one word of 1 MB stand for 200 GB."""
    words = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 200_000, pyarrow.int32()), ["a" * 10**6])
    write = pyarrow.parquet.write_table if format == "parquet" else pyarrow.feather.write_feather
    write(pyarrow.table({"text": words}), tmp_path / f"a.{format}")
    unit = next(read_units(corpus_files([str(tmp_path)]), RECIPE))
    assert isinstance(unit.content, Rows)
    assert sum(map(len, unit.content.rows)) == 3 * 10**6
