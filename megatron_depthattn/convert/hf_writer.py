"""Write a Hugging Face model folder: the weights file by file, and what lies beside them."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_depthattn import hf
from megatron_depthattn.hf.model_config import AUTO_MAP, CODE
from megatron_depthattn.hf.tokenizer import MODEL_INPUTS
from megatron_depthattn.hf.weights_folder import CONFIG, INDEX
from megatron_depthattn.paths import leads_out, link_root

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
)
"""All that is read of a tokenizer; a folder's code, and files that only look like these, are left where they are."""
GENERATION_CONFIG = "generation_config.json"
MAX_SHARD_BYTES = 500 << 20  # what is held in memory at a time, about twice


def write_model(
    folder: Path,
    config: Mapping[str, Any],
    sizes: Mapping[str, int],
    produce: Callable[[str], Iterable[tuple[str, Tensor]]],
    tokenizer: tuple[Path, PreTrainedTokenizerFast] | None,
) -> None:
    """Write config, weights, the model's code, and the tokenizer of a folder.

    Weights go to safetensors files of at most ``MAX_SHARD_BYTES`` (a larger tensor has its own) and, for several, an
    index.

    Args:
        sizes: bytes of each unit: tensors that are made together and stay in one file.
        produce: names and tensors of a unit; called once for each, in order.
        tokenizer: where it was loaded from, and it.
    """
    write_json(folder / CONFIG, config)
    copy_files(model_files(config["model_type"]), folder)
    if tokenizer:
        write_tokenizer(*tokenizer, folder)
    plan = split_state_dict_into_shards_factory(
        dict(sizes),  # type: ignore[arg-type] # sizes stand for the tensors
        get_storage_size=lambda num_bytes: num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_BYTES,
    )
    weight_map: dict[str, str] = {}
    for filename, units in plan.filename_to_tensors.items():
        # copies: safetensors rejects tensors that share memory, such as the parts of one Megatron tensor
        tensors = {name: tensor.clone() for unit in units for name, tensor in produce(unit)}
        save_file(tensors, folder / filename, metadata={"format": "pt"})
        shutil.copymode(folder / CONFIG, folder / filename)  # safetensors makes files that only their owner reads
        weight_map |= dict.fromkeys(tensors, filename)
        del tensors  # before the next file's are made
    if len(plan.filename_to_tensors) > 1:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": weight_map})


def model_files(model_type: str) -> list[Path]:
    """The code of a model, which lies beside the weights so that they load without this package; none for Qwen3."""
    if model_type not in AUTO_MAP:
        return []
    names = dict.fromkeys(("depthattn", CODE[model_type]))  # the others import from Depth-Attention's
    return [Path(hf.__path__[0]) / f"{part}_{name}.py" for name in names for part in ("configuration", "modeling")]


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy those that exist, under their names.

    Raises:
        ValueError: one is a link to a file elsewhere.
    """
    for file in files:
        if leads_out(file, link_root(file.parent)):
            raise ValueError(f"{file} is a link out of its folder, which is not followed: copy the file itself there")
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def tokenizer_files(folder: Path) -> list[Path]:
    """A tokenizer's files in a model folder or a folder of its own."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def write_tokenizer(source: Path, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Copy the files of a tokenizer that was loaded from ``source``, and say what transformers would guess wrongly.

    Its class: transformers 5 saves one that 4 does not have, and where ours stands for another it is the plain one.
    What it makes: by default also token types, which the models do not take.
    """
    copy_files(tokenizer_files(source), folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    config |= {"model_input_names": MODEL_INPUTS}
    if type(tokenizer) is PreTrainedTokenizerFast:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # __name__ in transformers 5 is one that 4 lacks
    elif not config.get("tokenizer_class"):  # the model's config.json said it, which is not copied
        config["tokenizer_class"] = type(tokenizer).__name__.removesuffix("Fast")
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 5's name of what 4 and 5 read
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(path, config)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as Hugging Face's files are: indented, with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
