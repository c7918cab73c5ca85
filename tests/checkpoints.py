"""Random Megatron checkpoints for tests of the converter: written by torch alone, names spelt out here."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.reference_methods import METHODS as METHOD_NAMES
from tests.reference_methods import random_method_weights

METHODS: dict[str, dict[str, Any]] = {
    "denseformer": {"method": "denseformer", "denseformer": {"period": 1, "dilation": 1}},
    "denseformer-dilated": {"method": "denseformer", "denseformer": {"period": 2, "dilation": 2}, "num_layers": 4},
    "attnres": {"method": "attnres", "attnres": {"block_size": 4}},
    "mhc": {"method": "mhc", "mhc": {"num_streams": 3}},
}
"""Changes to `model_section`, by what they make of it."""
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 3, 32, 4, 2, 8, 48


def model_section(**changes: Any) -> dict[str, Any]:
    """The `model` section of a run's config."""
    depth: dict[str, Any] = {"enabled": True, "stride": 2, "recent_window": 1, "op": "lean"}
    depth |= {"loop_sources": "same_layer", "weights": "softmax", "mixes": "value"} | changes.pop("depth_attention", {})
    section = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_query_groups": KV_HEADS,
        "kv_channels": HEAD_DIM,
        "ffn_hidden_size": FFN,
        "vocab_size": 301,
        "max_position_embeddings": 64,
        "rotary_base": 5000.0,
        "norm_epsilon": 1e-5,
        "init_std": 0.02,
        "tie_embeddings": False,
        "num_loops": 1,
        "spec": "local",
    }
    return section | changes | {"depth_attention": depth}


def random_weights(model: dict[str, Any], padded_vocab: int = 384) -> dict[str, Tensor]:
    """Every weight of the model under Megatron's names, in fp32."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator)
        return values * 0.2 + 1.0 if len(shape) == 1 else values * 0.2  # norm weights around one

    query, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    weights = {"embedding.word_embeddings.weight": random(padded_vocab, HIDDEN)}
    for layer in range(model["num_layers"]):
        prefix = f"decoder.layers.{layer}."
        weights |= {
            prefix + "self_attention.linear_qkv.layer_norm_weight": random(HIDDEN),
            prefix + "self_attention.linear_qkv.weight": random(query + 2 * kv, HIDDEN),
            prefix + "self_attention.q_layernorm.weight": random(HEAD_DIM),
            prefix + "self_attention.k_layernorm.weight": random(HEAD_DIM),
            prefix + "self_attention.linear_proj.weight": random(HIDDEN, query),
            prefix + "mlp.linear_fc1.layer_norm_weight": random(HIDDEN),
            prefix + "mlp.linear_fc1.weight": random(2 * FFN, HIDDEN),
            prefix + "mlp.linear_fc2.weight": random(HIDDEN, FFN),
        }
    weights |= _random_method_weights(model)
    weights["decoder.final_layernorm.weight"] = random(HIDDEN)
    if not model["tie_embeddings"]:
        weights["output_layer.weight"] = random(padded_vocab, HIDDEN)
    return weights


def _random_method_weights(model: dict[str, Any]) -> dict[str, Tensor]:
    """What the method adds; the last layer holds what comes behind it."""
    method, layers = model.get("method"), model["num_layers"]
    if method not in METHOD_NAMES:
        return {}
    weights = random_method_weights(6, method, num_layers=layers, hidden_size=HIDDEN, **model[method])
    start, last = "model.layers.", f"decoder.layers.{layers - 1}."
    return {
        "decoder.layers." + name.removeprefix(start)
        if name.startswith(start)
        else last + name.removeprefix("model."): weight.float()
        for name, weight in weights.items()
    }


def write_checkpoint(folder: Path, model: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """A step folder with these weights, FP8 scaling state and optimizer state; returns it."""
    folder.mkdir(parents=True)
    others: dict[str, Any] = {
        "decoder.layers.0.self_attention.linear_qkv._extra_state/shard_0_1": io.BytesIO(b"fp8"),
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(HIDDEN),
    }
    dcp.save({**weights, **others}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    progress = {"step": 7, "consumed_samples": 14, "consumed_tokens": 896}
    torch.save({"config": {"model": model}, "progress": progress}, folder / "common.pt")
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    (folder / "metadata.json").write_text(json.dumps(backends))
    return folder


def make(tmp_path: Path, dtype: torch.dtype = torch.float32, **changes) -> SimpleNamespace:
    """A random step folder, its weights by name, and where an export of it goes."""
    model = model_section(**changes)
    weights = {name: weight.to(dtype) for name, weight in random_weights(model).items()}
    folder = write_checkpoint(tmp_path / "step_00000007", model, weights)
    return SimpleNamespace(folder=folder, model=model, weights=weights, output=tmp_path / "hf")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a step folder, read without Megatron."""
    reader = dcp.FileSystemReader(folder)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def load_checkpoint(
    folder: Path,
    chunks: list[Any],
    optimizer: Any = None,
    scheduler: Any = None,
    *,
    config: dict[str, Any] | None = None,
    is_parent: bool = False,
) -> Any:
    """`train.checkpoint.load_checkpoint` into the parts of a Megatron engine."""
    from megatron_depthattn.train import checkpoint
    from megatron_depthattn.train.megatron_state import MegatronState

    state = MegatronState(chunks, optimizer)
    return checkpoint.load_checkpoint(folder, state, scheduler, config=config, is_parent=is_parent)


def save_checkpoint(
    directory: Path, progress: Any, chunks: list[Any], optimizer: Any, scheduler: Any, *, config: dict[str, Any]
) -> Path:
    """Write one checkpoint of the Megatron engine outside of a run's loop; without an optimizer weights only."""
    from megatron_depthattn.train.checkpoint import checkpoint_state
    from megatron_depthattn.train.megatron_state import MegatronState
    from megatron_depthattn.train.save import CheckpointSaver

    saver = CheckpointSaver(directory)
    saver.save(progress, checkpoint_state(MegatronState(chunks, optimizer), scheduler, config=config))
    outcome = saver.take_outcome()
    assert outcome is not None and outcome.error is None, outcome
    return outcome.folder
