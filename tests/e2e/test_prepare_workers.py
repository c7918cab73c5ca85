"""The bytes of a prepared corpus do not depend on the number of processes, nor on what stops them."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest

from megatron_depthattn.data import file_bytes, prepare, readers, shard_writer
from megatron_depthattn.data.encode_pool import WorkerDiedError
from megatron_depthattn.data.prepare import PrepareProgress, PrepareSettings, prepare_corpus
from megatron_depthattn.data.unfinished import open_unfinished, unfinished_folder
from tests.e2e.commands import wait_until
from tests.prepared import assert_holds, folder_bytes, make_documents, make_settings, save_tokenizer

ROOT = Path(__file__).parents[2]
KILLED = Path(__file__).with_name("prepare_until_done.py")


UNIT_BYTES = 5000


def make_units_small(patch: pytest.MonkeyPatch) -> None:
    """Many units and shards, so that there is a middle to be stopped in."""
    patch.setattr(readers, "UNIT_BYTES", UNIT_BYTES)
    patch.setattr(file_bytes, "BLOCK_BYTES", UNIT_BYTES)
    patch.setattr(shard_writer, "SHARD_BYTES", 20_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,501 documents, in their order: as text files, as JSON lines, and one that is longer than a unit."""
    folder = tmp_path_factory.mktemp("text")
    texts = make_documents(1500)
    for i, text in enumerate(texts[:100]):
        (folder / f"a{i:03}.txt").write_text(text)
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[100:]))
    (folder / "c.txt").write_text("\n".join(make_documents(200, seed=1)))
    assert (folder / "c.txt").stat().st_size > UNIT_BYTES
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    make_units_small(monkeypatch)


