"""Reading a prepared corpus by sample number: what is checked, what is made again, and what stops a run."""

import contextlib
import functools
import gzip
import http.server
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
import tracemalloc
import typing
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from filelock import FileLock
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import bytes_to_int

from megatron_depthattn.config.sizes import parse_bytes, shown
from megatron_depthattn.data import cache as shard_cache
from megatron_depthattn.data import shard_files, stream
from megatron_depthattn.data.corpus import Corpus
from megatron_depthattn.data.loader import TokenLoader
from megatron_depthattn.data.predownload import check_limit, samples_ahead
from megatron_depthattn.data.stream import TokenDataset

LENGTH, NUM_SAMPLES = 8, 100
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 1 << 16, (NUM_SAMPLES, LENGTH + 1)).astype(np.uint16)


def write_shards(folder: Path, tokens: np.ndarray = TOKENS, compression: str | None = "zstd", **settings) -> Path:
    """Known tokens in several shards, written with streaming itself."""
    columns = {"tokens": f"ndarray:uint16:{LENGTH + 1}"}
    settings = {"hashes": ["xxh64"], "size_limit": 600} | settings
    with MDSWriter(columns=columns, out=str(folder), compression=compression, **settings) as out:
        for row in tokens:
            out.write({"tokens": row})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(folder / "train")
    return folder


@pytest.fixture
def corpus(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return shutil.copytree(shards, tmp_path / "corpus")


def read(dataset: TokenDataset, samples: range = range(NUM_SAMPLES)) -> list[list[int]]:
    return [dataset[i].tolist() for i in samples]


def names(folder: Path) -> set[str]:
    """Files, without locks and records of what is cached."""
    return {file.name for file in folder.iterdir() if not file.name.startswith(".lock") and file.suffix != ".cached"}


def flip(file: Path, place: int = -9) -> None:
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


# --------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("compression", ["zstd", None, "gz"])
def test_samples_come_back_by_number(tmp_path: Path, compression: str | None) -> None:
    write_shards(tmp_path / "train", compression=compression)
    dataset = TokenDataset(tmp_path, "train", sequence_length=LENGTH)
    assert len(dataset) == NUM_SAMPLES
    assert len(dataset.samples_per_shard) > 3
    assert dataset.manifest is None
    assert dataset[5].dtype == torch.int64
    for i in RNG.permutation(NUM_SAMPLES):
        assert dataset[int(i)].tolist() == TOKENS[i].tolist()
    assert not [name for name in names(tmp_path / "train") if name.startswith(".")]


def test_the_manifest_comes_with_the_data(corpus: Path) -> None:
    (corpus / "manifest.json").write_text(json.dumps({"vocab_size": 65536}))
    assert TokenDataset(corpus).manifest == {"vocab_size": 65536}


def test_another_sequence_length_is_an_error(corpus: Path) -> None:
    assert TokenDataset(corpus).sequence_length == LENGTH
    with pytest.raises(ValueError, match=r"data.sequence_length is 9, but .* was prepared with 8: set data"):
        TokenDataset(corpus, sequence_length=9)


def test_paths_that_cannot_work_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"val has no index\.json: give a folder"):
        TokenDataset(tmp_path, "val")
    with pytest.raises(ValueError, match=r"s3://bucket/corpus is remote and data.cache is not set"):
        TokenDataset("s3://bucket/corpus")
    with pytest.raises(ValueError, match=r"ftp://there/train/index\.json could not be downloaded: Unsupported remote"):
        TokenDataset("ftp://there", cache=tmp_path)
    with MDSWriter(columns={"text": "str"}, out=str(tmp_path / "train")) as out:
        out.write({"text": "not tokens"})
    with pytest.raises(ValueError, match=r"not 'tokens' of a fixed length, alone or with 'padding'"):
        TokenDataset(tmp_path)


