"""Import: a Hugging Face folder to a Megatron step folder that a run can start from, under any layout."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from transformers import PreTrainedTokenizerFast

from megatron_depthattn.config import RunConfig, to_dict
from megatron_depthattn.convert.complete_folder import complete_folder
from megatron_depthattn.convert.hf_writer import (
    GENERATION_CONFIG,
    copy_files,
    tokenizer_files,
    write_model,
    write_tokenizer,
)
from megatron_depthattn.convert.to_hf import TOKENIZER
from megatron_depthattn.hf.model_config import (
    UNUSED_IN_RELEASED,
    normalises_keys_after_rope,
    to_hf_config,
    to_model_section,
)
from megatron_depthattn.hf.name_mapping import ModelShape, WeightGroup, check_weights, weight_groups
from megatron_depthattn.hf.tokenizer import load_fast_tokenizer
from megatron_depthattn.hf.weights_folder import CONFIG, HFFolder, read_json, some_names
from megatron_depthattn.train.step_folders import (
    COMMON,
    GENERATION,
    MANIFEST,
    SAVED_METADATA,
    Progress,
    digest_files,
    is_run_checkpoint,
    write_manifest,
)
from megatron_depthattn.vocabulary import padded_vocab_size

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
MODEL_YAML = "model.yaml"
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
        raise ValueError(f"{output} would be a checkpoint of the run that saves in {output.parent}: give another")
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
        return None, [f"{source.folder} has no tokenizer: data for this model needs one"]
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


def repackage(source: HFFolder, output: Path, *, overwrite: bool = False) -> list[str]:
    """Write ``output`` from a checkpoint in the released layout.

    Unlike an import, this keeps the order in which the released code normalises keys, and so the exact function.

    Returns:
        What the user should know: lines about what was left out.

    Raises:
        ValueError: the checkpoint is no released one, or does not hold the model that it describes; the output exists
            or cannot be written.
    """
    kind = source.config.get("model_type")
    if kind != "llama":
        raise ValueError(f"{source.folder} has model_type={kind!r}, not the released layout: transformers loads it")
    model = to_model_section(source.config)
    if not model["depth_attention"]["enabled"]:
        raise ValueError(f"{source.folder} has use_depth_attention=false: there is nothing to repackage")
    names = [name for group in hf_groups(source, model) for name in group.hf]
    special_tokens = {f"{part}_token_id": source.config.get(f"{part}_token_id") for part in ("bos", "eos", "pad")}
    dtype = str(source.dtypes[names[0]]).removeprefix("torch.")
    config = to_hf_config(model, dtype=dtype, special_tokens=special_tokens)
    config["depth_attention_k_norm_after_rope"] = True
    sizes = {name: source.num_bytes(name) for name in names}
    tokenizer, notes = tokenizer_of(source)
    with complete_folder(
        output, marker=CONFIG, source=source.folder, num_bytes=sum(sizes.values()), overwrite=overwrite
    ) as folder:
        found = (source.folder, tokenizer) if tokenizer else None
        write_model(folder, config, sizes, lambda name: [(name, read_finite(source, name))], found)
        copy_files([source.folder / GENERATION_CONFIG], folder)
    return notes


class _LazyPlanner(dcp.DefaultSavePlanner):
    """torch's planner, asking for a tensor when it is written and not before."""

    def __init__(self, produce: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._produce = produce

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._produce(index.fqn)


def write_megatron_checkpoint(
    folder: Path, weights: Mapping[str, Tensor], produce: Callable[[str], Tensor], common: Mapping[str, Any]
) -> None:
    """Write weights as Megatron would, into an existing empty folder.

    Args:
        weights: name to a tensor on the meta device: shape and dtype.
        produce: makes the tensor of a name; called once for each, just before it is written.
        common: what else the checkpoint holds.
    """
    # torch's writer holds all tensors of a file until the file is complete: a file each
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False)
    dcp.save(dict(weights), storage_writer=writer, planner=_LazyPlanner(produce), no_dist=True)
    torch.save({**common, "content_metadata": dict(SAVED_METADATA)}, folder / COMMON)
    save_config(CheckpointingConfig(sharded_backend="torch_dist"), str(folder))
