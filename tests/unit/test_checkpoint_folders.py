"""What a checkpoint folder goes through: manifest, publication, `latest`, retention, damage, quarantine."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.durable import publish_folder, recover_folder, write_durably
from megatron_depthattn.train.lease import EXPIRY_SECONDS, lease
from megatron_depthattn.train.lease import _host as lease_host
from megatron_depthattn.train.step_folders import (
    MANIFEST,
    clean_up,
    complete_folders,
    digest_files,
    find_damage,
    quarantine_after,
    resolve_checkpoint,
    staging_folder,
    step_folder,
    update_latest_and_rotate,
    write_manifest,
)


def fill(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "a.distcp").write_bytes(content)
    (folder / "b.distcp").write_bytes(content * 1000)
    write_manifest(folder, digest_files(folder, ["a.distcp", "b.distcp"]))
    return folder


def publish(directory: Path, step: int, keep: int | None = None, content: bytes = b"weights") -> Path:
    publish_folder(fill(staging_folder(directory, step), content), step_folder(directory, step))
    assert update_latest_and_rotate(step_folder(directory, step), keep) is None
    return step_folder(directory, step)


def steps(directory: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in complete_folders(directory)]


# ---- names, latest, retention ---------------------------------------------------------------------------------------


def test_retention_keeps_the_newest(tmp_path):
    for step in (100, 200, 300):
        publish(tmp_path, step, keep=2)
    assert steps(tmp_path) == [200, 300]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000200", "step_00000300"]
    for step in (400, 500, 600):
        publish_folder(fill(staging_folder(tmp_path, step)), step_folder(tmp_path, step))
        assert update_latest_and_rotate(step_folder(tmp_path, step), 2, [300, 400]) is None
    assert steps(tmp_path) == [300, 400, 500, 600], "beside those of keep_steps"


def test_a_lease_holds_back_the_rotation_which_catches_up(tmp_path):
    """What is held is no damage. A step without a lease, or with a file that nobody holds, is removed as ever."""
    with lease(publish(tmp_path, 100)):
        publish(tmp_path, 200)
        (tmp_path / "step_00000200/.lease-x").write_text(lease_host())
        publish(tmp_path, 300, keep=1)
        assert steps(tmp_path) == [100, 300]
        assert find_damage(tmp_path / "step_00000100") == []
        assert len(list((tmp_path / "step_00000100").glob(".lease-*"))) == 1
    publish(tmp_path, 400, keep=1)
    assert steps(tmp_path) == [400] and not list(tmp_path.glob("*/.lease-*"))


def test_a_lease_that_comes_while_a_folder_is_removed_brings_it_back(tmp_path, monkeypatch):
    rename, held = Path.rename, contextlib.ExitStack()

    def late(self, target):
        if self.name == "step_00000100":
            held.enter_context(lease(self))
        return rename(self, target)

    publish(tmp_path, 100)
    with monkeypatch.context() as patched, held:
        patched.setattr(Path, "rename", late)
        publish(tmp_path, 200, keep=1)
        assert steps(tmp_path) == [100, 200]
    with pytest.raises(FileNotFoundError), lease(tmp_path / "step_00000050"):
        pass


def test_a_dead_holder_holds_nothing(tmp_path):
    """Of this host at once, by its lock; of another one, whose locks may not be seen here, after a while."""
    code = "import sys, pathlib, time\nfrom megatron_depthattn.train.lease import lease\n"
    code += "with lease(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    own, other = publish(tmp_path, 100), publish(tmp_path, 200)
    with subprocess.Popen([sys.executable, "-c", code, own], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        (other / ".lease-elsewhere").write_text("another host")
        publish(tmp_path, 300, keep=1)
        assert steps(tmp_path) == [100, 200, 300]
        holder.kill()
    publish(tmp_path, 400, keep=1)
    assert steps(tmp_path) == [200, 400]
    for age in (EXPIRY_SECONDS - 60, EXPIRY_SECONDS + 60):
        now = (tmp_path / "latest").stat().st_mtime
        os.utime(other / ".lease-elsewhere", (now - age, now - age))
        publish(tmp_path, 500, keep=1)
        assert steps(tmp_path) == ([200, 500] if age < EXPIRY_SECONDS else [500])


def test_the_same_step_again_replaces_it(tmp_path):
    publish(tmp_path, 100, content=b"old")
    publish(tmp_path, 100, keep=1, content=b"new")
    assert (tmp_path / "step_00000100/a.distcp").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000100"]


def test_a_link_to_a_checkpoint_is_removed_and_what_it_names_stays(tmp_path):
    kept = publish(tmp_path / "archive", 100)
    publish(tmp_path / "checkpoints", 200)
    step_folder(tmp_path / "checkpoints", 100).symlink_to(kept)
    (tmp_path / "checkpoints/.step_00000050.removed").symlink_to(kept)
    (tmp_path / "checkpoints/step_notanint").mkdir()
    clean_up(tmp_path / "checkpoints")
    publish(tmp_path / "checkpoints", 300, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*step_0*")) == [
        "step_00000200",
        "step_00000300",
    ]
    assert not list((tmp_path / "checkpoints").glob(".step*"))
    assert find_damage(kept) == []


def test_resolving(tmp_path):
    assert resolve_checkpoint(None, tmp_path) == []
    assert resolve_checkpoint("latest", tmp_path) == []
    first, second = publish(tmp_path, 100), publish(tmp_path, 200)
    assert resolve_checkpoint("latest", tmp_path) == [second, first]
    assert resolve_checkpoint("step_00000100", tmp_path) == [first]
    assert resolve_checkpoint(str(first), Path("elsewhere")) == [first]
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        resolve_checkpoint("step_00000300", tmp_path)


def test_a_folder_is_complete_by_its_manifest(tmp_path):
    """Renamed folders get their manifest first: one without is half copied or half removed."""
    publish(tmp_path, 100)
    (publish(tmp_path, 200) / MANIFEST).unlink()
    assert resolve_checkpoint("latest", tmp_path) == [step_folder(tmp_path, 100)]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"step_00000100\n", "step_00000100"),
        *[(garbled, "no step folder") for garbled in (b"", b"\xff\xfe\x00\x93", b"../../step_00000100", b"/etc")],
    ],
)
def test_latest_without_any_checkpoint_is_no_fresh_start(tmp_path, content, named):
    publish(tmp_path, 100).rename(tmp_path / "elsewhere")
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/latest names {named}, but .* holds no complete checkpoint"):
        resolve_checkpoint("latest", tmp_path)
    with pytest.raises(ValueError, match=r"is no complete checkpoint|names no step folder"):
        MegatronCheckpoint(tmp_path)


def test_a_run_that_goes_back_leaves_the_later_checkpoints_under_another_name(tmp_path):
    for step in (100, 200, 300):
        publish(tmp_path, step)
    left = quarantine_after(tmp_path, 100)
    assert [path.name for path in left] == ["step_00000200.abandoned", "step_00000300.abandoned"]
    assert steps(tmp_path) == [100]
    publish(tmp_path, 200)
    assert [path.name for path in quarantine_after(tmp_path, 100)] == ["step_00000200.abandoned-2"]
    assert all((path / MANIFEST).is_file() for path in left)


# ---- what a crash leaves --------------------------------------------------------------------------------------------


def test_what_a_crash_leaves_is_tidied(tmp_path):
    kept = publish(tmp_path, 100)
    fill(staging_folder(tmp_path, 200))  # complete, but it died before the rename
    fill(tmp_path / ".step_00000050.removed")
    clean_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", kept.name]


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path):
    folder = publish(tmp_path, 100)
    folder.rename(tmp_path / ".step_00000100.old")
    clean_up(tmp_path)
    assert resolve_checkpoint("latest", tmp_path) == [folder]
    assert find_damage(folder) == []


def test_a_failed_publication_leaves_the_old_folder(tmp_path):
    output, aside = fill(tmp_path / "output", b"old"), fill(tmp_path / "aside", b"new")
    gone = aside.with_name("gone")
    with pytest.raises(OSError, match="gone"):
        publish_folder(gone, output)
    assert (output / "a.distcp").read_bytes() == b"old"
    recover_folder(output)  # nothing to do
    publish_folder(aside, output)
    assert (output / "a.distcp").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output"]


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path):
    write_durably(tmp_path / "latest", "first")
    with pytest.raises(UnicodeEncodeError):
        write_durably(tmp_path / "latest", "\udc80")
    assert (tmp_path / "latest").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


# ---- damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_every_flipped_byte_is_found_and_an_intact_folder_is_not_blamed(tmp_path):
    folder = publish(tmp_path, 100)
    assert find_damage(folder) == []
    size = (folder / "b.distcp").stat().st_size
    for position in (0, 1, size // 2, size - 1):
        flip(folder / "b.distcp", position)
        (problem,) = find_damage(folder)
        assert str(folder / "b.distcp") in problem and "other bytes" in problem
        flip(folder / "b.distcp", position)
    assert find_damage(folder) == []


def test_a_short_and_a_missing_file_are_named(tmp_path):
    folder = publish(tmp_path, 100)
    os.truncate(folder / "b.distcp", 10)
    (short,) = find_damage(folder)
    assert "b.distcp has 10 bytes, not 7000" in short
    (folder / "a.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.distcp"):
        find_damage(folder)


def test_ranks_share_the_reading(tmp_path):
    folder = publish(tmp_path, 100)
    flip(folder / "b.distcp", 5)
    shares = [find_damage(folder, part=part, parts=3) for part in range(3)]
    assert [len(share) for share in shares] == [0, 1, 0]


def entry(name: str, num_bytes: str = "3") -> str:
    return json.dumps({"files": {name: {"bytes": 0, "xxh3_128": "x"}}}).replace('"bytes": 0', f'"bytes": {num_bytes}')


@pytest.mark.parametrize(
    "content",
    [
        *(
            "",
            "{",
            "[]",
            '{"files": 3}',
            "[" * 100_000,
            "\udc80",
            entry("a.distcp", "Infinity"),
            entry("a.distcp", "null"),
        ),
        *map(entry, ("../outside", "/etc/passwd", "a/../../outside", "..", "", ".", "a\0b")),
    ],
)
def test_a_damaged_manifest_is_damage(tmp_path, content):
    """Names that lead out of the folder included: nothing there is read, not even to find that it is not there."""
    folder = publish(tmp_path, 100)
    (folder / MANIFEST).write_bytes(content.encode(errors="surrogateescape"))
    (problem,) = find_damage(folder)
    assert "manifest.json is no manifest" in problem


def test_a_device_is_no_file_of_a_checkpoint(tmp_path):
    """It has no bytes, as the manifest says, and would be read for ever."""
    folder = publish(tmp_path, 100)
    (folder / "c.distcp").write_bytes(b"")
    write_manifest(folder, digest_files(folder, ["c.distcp"]))
    (folder / "c.distcp").unlink()
    (folder / "c.distcp").symlink_to("/dev/zero")
    assert find_damage(folder) == [f"{folder / 'c.distcp'} is no plain file"]


def test_what_goes_wrong_after_publication_is_reported_and_the_checkpoint_stays(tmp_path):
    (tmp_path / "latest").mkdir()  # in the way of the pointer
    publish_folder(fill(staging_folder(tmp_path, 100)), step_folder(tmp_path, 100))
    assert "is complete, but" in update_latest_and_rotate(step_folder(tmp_path, 100), 2)
    assert steps(tmp_path) == [100]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path):
    """A run would begin anew beside its checkpoints. Such a path is too long to be opened, for root as well."""
    folder = tmp_path
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here, folder = inner, folder / ("d" * 250)
    os.close(here)
    with pytest.raises(OSError, match="too long"):
        complete_folders(folder)
