"""Where a run starts: damage against what only cannot be read, what a rank 0 error becomes; one run and one process per
folder."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_depthattn.train import start as starting
from megatron_depthattn.train import step_folders
from megatron_depthattn.train.history import RunHistory
from megatron_depthattn.train.line_files import AppendFile, drop_steps_after, read_records
from megatron_depthattn.train.parent import check_parent, parent_of
from megatron_depthattn.train.step_folders import OWNER, clean_up, quarantine_after
from tests.unit.test_checkpoint_folders import flip, publish, steps


@pytest.fixture
def run_dir(megatron_world_of_one, tmp_path: Path) -> Path:
    for step in (100, 200):
        publish(tmp_path / "checkpoints", step)
    return tmp_path


def start(run_dir: Path, load: str | None = "latest", start_from: Path | None = None, held: ExitStack | None = None):
    from megatron_depthattn.train.start import find_start

    with ExitStack() as own:
        return find_start(load, run_dir, run_dir / "checkpoints", start_from and str(start_from), held or own)


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


def test_a_file_that_cannot_be_read_is_no_damage(run_dir, monkeypatch):
    """A disk that fails, a mount that went away: nothing may be renamed for that."""

    def fail(*_) -> None:
        raise OSError(errno.EIO, "Input/output error")  # as a read does: without the file's name

    monkeypatch.setattr(step_folders.xxhash, "xxh3_128", lambda: SimpleNamespace(update=fail))
    with pytest.raises(
        ValueError, match=r"cannot be read by rank 0 on .*Input/output error: '.*distcp'.*nothing was renamed"
    ):
        start(run_dir)
    assert names(run_dir) == ["step_00000100", "step_00000200"]
    monkeypatch.undo()
    assert start(run_dir).folder == run_dir / "checkpoints/step_00000200"


def test_an_interrupted_run_continues_from_its_newest_checkpoint(run_dir, tmp_path):
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
        assert "was interrupted: it resumes from" in found.warnings[0]


@pytest.mark.parametrize("load", [None, "latest"])
def test_a_branch_begins_with_its_parent_and_resumes_its_own(run_dir, tmp_path, load):
    branch, newest = tmp_path / "branch", run_dir / "checkpoints/step_00000200"
    for given in (newest, run_dir / "checkpoints", run_dir):
        assert start(branch, load, given) == (newest, [], True)
    RunHistory(branch).start(0, "v", 1, load)
    own = publish(branch / "checkpoints", 7)
    assert (found := start(branch, load, run_dir)).folder == own and not found.is_parent
    flip(newest / "b.distcp", 3)

    def files():
        found = (path for path in (run_dir / "checkpoints").rglob("*") if path.is_file())  # a lease comes and goes
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}

    before = files()
    with pytest.raises(ValueError, match=rf"^checkpoint\.start_from={run_dir} is damaged: .*b\.distcp.* Name another"):
        start(tmp_path / "second", load, run_dir)
    with pytest.raises(ValueError, match=r"start_from=.*nowhere holds no complete checkpoint"):
        start(tmp_path / "second", load, tmp_path / "nowhere")
    assert files() == before, "the parent is only read"


@pytest.mark.parametrize("case", ["held", "late", "read-only", "planted"])
@pytest.mark.parametrize("load", [False, True])
def test_another_run_that_still_trains_does_not_rotate_away_what_is_loaded(run_dir, tmp_path, monkeypatch, case, load):
    """Where a lease can be written. What is gone before the lease is there is not taken: a newer one is, if any."""
    checkpoints, open_path, lease = run_dir / "checkpoints", Path.open, starting.lease
    wanted = checkpoints / "step_00000200"

    def late(folder: Path):
        if folder == wanted:
            publish(checkpoints, 300, keep=1)
        return lease(folder)

    def closed(path: Path, *given, **more):
        if path.name.startswith(".lease-"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_path(path, *given, **more)

    if case == "read-only":
        monkeypatch.setattr(Path, "open", closed)
    elif case != "held":
        monkeypatch.setattr(starting, "lease", late if case == "late" else lambda folder: nullcontext())
    given = (str(wanted), None) if load else (None, run_dir)
    with ExitStack() as held:
        if load and case == "late":
            with pytest.raises(ValueError, match=r"^checkpoint\.load=.*holds no complete checkpoint"):
                start(tmp_path / "branch", *given, held)
            return
        found = start(tmp_path / "branch", *given, held).folder
        assert found == (checkpoints / "step_00000300" if case == "late" else wanted)
        publish(checkpoints, 400, keep=1)
        assert found.is_dir() == (case in ("held", "late"))
    publish(checkpoints, 500, keep=1)
    assert names(run_dir) == ["step_00000500"]


def test_a_branch_keeps_its_parent(run_dir, tmp_path):
    folder = run_dir / "checkpoints/step_00000100"
    config = {"checkpoint": {"start_from": str(folder)}}
    common = {"run_id": "abc", "config": {}, "progress": {"step": 100, "consumed_samples": 9}}
    parent = parent_of(folder, common, config, takes_optimizer=True)
    assert (parent.run_id, parent.step, parent.position) == ("abc", 100, 9)
    moved = shutil.copytree(folder, tmp_path / "moved")
    for given in (None, str(folder), os.path.relpath(folder), str(moved)):
        check_parent(given, parent, run_dir)
    publish(run_dir / "checkpoints", 300, content=b"others")
    for given, known in ((folder, None), (run_dir, parent), (tmp_path / "gone", parent)):
        with pytest.raises(ValueError, match=r"has begun with .* checkpoint\.start_from=null to resume this one"):
            check_parent(str(given), known, run_dir)


def test_errors_of_rank_0_reach_every_rank(megatron_world_of_one):
    from megatron_depthattn.train.start import broadcast_from_rank0

    assert broadcast_from_rank0(lambda: 3) == 3
    with pytest.raises(ValueError, match="reported"):
        broadcast_from_rank0(lambda: (_ for _ in ()).throw(ValueError("reported")))


# ---- one run and one process per folder -----------------------------------------------------------------------------


def in_child(function: Callable[[], object]) -> int:
    """What a forked process ends with: 0, or 1 and a traceback on stderr."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    return process.exitcode


