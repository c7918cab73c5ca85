"""Saving from a run's memory: what is written is the step that was saved, however late it is written."""

import itertools
import random
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_depthattn.config import from_dict, to_dict
from megatron_depthattn.train.manifest import find_damage
from megatron_depthattn.train.step_folders import Progress, complete_folders, step_folder

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

    def __init__(self, directory: Path, *, is_async: bool, seed: int = 1):
        from megatron_depthattn.train.build import build_model, build_optimizer
        from megatron_depthattn.train.save import CheckpointSaver

        self.config = from_dict(SETTINGS | {"run": {"seed": seed}}, "a test")
        self.chunks = build_model(self.config, torch.device("cpu"))
        self.optimizer, self.scheduler = build_optimizer(self.config, self.chunks)
        self.saver = CheckpointSaver(directory, is_async=is_async)
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

        return checkpoint_state(self.chunks, self.optimizer, self.scheduler, config=to_dict(self.config), run_id="abc")

    def save(self) -> None:
        self.saver.save(Progress(step=self.number, consumed_samples=2 * self.number), self.state())

    def outcome(self):
        self.saver.wait()
        return self.saver.take_outcome()

    def load(self, folder: Path):
        from megatron_depthattn.train.checkpoint import load_checkpoint

        return load_checkpoint(folder, self.chunks, self.optimizer, self.scheduler, config=to_dict(self.config))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.chunks[0].named_parameters()}


@pytest.fixture
def run(megatron_world_of_one, tmp_path):
    return Run(tmp_path / "checkpoints", is_async=True)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a step folder, read without Megatron."""
    reader = dcp.FileSystemReader(folder)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def equal(one: dict, other: dict) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if torch.equal(one[name], other[name])]


def train_and_save(run: Run, directory: Path, steps: int) -> list[dict]:
    """The weights after each step; each step is saved, and written while the next ones go on."""
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
        assert loaded.run_id == "abc"
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


def test_the_copy_is_made_before_save_returns(run, tmp_path, monkeypatch):
    """The writer is held up until training has gone on: the checkpoint is of the step that was saved all the same."""
    import threading

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


@pytest.fixture
def no_room():
    """The operating system refuses to let a file grow beyond 20 kB, as a full disk would."""
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
    assert outcome.error is not None and outcome.error.startswith("rank 0: "), outcome
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_00000001"]
    assert find_damage(step_folder(directory, 1)) == []
    assert (directory / "latest").read_text() == "step_00000001\n"
    assert equal(run.weights(), weights) == list(weights)
    run.save()
    assert run.outcome().error is None
    assert (directory / "latest").read_text() == "step_00000002\n"


def test_a_folder_that_cannot_be_made_is_told(megatron_world_of_one, tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    run = Run(tmp_path / "checkpoints", is_async=False)
    run.step()
    run.save()
    assert "checkpoints" in run.outcome().error


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
