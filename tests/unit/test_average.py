"""`depthattn convert average` on random checkpoints: figures by numpy in fp64, memory, errors."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_depthattn.cli.convert import main
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.train.step_folders import digest_files, file_hash, write_manifest
from tests.checkpoints import model_section, random_weights, stored, write_checkpoint
from tests.e2e.exported import error_of

STEPS, LOSES_ITS_MASTER = (100, 200, 400), "decoder.final_layernorm.weight"


def write(folder: Path, step: int, *, dtype: torch.dtype = torch.float32, masters: bool = False, **changes) -> Path:
    """A step folder whose weights are random, and its masters, which are not the same numbers."""
    model = model_section(**changes)
    weights = {name: (weight * step).to(dtype) for name, weight in random_weights(model).items()}
    if masters:
        names = [name for name in weights if name != LOSES_ITS_MASTER or step != 200]
        weights |= {f"optimizer.state.param.{name}": torch.randn(weights[name].shape) for name in names}
    write_checkpoint(folder, model, weights)
    common = torch.load(folder / "common.pt")
    of_a_run = {"progress": {"step": step}, "run_id": "one", "parent": {"step": step}, "tokenizer": "t", "corpus": "c"}
    torch.save(common | of_a_run, folder / "common.pt")
    write_manifest(folder, digest_files(folder, [path.name for path in folder.iterdir()]))
    return folder


@pytest.fixture
def directory(tmp_path: Path, request) -> Path:
    for step in STEPS:
        write(tmp_path / f"run/checkpoints/step_{step:08d}", step, **getattr(request, "param", {}))
    return tmp_path / "run/checkpoints"


@pytest.mark.parametrize("directory", [{}, {"dtype": torch.bfloat16, "masters": True}], indirect=True)
@pytest.mark.parametrize(
    ("options", "shares"),
    [([], [1 / 3] * 3), (["--last", "2"], [0, 1 / 2, 1 / 2]), (["--decay", "0.75"], [0.5625, 0.1875, 0.25])],
)
def test_an_average_is_numpys(directory: Path, tmp_path: Path, options, shares, monkeypatch):
    """Given by the run's folder; one tensor of one checkpoint in memory at a time."""
    read, alive = MegatronCheckpoint.read, []

    def counted(self, name, **which):
        assert not any(tensor() is not None for tensor in alive)
        tensor = read(self, name, **which)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(MegatronCheckpoint, "read", counted)
    output = tmp_path / "average"
    assert main(["average", "--checkpoints", str(directory.parent), "--output", str(output), *options]) == 0
    used = [(step, share) for step, share in zip(STEPS, shares, strict=True) if share]
    states = [stored(directory / f"step_{step:08d}") for step, _ in used]
    made = stored(output)
    assert made.keys() == MegatronCheckpoint(directory / "step_00000400").weights.keys()
    for name, tensor in made.items():
        master = f"optimizer.state.param.{name}"
        parts = [state[master if all(master in each for each in states) else name] for state in states]
        weighted = [share * part.double().numpy() for part, (_, share) in zip(parts, used, strict=True)]
        assert tensor.dtype == states[-1][name].dtype
        np.testing.assert_array_equal(tensor.float(), torch.from_numpy(sum(weighted)).to(tensor.dtype).float())
    record = json.loads((output / "average.json").read_text())
    assert [(each["step"], each["weight"], each["run_id"]) for each in record["checkpoints"]] == [
        (step, pytest.approx(share), "one") for step, share in used
    ]
    digests = [file_hash(directory / f"step_{step:08d}/manifest.json") for step, _ in used]
    assert [each["manifest_xxh3_128"] for each in record["checkpoints"]] == digests
    common = MegatronCheckpoint(output).common
    assert (common["parent"], common["tokenizer"], common["corpus"]) == ({"step": 400}, "t", "c")
    assert common["average"] == record and not list(directory.glob("*/.lease-*"))


def test_what_cannot_be_averaged_is_one_line_and_leaves_nothing(directory: Path, tmp_path: Path, capsys):
    first, second, last = sorted(directory.iterdir())
    other = write(tmp_path / "other", 300, depth_attention={"stride": 1})
    larger = write(tmp_path / "larger", 300, tie_embeddings=True)
    damaged = write(tmp_path / "damaged", 300)
    (file,) = damaged.glob("__0_0.distcp")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (directory / "owner.json").write_text("{}")
    output, before = tmp_path / "average", sorted(tmp_path.iterdir())
    for given, complaint in {
        (first, other): "are of two models (depth_attention_stride is 2 and 1)",
        (first, larger): "are of two models (tie_word_embeddings is False and True)",
        (first, damaged): "other bytes than were written",
        (first, second, second): "each of another step",
        (first, tmp_path): "is no complete checkpoint",
        (last,): "has 0 complete checkpoints, 2 are needed",
        (directory, "--last", 4): "has 3 complete checkpoints, 4 are needed: set checkpoint.keep larger",
        (directory, "--last", 1): "--last 1: set 2 or more",
        (first, second, "--last", 2): "--last: only with one run's folder",
        (directory, "--decay", 1): "--decay 1.0: set more than 0 and less than 1",
        (directory, "--output", directory / "step_00000009"): "would be a checkpoint of the run that saves in",
        (directory, "--output", tmp_path): "holds",
        (directory, "--output", tmp_path / "other"): "exists: give another output, or --overwrite",
    }.items():
        assert complaint in error_of(main, capsys, "average", "--output", output, "--checkpoints", *given)
        assert sorted(tmp_path.iterdir()) == before
