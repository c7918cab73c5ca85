"""Export, import and verification of small random checkpoints: bits, round trips, and what lies beside the weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_depthattn.convert import hf_writer
from megatron_depthattn.convert.from_hf import import_checkpoint, repackage
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.convert.to_hf import export
from megatron_depthattn.data.tokenizer import train_bpe
from megatron_depthattn.hf.loading import load_causal_lm
from megatron_depthattn.hf.weights_folder import HFFolder
from tests.checkpoints import HEAD_DIM, HIDDEN, LAYERS, make, model_section, tensors_of
from tests.reference_decoder import decoder_logits

TOKENS = torch.randint(301, (2, 12), generator=torch.Generator().manual_seed(2))


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
        unrolled=depth.get("loop_sources", "unrolled") == "unrolled",
        uniform=depth.get("weights") == "uniform",
        mixes=depth.get("mixes", "value"),
        **options,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"num_loops": 2},
        {"num_loops": 2, "depth_attention": {"loop_sources": "unrolled"}},
        {"depth_attention": {"enabled": False}},
        {"depth_attention": {"enabled": False}, "num_loops": 2},
        {"depth_attention": {"mixes": "key_value"}},
        {"depth_attention": {"mixes": "key", "weights": "uniform"}},
    ],
    ids=str,
)
def test_exported_model_computes_the_reference(tmp_path: Path, changes: dict):
    """And says so: imported again it is the same model."""
    made = make(tmp_path, **changes)
    export(MegatronCheckpoint(made.folder), made.output)
    with torch.no_grad():
        logits = load_causal_lm(made.output, dtype=torch.float32)(TOKENS).logits
    expected = reference(tensors_of(made.output), made.model)
    assert (logits - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())
    import_checkpoint(HFFolder(made.output), tmp_path / "back")
    back = MegatronCheckpoint(tmp_path / "back").common["config"]["model"]
    is_ablation = made.model["depth_attention"]["mixes"] != "value"
    assert ("This is an ablation" in (made.output / "README.md").read_text()) == is_ablation
    if back["depth_attention"]["enabled"]:
        assert back["depth_attention"].items() >= (made.model["depth_attention"] | {"op": "auto"}).items()


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
    """Keys are normalised after the rotary embedding there: the exact function, not the one Megatron continues with."""
    folder = released(tmp_path)
    (folder / "tokenizer.model").write_bytes(b"a sentencepiece model alone")
    (note,) = repackage(HFFolder(folder), tmp_path / "repackaged")
    assert "no tokenizer was taken along" in note and "does not load" in note
    model, weights = model_section(), tensors_of(folder)
    assert tensors_of(tmp_path / "repackaged").keys() == weights.keys() - {"lm_head_layernorm.weight"}
    with torch.no_grad():
        logits = load_causal_lm(tmp_path / "repackaged", dtype=torch.float32)(TOKENS).logits
    before, after = (reference(weights, model, k_norm_after_rope=after) for after in (False, True))
    bound = 1e-4 * max(1, after.abs().max())
    assert (logits - after).abs().max() <= bound
    assert (before - after).abs().max() > 100 * bound, "control: the two orders are different functions"


def test_only_released_checkpoints_are_repackaged(tmp_path: Path):
    made = make(tmp_path)
    export(MegatronCheckpoint(made.folder), made.output)
    with pytest.raises(ValueError, match="model_type='depthattn', not the released layout"):
        repackage(HFFolder(made.output), tmp_path / "repackaged")


def test_large_weights_are_sharded_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = make(tmp_path)
    export(MegatronCheckpoint(made.folder), tmp_path / "whole")
    monkeypatch.setattr(hf_writer, "MAX_SHARD_BYTES", 40_000)
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


def test_what_lies_beside_the_weights_survives_both_ways(tmp_path: Path):
    made = make(tmp_path)
    train_bpe(iter([b"a few words, and a few more words"]), 300).save_pretrained(tmp_path / "tokenizer")
    export(MegatronCheckpoint(made.folder), made.output, tokenizer=tmp_path / "tokenizer")
    (made.output / "chat_template.jinja").write_text("{{ messages }}")
    (made.output / "generation_config.json").write_text('{"eos_token_id": [0, 5], "temperature": 0.7}')
    import_checkpoint(HFFolder(made.output), tmp_path / "step")
    export(MegatronCheckpoint(tmp_path / "step"), tmp_path / "back")
    for file in made.output.iterdir():
        if file.name == "generation_config.json":
            assert json.loads((tmp_path / "back" / file.name).read_text()) == json.loads(file.read_text())
        elif file.name not in ("README.md", "model.safetensors"):
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def test_common_state_of_megatron_0_19_is_read(tmp_path: Path):
    """It lies beside the tensors there, not in a file of its own."""
    made = make(tmp_path)
    common = MegatronCheckpoint(made.folder).common
    later = tmp_path / "later"
    state = {**made.weights, "common_state/shard_0_1": [common]}
    dcp.save(state, checkpoint_id=later, planner=dcp.DefaultSavePlanner(flatten_state_dict=False), no_dist=True)
    shutil.copy(made.folder / "metadata.json", later)
    assert MegatronCheckpoint(later).common == common