def test_the_digest_is_of_the_content_and_not_of_the_place(corpus: Path, shards: Path, tmp_path: Path) -> None:
    other = TOKENS.copy()
    other[7, 3] ^= 1
    write_shards(tmp_path / "other" / "train", other)
    assert TokenDataset(corpus).digest == TokenDataset(shards).digest != TokenDataset(tmp_path / "other").digest


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_shard_is_named_and_the_others_can_be_read(corpus: Path, damage: Callable[[Path], None]) -> None:
    damage(corpus / "train" / "shard.00001.mds.zstd")
    dataset = TokenDataset(corpus)
    first = int(dataset.samples_per_shard[0])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"shard\.00001\.mds\.zstd (differs from its xxh64|has \d+ bytes, not)"):
            dataset[first]
    assert read(dataset, range(first)) == TOKENS[:first].tolist()
    assert not (corpus / "train" / "shard.00001.mds").exists()


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_raw_shard_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Read in place, without a compressed form to make it from; streaming itself would read it as it is."""
    write_shards(tmp_path / "train", compression=None)
    file = tmp_path / "train" / "shard.00001.mds"
    damage(file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"shard\.00001\.mds (differs|has \d+ bytes).*: copy or prepare the corpus"):
        read(TokenDataset(tmp_path))
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_expanded_shard_is_made_again_and_logged(
    corpus: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    assert read(TokenDataset(corpus)) == TOKENS.tolist()
    file = corpus / "train" / "shard.00002.mds"
    intact = file.read_bytes()
    damage(file)
    with caplog.at_level(logging.WARNING):
        assert read(TokenDataset(corpus)) == TOKENS.tolist()
    assert file.read_bytes() == intact
    logged = [record.getMessage() for record in caplog.records]
    expected = [] if damage is Path.unlink else [f"note: {file} "]
    assert [line.startswith(start) for line, start in zip(logged, expected, strict=True)] == [True] * len(expected)


def test_both_forms_damaged_is_one_error_that_names_both(corpus: Path) -> None:
    read(TokenDataset(corpus))
    for name in ("shard.00001.mds", "shard.00001.mds.zstd"):
        flip(corpus / "train" / name)
    with pytest.raises(ValueError, match=r"00001\.mds differs from its xxh64.*, and .*00001\.mds\.zstd differs"):
        read(TokenDataset(corpus))


def test_a_missing_shard_is_found_at_the_start(corpus: Path) -> None:
    (corpus / "train" / "shard.00001.mds.zstd").unlink()
    with pytest.raises(ValueError, match=r"shard\.00001\.mds\.zstd is missing: copy or prepare the corpus again"):
        TokenDataset(corpus)


def test_a_shard_that_goes_missing_later_is_named(corpus: Path) -> None:
    dataset = TokenDataset(corpus)
    (corpus / "train" / "shard.00001.mds.zstd").unlink()
    with pytest.raises(ValueError, match=r"shard\.00001\.mds\.zstd is missing: copy or prepare"):
        read(dataset)


def test_an_expanded_shard_that_is_removed_under_a_run_is_made_again(corpus: Path) -> None:
    dataset = TokenDataset(corpus)
    for _ in range(2):
        assert read(dataset) == TOKENS.tolist()
        for file in (corpus / "train").glob("*.mds"):
            file.unlink()


def test_a_shard_that_is_cut_under_a_run_is_named(corpus: Path) -> None:
    dataset = TokenDataset(corpus)
    read(dataset)
    (corpus / "train" / "shard.00001.mds").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard\.00001\.mds cannot be read"):
        read(dataset)


def test_an_only_copy_is_read_and_never_deleted(corpus: Path, tmp_path: Path) -> None:
    """Streaming would delete a raw shard whose compressed form is gone."""
    read(TokenDataset(corpus))
    for file in (corpus / "train").glob("*.zstd"):
        file.unlink()
    before = names(corpus / "train")
    assert read(TokenDataset(corpus)) == TOKENS.tolist()
    assert read(TokenDataset(corpus, cache=tmp_path / "cache")) == TOKENS.tolist()
    assert names(corpus / "train") == before


def test_control_a_wrong_byte_is_read_without_hashes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the hashes are for; and the user is logged that there are none."""
    write_shards(tmp_path / "train", compression=None, hashes=[])
    flip(tmp_path / "train" / "shard.00001.mds")
    with caplog.at_level(logging.WARNING):
        assert read(TokenDataset(tmp_path)) != TOKENS.tolist()
    assert "no hashes in its index: only the sizes" in caplog.text


def test_a_folder_that_cannot_be_written_is_an_error(corpus: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(ValueError, match=r"shard\.00000\.mds cannot be (read|written).*Not a directory"):
        TokenDataset(corpus, cache=blocked)[0]


# ------------------------------------------------------------------- cache, other processes, leftovers


def test_a_cache_leaves_the_corpus_alone_and_is_used_again(corpus: Path, tmp_path: Path) -> None:
    before = names(corpus / "train")
    cache = tmp_path / "cache"
    assert read(TokenDataset(corpus, cache=cache)) == TOKENS.tolist()
    assert names(corpus / "train") == before
    (folder,) = cache.iterdir()
    assert folder.name.startswith("corpus-train-")
    made = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.mds")}
    assert read(TokenDataset(corpus, cache=cache)) == TOKENS.tolist()
    assert {file.name: file.stat().st_mtime_ns for file in folder.glob("*.mds")} == made


def test_corpora_can_share_a_cache(corpus: Path, tmp_path: Path) -> None:
    """Also two with the same name, at the same time: the cache knows a corpus by its content."""
    write_shards(tmp_path / "b" / "corpus" / "train", TOKENS[::-1])
    one, two = (TokenDataset(path, cache=tmp_path / "cache") for path in (corpus, tmp_path / "b" / "corpus"))
    for i in range(NUM_SAMPLES):
        assert one[i].tolist() == TOKENS[i].tolist()
        assert two[i].tolist() == TOKENS[-1 - i].tolist()


def _read_in_process(corpus: Path, cache: Path | None, results) -> None:
    results.put(read(TokenDataset(corpus, cache=cache)) == TOKENS.tolist())


@pytest.mark.parametrize("with_cache", [False, True])
def test_processes_make_each_shard_once(corpus: Path, tmp_path: Path, with_cache: bool) -> None:
    """Several processes of several runs start at once on one folder; nobody waits for ever, all read the truth."""
    cache = tmp_path / "cache" if with_cache else None
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=_read_in_process, args=(corpus, cache, results)) for _ in range(6)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [True] * 6
    for process in processes:
        process.join(timeout=60)
    assert not list(tmp_path.rglob(".*.part"))


def test_leftovers_of_killed_runs_do_not_matter(corpus: Path) -> None:
    """Half-written files, a lock file nobody holds, and streaming's own names in shared memory, which stay."""
    folder = corpus / "train"
    (folder / ".shard.00000.mds.part").write_bytes(b"half")
    (folder / ".shard.00001.mds.fetched").mkdir()
    (folder / ".lock.0").touch()
    memory = []
    for name in ("locals", "barrier", "next_epoch", "cache_usage", "shard_states", "shard_access_times"):
        with contextlib.suppress(FileExistsError):  # of a real run
            memory.append(SharedMemory(f"000000_{name}", create=True, size=64))
            memory[-1].buf[:] = b"\x41" * 64
    try:
        assert read(TokenDataset(corpus)) == TOKENS.tolist()
        assert all(bytes(block.buf[:64]) == b"\x41" * 64 for block in memory)
    finally:
        for block in memory:
            block.close()
            block.unlink()
    assert not list(folder.glob(".shard*"))


