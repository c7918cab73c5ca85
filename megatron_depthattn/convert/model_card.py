"""The README.md of an exported folder: what the model is, what it was trained on, how far, and how to use it."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.hf.model_config import AUTO_MAP
from megatron_depthattn.terminal import printable
from megatron_depthattn.train.line_files import read_records

METHODS = {
    "depthattn": (
        "Depth-Attention (arXiv:2606.05014): every layer mixes the values of earlier layers at the same token into its "
        "own."
    ),
    "denseformer": "DenseFormer (arXiv:2402.02622): layers read learned sums over the outputs of earlier ones.",
    "attnres": (
        "Attention Residuals (arXiv:2603.15031): every sublayer reads an attention over snapshots of the residual "
        "stream."
    ),
    "mhc": (
        "manifold-constrained hyper-connections (arXiv:2512.24880): every sublayer reads, mixes and writes several "
        "residual streams."
    ),
}
LOOP_SOURCES = {
    "same_layer": "A layer reads earlier ones of the same run, and itself in every run before.",
    "unrolled": "Earlier layers are counted through all runs.",
}
# As in the repository's CITATION.cff.
CITATION = """@article{zeng2026depthattention,
  title = {Depth-Attention: Cross-Layer Value Mixing for Language Models},
  author = {Zeng, Boyi and Hao, Yiqin and Wang, Zitong and Song, Shixiang and Li, He and Song, Feichen and
            Liu, Yifan and He, Ziwei and Wang, Xinbing and Lin, Zhouhan},
  journal = {arXiv preprint arXiv:2606.05014},
  url = {https://arxiv.org/abs/2606.05014},
  year = {2026}
}
@software{megatron_depthattn,
  title = {Depth-Attention on Megatron-Core},
  author = {{The megatron-depthattn maintainers}}
}
"""
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
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": [config["model_type"]]}
    trust = ", trust_remote_code=True" if config["model_type"] in AUTO_MAP else ""
    folder = shlex.quote(printable(str(checkpoint.folder)))
    name = Path(run.get("run", {}).get("dir") or checkpoint.folder.name).name
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {re.sub(r'[^A-Za-z0-9 ._-]+', '-', name)}",  # others may have chosen it
        _summary(config),
        _yaml("Shape", _shape(config, num_bytes)),
        _yaml("Training", _training(checkpoint, run)),
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
            f"depthattn convert to-hf --checkpoint {folder} --output HF_DIR\n"
            f"depthattn convert verify --checkpoint {folder} --model HF_DIR\n",
        ),
        "## Citation",
        _fenced("bibtex", CITATION),
        _yaml("Run config", run),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(config: Mapping[str, Any]) -> str:
    kind, num_loops = config["model_type"], config.get("num_loops", 1)
    if kind not in AUTO_MAP:
        return "A Qwen3 decoder, loaded by transformers without custom code."
    loops = f" Its layers are run {num_loops} times with the same weights." if num_loops > 1 else ""
    if not config.get("use_depth_attention", True):
        return f"A Qwen3-style decoder.{loops}"
    rule = f" {LOOP_SOURCES[config['depth_attention_loop_sources']]}" if loops else ""
    defaults = {"depth_attention_weights": "softmax", "depth_attention_mixes": "value"}
    changed = ", ".join(f"{key}={config[key]}" for key, value in defaults.items() if config.get(key, value) != value)
    ablation = f" This is an ablation of it: {changed}." if changed else ""
    return f"A Qwen3-style decoder with {METHODS[kind]}{ablation}{loops}{rule} {CODE}"


def _shape(config: Mapping[str, Any], num_bytes: int) -> dict[str, Any]:
    parameters = num_bytes // {"float32": 4, "float64": 8}.get(config["torch_dtype"], 2)
    return {"parameters": parameters} | {
        key: value for key, value in config.items() if not isinstance(value, dict | list)
    }


def _training(checkpoint: MegatronCheckpoint, run: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint says, and the last losses that the run had recorded when it saved it."""
    progress, data = checkpoint.common.get("progress", {}), run.get("data", {})
    step = progress.get("step", 0)
    facts: dict[str, Any] = {"steps": step, "tokens seen": progress.get("consumed_tokens", 0)}
    if "imported_from" in checkpoint.common:
        facts["imported from"] = checkpoint.common["imported_from"]
    if "average" in checkpoint.common:
        record = checkpoint.common["average"]
        facts["weights"] = {each["step"]: each["weight"] for each in record["checkpoints"]}
        facts["average"] = f"of these steps; {record['averaged']}; {record['formula']}"
    if isinstance(parent := checkpoint.common.get("parent"), dict):  # its own tokens are not among those above
        facts["begun with"] = {key: parent.get(key) for key in ("run_id", "step", "tokens")}
    facts |= {
        key: data[key] for key in ("path", "streams", "stages", "sequence_length", "document_mask") if data.get(key)
    }
    for record in read_records(checkpoint.folder.parent.parent / "metrics.jsonl", step=int):
        for kind in ("loss", "eval_loss"):
            if record["step"] <= step and record.get(kind) is not None:
                facts[f"{kind}, nats per token"] = {"step": record["step"], "value": round(record[kind], 4)}
    return facts


def _yaml(title: str, facts: Mapping[str, Any]) -> str:
    return f"## {title}\n\n{_fenced('yaml', yaml.safe_dump(dict(facts), sort_keys=False))}"


def _fenced(language: str, text: str) -> str:
    """A block of code that nothing in it can end."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text}{fence}"
