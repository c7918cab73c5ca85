"""Export, import and verification of small random checkpoints: bits, round trips, and every refusal."""

import functools
import json
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from megatron_depthattn.convert import hf_folder
from megatron_depthattn.convert.adopt import adopt
from megatron_depthattn.convert.from_hf import import_checkpoint
from megatron_depthattn.convert.hf_folder import complete_folder
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.convert.to_hf import export
from megatron_depthattn.data.tokenizer import train_bpe
from megatron_depthattn.hf.loading import load_causal_lm
from megatron_depthattn.hf.weights_folder import HFFolder
from tests.checkpoints import HEAD_DIM, HIDDEN, LAYERS, model_section, random_weights, write_checkpoint
from tests.reference_decoder import decoder_logits

TOKENS = torch.randint(301, (2, 12), generator=torch.Generator().manual_seed(2))


def make(tmp_path: Path, dtype: torch.dtype = torch.float32, **changes) -> SimpleNamespace:
    """A random step folder, its weights by name, and where an export of it goes."""
    model = model_section(**changes)
    weights = {name: weight.to(dtype) for name, weight in random_weights(model).items()}
    folder = write_checkpoint(tmp_path / "step_00000007", model, weights)
    return SimpleNamespace(folder=folder, model=model, weights=weights, output=tmp_path / "hf")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def reference(tensors: dict[str, torch.Tensor], model: dict, **options) -> torch.Tensor:
    depth = model["depth_attention"]
    return decoder_logits(
        tensors,
        TOKENS,
        num_layers=model["num_layers"],
        num_heads=model["num_attention_heads"],
        num_kv_heads=model["num_query_groups"],
        head_dim=model["kv_channels"],
        rope_theta=model["rotary_base"],
        eps=model["norm_epsilon"],
        stride=depth["stride"],
        window=depth["recent_window"],
        depth_attention=depth["enabled"],
        tied=model["tie_embeddings"],
        num_loops=model["num_loops"],
        **options,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"num_loops": 2},
        {"depth_attention": {"enabled": False}},
        {"depth_attention": {"enabled": False}, "num_loops": 2},
    ],
    ids=str,
)
def test_exported_model_computes_the_reference(tmp_path: Path, changes: dict):
    made = make(tmp_path, **changes)
    export(MegatronCheckpoint(made.folder), made.output)
    with torch.no_grad():
        logits = load_causal_lm(made.output, dtype=torch.float32)(TOKENS).logits
    expected = reference(tensors_of(made.output), made.model)
    assert (logits - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


def test_vanilla_export_needs_no_code_of_ours(tmp_path: Path):
    made = make(tmp_path, depth_attention={"enabled": False})
    export(MegatronCheckpoint(made.folder), made.output)
    assert not list(made.output.glob("*.py"))
    assert type(AutoModelForCausalLM.from_pretrained(made.output)) is Qwen3ForCausalLM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_megatron_to_hf_to_megatron_keeps_every_bit(tmp_path: Path, dtype: torch.dtype, tied: bool):
    made = make(tmp_path, dtype, tie_embeddings=tied)
    export(MegatronCheckpoint(made.folder), made.output)
    import_checkpoint(HFFolder(made.output), tmp_path / "back")
    back = MegatronCheckpoint(tmp_path / "back")
    assert back.weights.keys() == made.weights.keys()
    for name, weight in made.weights.items():
        returned = back.read(name)
        if weight.shape[0] == 384:  # the padded vocabulary
            assert not returned[301:].any()
            returned, weight = returned[:301], weight[:301]
        assert returned.dtype == dtype
        assert torch.equal(returned, weight), name


@pytest.mark.parametrize("tied", [False, True])
def test_qwen3_to_megatron_to_hf_keeps_every_bit(tmp_path: Path, tied: bool):
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": 40, "head_dim": HEAD_DIM}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=300, tie_word_embeddings=tied, **sizes, **heads))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "qwen")
    import_checkpoint(HFFolder(tmp_path / "qwen"), tmp_path / "step")
    export(MegatronCheckpoint(tmp_path / "step"), tmp_path / "back")
    before, after = tensors_of(tmp_path / "qwen"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    logits = [load_causal_lm(tmp_path / name)(TOKENS).logits for name in ("qwen", "back")]
    assert torch.equal(*logits)


def released(tmp_path: Path) -> Path:
    """A small checkpoint in the released layout: Llama's names and config, q/k norms, a norm that nothing reads."""
    made = make(tmp_path)
    export(MegatronCheckpoint(made.folder), made.output)
    config = json.loads((made.output / "config.json").read_text())
    for key in ("auto_map", "num_loops", "depth_attention_k_norm_after_rope"):
        del config[key]
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "use_qk_norm": True}
    tensors = tensors_of(made.output) | {"lm_head_layernorm.weight": torch.ones(HIDDEN)}
    folder = tmp_path / "released"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_released_layout_is_imported(tmp_path: Path):
    folder = released(tmp_path)
    notes = import_checkpoint(HFFolder(folder), tmp_path / "step")
    assert any("normalises keys after the rotary embedding" in note and "differ by up to" in note for note in notes)
    checkpoint = MegatronCheckpoint(tmp_path / "step")
    assert checkpoint.common["config"]["model"]["depth_attention"]["enabled"] is True
    export(checkpoint, tmp_path / "back")
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    assert before.keys() - after.keys() == {"lm_head_layernorm.weight"}
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_released_layout_runs_in_transformers_as_it_was_trained(tmp_path: Path):
    """Keys are normalised after the rotary embedding there: the exact function, not the one Megatron goes on with."""
    folder = released(tmp_path)
    adopt(HFFolder(folder), tmp_path / "adopted")
    model, weights = model_section(), tensors_of(folder)
    assert tensors_of(tmp_path / "adopted").keys() == weights.keys() - {"lm_head_layernorm.weight"}
    with torch.no_grad():
        logits = load_causal_lm(tmp_path / "adopted", dtype=torch.float32)(TOKENS).logits
    before, after = (reference(weights, model, k_norm_after_rope=after) for after in (False, True))
    bound = 1e-4 * max(1, after.abs().max())
    assert (logits - after).abs().max() <= bound
    assert (before - after).abs().max() > 100 * bound, "control: the two orders are different functions"


def test_only_released_checkpoints_are_adopted(tmp_path: Path):
    made = make(tmp_path)
    export(MegatronCheckpoint(made.folder), made.output)
    with pytest.raises(ValueError, match="model_type='depthattn', not the released layout"):
        adopt(HFFolder(made.output), tmp_path / "adopted")


def test_large_weights_are_sharded_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = make(tmp_path)
    export(MegatronCheckpoint(made.folder), tmp_path / "whole")
    monkeypatch.setattr(hf_folder, "MAX_SHARD_BYTES", 40_000)
    export(MegatronCheckpoint(made.folder), made.output)
    index = json.loads((made.output / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    whole, sharded = tensors_of(tmp_path / "whole"), tensors_of(made.output)
    assert whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, file in index["weight_map"].items():
        with safe_open(made.output / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 not a dict
    logits = [load_causal_lm(folder)(TOKENS).logits for folder in (tmp_path / "whole", made.output)]
    assert torch.equal(*logits)


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
def test_export_refuses_other_weights_and_leaves_nothing(tmp_path: Path, change: dict, message: str):
    made = make(tmp_path)
    checkpoint = damaged(made, change)
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        export(checkpoint, made.output)
    assert set(tmp_path.iterdir()) == before


def test_export_refuses_a_damaged_file(tmp_path: Path):
    made = make(tmp_path)
    file = next(made.folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"cannot read \S+ from {file.name}, which is missing or damaged"):
        export(MegatronCheckpoint(made.folder), made.output)
    file.unlink()
    with pytest.raises(ValueError, match="which is missing or damaged"):
        export(MegatronCheckpoint(made.folder), made.output)
    assert not made.output.exists()


def test_export_refuses_what_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        MegatronCheckpoint(tmp_path)
    made = make(tmp_path)
    (made.folder / "common.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="cannot be read"):
        MegatronCheckpoint(made.folder)
    torch.save({"iteration": 3}, made.folder / "common.pt")
    with pytest.raises(ValueError, match="does not say which model it holds"):
        MegatronCheckpoint(made.folder)


def test_latest_names_the_step(tmp_path: Path):
    made = make(tmp_path)
    (tmp_path / "latest").write_text("step_00000007\n")
    assert MegatronCheckpoint(tmp_path).folder == made.folder


def test_an_existing_output_is_kept_unless_told(tmp_path: Path):
    made = make(tmp_path)
    made.output.mkdir()
    (made.output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists: give another output, or --overwrite"):
        export(MegatronCheckpoint(made.folder), made.output)
    assert (made.output / "notes.txt").read_text() == "mine"
    export(MegatronCheckpoint(made.folder), made.output, overwrite=True)
    assert not (made.output / "notes.txt").exists()
    assert (made.output / "config.json").exists()


def test_a_disk_that_is_too_small_is_told_before_writing(tmp_path: Path):
    with (
        pytest.raises(ValueError, match=r"GB free, 1000000000\.00 GB are needed"),
        complete_folder(tmp_path / "output", num_bytes=10**18),
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
        with pytest.raises(ValueError, match="could not be written, and nothing is left of it"):
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
def test_import_refuses_damaged_folders_and_leaves_nothing(tmp_path: Path, damage, message: str):
    made = make(tmp_path)
    export(MegatronCheckpoint(made.folder), made.output)
    damage(made.output)
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        import_checkpoint(HFFolder(made.output), tmp_path / "step")
    assert set(tmp_path.iterdir()) == before


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path):
    made = make(tmp_path)
    train_bpe(iter([b"a few words, and a few more words"]), 310).save_pretrained(tmp_path / "small")
    export(MegatronCheckpoint(made.folder), made.output, tokenizer=tmp_path / "small")
    assert AutoTokenizer.from_pretrained(made.output).eos_token_id == 0
    assert json.loads((made.output / "generation_config.json").read_text())["eos_token_id"] == 0
    text = " ".join(f"word{i}" for i in range(500)).encode()
    train_bpe(iter([text]), 320).save_pretrained(tmp_path / "large")
    refused = {"large": "has ids up to 319, the model's vocabulary has 301", "gone": "no tokenizer.json"}
    for folder, message in refused.items():
        with pytest.raises(ValueError, match=message):
            export(MegatronCheckpoint(made.folder), tmp_path / "second", tokenizer=tmp_path / folder)
