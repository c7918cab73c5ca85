"""Export and import of the compared methods: names, bits, settings, files, the function that the folder computes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from megatron_depthattn.convert import verify
from megatron_depthattn.convert.from_hf import MODEL_YAML, import_checkpoint
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.convert.to_hf import export
from megatron_depthattn.hf.loading import load_causal_lm
from megatron_depthattn.hf.model_config import AUTO_MAP, METHOD_SETTINGS, to_hf_config, to_model_section
from megatron_depthattn.hf.weights_folder import HFFolder
from tests.checkpoints import METHODS, make, model_section, tensors_of
from tests.reference_methods import method_logits

TOKENS = torch.randint(301, (2, 12), generator=torch.Generator().manual_seed(2))

each = pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
each_method = pytest.mark.parametrize("method", METHOD_SETTINGS)


def reference(tensors: dict[str, Tensor], model: dict[str, Any], tokens: Tensor = TOKENS) -> Tensor:
    return method_logits(
        model["method"],
        tensors,
        tokens,
        model[model["method"]],
        num_layers=model["num_layers"],
        num_heads=model["num_attention_heads"],
        num_kv_heads=model["num_query_groups"],
        head_dim=model["kv_channels"],
        rope_theta=model["rotary_base"],
        eps=model["norm_epsilon"],
        tied=model["tie_embeddings"],
    )


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_keeps_every_bit(tmp_path: Path, dtype: torch.dtype, changes: dict):
    made = make(tmp_path, dtype, **changes)
    export(MegatronCheckpoint(made.folder), made.output)
    import_checkpoint(HFFolder(made.output), tmp_path / "back")
    back = MegatronCheckpoint(tmp_path / "back")
    assert back.weights.keys() == made.weights.keys()
    for name, weight in made.weights.items():
        rows = 301 if "word_embeddings" in name or "output_layer" in name else None
        returned = back.read(name)
        assert returned.dtype == dtype
        assert torch.equal(returned[:rows], weight[:rows]), name
    section, method = back.common["config"]["model"], changes["method"]
    expected = model_section(**changes)
    del expected["spec"], expected["depth_attention"]
    assert expected.items() <= section.items()
    assert section["depth_attention"]["op"] == "auto", "the other sections keep their defaults"
    assert f"method: {method}" in (tmp_path / "back" / MODEL_YAML).read_text()
    export(back, tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (made.output / "config.json").read_bytes()


@each_method
def test_the_folder_comes_with_its_own_code(tmp_path: Path, method: str):
    made = make(tmp_path, **METHODS[method])
    export(MegatronCheckpoint(made.folder), made.output)
    names = {f"{part}_{name}.py" for part in ("configuration", "modeling") for name in ("depthattn", "cross_layer")}
    assert {file.name for file in made.output.glob("*.py")} == names
    config = json.loads((made.output / "config.json").read_text())
    assert config["model_type"] == method and config["auto_map"] == AUTO_MAP[method]
    card = (made.output / "README.md").read_text()
    for key in METHOD_SETTINGS[method].values():
        assert f"\n{key}: " in card
    assert "trust_remote_code=True" in card and "Depth-Attention" not in card.partition("## Citation")[0]


@pytest.mark.parametrize("method", ["vanilla", "depthattn", *METHOD_SETTINGS])
def test_every_card_cites_the_paper_and_the_repository_as_they_ask(tmp_path: Path, method: str):
    made = make(tmp_path, **METHODS.get(method, {"method": method}))
    export(MegatronCheckpoint(made.folder), made.output)
    (entries,) = re.findall(r"```bibtex\n(.*?)```", (made.output / "README.md").read_text(), flags=re.DOTALL)
    cited = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text())
    (paper,) = cited["references"]
    for entry in (cited, paper):
        assert f"title = {{{entry['title']}}}" in entries
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert f"author = {{{authors}}}" in " ".join(entries.split())
    assert "arXiv:2606.05014" in entries and paper["url"].endswith("/2606.05014") and paper["url"] in entries


@pytest.mark.parametrize("num_loops", [1, 2])
def test_vanilla_by_name_is_the_vanilla_model(tmp_path: Path, num_loops: int):
    """Whatever the section of Depth-Attention says: it is not read."""
    changes = {"method": "vanilla", "num_loops": num_loops, "depth_attention": {"enabled": True}}
    made = make(tmp_path, **changes)
    export(MegatronCheckpoint(made.folder), made.output)
    config = json.loads((made.output / "config.json").read_text())
    if num_loops == 1:
        assert type(AutoModelForCausalLM.from_pretrained(made.output)) is Qwen3ForCausalLM
    else:
        assert (config["model_type"], config["use_depth_attention"]) == ("depthattn", False)
    assert to_model_section(config)["depth_attention"]["enabled"] is False


@each_method
def test_a_folder_of_an_earlier_version_is_imported_and_loaded(tmp_path: Path, method: str):
    """Its code lies in files of other names, which nothing here reads."""
    made = make(tmp_path, **METHODS[method])
    export(MegatronCheckpoint(made.folder), made.output)
    file = made.output / "config.json"
    earlier = file.read_text().replace("_cross_layer.", f"_{method}.")
    assert earlier != file.read_text()
    file.write_text(earlier)
    for code in made.output.glob("*.py"):
        code.unlink()
    import_checkpoint(HFFolder(made.output), tmp_path / "back")
    back, checkpoint = MegatronCheckpoint(tmp_path / "back"), MegatronCheckpoint(made.folder)
    assert back.weights.keys() == checkpoint.weights.keys()
    assert back.common["config"]["model"]["method"] == made.model["method"]
    assert type(load_causal_lm(made.output)).__name__ == json.loads(earlier)["architectures"][0]


@each_method
def test_import_and_loading_reject_a_folder_that_lacks_something(tmp_path: Path, method: str):
    made = make(tmp_path, **METHODS[method])
    export(MegatronCheckpoint(made.folder), made.output)
    tensors, file = tensors_of(made.output), made.output / "config.json"
    lost = next(name for name in tensors if "final_" in name or "readout" in name)
    save_file({n: w for n, w in tensors.items() if n != lost}, made.output / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{lost} is missing"):
        import_checkpoint(HFFolder(made.output), tmp_path / "back")
    with pytest.raises(ValueError, match=f"lacks {lost}"):
        load_causal_lm(made.output)
    key = next(iter(METHOD_SETTINGS[method].values()))
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))
    with pytest.raises(ValueError, match=f"config.json does not say {key}"):
        import_checkpoint(HFFolder(made.output), tmp_path / "back")


@each
def test_verify_tells_the_model_from_another(tmp_path: Path, changes: dict, monkeypatch: pytest.MonkeyPatch):
    """Megatron's logits are the reference's here: the exported model's are equal to them, in six checks."""
    made, method = make(tmp_path, **changes), changes["method"]
    checkpoint = MegatronCheckpoint(made.folder)
    export(checkpoint, made.output)
    weights = tensors_of(made.output)
    monkeypatch.setattr(verify, "megatron_logits", lambda _, tokens: reference(weights, made.model, tokens))
    checks = verify.verify(checkpoint, made.output)
    assert len(checks) == 6 and all(check.passed for check in checks), checks
    other = tmp_path / "other"
    shutil.copytree(made.output, other)
    (other / "modeling_cross_layer.py").write_text("")
    config = json.loads((other / "config.json").read_text())
    if method == "attnres":  # the only setting that no weight's shape tells
        (other / "config.json").write_text(json.dumps(config | {"attnres_block_size": 2}))
    failed = [check.name for check in verify.verify(checkpoint, other) if not check.passed]
    assert failed == (["config", "model files", verify.LOGITS] if method == "attnres" else ["model files"])
    vanilla = to_hf_config(model_section(depth_attention={"enabled": False}), dtype="float32", special_tokens={})
    (other / "config.json").write_text(json.dumps(vanilla))
    check = verify._config(made.model, HFFolder(other))
    assert not check.passed and f"method depth_attention, not {method}" in check.result