def test_reading_maps_no_shared_memory(corpus: Path) -> None:
    """So there is nothing that a killed run could leave there."""

    def mapped() -> list[str]:
        return [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm" in line]

    before = mapped()
    dataset = TokenDataset(corpus)
    read(dataset)
    assert mapped() == before


def test_a_lock_that_is_held_for_ever_is_named(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LOCK_TIMEOUT_SECONDS", 0.2)
    with (
        FileLock(corpus / "train" / ".lock.0"),
        pytest.raises(
            ValueError,
            match=r"shard\.00000\.mds could not be made: another process has held the lock .*\.lock\.0 for 0 s;",
        ),
    ):
        TokenDataset(corpus)[0]


# ---------------------------------------------------------------------------------------------- remote


@pytest.fixture
def bucket(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`s3://bucket` is the folder yielded here, which holds the corpus: a web server on this machine serves it."""
    _Quiet.gets.clear()
    (corpus / "manifest.json").write_text(json.dumps({"vocab_size": 7}))
    shutil.copytree(corpus, corpus.parent / "served" / "bucket" / "corpus")
    handler = functools.partial(_Quiet, directory=str(corpus.parent / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setattr(shard_files, "DOWNLOAD_ATTEMPTS", 1)
        monkeypatch.setattr(shard_files, "_clients", threading.local())
        yield corpus.parent / "served" / "bucket"
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    gets: typing.ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.gets.append(self.path.rpartition("/")[2])
        super().do_GET()

    def log_message(self, *_) -> None:
        pass


def test_a_remote_corpus_is_read_through_the_cache(bucket: Path, tmp_path: Path) -> None:
    dataset = TokenDataset("s3://bucket/corpus", cache=tmp_path / "cache")
    assert dataset.manifest == {"vocab_size": 7}
    assert read(dataset) == TOKENS.tolist()
    (folder,) = (tmp_path / "cache").iterdir()
    assert names(folder) == {f"shard.{i:05d}.mds" for i in range(len(dataset.samples_per_shard))}
    flip(folder / "shard.00001.mds")
    again = TokenDataset("s3://bucket/corpus", cache=tmp_path / "cache")
    assert read(again) == TOKENS.tolist()  # fetched again
    for file in (bucket / "corpus" / "train").glob("*.zstd"):
        file.unlink()
    assert read(TokenDataset("s3://bucket/corpus", cache=tmp_path / "cache")) == TOKENS.tolist()  # all cached


def test_remote_damage_is_named(bucket: Path, tmp_path: Path) -> None:
    flip(bucket / "corpus" / "train" / "shard.00001.mds.zstd")
    (bucket / "corpus" / "train" / "shard.00002.mds.zstd").unlink()
    (bucket / "corpus" / "manifest.json").unlink()
    dataset = TokenDataset("s3://bucket/corpus", cache=tmp_path / "cache")
    assert dataset.manifest is None
    ends = np.cumsum(dataset.samples_per_shard)
    with pytest.raises(ValueError, match=r"s3://bucket/corpus/train/shard\.00001\.mds\.zstd differs from its xxh64"):
        dataset[int(ends[0])]
    with pytest.raises(ValueError, match=r"s3://bucket/corpus/train/shard\.00002\.mds\.zstd could not be downloaded"):
        dataset[int(ends[1])]
    assert read(dataset, range(int(ends[0]))) == TOKENS[: ends[0]].tolist()
    with pytest.raises(ValueError, match=r"s3://bucket/nothing/train/index\.json could not be downloaded"):
        TokenDataset("s3://bucket/nothing", cache=tmp_path / "cache")


# --------------------------------------------------------------------- an index written by a stranger


def edit_index(split: Path, change: Callable[[dict], object], shard: int = 1) -> None:
    """Change one shard's entry in the index."""
    index = json.loads((split / "index.json").read_text())
    change(index["shards"][shard])
    (split / "index.json").write_text(json.dumps(index))


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder but those of `corpus/train`, where shards are expanded."""
    files = {str(file.relative_to(folder)): file.read_bytes() if file.is_file() else None for file in folder.rglob("*")}
    return {name: content for name, content in files.items() if not name.startswith("corpus/train/")}


NOT_PLAIN_NAMES = [
    "../../victim.mds",
    "{}/victim.mds",
    "../../victim.mds.zstd",
    "below/victim.mds",
    "below\\victim.mds",
    "..",
    "",
    ".bashrc",
    ".shard.00000.mds.part",
    "-r.mds",
    "index.json",
    "../manifest.json",
    "shard.00000.mds",
    "SHARD.00000.MDS",
    "Shard.00000.mds",
    "shard.00001.mds\0",
    "shard\n00001.mds",
    "\x1b]0;title\x07.mds",
    "shard.0000\u0661.mds",
    "s" * 300 + ".mds",
    7,
    None,
    ["shard.00001.mds"],
]


@pytest.mark.parametrize("name", NOT_PLAIN_NAMES, ids=lambda name: repr(name)[:30])
def test_a_name_that_is_no_plain_file_name_touches_nothing(corpus: Path, tmp_path: Path, name: object) -> None:
    """As in a downloaded corpus that would replace a file of its reader's, such as a start-up file of the shell."""
    (tmp_path / "victim.mds").write_text("precious")
    (corpus / "manifest.json").write_text("{}")
    split, intact = corpus / "train", (corpus / "train" / "index.json").read_bytes()
    name = name.format(tmp_path) if isinstance(name, str) else name
    before, in_split = tree(tmp_path), names(split)
    for key in ("raw_data", "zip_data"):
        edit_index(split, lambda shard, key=key: shard[key].update(basename=name))
        for cache in (None, tmp_path / "cache"):
            with pytest.raises(ValueError, match=r"corpus/train/index\.json, shard 1: .*; copy or prepare") as error:
                read(TokenDataset(corpus, cache=cache))
            assert str(error.value).isprintable()
            assert (tree(tmp_path), names(split)) == (before, in_split)
        (split / "index.json").write_bytes(intact)


def test_a_bucket_cannot_name_files_outside_the_cache(bucket: Path, tmp_path: Path) -> None:
    (tmp_path / "victim.mds").write_text("precious")
    edit_index(bucket / "corpus" / "train", lambda shard: shard["raw_data"].update(basename="../../victim.mds"))
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"s3://bucket/corpus/train/index\.json, shard 1: its file is named"):
        read(TokenDataset("s3://bucket/corpus", cache=tmp_path / "cache"))
    assert tree(tmp_path) == before


def columns(encoding: str, names: tuple[str, ...] = ("tokens",)) -> dict:
    return {"column_names": list(names), "column_encodings": [encoding] * len(names)}


LIES = [
    *(({"samples": n}, "samples is") for n in (-1, 33.0, "33", True, None, [33])),
    ({"samples": 0}, "it holds no samples"),
    ({"samples": 10**9}, r"shard\.00001\.mds has \d+ bytes, and 1000000000 samples of 18 bytes"),
    *(({"raw_data": {"bytes": n}}, "bytes is") for n in (-1, 590.0, "590", True, None, 10**4000)),
    *(({"raw_data": {"bytes": n}}, r"shard\.00001\.mds has \d+ bytes, and") for n in (0, 10**6, 1 << 33)),
    *(({"zip_data": {"bytes": n}}, "bytes is|has 8589934592 bytes") for n in (-1, 590.0, 1 << 33)),
    *(({"raw_data": {"hashes": of}}, "hashes") for of in ("xxh64", ["xxh64"], {"none": "0"}, {"shake_128": "0"})),
    *(
        ({key: of}, f"{key} is")
        for key, of in (("raw_data", None), ("raw_data", "x"), ("zip_data", 7), ("zip_data", []))
    ),
    *(({"compression": name}, "is compressed with") for name in (None, "br", "snappy", "../zstd", ["zstd"], 7)),
    ({"compression": "gz"}, r"is compressed with 'gz' and named 'shard.00001.mds.zstd'"),
    *(({"format": name}, "its format is") for name in ("json", "csv", None, ["mds"])),
    ({"version": 3}, "its format is"),
    *((columns(kind), "its columns are") for kind in ("pkl", "ndarray:float64:9", "ndarray:uint16:10", "pil")),
    (columns("ndarray:uint16:9", ("tokens", "more")), "its columns are"),
    ({"column_names": 7}, "is no index of MDS shards"),
    ({"column_names": ["tokens", "more"]}, "is no index of MDS shards"),
]


@pytest.mark.parametrize(("lie", "reason"), LIES, ids=lambda of: repr(of)[:40])
def test_an_index_with_impossible_sizes_or_types_is_an_error(corpus: Path, lie: dict, reason: str) -> None:
    def change(shard: dict) -> None:
        for key, value in lie.items():
            shard[key] = shard[key] | value if isinstance(value, dict) else value

    edit_index(corpus / "train", change)
    with pytest.raises(ValueError, match=rf"corpus/train/index\.json(, shard 1:)? .*({reason})") as error:
        TokenDataset(corpus)
    assert len(str(error.value)) < 500 and str(error.value).isprintable()


@pytest.mark.parametrize(
    "kind", ["pkl", "json", "jpeg", "ndarray", "ndarray:uint16", "ndarray:uint16:0", "ndarray:O:9"]
)
def test_shards_of_anything_but_tokens_are_errors(corpus: Path, kind: str) -> None:
    index = json.loads((corpus / "train" / "index.json").read_text())
    for shard in index["shards"]:
        shard |= columns(kind)
    (corpus / "train" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has the columns .*, not 'tokens' of a fixed length"):
        TokenDataset(corpus)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"null",
        b"[]",
        b"{}",
        b'{"shards": 7}',
        b'{"shards": {"a": 1}}',
        b'{"shards": [null]}',
        b"[" * 99999,
    ],
    ids=lambda content: repr(content)[:20],
)
def test_what_is_no_index_or_manifest_is_named(corpus: Path, content: bytes) -> None:
    for name in ("manifest.json", "train/index.json"):
        (corpus / name).write_bytes(content)
        if name == "train/index.json" or not content.startswith(b"{"):
            with pytest.raises(ValueError, match=rf"corpus/{name} is no "):
                TokenDataset(corpus)
        (corpus / "manifest.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "manifest",
    [{"vocab_size": "7"}, {"eos_token_id": -1}, {"tokenizer_sha256": "\x1b[2J"}, {"splits": [1]}, {"splits": {"a": 1}}],
)
def test_a_manifest_of_other_types_is_an_error(corpus: Path, manifest: dict) -> None:
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"corpus/manifest\.json is no manifest of a corpus: .*; copy or prepare"):
        TokenDataset(corpus)


