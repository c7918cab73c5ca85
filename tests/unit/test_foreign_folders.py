"""What strangers' model folders and checkpoints get from conversion and loading: no code run, no file of ours, no size
that they do not fill, and one line that says what is wrong."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from megatron_depthattn.convert.from_hf import import_checkpoint
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.convert.to_hf import export
from megatron_depthattn.data.tokenizer import train_bpe
from megatron_depthattn.hf.loading import load_causal_lm
from megatron_depthattn.hf.model_config import to_model_section
from megatron_depthattn.hf.tokenizer import load_fast_tokenizer
from megatron_depthattn.hf.weights_folder import HFFolder
from tests.checkpoints import make

SECRET = "the owner's own text"


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export with a tokenizer."""
    made = make(tmp_path)
    train_bpe(iter([b"a few words, and a few more words"]), 300).save_pretrained(tmp_path / "tokenizer")
    export(MegatronCheckpoint(made.folder), made.output, tokenizer=tmp_path / "tokenizer")
    return made.output


# ------------------------------------------------------------------------------------------------------------ code


def test_code_beside_a_tokenizer_is_neither_run_nor_handed_on(folder: Path, tmp_path: Path):
    ran = tmp_path / "it_ran"
    names = (
        "tokenizer.py",
        "tokenizer_evil.py",
        "tokenization_evil.py",
        "chat_template.py",
        "vocab.py",
        "tokenizer.so",
    )
    for name in names:
        (folder / name).write_text(f"open({str(ran)!r}, 'w')\n")
    import_checkpoint(HFFolder(folder), tmp_path / "step")
    export(MegatronCheckpoint(tmp_path / "step"), tmp_path / "back")
    copied = {file.name for made in ("step", "back") for file in (tmp_path / made).rglob("*")}
    assert not copied & set(names) and {"tokenizer.json", "modeling_depthattn.py"} <= copied
    auto_map = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    edit_json(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")
    (note,) = [note for note in import_checkpoint(HFFolder(folder), tmp_path / "second") if "tokenizer" in note]
    assert "data for this model needs one" in note and "names code of its own" in note
    assert not ran.exists() and not list((tmp_path / "second" / "tokenizer").iterdir())


@pytest.mark.parametrize("model_type", ["depthattn", "qwen3"])
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_an_attention_function_to_download_is_not_looked_for(folder: Path, key: str, model_type: str):
    edit_json(folder / "config.json", model_type=model_type, **{key: "some-org/some-kernel"})
    assert load_causal_lm(folder).config._attn_implementation == "sdpa"


def test_an_adapters_base_is_not_loaded(folder: Path):
    edit_json(folder / "adapter_config.json", base_model_name_or_path="/somewhere/else")
    with pytest.raises(ValueError, match=r"has adapter_config\.json, which names another model to load: merge"):
        load_causal_lm(folder)


# ----------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 10**9},
            r"num_hidden_layers=1000000000 is more than the weights can fill, which are \d+",
        ),
        ({"model_type": "gpt2", "n_layer": 10**9}, r"n_layer=1000000000 is more than the weights can fill"),
        ({"num_loops": 10**9}, "num_loops=1000000000 is more than 1024"),
        ({"num_labels": 10**30}, "num_labels=10+ is more than 1000000"),
        (
            {"vocab_size": 10**12},
            r"holds (lm_head|model\.embed_tokens)\.weight of shape \[301, 32\], not \[1000000000000",
        ),
        ({"hidden_size": 10**12}, "holds .* not .*1000000000000"),
        ({"configuration_files": ["../other.4.0.0.json"]}, r"config\.json: configuration_files names other files"),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers=10+ is more than"),
        ({"model_type": "bart", "decoder_layers": 10**9}, "decoder_layers=10+ is more than"),
        (
            {"model_type": "qwen3_moe", "num_experts": 10**9, "moe_intermediate_size": 8, "decoder_sparse_step": 1},
            r"config\.json asks for more than \d+ tensors, which is more than the weights can fill",
        ),
        ({"vocab_size": 10**9, "quantization_config": {"quant_method": "gptq", "bits": 4}}, r"has \d+ bytes for 64"),
        ({"model_type": "gpt2", "n_embd": 32, "n_head": 4, "vocab_size": 10**9}, r"lacks .*transformer\.h\.0"),
    ],
    ids=str,
)
def test_sizes_that_the_weights_do_not_fill_build_nothing(folder: Path, changes: dict, message: str):
    edit_json(folder / "config.json", **changes)
    if "lacks" in message:
        save_file(
            {"transformer.ln_f.bias": torch.ones(32)} | {f"x{i}": torch.ones(1) for i in range(20)},
            folder / "model.safetensors",
        )
    with pytest.raises(ValueError, match=message):
        load_causal_lm(folder)


