"""docs/extending.md, followed to the letter in a copy of the package: a sixth method trains under a pipeline."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.e2e.commands import REPOSITORY, must_succeed
from tests.e2e.small_run import MODEL, prepare_small_corpus, train

PAGE = (REPOSITORY / "docs/extending.md").read_text()


def follow(page: str, root: Path) -> None:
    """Make the files and the edits of the page below ``root``."""
    for kind, path, body in re.findall(r"```(python|diff)\n# (\S+)\n(.*?)```", page, flags=re.S):
        file = root / path
        if kind == "python":
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(body)
            (file.parent / "__init__.py").touch()
            continue
        lines = body.splitlines()
        old = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
        new = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
        text = file.read_text()
        assert text.count(old) == 1, f"{path} holds these lines {text.count(old)} times:\n{old}"
        file.write_text(text.replace(old, new))


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(300)
def test_the_page_adds_a_method(tmp_path: Path):
    shutil.copytree(REPOSITORY / "megatron_depthattn", tmp_path / "megatron_depthattn")
    follow(PAGE, tmp_path)
    prepare_small_corpus(tmp_path / "corpus")
    config = {
        "model": MODEL | {"method": "skip_back"},
        "data": {"path": str(tmp_path / "corpus"), "sequence_length": 32, "num_workers": 0},
        "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "depth_interval": None},
        "optimizer": {"lr": 3.0e-2, "warmup_ratio": 0.0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def losses_of(name: str, ranks: int, *overrides: str) -> list[float]:
        must_succeed(train("config.yaml", f"run.dir={name}", *overrides, ranks=ranks, root=tmp_path))
        return losses(tmp_path / name)

    single = losses_of("single", 0)
    staged = losses_of("staged", 2, "parallel.pipeline=2")
    other = losses_of("other", 0, "model.skip_back.distance=1")
    assert staged == pytest.approx(single, rel=1e-5)
    assert other[0] == single[0]  # both begin as vanilla
    assert other[-1] != pytest.approx(single[-1], rel=1e-5)  # the control