def test_an_index_too_large_to_be_one_is_not_read(corpus: Path) -> None:
    with (corpus / "train" / "index.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(ValueError, match=r"corpus/train/index\.json has more than 67,108,864 bytes"):
        TokenDataset(corpus)


@pytest.mark.parametrize(("compression", "compress"), [("zstd", zstandard.compress), ("gz", gzip.compress)])
def test_a_bomb_is_expanded_to_the_size_in_the_index_and_no_further(
    corpus: Path, compression: str, compress: Callable[[bytes], bytes]
) -> None:
    """A few kilobytes that would become 64 MB; with hashes that are right."""
    bomb = compress(bytes(1 << 26))
    file = corpus / "train" / f"shard.00001.mds.{compression}"
    hashes = {"xxh64": xxhash.xxh64(bomb).hexdigest()}
    described = {"basename": file.name, "bytes": len(bomb), "hashes": hashes}
    edit_index(corpus / "train", lambda shard: shard.update(compression=compression, zip_data=described))
    file.write_bytes(bomb)
    dataset = TokenDataset(corpus)
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=rf"mds\.{compression} expands to shard.00001.mds, which has more than the 590"
    ):
        dataset[int(dataset.samples_per_shard[0])]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert names(corpus / "train") == {path.name for path in (corpus / "train").glob("[a-z]*")}