def test_one_process_trains_in_a_folder_and_a_killed_one_lets_it_go(tmp_path, monkeypatch):
    monkeypatch.setattr(starting, "LOCK_SECONDS", 0.1)
    held = tmp_path / "held"

    def hold() -> None:
        lock = starting.lock_run(tmp_path / "run")
        held.touch()
        time.sleep(60)
        lock.release()

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    while not held.exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another process is training in"):
        starting.lock_run(tmp_path / "run")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    starting.lock_run(tmp_path / "run").release()
    # the same run, on two hosts where run.dir is a folder of each
    claim = starting.claim_checkpoints(tmp_path / "checkpoints", tmp_path / "run")
    with pytest.raises(ValueError, match=r"another process saves to checkpoint\.dir="):
        starting.claim_checkpoints(tmp_path / "checkpoints", tmp_path / "run")
    claim.lock.release()


def test_of_two_runs_that_start_together_one_owns_the_checkpoints(tmp_path):
    """And the other one ends at once, with a line; whichever it is."""
    context = multiprocessing.get_context("fork")

    def run(name: str, directory: Path, barrier, results) -> None:
        barrier.wait(30)
        try:
            claim = starting.claim_checkpoints(directory, tmp_path / name)
            results.put((name, ""))
            barrier.wait(30)  # it trains meanwhile
            claim.lock.release()
        except ValueError as error:
            results.put((name, str(error)))
            barrier.wait(30)

    for number in range(4):
        directory, barrier, results = tmp_path / f"checkpoints{number}", context.Barrier(2), context.SimpleQueue()
        processes = [context.Process(target=run, args=(each, directory, barrier, results)) for each in "ab"]
        for process in processes:
            process.start()
        said = dict(results.get() for _ in processes)
        for process in processes:
            process.join()
        (winner,) = [name for name, error in said.items() if not error]
        (loser,) = [name for name in said if name != winner]
        owned = json.loads((directory / OWNER).read_text())
        assert owned["run_dir"] == str(tmp_path / winner)
        for word in (f"checkpoint.dir={directory} ", owned["run_id"], f"run.dir={tmp_path / winner}:", "Set another"):
            assert word in said[loser], said[loser]
        assert sorted(path.name for path in directory.iterdir()) == [".checkpoints.lock", OWNER]


