"""Data sets in the Hub's layouts, from local folders: the shards are those of the same documents in plain files."""

import csv
import io
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import zstandard

from megatron_depthattn.cli import main
from megatron_depthattn.data import readers
from megatron_depthattn.data.hub import HubChoice, hub_files, hub_name
from megatron_depthattn.data.prepare import PrepareProgress, prepare_corpus
from tests.prepared import (
    FRACTION,
    LENGTH,
    TEXTS,
    arrow_stream_bytes,
    assert_holds,
    expected_streams,
    halves,
    json_lines,
    make_settings,
    parquet_bytes,
    shards,
    stored_stream,
    write,
)

HALVES = (TEXTS[:70], TEXTS[70:])
OTHER = [*TEXTS[:-1], "another"]
CUT = zstandard.compress(json_lines(TEXTS))[:100]
CARD = """---
license: mit
configs:
- config_name: wiki
  data_files:
  - split: train
    path: [b/*.parquet, a/1.parquet]
  - split: validation
    path: validation.parquet
- config_name: code
  data_files: other/*.jsonl
---
# A data set
"""


def csv_bytes(texts: list[str]) -> bytes:
    sink = io.StringIO(newline="")
    csv.writer(sink).writerows([("id", "text"), *enumerate(texts)])
    return sink.getvalue().encode()


def with_card(folder: Path) -> str:
    """Two configs, one of them with its files in another order than by name; returns the config to choose."""
    write(folder / "README.md", CARD.encode())
    write(folder / "b" / "0.parquet", parquet_bytes(HALVES[0]))
    write(folder / "a" / "1.parquet", parquet_bytes(HALVES[1]))
    write(folder / "validation.parquet", parquet_bytes(OTHER))
    write(folder / "other" / "x.jsonl", json_lines(OTHER))
    return ":wiki"


def split_files(folder: Path, data: Callable[[list[str]], bytes], ending: str, between: str = "-") -> None:
    for i, texts in enumerate(HALVES):
        write(folder / "data" / f"train{between}{i:05}-of-00002.{ending}", data(texts))
    write(folder / "data" / f"validation{between}00000-of-00001.{ending}", data(OTHER))


# Each writes TEXTS as the train split and OTHER as the validation split, as others see it on the Hub.
LAYOUTS: dict[str, Callable[[Path], str | None]] = {
    "parquet": lambda f: split_files(f, parquet_bytes, "parquet"),
    "jsonl.zst": lambda f: split_files(f, lambda texts: halves(texts, zstandard.compress), "jsonl.zst"),
    "arrow": lambda f: split_files(f, arrow_stream_bytes, "arrow"),
    "card": with_card,
    "no card, folders": lambda f: split_files(f, json_lines, "jsonl", between="/"),
    "csv": lambda f: split_files(f, csv_bytes, "csv"),
}


def prepare_hub(source: str, tokenizer: Path, output: Path, **changes: object) -> dict[str, object]:
    return prepare_corpus(make_settings(Path(source), tokenizer, output, **changes)).manifest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_shards_of_plain_files(
    layout: str, plain: dict[str, bytes], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "UNIT_BYTES", 2000)
    config = LAYOUTS[layout](tmp_path / "set") or ""
    source = f"hf:{tmp_path / 'set'}{config}"
    manifest = prepare_hub(source, tokenizer, tmp_path / "out", workers=2)
    assert shards(tmp_path / "out") == plain
    streamed = datasets.load_dataset(str(tmp_path / "set"), config[1:] or None, split="train", streaming=True)
    assert [row["text"] for row in streamed] == TEXTS  # and that is what the library makes of the folder
    assert not any(manifest["skipped"].values())
    assert manifest["sources"]["files"] == 2
    assert [manifest["settings"][key] for key in ("split", "revision")] == ["train", None]
    prepare_hub(source, tokenizer, tmp_path / "other", split="validation")
    assert_holds(tmp_path / "other", OTHER, tokenizer)
    assert shards(tmp_path / "other") != plain  # the control: one document is another


