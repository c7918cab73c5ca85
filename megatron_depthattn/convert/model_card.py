"""The README.md of an exported folder: what the model is, what it was trained on, how far, and how to use it."""

import html
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.hf.model_config import AUTO_MAP, METHOD_SETTINGS
from megatron_depthattn.terminal import printable

METHODS = {
    "depthattn": (
        "Depth-Attention (arXiv:2606.05014): every layer mixes the values of earlier layers at the same token into its "
        "own."
    ),
    "denseformer": "DenseFormer (arXiv:2402.02622): layers read learned sums over the outputs of earlier ones.",
    "attnres": "Attention Residuals: every sublayer reads an attention over snapshots of the residual stream.",
    "mhc": "manifold-constrained hyper-connections: every sublayer reads, mixes and writes several residual streams.",
}
CODE = (
    "The code beside the weights runs with transformers 4.57 and 5; decoding with a cache is exact, and the cache has "
    "a vanilla decoder's size."
)


def model_card(checkpoint: MegatronCheckpoint, config: Mapping[str, Any], num_bytes: int) -> str:
    """Markdown with Hugging Face's front matter; every figure comes from the checkpoint or its run's records.

    Args:
        config: the exported config.json.
        num_bytes: size of the exported weights.
    """
    run: dict[str, Any] = checkpoint.common["config"]
    if "imported_from" in checkpoint.common:
        run = {"model": run["model"]}  # the rest are defaults that trained nothing
    custom = config["model_type"] in AUTO_MAP
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": [config["model_type"]]}
    trust = ", trust_remote_code=True" if custom else ""
    folder = shlex.quote(printable(str(checkpoint.folder)))
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {_as_text(Path(run.get('run', {}).get('dir') or checkpoint.folder.name).name)}",
        _summary(config),
        _table("Shape", _shape(config, num_bytes)),
        _table("Training", _training(checkpoint, run)),
        "## Use",
        _fenced(
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("."{trust})\n'
            f'tokenizer = AutoTokenizer.from_pretrained("."{trust})\n'
            'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n",
        ),
        "`AutoModelForSequenceClassification` puts a new head on the same weights, for reward models and the like.",
        "## Made by",
        _fenced(
            "bash",
            f"python tools/convert_checkpoint.py to-hf --checkpoint {folder} --output HF_DIR\n"
            f"python tools/convert_checkpoint.py verify --checkpoint {folder} --model HF_DIR\n",
        ),
        "## Run config",
        _fenced("yaml", yaml.safe_dump(run, sort_keys=False)),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(config: Mapping[str, Any]) -> str:
    kind, num_loops = config["model_type"], config.get("num_loops", 1)
    if kind not in AUTO_MAP:
        return "A Qwen3 decoder, loaded by transformers without custom code."
    loops = f" Its layers are run {num_loops} times with the same weights." if num_loops > 1 else ""
    if not config.get("use_depth_attention", True):
        return f"A Qwen3-style decoder.{loops}"
    return f"A Qwen3-style decoder with {METHODS[kind]}{loops} {CODE}"


def _shape(config: Mapping[str, Any], num_bytes: int) -> dict[str, Any]:
    parameters = num_bytes // {"float32": 4, "float64": 8}.get(config["torch_dtype"], 2)
    keys = ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
    keys += ["intermediate_size", "vocab_size", "max_position_embeddings", "rope_theta", "tie_word_embeddings"]
    keys += ["torch_dtype", "depth_attention_stride", "depth_attention_recent_window", "num_loops"]
    keys += METHOD_SETTINGS.get(config["model_type"], {}).values()
    return {"parameters": f"{parameters:,}"} | {key: config[key] for key in keys if key in config}


def _training(checkpoint: MegatronCheckpoint, run: Mapping[str, Any]) -> dict[str, Any]:
    progress = checkpoint.common.get("progress", {})
    facts: dict[str, Any] = {"steps": progress.get("step", 0), "tokens seen": f"{progress.get('consumed_tokens', 0):,}"}
    if "imported_from" in checkpoint.common:
        facts["imported from"] = checkpoint.common["imported_from"]
    data = run.get("data", {}).get("path")
    if data:
        facts |= {"data": data, "sequence length": run["data"]["sequence_length"]} | _corpus(Path(data))
    return facts | _losses(checkpoint, progress.get("step", 0))


def _corpus(data: Path) -> dict[str, Any]:
    manifest = data / "manifest.json"
    if not manifest.is_file():
        return {}
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        train, inputs = content["splits"]["train"], ", ".join(content["settings"]["input"])
        return {"corpus": f"{inputs}: {train['documents']:,} documents, {train['tokens']:,} tokens"}
    except (KeyError, TypeError, ValueError):
        return {}  # another program's, or damaged: the model is none the worse


def _losses(checkpoint: MegatronCheckpoint, step: int) -> dict[str, str]:
    """The last losses in nats per token that the run had recorded when it saved this checkpoint."""
    record = checkpoint.folder.parent.parent / "metrics.jsonl"
    latest: dict[str, tuple[int, float]] = {}
    for line in record.read_text(encoding="utf-8").splitlines() if record.is_file() else []:
        try:
            metrics = json.loads(line)
        except ValueError:
            continue  # the run is writing it, or was killed while it did
        if not isinstance(metrics, dict):
            continue
        for kind in ("loss", "eval_loss"):
            if metrics.get("step", step + 1) <= step and metrics.get(kind) is not None:
                latest[kind] = metrics["step"], metrics[kind]
    names = {"loss": "training loss", "eval_loss": "held-out loss"}
    return {f"{names[kind]} (nats per token, step {at})": f"{loss:.4f}" for kind, (at, loss) in latest.items()}


def _table(title: str, facts: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {_as_text(value)} |" for name, value in facts.items())
    return f"## {title}\n\n| | |\n|---|---|\n{rows}"


def _as_text(value: object) -> str:
    """A value that others may have chosen, as one line that neither Markdown nor HTML takes for more."""
    return re.sub(r"([\\`*\[\]|!])", r"\\\1", html.escape(" ".join(printable(str(value)).split()), quote=False))


def _fenced(language: str, text: str) -> str:
    """A block of code that nothing in it can end."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text}{fence}"