class Folders:
    """Runs and a folder of checkpoints, as `claim_checkpoints` sees them."""

    def __init__(self, root: Path) -> None:
        self.root, self.shared = root, root / "shared"

    def claim(self, run: str, checkpoints: str | None = None) -> starting.Claim:
        """Start and end a run; its identity comes to its history."""
        directory = self.root / checkpoints if checkpoints else self.root / run / "checkpoints"
        found = starting.claim_checkpoints(directory, self.root / run)
        found.lock.release()
        RunHistory(self.root / run, found.run_id).start(0, "v", 1, "latest")
        return found

    def save(self, checkpoints: str, run_id: str | None) -> None:
        """A checkpoint in a folder without an owner."""
        folder = publish(self.root / checkpoints, 100)
        torch.save({"run_id": run_id} if run_id else {}, folder / "common.pt")

    def tree(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.shared.rglob("*") if path.is_file()}


@pytest.fixture
def folders(tmp_path) -> Folders:
    return Folders(tmp_path)


def test_a_folder_of_checkpoints_stays_with_its_run(folders):
    first = folders.claim("a", "shared")
    with pytest.raises(ValueError, match=r"It holds no checkpoint: if there is no such run, remove owner\.json\."):
        folders.claim("b", "shared")
    publish(folders.shared, 100)
    before = folders.tree()
    with pytest.raises(ValueError, match=f"belongs to run {first.run_id} of run.dir={folders.root}/a: .*set run.dir="):
        folders.claim("b", "shared")
    with pytest.raises(ValueError, match="belongs to run"):
        folders.claim("c", "shared")
    assert folders.tree() == before
    assert folders.claim("a", "shared").run_id == first.run_id
    (folders.root / "a/history.jsonl").unlink()  # as when run.dir was lost
    again = folders.claim("a", "shared")
    assert (again.run_id, again.notes) == (first.run_id, [])


def test_a_run_that_has_history_takes_no_folder_of_another(folders):
    folders.claim("a", "shared")
    folders.claim("b")
    with pytest.raises(ValueError, match="belongs to run"):
        folders.claim("b", "shared")
    folders.claim("c", "a/checkpoints")  # before a has ever used it
    with pytest.raises(ValueError, match=f"belongs to run .* of run.dir={folders.root}/c"):
        folders.claim("a")


@pytest.mark.parametrize("checkpoints", [None, "shared"])
def test_a_run_folder_that_was_moved(folders, checkpoints):
    first = folders.claim("a", checkpoints)
    (folders.root / "a").rename(folders.root / "b")
    second = folders.claim("b", checkpoints)
    assert second.run_id == first.run_id
    assert [note.partition(" was moved from ")[0] for note in second.notes] == [f"run {first.run_id}"] * bool(
        checkpoints
    )
    assert folders.claim("b", checkpoints).notes == []