def test_offsets_that_lead_elsewhere_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", compression=None, hashes=[])
    file = tmp_path / "train" / "shard.00000.mds"
    for offsets in ((0, 1 << 31), (50, 40), (0, 0), (1 << 31, (1 << 31) + 18)):
        content = bytearray(file.read_bytes())
        content[4:12] = np.array(offsets, "<u4").tobytes()
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"shard\.00000\.mds cannot be read: its sample 0 is not 18 bytes inside"):
            TokenDataset(tmp_path)[0]


# --------------------------------------------------------------------- links, pipes, and others in a cache


@pytest.mark.parametrize(
    "place", [".shard.00000.mds.part", ".shard.00000.mds.fetched", ".lock.0", "shard.00000.mds", "", "..."]
)
def test_nothing_is_written_or_read_through_a_link_in_a_shared_cache(corpus: Path, tmp_path: Path, place: str) -> None:
    """Placed there by another user of the cache, who cannot write to the victim's folder."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    dataset = TokenDataset(corpus, cache=tmp_path / "cache")
    folder = dataset._folder
    link = folder if place == "" else folder / place
    link.parent.mkdir(parents=True)
    link.symlink_to(victim if place in ("", ".shard.00000.mds.fetched") else victim / "file")
    if place.endswith((".part", ".fetched", "...")):
        assert read(dataset) == TOKENS.tolist()  # a link at a temporary name is replaced
    else:
        with pytest.raises(ValueError, match=r"is a link|cannot be written \(Too many levels of symbolic links\)"):
            read(dataset)
    assert names(victim) == {"file"}
    assert (victim / "file").read_text() == "precious"


@pytest.mark.parametrize("name", ["shard.00000.mds.zstd", "index.json", "../manifest.json"])
@pytest.mark.parametrize("kind", ["link", "device", "pipe"])
def test_only_plain_files_of_a_corpus_are_read(corpus: Path, tmp_path: Path, name: str, kind: str) -> None:
    """A link leads to what its author cannot read, a device has no end, a pipe keeps its reader waiting."""
    file = corpus / "train" / name
    (corpus / "manifest.json").write_text("{}")
    file.rename(tmp_path / "moved")
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(tmp_path / "moved" if kind == "link" else "/dev/zero")
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read: it is (a link, and files|no plain file)"):
        read(TokenDataset(corpus))


def test_a_corpus_is_reached_through_a_link(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(corpus)
    assert read(TokenDataset(tmp_path / "link", cache=tmp_path / "cache")) == TOKENS.tolist()


# --------------------------------------------------------------------------------- samples and documents

STARTS = RNG.random((NUM_SAMPLES, LENGTH + 1)) < 0.3
PADDING = RNG.integers(0, LENGTH + 1, NUM_SAMPLES).astype(np.uint32)
for row, padding in zip(STARTS, PADDING.tolist(), strict=True):
    row[LENGTH + 1 - padding :] = np.arange(padding) == 0


def write_documents(folder: Path, change: Callable[[dict], object] = dict, **other: str) -> Path:
    """As `write_shards`, with padding and starts, or `other` columns; `change` spoils sample 5."""
    columns = {"tokens": f"ndarray:uint16:{LENGTH + 1}", "starts": "ndarray:uint8:2", "padding": "uint32"} | other
    with MDSWriter(columns=columns, out=str(folder), compression="zstd", hashes=["xxh64"], size_limit=600) as out:
        for i, (tokens, starts, padding) in enumerate(zip(TOKENS, STARTS, PADDING, strict=True)):
            sample = {"tokens": tokens, "starts": np.packbits(starts), "padding": padding}
            sample |= {name: np.zeros(3, np.uint8) if name == "starts" else 0 for name in other}
            out.write(sample | (change(sample) if i == 5 else {}))
    return folder


def test_a_sample_comes_with_its_documents(tmp_path: Path) -> None:
    """Stored with it, or found by EOS; streaming's own reader sees the same."""
    write_documents(tmp_path / "train")
    dataset = TokenDataset(tmp_path)
    assert (dataset.stores_documents, dataset.pads) == (True, True)
    assert read(dataset) == TOKENS.tolist()
    peer = StreamingDataset(local=str(tmp_path / "train"), batch_size=1, shuffle=False)
    for i in RNG.permutation(NUM_SAMPLES).tolist():
        tokens, starts, padding = dataset.sample(i)
        assert (tokens.dtype, starts.dtype, padding) == (torch.int64, torch.bool, PADDING[i])
        assert (tokens.tolist(), starts.tolist()) == (TOKENS[i].tolist(), STARTS[i].tolist())
        stored = peer[i]
        assert (stored["tokens"] == TOKENS[i]).all() and stored["padding"] == PADDING[i]
        assert (np.unpackbits(stored["starts"], count=LENGTH + 1) == STARTS[i]).all()
    for pack, pads in (("concat", False), ("best-fit", True)):
        (tmp_path / "manifest.json").write_text(json.dumps({"settings": {"pack": pack}}))
        assert TokenDataset(tmp_path).pads == pads
    (tmp_path / "manifest.json").write_text(json.dumps({"settings": {"pack": "loose"}}))
    with pytest.raises(ValueError, match=r"settings.pack is 'loose', not one of concat, best-fit; copy or prepare"):
        TokenDataset(tmp_path)


