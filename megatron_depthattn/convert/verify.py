"""Does a Hugging Face folder hold the model of a step folder? Weights, logits, and decoding with a cache."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_depthattn.config import ParallelConfig, RecomputeConfig, from_dict
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.convert.to_hf import hf_tensors, megatron_groups
from megatron_depthattn.hf.loading import load_causal_lm
from megatron_depthattn.hf.weights_folder import HFFolder
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.train.build import build_chunk, transformer_config
from megatron_depthattn.train.checkpoint import load_weights

LOGITS_BOUND, CACHE_BOUND = 1e-4, 1e-5
BATCH, POSITIONS, CHUNK = 2, 64, 5


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    result: str
    bound: str
    passed: bool


def verify(checkpoint: MegatronCheckpoint, model: Path) -> list[Check]:
    """Compare the two; all arithmetic in fp32 on the CPU, so the bounds mean the same for every checkpoint.

    Logits are of 2 x 64 random tokens (fewer if the model takes fewer); differences are absolute, and relative to the
    largest logit where that is above 1.

    Raises:
        ValueError: one of the two cannot be read.
    """
    folder = HFFolder(model)
    checks = [_weights(checkpoint, folder)]
    if not checks[0].passed:
        return checks
    section = checkpoint.common["config"]["model"]
    length = min(POSITIONS, section["max_position_embeddings"])
    tokens = torch.randint(section["vocab_size"], (BATCH, length), generator=torch.Generator().manual_seed(0))
    expected = megatron_logits(checkpoint, tokens) if section["num_loops"] == 1 else None
    exported = load_causal_lm(model, dtype=torch.float32).eval()
    with torch.no_grad():
        full = exported(tokens, use_cache=False).logits
        if expected is not None:
            checks.append(_difference("logits, Megatron and Hugging Face", full, expected, LOGITS_BOUND))
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


def _difference(name: str, actual: Tensor, expected: Tensor, bound: float) -> Check:
    scale = max(1.0, expected.abs().max().item())
    difference = (actual - expected).abs().max().item() / scale
    return Check(name, f"{difference:.1e}", f"{bound:.0e}", difference <= bound)  # NaN is not below


def megatron_logits(checkpoint: MegatronCheckpoint, tokens: Tensor) -> Tensor:
    """Logits [b, t, vocabulary] in fp32 of Megatron's model in this process alone, whatever layout trained it."""
    saved = from_dict(checkpoint.common["config"], str(checkpoint.folder))
    config = dataclasses.replace(
        saved,
        model=dataclasses.replace(saved.model, spec="local"),
        parallel=ParallelConfig(),
        precision=dataclasses.replace(saved.precision, dtype="fp32", fp8=None),
        recompute=RecomputeConfig(),
    )
    with _world_of_one(), torch.no_grad():
        model = build_chunk(config, transformer_config(config))
        load_weights(checkpoint.folder, [model])
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits: Tensor = model.eval()(tokens, positions, None)
    return logits[..., : config.model.vocab_size].clone()


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
