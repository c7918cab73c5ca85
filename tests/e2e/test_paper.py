"""docs/paper.md from a data set to table 1, on a twin that trains in seconds."""

import contextlib
import io
import json
import math
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_depthattn.cli import main
from tests.e2e.commands import REPOSITORY, must_succeed
from tests.e2e.small_run import train

TINY = {
    "model.num_layers": 4,
    "model.hidden_size": 48,
    "model.num_attention_heads": 3,  # odd like the 360M's 15, and as many key/value heads
    "model.num_query_groups": 3,
    "model.kv_channels": 16,
    "model.ffn_hidden_size": 100,
    "model.vocab_size": 384,
    "model.depth_attention.stride": 2,
    "model.max_position_embeddings": 512,
    "data.sequence_length": 128,
    "train.steps": 12,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 4,
    "train.eval_interval": 6,
    "train.eval_batches": 2,
    "train.log_interval": 1,
    "checkpoint.interval": 12,
    "precision.dtype": "fp32",
}


def depthattn(*words: str | Path) -> str:
    """What a verb prints, run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*map(str, words)]) == 0
    return printed.getvalue()


def hub_layout(folder: Path) -> None:
    """A data set of two configs as the Hub lays one out, from this package's own source."""
    texts = [file.read_text() for file in sorted((REPOSITORY / "megatron_depthattn").rglob("*.py"))]
    for part in (0, 1):
        file = folder / "code" / f"train-{part:05}-of-00002.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts[part::2]}), file)
    (folder / "other").mkdir()
    (folder / "other" / "train.jsonl").write_text(json.dumps({"text": "nothing of it is read"}) + "\n")
    card = "configs:\n- {config_name: code, data_files: [{split: train, path: code/train-*}]}\n"
    card += "- {config_name: other, data_files: other/train.jsonl}\n"
    (folder / "README.md").write_text(f"---\n{card}---\n")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus and both models, in one folder."""
    folder = tmp_path_factory.mktemp("paper")
    hub_layout(folder / "hub")
    depthattn(
        *("prepare", "--input", f"hf:{folder / 'hub'}:code", "--split", "train", "--text-field", "text"),
        *("--tokenizer", "train-bpe:384", "--sequence-length", "128", "--validation-fraction", "0.1"),
        *("--output", folder / "corpus"),
    )
    for method in ("vanilla", "depth_attention"):
        keys = {**TINY, "data.path": folder / "corpus", "run.dir": folder / method, "model.method": method}
        must_succeed(train(REPOSITORY / "configs/360m.yaml", *(f"{key}={value}" for key, value in keys.items())))
        depthattn("convert", "to-hf", "--checkpoint", folder / method, "--output", folder / "hf" / method)
    return folder


def test_from_a_data_set_to_table_1(exported: Path) -> None:
    """Both models, all tasks, both numbers of shots; perplexity is e to the loss that training found on the split."""
    models = {method: exported / "hf" / method for method in ("vanilla", "depth_attention")}
    printed = depthattn(
        *("evaluate", "--suite", "offline", "--limit", "10", "--max-samples", "16", "--model", *models.values()),
        *("--data", exported / "corpus", "--json", exported / "table.json", "--markdown", exported / "table.md"),
    )
    assert "lost their beginning" not in printed
    found = {each["name"]: each for each in json.loads((exported / "table.json").read_text())["models"]}
    for method, folder in models.items():
        config = json.loads((folder / "config.json").read_text())
        assert config.get("use_depth_attention", False) == (method == "depth_attention")
        losses = [json.loads(line) for line in (exported / method / "metrics.jsonl").read_text().splitlines()]
        assert found[method]["perplexity"] == pytest.approx(math.exp(losses[-1]["eval_loss"]), rel=1e-5)
        assert f"{found[method]['perplexity']:.2f}" in printed
    assert len({found[method]["perplexity"] for method in models}) == 2  # another function
    assert all(text in (exported / "table.md").read_text() for text in ("brackets", "last word", "which name", *models))
