"""What a checkpoint folder goes through when it is published: names, `latest`, retention, abandoned branches."""

from pathlib import Path

import pytest

from megatron_depthattn.train.checkpoint import _publish
from megatron_depthattn.train.step_folders import resolve_checkpoint, step_folder


def publish(directory: Path, step: int, keep: int | None = None, content: str = "") -> None:
    aside = directory / f".step_{step:08d}.part"
    aside.mkdir(parents=True)
    (aside / "metadata.json").write_text(content)
    _publish(aside, step_folder(directory, step), keep)


def steps(directory: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in sorted(directory.glob("step_*"))]


def test_latest_names_the_newest(tmp_path):
    publish(tmp_path, 100)
    publish(tmp_path, 200)
    assert resolve_checkpoint("latest", tmp_path) == tmp_path / "step_00000200"
    assert steps(tmp_path) == [100, 200]


def test_retention_keeps_the_newest(tmp_path):
    for step in (100, 200, 300):
        publish(tmp_path, step, keep=2)
    assert steps(tmp_path) == [200, 300]


def test_a_rewound_run_keeps_what_it_saves(tmp_path):
    """Step 200 after 400 and 500: the later ones are of a branch that was left; the one just saved stays."""
    publish(tmp_path, 400)
    publish(tmp_path, 500)
    publish(tmp_path, 200, keep=2)
    assert steps(tmp_path) == [200]
    assert resolve_checkpoint("latest", tmp_path) == tmp_path / "step_00000200"


def test_the_same_step_again_replaces_it(tmp_path):
    publish(tmp_path, 100, content="old")
    publish(tmp_path, 100, keep=1, content="new")
    assert (tmp_path / "step_00000100/metadata.json").read_text() == "new"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["latest", "step_00000100"]


def test_resolving(tmp_path):
    assert resolve_checkpoint(None, tmp_path) is None
    assert resolve_checkpoint("latest", tmp_path) is None
    publish(tmp_path, 100)
    assert resolve_checkpoint("step_00000100", tmp_path) == tmp_path / "step_00000100"
    assert resolve_checkpoint(str(tmp_path / "step_00000100"), Path("elsewhere")) == tmp_path / "step_00000100"
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        resolve_checkpoint("step_00000200", tmp_path)