# ----------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path, name: str):
    secret = tmp_path / "secret"
    secret.write_text(json.dumps(SECRET))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match="is a link out of"):
        import_checkpoint(HFFolder(folder), tmp_path / "step")
    assert not (tmp_path / "step").exists()


def test_a_tokenizer_by_a_link_is_not_taken_along(folder: Path, tmp_path: Path):
    (folder / "merges.txt").symlink_to(tmp_path / "secret")
    notes = import_checkpoint(HFFolder(folder), tmp_path / "step")
    assert "'merges.txt' is a link out of the folder" in notes[-1]
    (tmp_path / "step" / "tokenizer").rmdir()
    (tmp_path / "step" / "tokenizer").symlink_to(tmp_path / "tokenizer")  # as a downloaded step folder might have it
    with pytest.raises(ValueError, match=r"step/tokenizer is a link out of its folder.* --tokenizer"):
        export(MegatronCheckpoint(tmp_path / "step"), tmp_path / "back")
    export(MegatronCheckpoint(tmp_path / "step"), tmp_path / "back", tokenizer=tmp_path / "step" / "tokenizer")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "a\\b"])
def test_an_index_names_files_in_its_folder_only(folder: Path, tmp_path: Path, name: str):
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    weight_map = dict.fromkeys(load_file(tmp_path / "secret.safetensors"), name)
    edit_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(ValueError, match=r"index\.json names .* which is no plain name"):
        load_causal_lm(folder)


# ------------------------------------------------------------------------------------------------------------ text


def test_a_model_card_takes_no_string_for_markdown_or_html(tmp_path: Path):
    made = make(tmp_path)
    path, code = "runs/<img src=x onerror=y>|[a](http://b)\x1b[2J", "```\n<script>z</script>"
    torch.save(
        {
            "config": {"model": made.model, "run": {"dir": path}, "data": {"path": code, "sequence_length": 8}},
            "imported_from": path,
            "parent": {"run_id": code, "step": 3, "tokens": 96, "folder": "/home/me"},
        },
        made.folder / "common.pt",
    )
    export(MegatronCheckpoint(made.folder), made.output)
    card = (made.output / "README.md").read_text()
    assert "\x1b" not in card
    rendered = re.sub(r"^(`{3,}).*?^\1$", "", card, flags=re.DOTALL | re.MULTILINE)  # all but blocks of code
    assert "<" not in rendered and "](" not in rendered and "img src=x" in card
    assert "begun with:\n" in card and "tokens: 96\n" in card and "/home/me" not in card


# -------------------------------------------------------------------------------------------------------- settings


