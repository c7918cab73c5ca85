"""Export: a Megatron step folder to a Hugging Face folder that loads without this package."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from megatron_depthattn.convert.complete_folder import complete_folder
from megatron_depthattn.convert.hf_writer import (
    GENERATION_CONFIG,
    copy_files,
    model_files,
    tokenizer_files,
    write_json,
    write_weights,
)
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.convert.model_card import model_card
from megatron_depthattn.hf.loading import load_tokenizer
from megatron_depthattn.hf.model_config import to_hf_config
from megatron_depthattn.hf.name_mapping import ModelShape, WeightGroup, check_weights, weight_groups
from megatron_depthattn.hf.weights_folder import CONFIG

TOKENIZER = "tokenizer"


def export(
    checkpoint: MegatronCheckpoint, output: Path, *, tokenizer: Path | None = None, overwrite: bool = False
) -> list[str]:
    """Write ``output`` from the checkpoint: weights, config, model files, tokenizer, generation config, model card.

    Every tensor keeps its dtype and its bits. The folder appears when it is complete and not before.

    Args:
        tokenizer: a tokenizer folder; None: the one beside the checkpoint or in the run's data folder.

    Returns:
        What the user should know: lines about what was left out.

    Raises:
        ValueError: a tensor is missing, left over, not finite or of the wrong shape; the output exists or cannot be
            written; the tokenizer does not load or does not fit the model.
    """
    model = checkpoint.common["config"]["model"]
    groups = megatron_groups(checkpoint)
    found = tokenizer or find_tokenizer(checkpoint)
    special_tokens = _check_tokenizer(found, model["vocab_size"]) if found else {}
    dtype = checkpoint.weights[groups[0].megatron].properties.dtype
    config = to_hf_config(model, dtype=str(dtype).removeprefix("torch."), special_tokens=special_tokens)

    by_name = {group.megatron: group for group in groups}
    sizes = {name: _num_bytes(checkpoint, group) for name, group in by_name.items()}
    num_bytes = sum(sizes.values())
    card = model_card(checkpoint, config, num_bytes)
    with complete_folder(
        output, marker=CONFIG, source=checkpoint.folder, num_bytes=num_bytes, overwrite=overwrite
    ) as folder:
        write_json(folder / CONFIG, config)
        write_weights(folder, sizes, lambda name: hf_tensors(checkpoint, [by_name[name]]))
        copy_files(model_files(config["model_type"]), folder)
        if found:
            copy_files(tokenizer_files(found), folder)
        GenerationConfig(**special_tokens).save_pretrained(folder)
        copy_files([checkpoint.folder / GENERATION_CONFIG], folder)  # an imported model brings its own
        (folder / "README.md").write_text(card, encoding="utf-8")
    return [] if found else ["no tokenizer was found beside the checkpoint or in the run's data: give --tokenizer DIR"]


def megatron_groups(checkpoint: MegatronCheckpoint) -> list[WeightGroup]:
    """The weights of the model that the checkpoint's config describes.

    Raises:
        ValueError: the checkpoint holds others.
    """
    groups = weight_groups(ModelShape.from_model_section(checkpoint.common["config"]["model"]))
    check_weights(
        checkpoint.folder,
        {group.megatron: group.megatron_shape for group in groups},
        {name: tuple(entry.size) for name, entry in checkpoint.weights.items()},
        frozenset(group.megatron for group in groups if group.has_vocabulary_rows),
    )
    return groups


def hf_tensors(checkpoint: MegatronCheckpoint, groups: list[WeightGroup]) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor with its name, one Megatron tensor in memory at a time.

    Raises:
        ValueError: a value is not finite, or a file cannot be read.
    """
    for group in groups:
        tensor = checkpoint.read(group.megatron)
        for name, part in zip(group.hf, group.split(tensor), strict=True):
            if not torch.isfinite(part).all():
                raise ValueError(f"{checkpoint.folder}: {group.megatron} has values that are not finite")
            yield name, part


def find_tokenizer(checkpoint: MegatronCheckpoint) -> Path | None:
    """The tokenizer's folder beside an imported checkpoint, or in the data folder of the run that saved it."""
    data = checkpoint.common["config"].get("data", {}).get("path")
    places = [checkpoint.folder / TOKENIZER, *([Path(data) / TOKENIZER] if data else [])]
    return next((place for place in places if tokenizer_files(place)), None)


def _check_tokenizer(folder: Path, vocab_size: int) -> dict[str, int | None]:
    """Its special tokens' ids, by their keys in config.json."""
    tokenizer = load_tokenizer(folder)
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(f"tokenizer {folder} has ids up to {largest}, the model's vocabulary has {vocab_size}")
    return {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}


def _num_bytes(checkpoint: MegatronCheckpoint, group: WeightGroup) -> int:
    return math.prod(group.megatron_shape) * checkpoint.weights[group.megatron].properties.dtype.itemsize