def test_shards_of_tokens_alone_have_documents_by_eos(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"does not say where its documents begin: .* no manifest\.json with eos_toke"):
        TokenDataset(corpus).sample(0)
    end = int(TOKENS[3, 4])
    (corpus / "manifest.json").write_text(json.dumps({"eos_token_id": end}))
    dataset = TokenDataset(corpus)
    assert (dataset.stores_documents, dataset.pads) == (False, False)
    tokens, starts, padding = dataset.sample(3)
    assert tokens.tolist() == TOKENS[3].tolist()
    assert (starts.nonzero().ravel().tolist(), padding) == ([i + 1 for i in range(LENGTH) if TOKENS[3, i] == end], 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda sample: {"padding": np.uint32(LENGTH + 1)},
        lambda sample: {"padding": np.uint32(1 << 31)},
        lambda sample: {"padding": np.uint32(2), "starts": np.packbits(np.arange(LENGTH + 1) == 1)},
        lambda sample: {"padding": np.uint32(2), "starts": np.packbits(np.arange(LENGTH + 1) >= LENGTH - 1)},
        lambda sample: {"starts": sample["starts"] | np.array([0, 1], np.uint8)},
    ],
    ids=["padding alone", "more padding than tokens", "padding without start", "a start in padding", "spare bits"],
)
def test_padding_and_starts_that_cannot_be_are_named(tmp_path: Path, change: Callable[[dict], object]) -> None:
    dataset = TokenDataset(write_documents(tmp_path / "train", change).parent)
    dataset.sample(4), dataset.sample(6)
    assert dataset[5].tolist() == TOKENS[5].tolist()
    with pytest.raises(ValueError, match=r"shard\.00000\.mds cannot be read: in its sample 5, .* do not fit together"):
        dataset.sample(5)


@pytest.mark.parametrize("other", [{"starts": "ndarray:uint8:3"}, {"padding": "uint16"}, {"more": "uint32"}])
def test_columns_that_are_no_samples_with_documents_are_an_error(tmp_path: Path, other: dict[str, str]) -> None:
    write_documents(tmp_path / "train", **other)
    with pytest.raises(ValueError, match=r"not 'tokens' of a fixed length, alone or with 'padding' and 'starts'"):
        TokenDataset(tmp_path)


# ------------------------------------------------------------------------------------ a cache with a limit