QWEN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
QWEN |= {"model_type": "qwen3", "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "head_dim": 8}


def test_null_in_a_config_is_absent():
    """For every key that is read: the same section as without the key, or the same complaint."""
    full = QWEN | {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 5e3, "initializer_range": 0.1}
    full |= {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "rope_scaling": {}}
    full |= {
        "use_depth_attention": True,
        "depth_attention_stride": 2,
        "depth_attention_recent_window": 1,
        "num_loops": 1,
    }
    full |= {"rope_parameters": {"rope_theta": 7e3, "rope_type": "default"}, "layer_types": ["full_attention"] * 2}

    def outcome(config: dict) -> object:
        try:
            return to_model_section(config)
        except ValueError as error:
            return str(error)

    for key in full:
        without = {name: value for name, value in full.items() if name != key}
        assert outcome(full | {key: None}) == outcome(without), key
    assert outcome(full | {"num_key_value_heads": None})["num_query_groups"] == 4
    for inner in ("rope_theta", "rope_type"):
        rope = full["rope_parameters"] | {inner: None}
        assert isinstance(outcome(full | {"rope_parameters": rope}), dict), inner


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("num_hidden_layers", "2", "an integer of at least 1"),
        ("num_hidden_layers", 2.0, "an integer of at least 1"),
        ("num_attention_heads", 0, "an integer of at least 1"),
        ("num_attention_heads", 5, "a multiple of num_key_value_heads=2"),
        ("num_key_value_heads", True, "an integer of at least 1"),
        ("head_dim", [8], "an integer of at least 1"),
        ("num_loops", "1", "an integer of at least 1"),
        ("depth_attention_recent_window", -1, "an integer"),
        ("depth_attention_loop_sources", "same layer", "one of unrolled, same_layer"),
        ("depth_attention_weights", ["softmax"], "one of softmax, uniform"),
        ("depth_attention_mixes", 1, "one of value, key, key_value"),
        ("rms_norm_eps", "1e-6", "a number"),
        ("rope_theta", float("inf"), "a number"),
        ("initializer_range", 10**400, "a number"),
        ("tie_word_embeddings", "false", "true or false"),
        ("use_depth_attention", 1, "true or false"),
        ("rope_scaling", "linear", "an object"),
        ("layer_types", 3, "a list"),
        ("rope_parameters", {"rope_theta": "a"}, "a number"),
    ],
)
def test_a_setting_of_another_type_is_named(key: str, value: object, wanted: str):
    name = "rope_theta" if key == "rope_parameters" else key
    with pytest.raises(ValueError, match=rf"^{name}=.* must be {wanted}$"):
        to_model_section(QWEN | {"num_key_value_heads": 2} | {key: value})


def test_layers_of_another_attention_are_rejected():
    with pytest.raises(ValueError, match="layer_types other than full_attention"):
        to_model_section(QWEN | {"layer_types": ["full_attention", "sliding_attention"]})


# ------------------------------------------------------------------------------------------- others' checkpoints


@pytest.mark.usefixtures("megatron_world_of_one")
def test_a_megatron_checkpoint_of_another_program_is_named(tmp_path: Path):
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True)
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=128, max_sequence_length=8)
    step = tmp_path / "checkpoints" / "iter_0000010"
    step.mkdir(parents=True)
    state = {"args": argparse.Namespace(num_layers=1), "iteration": 10, "model": model.sharded_state_dict()}
    dist_checkpointing.save(state, str(step))
    (step.parent / "latest_checkpointed_iteration.txt").write_text("10")
    legacy = tmp_path / "legacy" / "mp_rank_00"
    legacy.mkdir(parents=True)
    torch.save({"args": state["args"], "model": model.state_dict()}, legacy / "model_optim_rng.pt")
    Qwen3ForCausalLM(Qwen3Config(**QWEN, num_key_value_heads=2)).save_pretrained(tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    expected = {
        step: "a Megatron-Core checkpoint of another program",
        step.parent: "a folder of checkpoints of another program, such as Megatron-LM",
        legacy.parent: "a checkpoint, or a part of one, of another program",
        legacy: "a checkpoint, or a part of one, of another program",
        legacy / "model_optim_rng.pt": "a file: give a step folder",
        tmp_path / "hf": "a Hugging Face model folder: give it as --model, to from-hf or verify",
        tmp_path / "nowhere": "no complete checkpoint: it does not exist",
        tmp_path: "a folder of checkpoints of another program",
        tmp_path / "empty": "no complete checkpoint: give a step folder",
    }
    for path, what in expected.items():
        found = step.parent if path == tmp_path else path  # as of a run's folder
        with pytest.raises(ValueError, match=re.escape(f"{found} is {what}")) as caught:
            MegatronCheckpoint(path)
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value).lower()


