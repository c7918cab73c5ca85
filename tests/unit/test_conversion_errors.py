"""What export and import reject, in one clear line each, and that they leave nothing behind and destroy nothing."""

import functools
import json
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from megatron_depthattn.convert.complete_folder import complete_folder
from megatron_depthattn.convert.from_hf import import_checkpoint
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.convert.to_hf import export
from megatron_depthattn.data.tokenizer import train_bpe
from megatron_depthattn.hf.loading import load_causal_lm
from megatron_depthattn.hf.weights_folder import HFFolder
from tests.checkpoints import HIDDEN, make, tensors_of, write_checkpoint


def damaged(made: SimpleNamespace, change: dict) -> MegatronCheckpoint:
    """The checkpoint with some weights replaced, or left out where the new value is None."""
    weights = {name: weight for name, weight in (made.weights | change).items() if weight is not None}
    return MegatronCheckpoint(write_checkpoint(made.folder.with_name("damaged"), made.model, weights))


QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({QKV: None}, f"{QKV} is missing"),
        ({"decoder.layers.3.mlp.linear_fc2.weight": torch.ones(2)}, "layers.3.mlp.linear_fc2.weight is left over"),
        ({QKV: torch.ones(72, HIDDEN)}, r"is \[72, 32\] and should be \[64, 32\]"),
        ({QKV: torch.full((64, HIDDEN), torch.nan)}, f"{QKV} has values that are not finite"),
        ({"output_layer.weight": torch.ones(300, HIDDEN)}, r"is \[300, 32\] and should be \[301, 32\]"),
    ],
)
def test_export_rejects_other_weights_and_leaves_nothing(tmp_path: Path, change: dict, message: str):
    made = make(tmp_path)
    checkpoint = damaged(made, change)
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        export(checkpoint, made.output)
    assert set(tmp_path.iterdir()) == before


def test_export_rejects_a_damaged_file(tmp_path: Path):
    made = make(tmp_path)
    file = next(made.folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"cannot read \S+ from {file.name}, which is missing or damaged"):
        export(MegatronCheckpoint(made.folder), made.output)
    file.unlink()
    with pytest.raises(ValueError, match="which is missing or damaged"):
        export(MegatronCheckpoint(made.folder), made.output)
    assert not made.output.exists()


def test_export_rejects_what_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        MegatronCheckpoint(tmp_path)
    made = make(tmp_path)
    (made.folder / "common.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="cannot be read"):
        MegatronCheckpoint(made.folder)
    torch.save({"iteration": 3}, made.folder / "common.pt")
    with pytest.raises(ValueError, match="does not say which model it holds"):
        MegatronCheckpoint(made.folder)


@pytest.mark.parametrize("marker", ["owner.json", "latest"])
def test_an_import_does_not_become_a_checkpoint_of_a_run(tmp_path: Path, marker: str):
    """The run would continue from it, or remove it; --overwrite would replace what the run has saved."""
    made = make(tmp_path)
    (tmp_path / marker).touch()
    export(MegatronCheckpoint(made.folder), made.output)
    before = sorted(path.name for path in made.folder.iterdir())
    for folder in (made.folder, tmp_path / "step_00000009"):
        with pytest.raises(ValueError, match="would be a checkpoint of the run that saves in"):
            import_checkpoint(HFFolder(made.output), folder, overwrite=True)
    assert sorted(path.name for path in made.folder.iterdir()) == before
    import_checkpoint(HFFolder(made.output), tmp_path / "imported")


def test_an_existing_output_is_kept_unless_asked(tmp_path: Path):
    made = make(tmp_path)
    made.output.mkdir()
    (made.output / "notes.txt").write_text("mine")
    checkpoint = MegatronCheckpoint(made.folder)
    with pytest.raises(ValueError, match="exists: give another output, or --overwrite"):
        export(checkpoint, made.output)
    with pytest.raises(ValueError, match=r"has no config\.json, so it is no earlier result"):
        export(checkpoint, made.output, overwrite=True)
    assert (made.output / "notes.txt").read_text() == "mine"
    (made.output / "config.json").touch()
    made.output.with_name(".hf.old").mkdir()  # what a kill between two renames leaves
    (made.output.with_name(".hf.old") / "file").touch()
    export(checkpoint, made.output, overwrite=True)
    assert not (made.output / "notes.txt").exists()
    assert not made.output.with_name(".hf.old").exists()
    load_causal_lm(made.output)


@pytest.mark.parametrize("output", ["step_00000007", "."])
def test_the_source_is_never_overwritten(tmp_path: Path, output: str):
    made = make(tmp_path)
    before = sorted(made.folder.iterdir())
    with pytest.raises(ValueError, match="holds what is converted"):
        export(MegatronCheckpoint(made.folder), tmp_path / output, overwrite=True)
    assert sorted(made.folder.iterdir()) == before


def test_a_linked_output_is_written_where_it_points(tmp_path: Path):
    made = make(tmp_path)
    made.output.symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        export(MegatronCheckpoint(made.folder), made.output, overwrite=True)
    assert made.output.is_symlink()
    assert (tmp_path / "elsewhere" / "config.json").exists()


def test_an_output_that_cannot_be_made_is_reported(tmp_path: Path):
    made = make(tmp_path)
    with pytest.raises(ValueError, match="could not be written"):
        export(MegatronCheckpoint(made.folder), made.folder / "common.pt" / "hf")


def test_a_disk_that_is_too_small_is_reported_before_writing(tmp_path: Path):
    with (
        pytest.raises(ValueError, match=r"GB free, 1000000000\.00 GB are needed"),
        complete_folder(tmp_path / "output", marker="x", source=Path("/nowhere"), num_bytes=10**18),
    ):
        pytest.fail("the block must not be entered")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "darwin", reason="file size limits work differently there")