MANY, EACH = 34, 3
"""Shards, and samples of each."""


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A corpus of many small shards."""
    write_shards(tmp_path / "many" / "train", size_limit=280)
    assert len(list((tmp_path / "many" / "train").glob("*.zstd"))) == MANY
    return tmp_path / "many"


def limited(corpus: Path | str, folder: Path, share: float = 0.1) -> TokenDataset:
    whole = TokenDataset(corpus, cache=folder)
    total = sum(whole.bytes_of(shard)[0] for shard in range(len(whole.samples_per_shard)))
    return TokenDataset(corpus, cache=folder, cache_limit=int(total * share))


def cached_bytes(folder: Path) -> int:
    """All shards, complete or not, while none can leave and none can begin."""
    sizes: dict[str, int] = {}
    with FileLock(folder / ".lock.room"):
        for file in folder.rglob("*shard.*"):
            with contextlib.suppress(FileNotFoundError):
                if file.suffix in (".mds", ".part"):  # one becomes the other
                    name = f"{file.parent.name}/{file.name.removeprefix('.').removesuffix('.part')}"
                    sizes[name] = max(sizes.get(name, 0), file.stat().st_size)
    return sum(sizes.values())


def _read_limited(corpus: Path, folder: Path, seed: int, results) -> None:
    dataset, order = limited(corpus, folder), np.random.default_rng(seed).permutation(np.repeat(range(NUM_SAMPLES), 2))
    results.put(all(dataset[int(i)].tolist() == TOKENS[i].tolist() for i in order))


@pytest.mark.parametrize("units", ["kb", "mb", "gb", "tb", "b", ""])
def test_a_size_is_what_streaming_reads(units: str) -> None:
    for number in ("1", "200", "7.5") if units not in ("b", "") else ("1", "200"):
        assert parse_bytes(number + units) == bytes_to_int(number + units)
        assert parse_bytes(f" {number} {units.upper()} ") == parse_bytes(
            number + units.replace("b", "ib" * (len(units) > 1))
        )
    assert parse_bytes(200) == 200
    for size in (1, 1023, 1025, 10**9, 3 * 2**40 + 1):
        assert size <= parse_bytes(shown(size)) < 1.11 * size


def test_processes_of_two_runs_share_a_tenth_of_the_corpus(many: Path, tmp_path: Path) -> None:
    """Six processes on two corpora, at random; the folder never has more than its limit, and all read the truth."""
    folder, fork = tmp_path / "cache", multiprocessing.get_context("fork")
    results = fork.Queue()
    other = write_shards(tmp_path / "other" / "train", size_limit=290).parent
    limit = max(limited(path, folder).cache.limit for path in (many, other))
    processes = [
        fork.Process(target=_read_limited, args=(other if seed > 3 else many, folder, seed, results))
        for seed in range(6)
    ]
    for process in processes:
        process.start()
    most = 0
    assert until(folder.exists)
    while any(process.is_alive() for process in processes):
        most = max(most, cached_bytes(folder))
    assert [results.get(timeout=60) for _ in processes] == [True] * len(processes)
    assert 0 < most <= limit
    done = shard_cache.counts(folder)
    assert done.evicted >= done.again > MANY and done.made >= done.evicted
    assert done.too_soon == 0


def test_nothing_but_what_was_cached_leaves(many: Path, tmp_path: Path) -> None:
    """Foreign files, links, shards without a record, replaced ones, and those whose source is gone."""
    folder, victim = tmp_path / "cache", tmp_path / "victim"
    dataset = TokenDataset(many, cache=folder)
    own = dataset.place(0).parent
    read(dataset, range(6 * EACH))
    shards = [dataset.place(number).name for number in range(6)]
    replaced = (own / shards[1]).read_bytes()
    (own / shards[1]).rename(tmp_path / "kept")
    (own / shards[1]).write_bytes(replaced)  # by its owner: another file of that name
    (own / f".{shards[2]}.cached").unlink()  # as of an earlier version, or copied there by hand
    (many / "train" / f"{shards[3]}.zstd").rename(tmp_path / "gone")  # now the only copy
    (own / "shard.00999.mds").write_bytes(b"foreign")
    (own / "notes.txt").write_text("foreign")
    (folder / "shard.00000.mds").write_bytes(b"foreign")
    shutil.copytree(own, victim)
    (folder / f"linked-{own.name}").symlink_to(victim)
    (own / ".shard.00998.mds.cached").symlink_to(victim / "notes.txt")
    stays = {own / name for name in (*shards[1:4], "shard.00999.mds", "notes.txt")} | {folder / "shard.00000.mds"}
    before, outside = {file: file.read_bytes() for file in stays}, names(victim)
    corpus_files = tree(many)
    (tmp_path / "gone").rename(many / "train" / f"{shards[3]}.zstd")
    small = TokenDataset(many, cache=folder, cache_limit=max(sum(f.stat().st_size for f in own.glob("shard*")), 1))
    (many / "train" / f"{shards[3]}.zstd").rename(tmp_path / "gone")
    for sample in range(6 * EACH, NUM_SAMPLES):
        assert small[sample].tolist() == TOKENS[sample].tolist()
    assert {file: file.read_bytes() for file in stays} == before
    assert not (own / shards[0]).exists() and not (own / shards[4]).exists()
    assert names(victim) == outside
    assert tree(many) == corpus_files


def test_control_a_record_is_what_makes_a_shard_leave(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the look at the inode, a file that its owner put there would go."""
    dataset = TokenDataset(many, cache=tmp_path / "cache")
    read(dataset, range(EACH))
    place, content = dataset.place(0), dataset.place(0).read_bytes()
    place.rename(tmp_path / "kept")
    place.write_bytes(content)
    with shard_cache._folder(place.parent) as descriptor:
        assert not shard_cache._evict(descriptor, place.name)
        record = place.parent / f".{place.name}.cached"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"inode": place.stat().st_ino}))
        with dataset.cache.in_use(place.name):
            assert not shard_cache._evict(descriptor, place.name)
        assert shard_cache._evict(descriptor, place.name)
    assert not place.exists()


def _read_for_ever(corpus: str, folder: Path) -> None:
    dataset = limited(corpus, folder)
    while True:
        for sample in np.random.default_rng().permutation(NUM_SAMPLES):
            dataset[int(sample)]


def test_processes_killed_at_any_moment_leave_nothing_in_the_way(many: Path, tmp_path: Path) -> None:
    folder, fork = tmp_path / "cache", multiprocessing.get_context("fork")
    for delay in np.random.default_rng(0).uniform(0.005, 0.08, 40):
        processes = [fork.Process(target=_read_for_ever, args=(str(many), folder)) for _ in range(2)]
        for process in processes:
            process.start()
        time.sleep(delay)
        for process in processes:
            process.kill()
            process.join()
    (planted,) = folder.glob("many-train-*")
    (planted / ".shard.00001.mds.part").write_bytes(bytes(10**6))  # as of a process killed while it wrote
    (planted / ".shard.00001.mds.cached").write_text(json.dumps({"making": 10**12}))
    (planted / "shard.00001.mds").unlink(missing_ok=True)
    (folder / ".needs.0").write_text("".join(f"{planted.name}/shard.{i:05d}.mds\n" for i in range(MANY)))
    dataset = limited(many, folder)
    assert read(dataset) == TOKENS.tolist()
    assert cached_bytes(folder) <= dataset.cache.limit
    assert not list(folder.rglob("*.part")) + list(folder.rglob("*.fetched")) + list(folder.glob(".needs*"))
    made = {file.name for file in planted.glob("shard*")}
    assert made == {file.name[1:-7] for file in planted.glob("*.cached") if file.stat().st_size > 1}


