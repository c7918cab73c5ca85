"""Saving from a run's memory: what is written is the step that was saved, however late it is written."""

import dataclasses
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_depthattn.config import from_dict, to_dict
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.train.step_folders import (
    COMMON,
    MANIFEST,
    Progress,
    complete_folders,
    digest_files,
    find_damage,
    step_folder,
    write_manifest,
)
from megatron_depthattn.train.step_reader import COMMON_ENTRY, check_fp8_state, read_common
from tests.checkpoints import load_checkpoint, stored
from tests.small_disk import can_mount, small_disk

SETTINGS = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": 64,
        "vocab_size": 128,
        "max_position_embeddings": 16,
    },
    "data": {"sequence_length": 16},
    "train": {"global_batch_size": 2, "micro_batch_size": 2, "steps": 20},
    "optimizer": {"lr": 1e-2, "warmup_ratio": 0.0},
}


class Run:
    """A model in training, without a loop around it."""

    def __init__(self, directory: Path, *, is_async: bool, seed: int = 1, **more):
        from megatron_depthattn.train.build import build_model, build_optimizer
        from megatron_depthattn.train.save import CheckpointSaver

        self.config = from_dict(SETTINGS | {"run": {"seed": seed}}, "a test")
        self.chunks = build_model(self.config, torch.device("cpu"))
        self.optimizer, self.scheduler = build_optimizer(self.config, self.chunks)
        self.saver = CheckpointSaver(directory, is_async=is_async, **more)
        self.generator = torch.Generator().manual_seed(seed)
        self.number = 0

    def step(self) -> None:
        from megatron_depthattn.train.step import train_step

        tokens = torch.randint(0, 128, (2, 17), generator=self.generator)
        self.scheduler.step(increment=1)
        batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
        train_step(self.chunks, self.optimizer, [batch], (2, 16))
        self.number += 1

    def state(self) -> dict:
        from megatron_depthattn.train.checkpoint import checkpoint_state
        from megatron_depthattn.train.megatron_state import MegatronState

        state = MegatronState(self.chunks, self.optimizer)
        return checkpoint_state(state, self.scheduler, config=to_dict(self.config), run_id="abc")

    def save(self) -> None:
        self.saver.save(Progress(step=self.number, consumed_samples=2 * self.number), self.state())

    def outcome(self):
        self.saver.wait()
        return self.saver.take_outcome()

    def load(self, folder: Path):
        return load_checkpoint(folder, self.chunks, self.optimizer, self.scheduler, config=to_dict(self.config))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.chunks[0].named_parameters()}


@pytest.fixture
def run(megatron_world_of_one, tmp_path):
    return Run(tmp_path / "checkpoints", is_async=True)


def equal(one: dict, other: dict) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if torch.equal(one[name], other[name])]


def train_and_save(run: Run, directory: Path, steps: int) -> list[dict]:
    """The weights after each step; each step is saved, and written while the next ones continue."""
    weights = []
    for _ in range(steps):
        run.step()
        weights.append(run.weights())
        run.saver.wait()
        run.saver.take_outcome()
        run.save()
    assert run.outcome().error is None
    return weights


@pytest.mark.parametrize("is_async", [True, False])
def test_each_checkpoint_is_of_its_own_step(megatron_world_of_one, tmp_path, is_async):
    """Consecutive checkpoints differ in every tensor, and step k's holds what the model held after step k."""
    directory = tmp_path / "checkpoints"
    weights = train_and_save(Run(directory, is_async=is_async), directory, 4)
    folders = complete_folders(directory)
    assert [folder.name for folder in folders] == [f"step_{step:08d}" for step in (1, 2, 3, 4)]
    tensors = [stored(folder) for folder in folders]
    assert len(tensors[0]) > 30 and sum("exp_avg" in name for name in tensors[0]) > 10
    for before, after in itertools.pairwise(tensors):
        assert equal(before, after) == []
    reader = Run(tmp_path / "other", is_async=False, seed=1)
    for step, (folder, expected) in enumerate(zip(folders, weights, strict=True), start=1):
        loaded = reader.load(folder)
        assert loaded.progress == Progress(step=step, consumed_samples=2 * step)
        assert read_common(folder)["run_id"] == "abc"
        assert equal(reader.weights(), expected) == list(expected)


def test_control_a_copy_that_is_not_renewed_is_seen(megatron_world_of_one, tmp_path, monkeypatch):
    """The fault of a buffer that is kept and not filled again: later checkpoints hold the first one's tensors."""
    from megatron_depthattn.train import save

    renewed = save._CopyToHost._copy
    first: dict = {}

    def keep(self, part):
        return first.setdefault((part.key, part.global_offset), renewed(self, part).clone())

    monkeypatch.setattr(save._CopyToHost, "_copy", keep)
    directory = tmp_path / "checkpoints"
    train_and_save(Run(directory, is_async=True), directory, 2)
    one, two = (stored(folder) for folder in complete_folders(directory))
    assert equal(one, two) == list(one)


