"""Where a run starts: damage against what only cannot be read, what a rank 0 error becomes, one process per folder."""

import errno
import shutil
from pathlib import Path

import pytest

from megatron_depthattn.config import from_dict
from megatron_depthattn.train import manifest
from megatron_depthattn.train.history import RunHistory
from tests.unit.test_checkpoint_folders import flip, publish


@pytest.fixture
def run_dir(megatron_world_of_one, tmp_path: Path) -> Path:
    for step in (100, 200):
        publish(tmp_path / "checkpoints", step)
    return tmp_path


def start(run_dir: Path, load: str | None = "latest"):
    from megatron_depthattn.train.start import find_start

    return find_start(from_dict({"run": {"dir": str(run_dir)}, "checkpoint": {"load": load}}, "a test"))


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))


def test_the_newest_intact_checkpoint_is_taken(run_dir):
    found = start(run_dir)
    assert found.folder == run_dir / "checkpoints/step_00000200" and found.warnings == []
    flip(found.folder / "b.distcp", 3)
    found = start(run_dir)
    assert found.folder == run_dir / "checkpoints/step_00000100"
    assert "step_00000200.damaged" in found.warnings[0]
    assert names(run_dir) == ["step_00000100", "step_00000200.damaged"]


def test_a_missing_file_is_damage(run_dir):
    (run_dir / "checkpoints/step_00000200/a.distcp").unlink()
    found = start(run_dir)
    assert found.folder == run_dir / "checkpoints/step_00000100"
    assert "a.distcp is missing" in found.warnings[0]


def test_a_file_that_cannot_be_read_is_no_damage(run_dir, monkeypatch):
    """A disk that fails, a mount that went away: nothing may be renamed for that."""

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(manifest, "file_hash", fail)
    with pytest.raises(ValueError, match=r"cannot be read by rank 0 on .*Input/output error.*nothing was renamed"):
        start(run_dir)
    assert names(run_dir) == ["step_00000100", "step_00000200"]
    monkeypatch.undo()
    assert start(run_dir).folder == run_dir / "checkpoints/step_00000200"


def test_an_interrupted_run_goes_on_from_its_newest_checkpoint(run_dir, tmp_path):
    """Whatever checkpoint.load says: a scheduler that starts the command again must not send the run back."""
    imported = shutil.copytree(run_dir / "checkpoints/step_00000100", tmp_path / "imported")
    for load in (None, "step_00000100", str(imported)):
        (run_dir / "history.jsonl").unlink(missing_ok=True)
        if load != "step_00000100":
            with pytest.raises(ValueError, match="would be overwritten"):
                start(run_dir, load)
        RunHistory(run_dir).start(0, "v", 1, load)
        found = start(run_dir, load)
        assert found.folder == run_dir / "checkpoints/step_00000200"
        assert "was interrupted: it goes on from" in found.warnings[0]


def test_one_process_trains_in_a_folder(tmp_path, monkeypatch):
    from megatron_depthattn.train import start as module

    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    lock = module.lock_run(tmp_path / "run")
    with pytest.raises(ValueError, match="another process is training in"):
        module.lock_run(tmp_path / "run")
    lock.release()
    module.lock_run(tmp_path / "run").release()


def test_errors_of_rank_0_reach_every_rank(megatron_world_of_one):
    from megatron_depthattn.train.start import from_rank_0

    assert from_rank_0(lambda: 3) == 3
    with pytest.raises(ValueError, match="told"):
        from_rank_0(lambda: (_ for _ in ()).throw(ValueError("told")))
