"""A model folder loads whole or not at all, under transformers 4 and 5.

Needs no Megatron, so it also runs beside transformers 5: ``pytest --noconftest tests/unit/test_hf_loading.py``.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from megatron_depthattn.hf.configuration_depthattn import DepthAttnConfig
from megatron_depthattn.hf.loading import load_causal_lm, pick_device
from megatron_depthattn.hf.modeling_depthattn import DepthAttnForCausalLM

SIZE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
TOKENS = torch.arange(12).reshape(1, 12)


@pytest.fixture(scope="module")
def model() -> DepthAttnForCausalLM:
    torch.manual_seed(0)
    return DepthAttnForCausalLM(DepthAttnConfig(**SIZE, depth_attention_stride=2, tie_word_embeddings=False)).eval()


@pytest.fixture
def whole(model: DepthAttnForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def sharded(model: DepthAttnForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def error_of(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_causal_lm(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ what loads


@pytest.mark.parametrize("name", ["whole", "sharded"])
def test_a_saved_model_comes_back(name, model, request, capfd):
    folder = request.getfixturevalue(name)
    capfd.readouterr()  # transformers 5 draws a bar when it saves
    loaded = load_causal_lm(folder)
    assert type(loaded) is DepthAttnForCausalLM and not loaded.training
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=0)
    assert capfd.readouterr() == ("", "")


def test_tied_embeddings_need_no_output_layer(tmp_path):
    tied = DepthAttnForCausalLM(DepthAttnConfig(**SIZE, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_causal_lm(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, tied.lm_head.weight)


def test_types_and_attention(whole):
    assert load_causal_lm(whole).dtype is torch.float32
    assert load_causal_lm(whole, torch.bfloat16).dtype is torch.bfloat16
    edit_config(whole, dtype="bfloat16", torch_dtype="bfloat16")
    assert load_causal_lm(whole).dtype is torch.bfloat16
    assert load_causal_lm(whole, torch.float32).dtype is torch.float32
    assert load_causal_lm(whole, attn_implementation="eager").config._attn_implementation == "eager"


def test_other_models_load_through_transformers(tmp_path):
    vanilla = Qwen3ForCausalLM(Qwen3Config(**SIZE)).eval()
    vanilla.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path)
    assert type(loaded) is Qwen3ForCausalLM
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, vanilla(TOKENS).logits)


def test_tensors_that_transformers_ignores_may_be_of_any_type(tmp_path):
    """Pythia's files hold attention masks."""
    size = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**size, num_hidden_layers=1)).eval()
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"gpt_neox.layers.0.attention.bias": torch.ones(8, dtype=torch.bool)}))
    with torch.no_grad():
        assert torch.equal(load_causal_lm(tmp_path)(TOKENS).logits, model(TOKENS).logits)


