"""Micro-batches read ahead by processes: what they hold, how they end, and what signals do to them."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from streaming import MDSWriter

from megatron_depthattn.data.loader import MicroBatch, TokenLoader
from megatron_depthattn.data.order import SampleSequence
from megatron_depthattn.data.stream import TokenDataset

LENGTH, NUM_SAMPLES = 8, 100
TOKENS = np.random.default_rng(0).integers(0, 1 << 16, (NUM_SAMPLES, LENGTH + 1)).astype(np.uint16)


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    columns = {"tokens": f"ndarray:uint16:{LENGTH + 1}"}
    settings = {"compression": "zstd", "hashes": ["xxh64"], "size_limit": 600}
    with MDSWriter(columns=columns, out=str(tmp_path / "train"), **settings) as out:
        for row in TOKENS:
            out.write({"tokens": row})
    return TokenDataset(tmp_path)


def start(dataset: TokenDataset, *, consumed: int = 0, workers: int = 0, seed: int = 3, **sizes: int) -> TokenLoader:
    """A loader of steps of two micro-batches of four."""
    return TokenLoader(
        dataset,
        SampleSequence(dataset.samples_per_shard, seed=seed, shuffle=True),
        consumed_samples=consumed,
        num_workers=workers,
        **{"global_batch_size": 8, "micro_batch_size": 4, "data_parallel_rank": 0, "data_parallel_size": 1} | sizes,
    )


def read(dataset: TokenDataset, num_steps: int, **how: int) -> list[list[MicroBatch]]:
    with contextlib.closing(start(dataset, **how)) as loader:
        return [next(loader) for _ in range(num_steps)]


@pytest.fixture
def loader(dataset: TokenDataset) -> Iterator[TokenLoader]:
    """With two processes."""
    loader = start(dataset, workers=2)
    yield loader
    loader.close()


OTHER_CHILDREN: list[multiprocessing.process.BaseProcess] = []


def workers() -> list[psutil.Process]:
    """Loader processes of this process; other tests may have left it other children."""
    children = [child for child in multiprocessing.active_children() if child not in OTHER_CHILDREN]
    return [psutil.Process(child.pid) for child in children if psutil.pid_exists(child.pid)]


@pytest.fixture(autouse=True)
def _other_children() -> None:
    OTHER_CHILDREN[:] = multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_inputs_and_next_tokens(dataset: TokenDataset, workers: int) -> None:
    for step in read(dataset, 30, workers=workers):
        assert len(step) == 2
        for batch in step:
            rows = TOKENS[batch["sample_ids"].numpy()].astype(np.int64)
            assert (batch["tokens"].numpy() == rows[:, :-1]).all()
            assert (batch["labels"].numpy() == rows[:, 1:]).all()
            assert batch["tokens"].shape == (4, LENGTH)
            assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize("document_mask", [True, False])
def test_documents_and_padding_are_masked_by_plain_loops(tmp_path: Path, document_mask: bool) -> None:
    """Samples that store borders and padding; and older ones, whose documents end with EOS."""
    rng = np.random.default_rng(1)
    padding = rng.choice([0, 0, 1, 3, LENGTH], NUM_SAMPLES)
    starts = rng.random((NUM_SAMPLES, LENGTH + 1)) < 0.3
    for row, count in enumerate(padding):
        starts[row, LENGTH + 1 - count :] = False
        starts[row, LENGTH + 1 - count : LENGTH + 2 - count] = True
    columns = {"padding": "uint32", "starts": "ndarray:uint8:2", "tokens": f"ndarray:uint16:{LENGTH + 1}"}
    with MDSWriter(columns=columns, out=str(tmp_path / "new/train"), hashes=["xxh64"], size_limit=600) as out:
        for row, first, count in zip(TOKENS, starts, padding, strict=True):
            out.write({"padding": np.uint32(count), "starts": np.packbits(first), "tokens": row})
    few = TOKENS % 4
    with MDSWriter(columns={"tokens": columns["tokens"]}, out=str(tmp_path / "old/train"), hashes=["xxh64"]) as out:
        for row in few:
            out.write({"tokens": row})
    (tmp_path / "old/manifest.json").write_text('{"eos_token_id": 3, "vocab_size": 4}')
    after_eos = np.pad(few[:, :-1] == 3, ((0, 0), (1, 0)))
    for name, begins, padded in (("new", starts, padding), ("old", after_eos, 0 * padding)):
        for batch in itertools.chain(*read(TokenDataset(tmp_path / name), 13, workers=1, document_mask=document_mask)):
            assert ("loss_mask" in batch) == (document_mask or name == "new")
            assert ("cu_seqlens" in batch) == document_mask
            borders = []
            for row, sample in enumerate(batch["sample_ids"].tolist()):
                for place in range(LENGTH):
                    borders += [row * LENGTH + place] * (begins[sample, place] or place == 0)
                    hidden = place + 1 > LENGTH - padded[sample] or (document_mask and begins[sample, place + 1])
                    assert "loss_mask" not in batch or bool(batch["loss_mask"][row, place]) == (not hidden)
            if document_mask:
                assert batch["cu_seqlens"].tolist() == [*borders, 4 * LENGTH]
                assert batch["cu_seqlens"].dtype == torch.int32


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_past_the_first_epoch_equals_the_uninterrupted_run(dataset: TokenDataset, workers: int) -> None:
    whole = read(dataset, 40)  # 320 samples: into the fourth epoch
    for consumed in (8, 96, 104, 200):
        resumed = read(dataset, 5, consumed=consumed, workers=workers)
        for ours, theirs in zip(resumed, whole[consumed // 8 :], strict=False):
            for ours_m, theirs_m in zip(ours, theirs, strict=True):
                assert all(torch.equal(ours_m[key], theirs_m[key]) for key in theirs_m)


def test_control_other_positions_and_seeds_differ(dataset: TokenDataset) -> None:
    def ids(**how: int) -> list[int]:
        return torch.cat([batch["sample_ids"] for step in read(dataset, 3, **how) for batch in step]).tolist()

    assert ids() == ids() != ids(consumed=16)
    assert ids() != ids(seed=4)


def test_the_global_random_state_is_left_alone(dataset: TokenDataset) -> None:
    before = torch.get_rng_state()
    read(dataset, 2, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_closed_loader_ends_and_takes_its_processes_with_it(loader: TokenLoader) -> None:
    next(loader)
    assert len(workers()) == 2
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)
    assert not workers()
    loader.close()


def test_sizes_are_checked_before_any_worker_starts(dataset: TokenDataset) -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch_size 6"):
        start(dataset, global_batch_size=6, workers=1)
    assert not workers()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_shard_is_one_line_from_a_worker_as_well(dataset: TokenDataset, num_workers: int) -> None:
    file = Path(dataset.path, "train", "shard.00001.mds.zstd")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard\.00001\.mds\.zstd has \d+ bytes") as raised:
        read(dataset, NUM_SAMPLES // 8, workers=num_workers)
    assert "\n" not in str(raised.value)
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_token_outside_the_vocabulary_is_one_line(dataset: TokenDataset, num_workers: int) -> None:
    """Tensor ranks that share an embedding would look up nothing, and train on."""
    assert TOKENS.max() > 60000
    with (
        contextlib.closing(start(dataset, workers=num_workers, vocab_size=60000)) as loader,
        pytest.raises(ValueError, match=r"the data has token 6\d{4}, in samples \d+ to \d+, and model.vocab_size is"),
    ):
        [next(loader) for _ in range(20)]
    read(dataset, 1, workers=num_workers, vocab_size=1 << 16)


# --------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_workers_continue_when_a_scheduler_signals_every_process(loader: TokenLoader, number: int) -> None:
    """Sent by another process, as a scheduler does; right after the fork and later."""
    pids = [str(worker.pid) for worker in workers()]
    expected = [batch["sample_ids"].tolist() for batch in next(loader)]
    for _ in range(3):
        subprocess.run(["kill", f"-{int(number)}", *pids], check=True)
        for _ in range(8):  # more than was read ahead
            batch = next(loader)
            assert len(batch) == len(expected)
    assert [str(worker.pid) for worker in workers()] == pids


def test_workers_end_when_their_parent_ends_them(loader: TokenLoader) -> None:
    next(loader)
    processes = workers()
    for process in processes:
        process.terminate()
    gone, alive = psutil.wait_procs(processes, timeout=30)
    assert len(gone) == 2 and not alive


def test_the_signals_of_the_run_itself_are_untouched(dataset: TokenDataset) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    loader = start(dataset, workers=1)
    assert [signal.getsignal(number) for number in numbers] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    loader.close()


def test_a_killed_worker_is_one_clear_error_at_the_next_batch(loader: TokenLoader) -> None:
    """As the kernel does when memory runs out. Nothing is raised in between, where it would hit a save."""
    next(loader)
    for process in workers():
        process.kill()
    time.sleep(0.2)  # DataLoader's own handler would raise here
    with pytest.raises(
        ChildProcessError, match=r"a loader process of this rank died: DataLoader worker .*out of memory"
    ) as e:
        [next(loader) for _ in range(8)]
    assert "\n" not in str(e.value)


def test_workers_need_neither_a_short_tmpdir_nor_shared_memory(
    dataset: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket below TMPDIR has a path of at most 107 bytes; a small container has no room in /dev/shm."""
    long = tmp_path / ("l" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", None)
    with contextlib.closing(start(dataset, workers=1)) as loader:
        assert [len(next(loader)) for _ in range(4)] == [2] * 4
        (worker,) = workers()
        assert not worker.net_connections(kind="unix")
        assert not [line for line in Path(f"/proc/{worker.pid}/maps").read_text().splitlines() if "/torch_" in line]
    assert not list(long.iterdir())


def test_a_worker_that_cannot_hand_an_error_over_ends(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Python prints that it cannot, drops the step, and continues: the run would wait for ever."""

    class StoreError(Exception):
        """Of a kind that is made at run time, as boto3's are, so that no pipe can carry it."""

    def fail(*_) -> None:
        raise StoreError("no such key")

    monkeypatch.setattr(TokenDataset, "__getitem__", fail)
    with contextlib.closing(start(dataset, workers=1)) as loader, pytest.raises(ChildProcessError, match="died"):
        next(loader)
    assert "error: a loader process could not hand over a step: Can't pickle local object" in capfd.readouterr().err


# ----------------------------------------------------------------------------------------- killed runs


def _run_until_killed(corpus: str, cache: Path | None, started) -> None:
    """A run of three processes in a group of its own."""
    os.setsid()
    loader = start(TokenDataset(corpus, cache=cache), workers=2)
    started.set()
    while True:
        next(loader)


def test_workers_end_after_their_parent_was_killed(dataset: TokenDataset) -> None:
    fork = multiprocessing.get_context("fork")
    started = fork.Event()
    run = fork.Process(target=_run_until_killed, args=(dataset.path, None, started))
    run.start()
    assert started.wait(timeout=30)
    orphans = psutil.Process(run.pid).children()
    assert len(orphans) == 2
    run.kill()
    run.join(timeout=30)
    gone, alive = psutil.wait_procs(orphans, timeout=30)
    assert not alive, f"{len(gone)} ended"


def _live_run(corpus: str, cache: Path | None, stop, answers) -> None:
    """Another user of the same folder: opens and reads everything, again and again."""
    rounds, is_right = 0, True
    while not stop.is_set() or rounds < 2:
        dataset = TokenDataset(corpus, cache=cache)
        is_right = is_right and all(dataset[i].tolist() == TOKENS[i].tolist() for i in range(NUM_SAMPLES))
        rounds += 1
    answers.put((rounds, is_right))


@pytest.mark.parametrize("with_cache", [False, True])
def test_killed_runs_block_neither_the_next_one_nor_a_live_one(
    dataset: TokenDataset, tmp_path: Path, with_cache: bool
) -> None:
    cache = tmp_path / "cache" if with_cache else None
    fork = multiprocessing.get_context("fork")
    stop, answers = fork.Event(), fork.Queue()
    live = fork.Process(target=_live_run, args=(dataset.path, cache, stop, answers))
    live.start()
    for delay in (0.0, 0.01, 0.05, 0.3):  # from the middle of expanding the first shards to the middle of reading
        for expanded in [*tmp_path.rglob("*.mds")][::2]:
            expanded.unlink(missing_ok=True)
        started = fork.Event()
        run = fork.Process(target=_run_until_killed, args=(dataset.path, cache, started))
        run.start()
        assert started.wait(timeout=30)
        time.sleep(delay)
        os.killpg(run.pid, signal.SIGKILL)
        run.join(timeout=30)
        assert run.exitcode == -signal.SIGKILL
    again = TokenDataset(dataset.path, cache=cache)
    assert [again[i].tolist() for i in range(NUM_SAMPLES)] == TOKENS.tolist()
    assert [len(step) for step in read(again, 8, workers=2)] == [2] * 8
    stop.set()
    rounds, is_right = answers.get(timeout=30)
    live.join(timeout=30)
    assert rounds >= 2
    assert is_right