def test_each_part_that_is_copied_is_a_heartbeat(megatron_world_of_one, tmp_path, monkeypatch):
    from megatron_depthattn.train import save

    copy, beats, seen = save._CopyToHost._copy, [], []
    run = Run(tmp_path / "checkpoints", is_async=True, on_progress=lambda: beats.append(None))
    monkeypatch.setattr(save._CopyToHost, "_copy", lambda self, part: (seen.append(len(beats)), copy(self, part))[1])
    run.step()
    run.save()
    assert len(seen) > 30 and all(earlier < later for earlier, later in itertools.pairwise([0, *seen]))
    assert run.outcome().error is None


def test_the_copy_is_made_before_save_returns(run, tmp_path, monkeypatch):
    """The writer is held up until training has gone on: the checkpoint is of the step that was saved all the same."""
    go_on = threading.Event()
    write = dcp.save

    def late(*arguments, **more):
        assert go_on.wait(60)
        return write(*arguments, **more)

    monkeypatch.setattr("megatron_depthattn.train.save.dcp.save", late)
    run.step()
    expected = run.weights()
    run.save()
    assert run.saver.is_writing and run.saver.take_outcome() is None
    assert complete_folders(tmp_path / "checkpoints") == [], "nothing is published before it is written"
    for _ in range(3):
        run.step()
    go_on.set()
    assert run.outcome().error is None
    reader = Run(tmp_path / "other", is_async=False)
    reader.load(step_folder(tmp_path / "checkpoints", 1))
    assert equal(reader.weights(), expected) == list(expected)
    assert equal(run.weights(), expected) == []


def test_a_loop_that_waits_beats_while_some_rank_writes_and_not_otherwise(megatron_world_of_one, tmp_path, monkeypatch):
    from megatron_depthattn.train import save

    monkeypatch.setattr(save, "LOOK_SECONDS", 0.01)
    lookup, beats, beat, seen = save._Planner.lookup_object, [], threading.Event(), []
    run = Run(tmp_path / "checkpoints", is_async=False, on_progress=lambda: (beats.append(1), beat.set()))

    def hang(self, index):
        """The first tensor takes its time, in which nothing is written here; then another rank writes something."""
        if not seen:
            assert beat.wait(60)
            before = len(beats)
            time.sleep(0.5)
            seen.append(len(beats) - before)
            beat.clear()
            save._Written().grow()
            seen.append(beat.wait(60))
        return lookup(self, index)

    monkeypatch.setattr(save._Planner, "lookup_object", hang)
    run.step()
    run.save()
    assert run.saver.take_outcome().error is None
    quiet, has_beaten = seen
    assert quiet <= 1, "for what was written before"
    assert has_beaten


@pytest.fixture
def no_room():
    """The operating system rejects to let a file grow beyond 20 kB, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [20_000, 0])  # the tensors do not fit; not even the common state does
def test_a_save_that_fails_changes_nothing_and_the_next_one_works(run, tmp_path, no_room, size):
    directory = tmp_path / "checkpoints"
    run.step()
    run.save()
    assert run.outcome().error is None
    run.step()
    weights = run.weights()
    no_room(size)
    run.save()
    outcome = run.outcome()
    no_room(resource.RLIM_INFINITY)
    assert outcome.error is not None and outcome.error.startswith("rank 0: File too large: "), outcome
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_00000001"]
    assert find_damage(step_folder(directory, 1)) == []
    assert (directory / "latest").read_text() == "step_00000001\n"
    assert equal(run.weights(), weights) == list(weights)
    run.save()
    assert run.outcome().error is None
    assert (directory / "latest").read_text() == "step_00000002\n"


def test_the_record_waits_for_room_and_says_so(megatron_world_of_one, tmp_path, no_room, capsys):
    from megatron_depthattn.train.reporter import Reporter

    record = dict.fromkeys(("eval_loss", "depth")) | {
        "samples": 1,
        "loss": 1.0,
        "grad_norm": 1.0,
        "lr": 1.0,
        "tokens_per_second": 1.0,
    }

    def report(*sizes: int) -> list[int]:
        """The steps on record, one written under each limit."""
        reporter = Reporter(tmp_path, log_interval=10, first_step=0, last_step=99, samples=(0, 99))
        for step, size in enumerate(sizes, start=1):
            no_room(size)
            reporter.step(record | {"step": step})
        reporter.close()
        no_room(resource.RLIM_INFINITY)
        return [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    assert report(0, 0, resource.RLIM_INFINITY) == [1, 2, 3]
    assert capsys.readouterr().err == "metrics.jsonl cannot be written: File too large; its lines wait in memory\n"
    assert report(0) == []
    assert capsys.readouterr().err.endswith("the last lines of metrics.jsonl are lost: File too large\n")


@pytest.mark.parametrize("taken", [0.97, 1.0])  # the tensors do not fit; not even the common state does
def test_a_full_disk_is_named(run, tmp_path, taken):
    """Torch says `unexpected pos 704 vs 598`, with the system's error behind it or, from C++, with none."""
    if not can_mount(tmp_path):
        pytest.skip("needs the right to mount a small file system")
    (tmp_path / "checkpoints").mkdir()
    with small_disk(tmp_path / "checkpoints", "1m") as disk:
        (disk / "filler").write_bytes(bytes(int(taken * 2**20)))
        run.step()
        run.save()
        error = run.outcome().error
        assert error.startswith("rank 0: the disk is full, or your share of it: No space left on device: "), error
        assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_link_in_the_way_of_a_save_is_not_written_through(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/kept").write_text("kept")
    (tmp_path / "checkpoints").mkdir()
    for name in (".step_00000001.part", ".step_00000001.old"):
        (tmp_path / "checkpoints" / name).symlink_to(tmp_path / "mine")
    run.step()
    run.save()
    assert run.outcome().error is None
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["kept"]
    assert not any(path.is_symlink() for path in (tmp_path / "checkpoints").rglob("*"))


def test_generators_come_back(run, tmp_path):
    def draw() -> tuple:
        from megatron.core import tensor_parallel

        with tensor_parallel.get_cuda_rng_tracker().fork():
            tracked = torch.rand(3).tolist()
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), tracked

    run.step()
    run.save()
    assert run.outcome().error is None
    drawn = draw()
    assert draw() != drawn, "control: generators move on"
    run.load(step_folder(tmp_path / "checkpoints", 1))
    assert draw() == drawn


