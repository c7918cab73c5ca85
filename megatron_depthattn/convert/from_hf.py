"""Import: a Hugging Face folder to a Megatron step folder that a run can start from, under any layout."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_depthattn.config import RunConfig, to_dict
from megatron_depthattn.convert.complete_folder import complete_folder
from megatron_depthattn.convert.hf_writer import GENERATION_CONFIG, tokenizer_files, write_tokenizer
from megatron_depthattn.convert.megatron_writer import write_megatron_checkpoint
from megatron_depthattn.convert.to_hf import TOKENIZER
from megatron_depthattn.hf.model_config import UNUSED_IN_RELEASED, normalises_keys_after_rope, to_model_section
from megatron_depthattn.hf.name_mapping import ModelShape, WeightGroup, check_weights, weight_groups
from megatron_depthattn.hf.tokenizer import load_fast_tokenizer
from megatron_depthattn.hf.weights_folder import HFFolder, read_json, some_names
from megatron_depthattn.train.step_folders import (
    GENERATION,
    MANIFEST,
    Progress,
    digest_files,
    is_run_checkpoint,
    write_manifest,
)
from megatron_depthattn.vocabulary import padded_vocab_size

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
MODEL_YAML = "model.yaml"
NO_TOKENIZER = "{} has no tokenizer: data for this model needs one"
RECOMPUTED = ("rotary_emb.inv_freq",)  # old checkpoints carry what the model computes itself


def import_checkpoint(source: HFFolder, output: Path, *, overwrite: bool = False) -> list[str]:
    """Write the step folder ``output`` from an export of ours, a Qwen3 or a released checkpoint.

    Every tensor keeps its dtype and its bits; padding rows of the vocabulary are zero. Beside the weights lie
    `model.yaml`, the config overlay of this model, and the tokenizer. The generation config is in what the checkpoint
    holds besides tensors: runs that start from it hand it on.

    Returns:
        What the user should know: lines about what will differ from the source.

    Raises:
        ValueError: the model is of a kind that cannot be trained here; a tensor is missing, left over, not finite or of
            the wrong shape; the output exists or cannot be written.
    """
    if is_run_checkpoint(output.resolve()):
        raise ValueError(
            f"{output} would be a checkpoint of the run that saves in {output.parent}: give another output"
        )
    model = to_model_section(source.config)
    groups = hf_groups(source, model)
    meta = {group.megatron: _meta(source, group) for group in groups}
    by_name = {group.megatron: group for group in groups}

    def produce(name: str) -> Tensor:
        group = by_name[name]
        merged = group.merge([read_finite(source, part) for part in group.hf])
        padding = meta[name].shape[0] - merged.shape[0]
        return torch.nn.functional.pad(merged, (0, 0, 0, padding)) if padding else merged

    run = to_dict(RunConfig())
    for key, value in model.items():
        run["model"][key] = run["model"][key] | value if isinstance(value, dict) else value
    common: dict[str, Any] = {
        "progress": dataclasses.asdict(Progress()),
        "config": run,
        "imported_from": str(source.folder),
    }
    if (source.folder / GENERATION_CONFIG).exists():
        common[GENERATION] = read_json(source.folder / GENERATION_CONFIG)
    num_bytes = sum(tensor.nbytes for tensor in meta.values())
    tokenizer, tokenizer_notes = tokenizer_of(source)
    with complete_folder(
        output, marker=MANIFEST, source=source.folder, num_bytes=num_bytes, overwrite=overwrite
    ) as folder:
        write_megatron_checkpoint(folder, meta, produce, common)
        (folder / MODEL_YAML).write_text(yaml.safe_dump({"model": model}, sort_keys=False), encoding="utf-8")
        (folder / TOKENIZER).mkdir()
        if tokenizer:
            write_tokenizer(source.folder, tokenizer, folder / TOKENIZER)
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        write_manifest(folder, digest_files(folder, files))
    return [*_differences(source, model), *tokenizer_notes]


def tokenizer_of(source: HFFolder) -> tuple[PreTrainedTokenizerFast | None, list[str]]:
    """The folder's tokenizer, or None and a line that says why: weights are worth having without one."""
    if not tokenizer_files(source.folder):
        return None, [NO_TOKENIZER.format(source.folder)]
    try:
        return load_fast_tokenizer(source.folder), []
    except ValueError as error:
        return None, [f"no tokenizer was taken along, and data for this model needs one: {error}"]


def hf_groups(source: HFFolder, model: Mapping[str, Any]) -> list[WeightGroup]:
    """The weights of ``model``.

    Raises:
        ValueError: the folder holds others, or one that is not of floating-point numbers.
    """
    groups = weight_groups(ModelShape.from_model_section(model))
    unused = RECOMPUTED + (UNUSED_IN_RELEASED if source.config["model_type"] == "llama" else ())
    found = {name: shape for name, shape in source.shapes.items() if not name.endswith(unused)}
    if model["tie_embeddings"] and {OUTPUT, EMBEDDING} <= found.keys():
        if not torch.equal(source.read(OUTPUT), source.read(EMBEDDING)):
            raise ValueError(f"{source.folder}: {OUTPUT} differs from {EMBEDDING}, and config.json says they are tied")
        del found[OUTPUT]
    check_weights(source.folder, {name: shape for group in groups for name, shape in group.hf.items()}, found)
    if others := found.keys() - source.dtypes.keys():
        raise ValueError(
            f"{source.folder} holds {some_names(others)} in another type than F64, F32, BF16, F16: save the model in "
            "one of these"
        )
    return groups


def _meta(source: HFFolder, group: WeightGroup) -> Tensor:
    """Shape and dtype of the Megatron tensor, without its numbers."""
    rows, *rest = group.megatron_shape
    if group.has_vocabulary_rows:
        rows = padded_vocab_size(rows)
    dtypes = {source.dtypes[name] for name in group.hf}
    if len(dtypes) > 1:
        raise ValueError(f"{source.folder}: {', '.join(group.hf)} have different dtypes and are one tensor in Megatron")
    return torch.empty((rows, *rest), dtype=dtypes.pop(), device="meta")


def read_finite(source: HFFolder, name: str) -> Tensor:
    """A tensor of the folder; ValueError if a value is not finite."""
    tensor = source.read(name)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{source.folder}: {name} has values that are not finite")
    return tensor


def _differences(source: HFFolder, model: Mapping[str, Any]) -> list[str]:
    """Where Megatron will not compute quite what the source computes."""
    notes = []
    padding = padded_vocab_size(model["vocab_size"]) - model["vocab_size"]
    if padding:
        notes.append(
            f"the vocabulary of {model['vocab_size']} is padded with {padding} zero rows; as always in Megatron they "
            "take part in the softmax of the training loss, until training has pushed them down"
        )
    if not normalises_keys_after_rope(source.config):
        return notes
    largest = 0.0
    for layer in range(model["num_layers"]):
        first, second = source.read(f"model.layers.{layer}.self_attn.k_norm.weight").float().chunk(2)
        largest = max(largest, ((first - second).abs() / torch.maximum(first.abs(), second.abs())).max().item())
    return [
        *notes,
        "this checkpoint normalises keys after the rotary embedding, training here does before: the same function only "
        "where k_norm's weights are equal within each rotated pair; here they differ by up to "
        f"{100 * largest:.2g} %",
    ]