@pytest.mark.parametrize("way", ["export", "import"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, way: str):
    made = make(tmp_path)
    source = MegatronCheckpoint(made.folder)
    export(source, made.output)
    before = set(tmp_path.iterdir())
    ways = {"export": (export, source), "import": (import_checkpoint, HFFolder(made.output))}
    convert = functools.partial(*ways[way])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(ValueError, match="could not be written, and nothing new is left there: File too large: "):
            convert(tmp_path / "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(tmp_path.iterdir()) == before


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])


def change_config(**changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def change_tensors(**changes):
    def change(folder: Path) -> None:
        tensors = tensors_of(folder) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
        save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model.safetensors does not load \(.* cut short or damaged; copy or export"),
        (change_config(intermediate_size=64), r"gate_proj.weight is \[48, 32\] and should be \[64, 32\]"),
        (change_config(num_hidden_layers=4), "model.layers.3.input_layernorm.weight is missing"),
        (change_config(num_hidden_layers=2), "model.layers.2.input_layernorm.weight is left over"),
        (change_config(model_type="mamba"), "model_type='mamba' cannot be imported"),
        (change_config(tie_word_embeddings=True), "lm_head.weight differs from model.embed_tokens.weight"),
        (change_tensors(model__norm__weight=None), "model.norm.weight is missing"),
        (change_tensors(model__norm__weight=torch.full((HIDDEN,), torch.inf)), "model.norm.weight has values that are"),
        (
            change_tensors(model__norm__weight=torch.ones(HIDDEN, dtype=torch.int8)),
            "model.norm.weight in another type than F64",
        ),
    ],
)
def test_import_rejects_damaged_folders_and_leaves_nothing(tmp_path: Path, damage, message: str):
    made = make(tmp_path)
    export(MegatronCheckpoint(made.folder), made.output)
    damage(made.output)
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        import_checkpoint(HFFolder(made.output), tmp_path / "step")
    assert set(tmp_path.iterdir()) == before


def test_a_tokenizer_that_does_not_fit_is_rejected(tmp_path: Path):
    made = make(tmp_path)
    train_bpe(iter([b"a few words, and a few more words"]), 310).save_pretrained(tmp_path / "small")
    export(MegatronCheckpoint(made.folder), made.output, tokenizer=tmp_path / "small")
    assert AutoTokenizer.from_pretrained(made.output).eos_token_id == 0
    assert json.loads((made.output / "generation_config.json").read_text())["eos_token_id"] == 0
    text = " ".join(f"word{i}" for i in range(500)).encode()
    train_bpe(iter([text]), 320).save_pretrained(tmp_path / "large")
    rejected = {"large": "has ids up to 319, the model's vocabulary has 301", "gone": "gone does not exist"}
    for folder, message in rejected.items():
        with pytest.raises(ValueError, match=message):
            export(MegatronCheckpoint(made.folder), tmp_path / "second", tokenizer=tmp_path / folder)
