"""Does a Hugging Face folder hold the model of a step folder? Weights, config, code, logits, decoding with a cache."""

import filecmp
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_depthattn.config.load import Layer, build
from megatron_depthattn.config.schema import RunConfig
from megatron_depthattn.convert.hf_writer import model_files
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.convert.to_hf import hf_tensors, megatron_groups
from megatron_depthattn.hf.loading import load_causal_lm
from megatron_depthattn.hf.model_config import AUTO_MAP, normalises_keys_after_rope, to_hf_config, to_model_section
from megatron_depthattn.hf.weights_folder import HFFolder
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.switches import MODEL_SWITCHES
from megatron_depthattn.train.build import build_chunk, transformer_config
from megatron_depthattn.train.checkpoint import load_weights

LOGITS, DEPTH_SWITCH = "logits, Megatron and Hugging Face", "depth_attention.enabled"
LOGITS_BOUND, CACHE_BOUND = 1e-4, 1e-5
BATCH, POSITIONS, CHUNK = 2, 64, 5


class Check(NamedTuple):
    """One line of the table."""

    name: str
    result: str
    bound: str
    passed: bool


def verify(checkpoint: MegatronCheckpoint, model: Path) -> list[Check]:
    """Compare the two; all arithmetic in fp32, so the bounds mean the same for every checkpoint.

    Logits are of 2 x 64 random tokens (fewer if the model takes fewer); differences are absolute, and relative to the
    largest logit where that is above 1.

    Raises:
        ValueError: one of the two cannot be read.
    """
    folder = HFFolder(model)
    section = checkpoint.common["config"]["model"]
    checks = [_weights(checkpoint, folder), _config(section, folder), *_model_files(folder)]
    if not checks[0].passed:
        return checks
    length = min(POSITIONS, section["max_position_embeddings"])
    tokens = torch.randint(section["vocab_size"], (BATCH, length), generator=torch.Generator().manual_seed(0))
    exported = load_causal_lm(model, dtype=torch.float32)
    with torch.no_grad():
        full = exported(tokens, use_cache=False).logits
        checks.append(_difference(LOGITS, full, megatron_logits(checkpoint, tokens), LOGITS_BOUND))
        for chunk in (1, CHUNK):
            cached = _cached(exported, tokens, chunk)
            checks.append(_difference(f"cached decoding, chunks of {chunk}", cached, full, CACHE_BOUND))
    return checks


def _weights(checkpoint: MegatronCheckpoint, folder: HFFolder) -> Check:
    """Every tensor, name by name and bit by bit."""
    wrong, names = [], set()
    for name, tensor in hf_tensors(checkpoint, megatron_groups(checkpoint)):
        names.add(name)
        if name not in folder.shapes:
            wrong.append(f"{name} is missing")
        elif folder.dtypes.get(name) != tensor.dtype or not torch.equal(folder.read(name), tensor):
            wrong.append(f"{name} differs")
    wrong += [f"{name} is left over" for name in sorted(folder.shapes.keys() - names)]
    result = (
        f"{len(names)} tensors equal" if not wrong else f"{len(wrong)} of {len(names)} wrong: {', '.join(wrong[:3])}"
    )
    return Check("weights, name by name", result, "bit-equal", not wrong)


def _config(section: Mapping[str, Any], folder: HFFolder) -> Check:
    """The settings that decide what the weights compute."""
    ours, theirs = (_settings(config) for config in (to_hf_config(section, dtype="", special_tokens={}), folder.config))
    # a Qwen3's config.json says nothing of how it was initialised or could be mixed
    free = {"init_std"}
    if not ours.get(DEPTH_SWITCH, True):
        free |= {key for key in ours if "." in key} - {DEPTH_SWITCH}
    keys = [key for key in ours if key not in free and theirs.get(key) != ours[key]]
    wrong = [f"{key} {theirs.get(key)}, not {ours[key]}" for key in keys]
    return Check("config", "; ".join(wrong) or "same model", "equal", not wrong)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as our keys, dotted."""
    settings: dict[str, Any] = {"depth_attention.k_norm_after_rope": normalises_keys_after_rope(config)}
    for key, value in to_model_section(config).items():
        settings |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return settings


def _model_files(folder: HFFolder) -> list[Check]:
    """Whether the folder's code, which others run, is this package's, which is run here."""
    kind = folder.config["model_type"]
    files = model_files(kind)
    if not files:
        return []
    names = [file.name for file in files]
    _, differing, unreadable = filecmp.cmpfiles(files[0].parent, folder.folder, names, shallow=False)
    wrong = differing + unreadable
    wrong += ["auto_map"] if folder.config.get("auto_map") != AUTO_MAP[kind] else []
    return [Check("model files", f"{', '.join(wrong)} differ" if wrong else "this version's", "equal", not wrong)]


def _difference(name: str, actual: Tensor, expected: Tensor, bound: float) -> Check:
    scale = max(1.0, expected.abs().max().item())
    difference = (actual - expected).abs().max().item() / scale
    return Check(name, f"{difference:.1e}", f"{bound:.0e}", difference <= bound)  # NaN is not below


def megatron_logits(checkpoint: MegatronCheckpoint, tokens: Tensor) -> Tensor:
    """Logits [b, t, vocabulary] in fp32 of Megatron's model in this process alone, whatever layout trained it."""
    saved = {key: value for key, value in checkpoint.common["config"].items() if key not in ("parallel", "recompute")}
    switches = dict.fromkeys(MODEL_SWITCHES, False)
    plain = {"model": {"spec": "local", "depth_attention": {"op": "lean"}, **switches}}
    saved["precision"] = {"dtype": "fp32"}
    config = build(RunConfig, [Layer(str(checkpoint.folder), saved), Layer("verify", plain)])
    with _world_of_one(), torch.no_grad():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Megatron's groups are
        model = build_chunk(config, transformer_config(config)).to(device)
        load_weights(checkpoint.folder, [model])
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        logits: Tensor = model.eval()(tokens.to(device), positions, None)
    return logits[..., : config.model.vocab_size].cpu()


@contextmanager
def _world_of_one() -> Iterator[None]:
    """Megatron's groups in this process alone; those that a caller has made are used and left."""
    if dist.is_initialized():
        yield
        return
    initialize_distributed(launch_environment())
    try:
        initialize_model_parallel()
        yield
    finally:
        shut_down()


def _cached(model: nn.Module, tokens: Tensor, chunk: int) -> Tensor:
    """Logits [b, t, vocabulary], ``chunk`` tokens at a time through the model's cache."""
    logits, cache = [], None
    for part in tokens.split(chunk, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        logits.append(output.logits)
        cache = output.past_key_values
    return torch.cat(logits, dim=1)
