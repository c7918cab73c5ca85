"""Export: a Megatron step folder to a Hugging Face folder that loads without this package."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from megatron_depthattn.convert.complete_folder import complete_folder
from megatron_depthattn.convert.hf_writer import GENERATION_CONFIG, tokenizer_files, write_json, write_model
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.convert.model_card import model_card
from megatron_depthattn.data.tokenizer import file_sha256
from megatron_depthattn.hf.model_config import TRAINED_WITH_DOCUMENT_MASK, to_hf_config
from megatron_depthattn.hf.name_mapping import ModelShape, WeightGroup, check_weights, weight_groups
from megatron_depthattn.hf.tokenizer import load_fast_tokenizer
from megatron_depthattn.hf.weights_folder import CONFIG, read_json
from megatron_depthattn.paths import leads_out, link_root
from megatron_depthattn.train.step_folders import GENERATION

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
    loaded = _load_fitting(found, model["vocab_size"]) if found else None
    kinds = ("bos", "eos", "pad") if loaded else ()
    special_tokens = {f"{kind}_token_id": getattr(loaded, f"{kind}_token_id") for kind in kinds}
    dtype = checkpoint.weights[groups[0].megatron].properties.dtype
    config = to_hf_config(model, dtype=str(dtype).removeprefix("torch."), special_tokens=special_tokens)
    if checkpoint.common["config"].get("data", {}).get("document_mask"):
        config[TRAINED_WITH_DOCUMENT_MASK] = True

    generation = _imported_generation(checkpoint, special_tokens.get("eos_token_id"))
    by_name = {group.megatron: group for group in groups}
    itemsizes = {name: entry.properties.dtype.itemsize for name, entry in checkpoint.weights.items()}
    sizes = {name: math.prod(group.megatron_shape) * itemsizes[name] for name, group in by_name.items()}
    num_bytes = sum(sizes.values())
    card = model_card(checkpoint, config, num_bytes)
    with complete_folder(
        output, marker=CONFIG, source=checkpoint.folder, num_bytes=num_bytes, overwrite=overwrite
    ) as folder:
        tokenizer_found = (found, loaded) if found and loaded else None
        write_model(folder, config, sizes, lambda name: hf_tensors(checkpoint, [by_name[name]]), tokenizer_found)
        GenerationConfig(**special_tokens).save_pretrained(folder)
        if generation:
            write_json(folder / GENERATION_CONFIG, generation)
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
    """The tokenizer's folder beside an imported checkpoint, or in the data folders of the run that saved it.

    Raises:
        ValueError: the data folders hold different ones, or another one than their manifest says; it is a link to
            a folder elsewhere.
    """
    data = checkpoint.common["config"].get("data", {})
    paths = [stream["path"] for stream in data.get("streams") or ()] or [data.get("path")]
    for place in (checkpoint.folder, *(Path(path) for path in paths if path)):
        if leads_out(place / TOKENIZER, link_root(place)):
            raise ValueError(f"{place / TOKENIZER} is a link out of its folder: to follow it, give it as --tokenizer")
    corpora = [Path(path) for path in paths if path and tokenizer_files(Path(path) / TOKENIZER)]
    if tokenizer_files(checkpoint.folder / TOKENIZER):
        return checkpoint.folder / TOKENIZER
    digests = {corpus: _tokenizer_digest(corpus) for corpus in corpora}
    if len(set(digests.values())) > 1:
        raise ValueError(f"{', '.join(map(str, corpora))} hold different tokenizers: give --tokenizer DIR")
    return corpora[0] / TOKENIZER if corpora else None


def _tokenizer_digest(corpus: Path) -> str:
    """Of the tokenizer.json that made a corpus."""
    file = corpus / TOKENIZER / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}: give --tokenizer DIR")
    digest = file_sha256(file)
    manifest = corpus / "manifest.json"
    made_by = read_json(manifest).get("tokenizer_sha256", digest) if manifest.is_file() else digest
    if digest != made_by:
        raise ValueError(f"{file} did not make the data (tokenizer_sha256 in {manifest}): give --tokenizer DIR")
    return digest


def _load_fitting(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer, whose ids the model has all."""
    tokenizer = load_fast_tokenizer(folder)
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(f"tokenizer {folder} has ids up to {largest}, the model's vocabulary has {vocab_size}")
    return tokenizer


def _imported_generation(checkpoint: MegatronCheckpoint, end: int | None) -> Mapping[str, Any] | None:
    """The generation config of the imported model that the run started from; it also stops at ``end``, as trained."""
    generation: dict[str, Any] | None = checkpoint.common.get(GENERATION)
    file = checkpoint.folder / GENERATION_CONFIG  # imports of earlier versions
    if generation is None and file.is_file():
        return read_json(file)
    known = (generation or {}).get("eos_token_id")
    ends = known if isinstance(known, list) else [known] if known is not None else []
    if generation is None or end is None or end in ends:
        return generation
    return generation | {"eos_token_id": [*ends, end] if ends else end}