@pytest.fixture(scope="module")
def reference(source: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes that one uninterrupted process makes."""
    output = tmp_path_factory.mktemp("reference") / "out"
    with pytest.MonkeyPatch.context() as patch:
        make_units_small(patch)
        prepare_corpus(make_settings(source, tokenizer, output))
    texts = make_documents(1500)
    assert_holds(output, [*texts, (source / "c.txt").read_text()], tokenizer)
    bytes_ = folder_bytes(output)
    assert len([name for name in bytes_ if name.startswith("train/shard")]) > 10
    return bytes_


def test_any_number_of_processes_gives_the_same_bytes(
    source: Path, tokenizer: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for workers, unit_bytes in ((2, UNIT_BYTES), (3, 1 << 16)):  # nor does the size of a unit matter
        monkeypatch.setattr(readers, "UNIT_BYTES", unit_bytes)
        prepare_corpus(make_settings(source, tokenizer, tmp_path / str(workers), workers=workers))
        assert folder_bytes(tmp_path / str(workers)) == reference
    prepare_corpus(make_settings(source, tokenizer, tmp_path / "other", validation_fraction=0.3))  # the control
    other = folder_bytes(tmp_path / "other")
    assert all(other[name] != reference[name] for name in ("train/shard.00003.mds.zstd", "train/index.json"))


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_killed_at_any_moment_it_continues(
    kind: str, source: Path, tokenizer: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    """A data set in the Hub's layout with the same documents, too."""
    data_set = tmp_path / "set"
    if kind == "hub":
        (data_set / "train").mkdir(parents=True)
        texts = [*make_documents(1500), (source / "c.txt").read_text()]
        for i, part in enumerate((texts[:700], texts[700:])):
            pyarrow.parquet.write_table(pyarrow.table({"text": part}), data_set / "train" / f"{i}.parquet")
    given = f"hf:{data_set}" if kind == "hub" else str(source)
    kills = 8 if kind == "files" else 4
    arguments = [given, str(tokenizer), str(tmp_path / "out"), str(kills)]
    done = subprocess.run(
        [sys.executable, str(KILLED), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["killed"] > kills // 2  # on a fast machine it may be done before the last
    assert report["continued"] >= kills // 2 - 1  # in the middle of the corpus
    found = folder_bytes(tmp_path / "out")
    for name in ("manifest.json", "sources.jsonl") if kind == "hub" else ():  # name the files
        found[name] = reference[name]
    assert found == reference
    assert {path.name for path in tmp_path.iterdir()} - {"set"} == {"out"}


def encoding_processes() -> list[psutil.Process]:
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if "spawn_main" in " ".join(child.cmdline())]


class Stop:
    """A progress callback that does something once, after so many units; and keeps the messages."""

    def __init__(self, after: int, action) -> None:
        self.left, self.action = after, action
        self.messages: list[str] = []

    def __call__(self, progress: PrepareProgress) -> None:
        self.messages += [progress.message] if progress.message else []
        if progress.phase == "tokenising":
            self.left -= 1
            if self.left == 0:
                self.action()


def interrupt() -> None:
    raise KeyboardInterrupt


def continue_to_the_end(settings: PrepareSettings, reference: dict[str, bytes]) -> None:
    watcher = Stop(0, interrupt)
    assert not prepare_corpus(settings, watcher).already_prepared
    assert watcher.messages[0].startswith("continuing at file ")
    assert folder_bytes(settings.output) == reference
    assert not unfinished_folder(settings.output).exists()


def test_an_interrupt_keeps_everything_merged(
    source: Path, tokenizer: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    given = make_settings(source, tokenizer, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(given, Stop(20, interrupt))
    assert not given.output.exists()
    with open_unfinished(given.output) as unfinished:
        assert unfinished.can_continue
        with pytest.raises(ValueError, match="prepared by another process"):
            prepare_corpus(given)
    with pytest.raises(
        ValueError, match=r"holds unfinished work with sequence_length 16, not 8: finish it .*--overwrite"
    ):
        prepare_corpus(make_settings(source, tokenizer, given.output, sequence_length=8))
    continue_to_the_end(given, reference)


def test_a_trained_tokenizer_is_not_trained_again(source: Path, tmp_path: Path) -> None:
    outputs = [make_settings(source, "train-bpe:280", tmp_path / name) for name in ("whole", "stopped")]
    prepare_corpus(outputs[0])
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(outputs[1], Stop(20, interrupt))
    seen: list[str] = []
    prepare_corpus(outputs[1], lambda progress: seen.append(progress.phase))
    assert {*seen} == {"tokenising"}
    assert folder_bytes(outputs[1].output) == folder_bytes(outputs[0].output)


def test_an_edited_file_is_not_continued(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for path in source.iterdir():
        (tmp_path / "text" / path.name).write_bytes(path.read_bytes())
    given = make_settings(tmp_path / "text", tokenizer, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(given, Stop(20, interrupt))
    edited = tmp_path / "text" / "a000.txt"
    edited.write_text(edited.read_text().swapcase())  # the same size
    with pytest.raises(ValueError, match="holds unfinished work with modification_times_sha256"):
        prepare_corpus(given)
    watcher = Stop(0, interrupt)
    prepare_corpus(make_settings(tmp_path / "text", tokenizer, given.output, overwrite=True), watcher)
    assert watcher.messages == []


def test_a_process_that_is_killed_is_an_error_and_no_hang(
    source: Path, tokenizer: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    for workers in (1, 2):
        given = make_settings(source, tokenizer, tmp_path / str(workers), workers=workers)
        assert wait_until(lambda: not encoding_processes(), 30)  # of the tests before

        def kill_one() -> None:
            encoding_processes()[0].kill()

        with pytest.raises(WorkerDiedError, match="was killed: out of memory"):
            prepare_corpus(given, Stop(5, kill_one))
        assert wait_until(lambda: not encoding_processes(), 30)  # one that was being started ends a moment later
        continue_to_the_end(given, reference)


def test_a_full_disk_is_an_error_and_continues(
    source: Path, tokenizer: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files stands for the disk: the same errors come from the same calls."""
    monkeypatch.setattr(prepare, "SAVE_SECONDS", 0.0)
    given = make_settings(source, tokenizer, tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="File too large"):
            prepare_corpus(given, Stop(20, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    continue_to_the_end(given, reference)


def test_a_death_after_the_last_rename_leaves_a_whole_corpus(
    source: Path, tokenizer: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = make_settings(source, tokenizer, tmp_path / "out")
    publish = prepare.publish_folder
    monkeypatch.setattr(prepare, "publish_folder", lambda staging, final: (publish(staging, final), interrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(given)
    assert folder_bytes(given.output) == reference
    leftover = unfinished_folder(given.output)
    leftover.mkdir(exist_ok=True)  # as SIGKILL would leave it
    assert prepare_corpus(given).already_prepared
    assert not leftover.exists()