# ---- step folders from strangers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(megatron_world_of_one, tmp_path_factory) -> tuple[Run, Path]:
    """A run and the step folder that it has saved."""
    directory = tmp_path_factory.mktemp("saved")
    run = Run(directory, is_async=False)
    run.step()
    run.save()
    assert run.outcome().error is None
    return run, step_folder(directory, 1)


class Code:
    """What makes a folder when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


def in_metadata(folder: Path, code: Code) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(code))


def in_common(folder: Path, code: Code) -> None:
    torch.save({"config": code}, folder / COMMON)


def as_entry(folder: Path, code: Code, name: str, *, is_new: bool = False) -> None:
    """One entry of the folder becomes an object that is code."""
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    torch.save([code], folder / "__9_0.distcp")
    where = dataclasses.replace(
        next(iter(metadata.storage_data.values())),
        relative_path="__9_0.distcp",
        offset=0,
        length=(folder / "__9_0.distcp").stat().st_size,
    )
    assert is_new or name in metadata.state_dict_metadata, sorted(metadata.state_dict_metadata)
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn != name}
    metadata.storage_data[MetadataIndex(name)] = where
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def as_object(folder: Path, code: Code) -> None:
    as_entry(folder, code, "rng_state/shard_0.0_1.1")


def as_weight(folder: Path, code: Code) -> None:
    as_entry(folder, code, "decoder.final_layernorm.weight")


def as_common_entry(folder: Path, code: Code) -> None:
    """Where megatron-core 0.19 keeps the common state."""
    as_entry(folder, code, COMMON_ENTRY, is_new=True)
    (folder / COMMON).unlink(missing_ok=True)


def elsewhere(folder: Path, code: Code) -> None:
    """No code, but a shard outside of the folder."""
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    for info in metadata.storage_data.values():
        info.relative_path = f"../{folder.name}/{info.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("attack", [in_metadata, in_common, as_object, as_weight, as_common_entry, elsewhere])
def test_a_step_folder_runs_no_code_and_leads_nowhere_else(saved, tmp_path, attack):
    run, genuine = saved
    folder = shutil.copytree(genuine, tmp_path / genuine.name)
    attack(folder, Code(tmp_path / "sentinel"))
    (folder / MANIFEST).unlink()
    write_manifest(folder, digest_files(folder, [path.name for path in folder.iterdir()]))
    assert find_damage(folder) == [], "hashes do not stop it"
    said = r"refers to (posix\.)?mkdir|which is no file of this folder|is no tensor"
    if attack is not as_object:  # which no export reads
        with pytest.raises(ValueError, match=said):
            MegatronCheckpoint(folder)
    with pytest.raises(ValueError, match=said):
        run.load(folder)
    assert not (tmp_path / "sentinel").exists()


def test_fp8_state_is_looked_at_before_it_is_unpickled(tmp_path):
    def state(content) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)

    check_fp8_state("a", state({"scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}}))
    check_fp8_state("a", torch.empty(0, dtype=torch.uint8))
    inner = io.BytesIO()
    torch.save(Code(tmp_path / "sentinel"), inner, _use_new_zipfile_serialization=False)

    class Storage:
        """How a tensor's values are pickled: bytes that are loaded in their turn."""

        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    for content in (Code(tmp_path / "sentinel"), {"scale_fwd": Storage()}):
        with pytest.raises(ValueError, match=r"a of the checkpoint refers to (posix\.)?mkdir"):
            check_fp8_state("a", state(content))
    # A class whose hook becomes a function that is allowed, to be called with other bytes when the class is.
    hooked = b"ctransformer_engine.common.recipe\nFormat\n(N}V_missing_\nctorch.storage\n_load_from_bytes\nstb."
    with pytest.raises(ValueError, match="sets _missing_ of a class"):
        check_fp8_state("a", torch.frombuffer(bytearray(hooked), dtype=torch.uint8))
    assert not (tmp_path / "sentinel").exists()
