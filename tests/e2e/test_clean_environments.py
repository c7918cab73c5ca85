"""An exported folder works where there is only torch and transformers, of either version; and so do tests/hf."""

import json
from pathlib import Path

import pytest
import torch

from megatron_depthattn.convert import hf_writer
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.convert.to_hf import export
from megatron_depthattn.data.tokenizer import train_bpe
from megatron_depthattn.hf.loading import load_causal_lm
from megatron_depthattn.hf.tokenizer import load_fast_tokenizer
from tests.checkpoints import METHODS, model_section, random_weights, write_checkpoint
from tests.e2e.clean_environment import CleanEnvironment
from tests.e2e.commands import must_succeed, run
from tests.hf.models import largest


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory) -> CleanEnvironment:
    return CleanEnvironment.build(tmp_path_factory.mktemp("transformers_4"), "torch", "transformers", "safetensors")


@pytest.fixture(scope="session")
def transformers_5(tmp_path_factory) -> CleanEnvironment:
    folder = tmp_path_factory.mktemp("transformers_5")
    return CleanEnvironment.build(folder, "torch", "pytest", installed="transformers>=5,<6")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What the converter writes: looped, in several files; tied, in one; vanilla; each compared method.

    All with a tokenizer, as transformers 5 saves it.
    """
    monkeypatch.setattr(hf_writer, "MAX_SHARD_BYTES", 60_000)
    train_bpe(iter([b"a few words, and a few more words"]), 300).save_pretrained(tmp_path / "tokenizer")
    named = tmp_path / "tokenizer/tokenizer_config.json"
    later = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["few"]}
    named.write_text(json.dumps(json.loads(named.read_text()) | later))
    made = []
    vanilla = {"depth_attention": {"enabled": False}}
    for settings in ({"num_loops": 2}, {"tie_embeddings": True, "num_layers": 1}, vanilla, *METHODS.values()):
        model = model_section(**settings)
        step = write_checkpoint(tmp_path / f"step{len(made)}", model, random_weights(model))
        made.append(tmp_path / f"hf{len(made)}")
        export(MegatronCheckpoint(step), made[-1], tokenizer=tmp_path / "tokenizer")
    assert (made[0] / "model.safetensors.index.json").exists()
    return made


@pytest.mark.parametrize("version", [4, 5])
@torch.no_grad()
def test_exported_folder_loads_without_the_project(version, request, tmp_path, folders):
    environment = request.getfixturevalue(f"transformers_{version}")
    # -I: neither the folder of the script nor PYTHONPATH leads to the project.
    script = Path(__file__).with_name("load_exported_folders.py")
    command = [environment.python, "-I", script, tmp_path / "cache", *folders]
    result = json.loads(must_succeed(run(command, seconds=120, cwd=tmp_path)).stdout)
    assert result["transformers"].startswith(f"{version}.")
    tokens = torch.arange(3, 14)[None]
    for folder, there in zip(folders, result["models"], strict=True):
        model = load_causal_lm(folder)
        own_code = any(folder.glob("*.py"))
        assert there["class"].startswith("transformers_modules." if own_code else "transformers.models.qwen3.")
        assert there["class"].endswith(f".{type(model).__name__}")
        assert largest(torch.tensor(there["logits"]) - model(tokens).logits) < 1e-5
        here = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert there["generated"] == here.tolist()
        assert there["tokens"] == load_fast_tokenizer(folder)("a few words")["input_ids"]
        assert there["as_on_the_card"].startswith("Once upon a time")
        assert there["classifier"] == type(model).__name__.replace("CausalLM", "SequenceClassification")
        assert there["is_same_decoder"]
        if version == 5 and getattr(model.config, "num_loops", 1) > 1:
            assert "num_loops=2: continuous batching" in there["batched"]
        elif version == 5:
            free = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1)
            assert there["batched"] == free[0, tokens.shape[1] :].tolist()


def test_what_differs_between_versions_passes_under_transformers_5(transformers_5):
    options = ["-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "-q"]
    files = [f"tests/hf/test_{name}.py" for name in ("saving", "cache", "documents", "model")]
    result = must_succeed(run([transformers_5.python, "-m", "pytest", *options, *files], seconds=280))
    summary = result.stdout.strip().splitlines()[-1]
    assert " passed" in summary and "skipped" not in summary, result.stdout[-3000:]