def test_rows_of_a_file_are_read_from_any_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "UNIT_BYTES", 500)
    LAYOUTS["jsonl.zst"](tmp_path / "set")
    files = hub_files(f"hf:{tmp_path / 'set'}", HubChoice("train", "text", None))
    recipe = readers.Recipe("text", FRACTION)
    units = list(readers.read_units(files, recipe))
    rows = [[row for unit in units[i:] for row in getattr(unit.content, "rows", [])] for i in range(len(units) + 1)]
    assert [row.decode() for row in rows[0]] == TEXTS
    assert len(units) > 40
    for i, unit in enumerate(units[::7]):
        rest = [row for u in readers.read_units(files, recipe, unit.end) for row in getattr(u.content, "rows", [])]
        assert rest == rows[7 * i + 1]


@pytest.mark.parametrize("source", ["files", "hub"])
@pytest.mark.parametrize(("workers", "unit_bytes"), [(1, 1500), (2, 1 << 20)])
def test_max_tokens_is_exact(
    source: str, workers: int, unit_bytes: int, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train holds the first N + 1 tokens of its stream; val what came before the place where it ends."""
    monkeypatch.setattr(readers, "UNIT_BYTES", unit_bytes)
    write(tmp_path / "set" / "train.jsonl", json_lines(TEXTS))
    given = f"hf:{tmp_path / 'set'}" if source == "hub" else tmp_path / "set" / "train.jsonl"
    limit = 200 * LENGTH
    whole = expected_streams(TEXTS, tokenizer)
    before = next(n for n in range(len(TEXTS)) if len(expected_streams(TEXTS[:n], tokenizer)["train"]) > limit)
    val = expected_streams(TEXTS[:before], tokenizer)["val"]
    wanted = make_settings(Path(given), tokenizer, tmp_path / "out", max_tokens=limit, workers=workers)

    def interrupt_at_the_end(progress: PrepareProgress) -> None:
        if progress.tokens == limit + 1 + len(val):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(wanted, interrupt_at_the_end)
    manifest = prepare_corpus(wanted).manifest
    assert stored_stream(tmp_path / "out" / "train") == whole["train"][: limit + 1]
    assert len(val) - LENGTH < len(stored := stored_stream(tmp_path / "out" / "val")) <= len(val)
    assert stored == val[: len(stored)]
    counts = {split: manifest["splits"][split] for split in ("train", "val")}
    assert [counts["train"][key] for key in ("tokens", "samples", "dropped_tail_tokens")] == [limit + 1, 200, 0]
    assert counts["train"]["documents"] + counts["val"]["documents"] == before
    assert sum(of["bytes"] for of in counts.values()) == sum(len(text.encode()) for text in TEXTS[:before])


def truncated(folder: Path) -> None:
    LAYOUTS["parquet"](folder)
    path = folder / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-500])


def cut_lines(folder: Path) -> None:
    write(folder / "train" / "0.jsonl", json_lines(HALVES[0]))
    write(folder / "train" / "1.jsonl", json_lines(HALVES[1])[:-300])


@pytest.mark.parametrize("damage", [truncated, cut_lines])
def test_a_damaged_file_is_an_error_or_left_out_and_counted(
    damage: Callable[[Path], None], tokenizer: Path, tmp_path: Path
) -> None:
    damage(tmp_path / "set")
    given = make_settings(Path(f"hf:{tmp_path / 'set'}"), tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match=r"set/.*/.*1.*: after row 0, datasets cannot read it .*; repair it"):
        prepare_corpus(given)
    manifest = prepare_hub(given.inputs[0], tokenizer, given.output, on_corrupt="skip", overwrite=True)
    assert manifest["skipped"]["damaged_files"] == 1
    assert_holds(given.output, HALVES[0], tokenizer)


def test_an_edited_file_is_not_taken_for_the_prepared_one(tokenizer: Path, tmp_path: Path) -> None:
    LAYOUTS["parquet"](tmp_path / "set")
    given = make_settings(Path(f"hf:{tmp_path / 'set'}"), tokenizer, tmp_path / "out")
    prepare_corpus(given)
    assert prepare_corpus(given).already_prepared
    with pytest.raises(ValueError, match="prepared with split 'train', not 'validation'; corpus_files_sha256"):
        prepare_hub(given.inputs[0], tokenizer, given.output, split="validation")
    write(tmp_path / "set" / "data" / "train-00002-of-00003.parquet", parquet_bytes(OTHER))
    with pytest.raises(ValueError, match="was prepared with corpus_files_sha256"):
        prepare_corpus(given)


def linked(folder: Path) -> None:
    write(folder.parent / "elsewhere" / "a.parquet", parquet_bytes(TEXTS))
    folder.mkdir()
    (folder / "train.parquet").symlink_to(folder.parent / "elsewhere" / "a.parquet")


def card_that_leaves(folder: Path) -> None:
    write(folder.parent / "secret.parquet", parquet_bytes(OTHER))
    write(folder / "a.parquet", parquet_bytes(TEXTS))
    card = "---\nconfigs:\n- config_name: default\n  data_files: ['a.parquet', '../secret.parquet']\n---\n"
    write(folder / "README.md", card.encode())


ERRORS: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no config given": (with_card, [], "no config is given: set --input hf:NAME:CONFIG with one of wiki, code"),
    "no such config": (with_card, [":math"], "there is no config math: set --input hf:NAME:CONFIG with one of"),
    "no such split": (with_card, [":wiki", "--split", "val"], "there is no --split val among train, validation"),
    "slice": (with_card, [":wiki", "--split", "train[:10%]"], "(a slice needs the whole split: set --max-tokens)"),
    "no such field": (with_card, [":wiki", "--text-field", "content"], '0 columns "content" among id, text, meta'),
    "field of numbers": (with_card, [":wiki", "--text-field", "id"], 'the column "id" holds int64, not strings'),
    "nothing there": (lambda f: f.mkdir(), [], "set"),
    "script": (lambda f: write(f / "set.py", b""), [], "Dataset scripts are no longer supported"),
    "cut to nothing": (lambda f: write(f / "train.jsonl.zst", CUT), [], "its first file holds no rows"),
    "no texts": (lambda f: write(f / "a.tar", bytes(1024)), [], "read as webdataset, which is none of parquet, json"),
    "linked": (linked, [], "train.parquet, which lies outside of it"),
    "out of it": (card_that_leaves, [], "secret.parquet, which lies outside of it"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_read_is_one_line(
    case: str, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, given, expected = ERRORS[case]
    make(tmp_path / "set")
    config, options = (given[0], given[1:]) if given else ("", [])
    fixed = ["--tokenizer", str(tokenizer), "--sequence-length", "16", "--output", str(tmp_path / "out")]
    assert main(["prepare", "--input", f"hf:{tmp_path / 'set'}{config}", *fixed, *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --input hf:{tmp_path / 'set'}{config}: ")
    assert expected in line
    assert not (tmp_path / "out").exists()


def test_without_the_library_one_line_says_what_to_install(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs datasets, .*pip install 'megatron-depthattn\[hub\]'"):
        prepare_hub(f"hf:{tmp_path / 'set'}", tokenizer, tmp_path / "out")


@pytest.mark.parametrize("given", ["hf:", "hf:json", "hf:./org", "hf:a/b/c", f"hf:{__file__}"])
def test_what_is_no_name_is_an_error(given: str, tokenizer: Path, tmp_path: Path) -> None:
    """Among them a name that the library takes for a format, of files in the working directory."""
    with pytest.raises(
        ValueError, match=f"^--input {re.escape(given)}: there is no such folder, and a data set on the"
    ):
        prepare_corpus(replace(make_settings(tmp_path, tokenizer, tmp_path / "out"), inputs=(given,)))


def test_a_name_may_hold_a_colon_where_the_folder_does(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert hub_name(f"hf:{tmp_path}/a:b") == (f"{tmp_path}/a:b", None)
    assert hub_name(f"hf:{tmp_path}/a:b:wiki") == (f"{tmp_path}/a:b", "wiki")
    assert hub_name("hf:org/name:en") == ("org/name", "en")
    assert hub_name("hf:org/name") == ("org/name", None)
