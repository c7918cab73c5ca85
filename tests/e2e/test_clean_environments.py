"""An exported folder works where there is only torch and transformers, of either version; and so do tests/hf."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_depthattn import hf
from megatron_depthattn.hf.model_config import AUTO_MAP
from tests.e2e.clean_environment import CleanEnvironment
from tests.e2e.commands import must_succeed, run
from tests.hf.models import DENSE, largest, make_model

SETTINGS = [DENSE | {"num_loops": 2}, {"tie_word_embeddings": True}]


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory) -> CleanEnvironment:
    folder = tmp_path_factory.mktemp("transformers_4")
    return CleanEnvironment.build(folder, "transformers>=4.57,<5", "safetensors")


@pytest.fixture(scope="session")
def transformers_5(tmp_path_factory) -> CleanEnvironment:
    folder = tmp_path_factory.mktemp("transformers_5")
    return CleanEnvironment.build(folder, "transformers>=5,<6", "safetensors", "pytest")


def export(model, folder: Path) -> Path:
    """A folder as the export writes it: weights, config.json and the model's two files."""
    model.save_pretrained(folder)
    for name in ("configuration_depthattn.py", "modeling_depthattn.py"):
        shutil.copy(Path(hf.__file__).with_name(name), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    return folder


@pytest.mark.parametrize("version", [4, 5])
@torch.no_grad()
def test_exported_folder_loads_without_the_project(version, request, tmp_path):
    environment = request.getfixturevalue(f"transformers_{version}")
    models = [make_model(**settings) for settings in SETTINGS]
    folders = [export(model, tmp_path / str(i)) for i, model in enumerate(models)]
    # -I: neither the folder of the script nor PYTHONPATH leads to the project.
    script = Path(__file__).with_name("load_exported_folders.py")
    command = [environment.python, "-I", script, tmp_path / "cache", *folders]
    result = json.loads(must_succeed(run(command, seconds=120, cwd=tmp_path)).stdout)
    assert result["transformers"].startswith(f"{version}.")
    tokens = torch.arange(3, 14)[None]
    for model, there in zip(models, result["models"], strict=True):
        assert there["class"].startswith("transformers_modules.") and there["class"].endswith(".DepthAttnForCausalLM")
        assert largest(torch.tensor(there["logits"]) - model(tokens).logits) < 1e-5
        here = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert there["generated"] == here.tolist()


def test_model_tests_pass_under_transformers_5(transformers_5):
    # For one test: transformers refuses tensor parallelism without it. The model files do not need it.
    transformers_5.install("--no-deps", "accelerate", "psutil")
    options = ["-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "-q"]
    result = must_succeed(run([transformers_5.python, "-m", "pytest", *options, "tests/hf"], seconds=280))
    summary = result.stdout.strip().splitlines()[-1]
    assert " passed" in summary and "skipped" not in summary, result.stdout[-3000:]