def test_a_limit_that_cannot_do_is_one_error_with_the_least(many: Path, tmp_path: Path) -> None:
    corpus = Corpus([str(many)], [1], "train", cache=tmp_path / "cache", cache_limit=10)
    with pytest.raises(ValueError, match=r"data.cache_limit is 10b, and one shard of many-train-\w+ takes \d+b"):
        corpus[0]
    largest = max(corpus.streams[0].bytes_of(shard)[1] for shard in range(MANY))
    nothing, three = np.arange(0), np.arange(2 * EACH)
    check_limit(corpus, 5 * largest, 5, nothing)
    with pytest.raises(ValueError, match=r"takes [\d.]+kb: up to \d+b for a shard of each of 5 processes"):
        check_limit(corpus, 5 * largest - 1, 5, nothing)
    with pytest.raises(ValueError, match=r"next 6 samples \(data.predownload\); set data.cache_limit=.*smaller data.p"):
        check_limit(corpus, 5 * largest, 5, three)


# ------------------------------------------------------------------------------------------ ahead of need


def _read_rank(rank: int, folder: Path, ahead: int, take, results) -> None:
    """One of two ranks; `take` says how many steps it may take."""
    corpus = Corpus(["s3://bucket/many"], [1], "train", cache=folder)
    sizes = {"global_batch_size": 4, "micro_batch_size": 2, "data_parallel_rank": rank, "data_parallel_size": 2}
    order = corpus.sequence(seed=1, shuffle=True)
    loader = TokenLoader(corpus, order, consumed_samples=8, num_workers=1, predownload=ahead, **sizes)
    while (steps := take.get()) is not None:
        batches = [batch for _ in range(steps) for batch in next(loader)]
        results.put(all((b["tokens"].numpy() == TOKENS[b["sample_ids"]][:, :-1].astype(int)).all() for b in batches))
    loader.close()
    results.put(not multiprocessing.active_children())


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("ahead", [40, 0])
def test_ranks_fetch_ahead_and_each_shard_once(bucket: Path, many: Path, tmp_path: Path, ahead: int) -> None:
    """The bucket counts; control: nothing is fetched ahead without it."""
    shutil.copytree(many, bucket / "many")
    corpus = Corpus(["s3://bucket/many"], [1], "train", cache=tmp_path / "of its own")
    assert samples_ahead(None, corpus, 4) == 32 and samples_ahead(7, corpus, 4) == 7
    first = corpus.shards_of(corpus.sequence(seed=1, shuffle=True).sample_ids(np.arange(8, 8 + 16 + ahead)))
    expected = [f"{corpus.streams[0].place(number).name}.zstd" for _, number in first]
    _Quiet.gets.clear()
    fork = multiprocessing.get_context("fork")
    take, results = [fork.Queue() for _ in range(2)], fork.Queue()
    ranks = [
        fork.Process(target=_read_rank, args=(rank, tmp_path / "cache", ahead, take[rank], results))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()

    def fetched() -> list[str]:
        return [name for name in _Quiet.gets if name.endswith(".zstd")]

    # Loader processes were asked for two steps of 4 samples each; the order is known so many samples beyond.
    soon = corpus.shards_of(corpus.sequence(seed=1, shuffle=True).sample_ids(np.arange(8, 8 + 8 + ahead)))
    assert until(lambda: len(fetched()) >= len(soon))
    time.sleep(0.5)
    assert sorted(fetched()) == sorted(expected[: len(soon)])
    for queue in take:
        queue.put(60)  # beyond the first epoch
        queue.put(None)
    assert [results.get(timeout=60) for _ in range(4)] == [True] * 4
    for rank in ranks:
        rank.join(timeout=60)
    assert sorted(fetched()) == sorted({*fetched()})


def test_who_fetches_ahead_keeps_the_order_hides_no_error_and_ends_with_its_parent(
    bucket: Path, many: Path, tmp_path: Path
) -> None:
    shutil.copytree(many, bucket / "many")
    (bucket / "many" / "train" / "shard.00001.mds.zstd").unlink()
    corpus = Corpus(["s3://bucket/many"], [1], "train", cache=tmp_path / "cache")
    sizes = {"global_batch_size": 2, "micro_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 1}
    stored, _ = corpus.sequence(seed=1, shuffle=False), _Quiet.gets.clear()
    with contextlib.closing(TokenLoader(corpus, stored, consumed_samples=0, predownload=100, **sizes)) as loader:
        (process,) = (child for child in multiprocessing.active_children() if child == loader._predownloader._process)
        assert until(lambda: len(list((tmp_path / "cache").rglob("shard*.mds"))) > MANY // 2)
        order = [int(name[6:11]) for name in _Quiet.gets if name.startswith("shard.")]
        assert len(order) == len({*order}) and 1 not in order
        # The first of a fetcher waits for its client.
        late = [shard for place, shard in enumerate(order) if abs(shard - place) > 2 * shard_cache.FETCHES]
        assert len(late) <= shard_cache.FETCHES
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(process.pid, number)
        with pytest.raises(ValueError, match=r"s3://bucket/many/train/shard\.00001\.mds\.zstd could not be downlo"):
            [next(loader) for _ in range(4)]
        assert process.is_alive()
    assert not process.is_alive()