# ------------------------------------------------------------------------------------------ tokenizers that come along


def test_a_tokenizer_of_transformers_5_is_exported_for_both_versions(folder: Path, tmp_path: Path):
    source, made = tmp_path / "tokenizer", tmp_path / "again"
    edit_json(source / "tokenizer_config.json", tokenizer_class="TokenizersBackend", extra_special_tokens=["few"])
    export(MegatronCheckpoint(tmp_path / "step_00000007"), made, tokenizer=source)
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.additional_special_tokens == ["few"] and tokenizer.eos_token_id == 0
    settings = json.loads((made / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    inputs = tokenizer("a few words", return_tensors="pt")
    assert [*inputs] == ["input_ids", "attention_mask"]
    assert load_causal_lm(made).generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def corpus(folder: Path, text: bytes) -> Path:
    train_bpe(iter([text]), 290).save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_a_tokenizer_of_vocab_and_merges_is_exported_with_its_class(folder: Path, tmp_path: Path):
    """Where the model's config.json alone says the class."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    export(MegatronCheckpoint(tmp_path / "step_00000007"), tmp_path / "again", tokenizer=source)
    import_checkpoint(HFFolder(tmp_path / "again"), tmp_path / "step")
    for made in (tmp_path / "again", tmp_path / "step" / "tokenizer"):
        assert load_fast_tokenizer(made).encode("ab") == [2]


def test_a_run_on_several_streams_exports_their_tokenizer(tmp_path: Path):
    made = make(tmp_path)
    first, same, other = (
        corpus(tmp_path / name, text)
        for name, text in (("a", b"x y z"), ("b", b"x y z"), ("c", b"zxyzxy abcabc abcabc"))
    )
    generation = {"eos_token_id": [5, 7], "do_sample": True, "temperature": 0.6}

    def run_on(*paths: Path) -> MegatronCheckpoint:
        common = torch.load(made.folder / "common.pt", weights_only=True)
        streams = [{"path": str(path), "proportion": 0.5} for path in paths]
        common["config"]["data"] = {"path": None, "streams": streams, "sequence_length": 8}
        torch.save(common | {"generation_config": generation}, made.folder / "common.pt")
        return MegatronCheckpoint(made.folder)

    assert export(run_on(Path("s3://elsewhere"), first, same), made.output) == []
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (made.output / name).read_bytes() == (first / "tokenizer" / name).read_bytes()
    settings = json.loads((made.output / "config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"]) == (0, 1)
    # As imported, and it stops where this run's documents end.
    exported = json.loads((made.output / "generation_config.json").read_text())
    assert exported == generation | {"eos_token_id": [5, 7, 0]}
    with pytest.raises(ValueError, match="hold different tokenizers: give --tokenizer DIR"):
        export(run_on(first, other), tmp_path / "second")
    edit_json(first / "manifest.json", tokenizer_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"did not make the data \(tokenizer_sha256"):
        export(run_on(first, same), tmp_path / "second")


def test_names_of_tensors_are_written_out_on_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]):
    from megatron_depthattn.cli.convert import main

    tensors = load_file(folder / "model.safetensors") | {"evil\x1b]0;x\x07\nerror: no": torch.ones(1)}
    save_file(tensors, folder / "model.safetensors")
    assert main(["from-hf", "--model", str(folder), "--output", str(folder.parent / "step")]) == 1
    errors = capsys.readouterr().err
    assert "evil\\x1b]0;x\\x07 error: no is left over" in errors and errors.count("\n") == 1
    assert main(["from-hf", "--model", "x" * 300, "--output", str(folder.parent / "step")]) == 1
    assert re.fullmatch(r"error: .*File name too long: .*\n", capsys.readouterr().err)