def test_an_index_beside_a_whole_file_is_not_read(whole, model):
    (whole / "model.safetensors.index.json").write_text('{"weight_map": {"gone": "gone.safetensors"}}')
    with torch.no_grad():
        assert torch.equal(load_causal_lm(whole)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("model_type", ["depthattn", "qwen3", "unheard_of"])
def test_code_in_the_folder_is_never_run(whole, model_type):
    mark = whole / "it_ran"
    (whole / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nraise SystemExit\n")
    edit_config(whole, model_type=model_type, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    if model_type == "unheard_of":
        assert "has model_type 'unheard_of', which transformers" in error_of(whole)
    elif model_type == "depthattn":
        assert type(load_causal_lm(whole)) is DepthAttnForCausalLM
    else:
        assert type(load_causal_lm(whole)) is Qwen3ForCausalLM  # the names and shapes are Qwen3's
    assert not mark.exists()


def test_verbosity_is_put_back(whole):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_causal_lm(whole)
    edit_weights(whole, lambda tensors: tensors.pop("lm_head.weight"))
    error_of(whole)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# ------------------------------------------------------------------------------------------------ what does not


def test_no_folder_no_config(tmp_path):
    assert error_of(tmp_path / "nowhere").startswith(f"model folder {tmp_path}/nowhere does not exist: give ")
    assert error_of(tmp_path) == f"model folder {tmp_path} has no config.json: give a Hugging Face model folder"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"model_type": "depthattn",', "cannot be read (Expecting property name"),
        (b"\xff\xfe{}", "cannot be read ('utf-8' codec can't decode"),
        (b"[1]", "holds no JSON object"),
    ],
)
def test_a_damaged_config(whole, content, complaint):
    (whole / "config.json").write_bytes(content)
    said = error_of(whole)
    assert said.startswith(f"{whole / 'config.json'} {complaint}")
    assert said.endswith(": copy or export the model again")


def test_a_config_that_the_model_rejects(whole):
    edit_config(whole, depth_attention_stride=0)
    assert error_of(whole) == f"{whole}/config.json: depth_attention_stride=0 must be an integer of at least 1"


def test_no_safetensors(whole):
    torch.save(load_file(whole / "model.safetensors"), whole / "pytorch_model.bin")
    (whole / "model.safetensors").unlink()
    assert error_of(whole) == (
        f"{whole} has neither model.safetensors nor model.safetensors.index.json: save the model as safetensors"
    )


@pytest.mark.parametrize("keep", [0, 100, -4])
def test_a_truncated_file_is_named(whole, keep):
    file = whole / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert error_of(whole).startswith(f"{file} does not load (")


def test_a_missing_shard_is_named(sharded):
    second = sorted(sharded.glob("*.safetensors"))[1]
    second.unlink()
    assert error_of(sharded).startswith(f"{second} is missing (model.safetensors.index.json names it)")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_a_damaged_index_is_named(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    said = error_of(sharded)
    assert said.startswith(str(sharded / "model.safetensors.index.json"))
    assert said.endswith(": copy or export the model again")


@pytest.mark.parametrize("named", ["nowhere.safetensors", 1])
def test_an_index_that_names_what_is_not_there(sharded, named):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.extra.weight"] = named
    file.write_text(json.dumps(index))
    missing = sharded / str(named)
    assert error_of(sharded) == f"{missing} is missing ({file.name} names it): copy or export the model again"


def test_a_shard_that_does_not_hold_what_the_index_says(sharded):
    """One shard copied over another: no file is missing, tensors are. transformers 4 alone loads it."""
    files = sorted(sharded.glob("*.safetensors"))
    gone = sorted(load_file(files[1]))
    shutil.copy(files[0], files[1])
    assert error_of(sharded).startswith(f"{files[1]} lacks {gone[0]}")


def test_a_tensor_that_two_shards_hold(sharded):
    """Which of the two a reader takes would be chance."""
    files = sorted(sharded.glob("*.safetensors"))
    twice = sorted(load_file(files[0]))[0]
    save_file(load_file(files[1]) | {twice: torch.ones(1)}, files[1], metadata={"format": "pt"})
    assert error_of(sharded) == (
        f"{files[1]} has {twice}, but model.safetensors.index.json says otherwise: copy or export the model again"
    )


LAYER = "model.layers.2.self_attn.q_norm.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop(LAYER), rf"lacks {LAYER}: its weights are not those of its config\.json"),
        (lambda t: t.pop("lm_head.weight"), r"lacks lm_head\.weight"),
        (lambda t: t.update({"model.extra.weight": torch.ones(1)}), r"holds model\.extra\.weight, which the config"),
        (lambda t: t.update({LAYER: torch.ones(7)}), rf"holds {LAYER} of shape \[7\], not \[8\]"),
        (lambda t: t.update({LAYER: t.pop(LAYER), LAYER + "s": torch.ones(1)}), "holds"),
    ],
)
def test_tensors_that_do_not_fit_are_named(whole, change, complaint):
    edit_weights(whole, change)
    assert re.search(complaint, error_of(whole))


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    for name in ("tpu9", "mps"):
        with pytest.raises(ValueError, match=rf"device '{name}' cannot be used here .*: set cpu or auto"):
            pick_device(name)