def test_a_run_folder_that_was_copied(folders):
    first = folders.claim("a")
    shutil.copytree(folders.root / "a", folders.root / "b")
    assert folders.claim("b").run_id == folders.claim("a").run_id == first.run_id  # each has its own checkpoints
    first = folders.claim("c", "shared")
    shutil.copytree(folders.root / "c", folders.root / "d")
    with pytest.raises(ValueError, match=r"d is a copy of .*/c, .* start a new run from its last checkpoint"):
        folders.claim("d", "shared")
    assert folders.claim("c", "shared").run_id == first.run_id


@pytest.mark.parametrize(
    ("run_id", "has_history", "checkpoints", "is_own"),
    [
        ("abc", True, "shared", True),
        ("abc", False, "a/checkpoints", True),
        (None, False, "a/checkpoints", True),  # an imported model, put there by hand
        ("abc", False, "shared", False),  # nothing says that it is this run's
        ("xyz", True, "shared", False),
        (None, True, "shared", False),
    ],
)
def test_checkpoints_without_an_owner(folders, run_id, has_history, checkpoints, is_own):
    folders.save(checkpoints, run_id)
    if has_history:
        RunHistory(folders.root / "a", "abc").start(0, "v", 1, None)
    if is_own:
        found = folders.claim("a", checkpoints)
        assert run_id in (None, found.run_id)
        assert "had no owner" in found.notes[0]
        assert folders.claim("a", checkpoints).notes == []
    else:
        before = folders.tree()
        with pytest.raises(
            ValueError, match=r"holds checkpoints of .* and no owner.json .* Set another checkpoint.dir"
        ):
            folders.claim("a", checkpoints)
        assert folders.tree() == before


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b'{"run_id": "a"}', b'{"run_id": "a", "run_dir": "\\u0000"}', b"[" * 100_000]
)
def test_a_garbled_owner_is_named(folders, content):
    folders.claim("a", "shared")
    (folders.shared / OWNER).write_bytes(content)
    with pytest.raises(ValueError, match=r"shared/owner.json does not name a run .* remove that file"):
        folders.claim("a", "shared")
    (folders.shared / OWNER).unlink()
    folders.claim("a", "shared")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become two other users")
def test_a_teammate_continues_a_run(request):
    """Two users of one group: everything that the first one leaves behind the second one can change."""
    run_dir = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest closes its own folders to other users
    request.addfinalizer(lambda: shutil.rmtree(run_dir))
    os.chown(run_dir, 0, 2000)
    run_dir.chmod(0o2775)

    def become(user: int) -> None:
        os.setgroups([])
        os.setgid(2000 if user == 1001 else 2001)
        os.setgroups([2000])
        os.setuid(user)
        os.umask(0o002)

    def train(user: int, first: int) -> None:
        become(user)
        lock = starting.lock_run(run_dir)
        claim = starting.claim_checkpoints(run_dir / "checkpoints", run_dir)
        clean_up(run_dir / "checkpoints")
        quarantine_after(run_dir / "checkpoints", first)
        RunHistory(run_dir, claim.run_id).start(first, "v", 1, "latest")
        drop_steps_after(run_dir / "metrics.jsonl", first)
        metrics, log = AppendFile(run_dir / "metrics.jsonl"), AppendFile(run_dir / "log.txt")
        log.write("start\n")
        for step in (first + 1, first + 2):
            metrics.write(json.dumps({"step": step}) + "\n")
            publish(run_dir / "checkpoints", step, keep=2)
        metrics.close()
        log.close()
        shutil.copytree(run_dir / "checkpoints" / f"step_{first + 2:08d}", run_dir / "checkpoints/.step_00000009.part")
        claim.lock.release()
        lock.release()

    assert in_child(lambda: train(1001, 0)) == 0
    assert in_child(lambda: train(1002, 1)) == 0
    assert in_child(lambda: train(1001, 3)) == 0
    assert [record["step"] for record in read_records(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert steps(run_dir / "checkpoints") == [4, 5]
    closed = [path for path in run_dir.rglob("*") if path.stat().st_mode & 0o060 != 0o060 or path.stat().st_gid != 2000]
    assert closed == []
