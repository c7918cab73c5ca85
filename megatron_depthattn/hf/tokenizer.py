"""Load a fast tokenizer from a folder that may come from anywhere: no code of it runs, no link leads out of it.

`AutoTokenizer` alone is not enough. Where a folder names code of its own it asks on the terminal; a `tokenizer_class`
may name any attribute of transformers, such as `AutoProcessor`, which asks again; and folders saved by transformers 5
(`TokenizersBackend`, a list of `extra_special_tokens`) do not load with 4.57, though their tokenizer.json says it all.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from megatron_depthattn.hf.model_config import check_settings
from megatron_depthattn.hf.quietly import one_line, quiet
from megatron_depthattn.paths import leads_out, link_root

TOKENIZER, TOKENIZER_CONFIG, MODEL_CONFIG = "tokenizer.json", "tokenizer_config.json", "config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
MODEL_INPUTS = ["input_ids", "attention_mask"]  # what decoders take: no token types
KNOWN_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # for a bare tokenizer.json, which names none
# What transformers 4 saved there and does not open: paths of the machine that saved it.
UNREAD_FILE_KEYS = ("special_tokens_map_file", "added_tokens_file", "tokenizer_config_file", "chat_template_file")
# What transformers opens for a tokenizer has one of these, whatever its class; anything else may be a link.
SUFFIXES = (".json", ".txt", ".model", ".spm", ".codes", ".tokenizer", ".tiktoken", ".jinja")
CHAT_TEMPLATES, WEIGHTS_INDEX = "additional_chat_templates", ".index.json"


def load_fast_tokenizer(folder_or_file: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer folder, or a tokenizer.json (with its folder, if that has a tokenizer_config.json).

    Raises:
        ValueError: it does not exist or load, is not fast, needs code of its own, or has links that lead out of it.
    """
    path = Path(folder_or_file)
    if not path.exists():
        raise ValueError(f"tokenizer {path} does not exist: give a folder or a {TOKENIZER}")
    if path.name == TOKENIZER and path.with_name(TOKENIZER_CONFIG).is_file():
        path = path.parent  # it also names the special tokens
    try:
        with quiet():
            tokenizer = _load_folder(path) if path.is_dir() else _load_file(path)
    except Exception as error:  # the loaders raise bare Exception, among others
        raise ValueError(f"tokenizer {path} does not load: {one_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer {path} has no {TOKENIZER}: save it as a fast tokenizer first")
    return tokenizer


def _load_file(file: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    tokenizer.eos_token = next((token for token in KNOWN_EOS if token in tokenizer.get_vocab()), None)
    return tokenizer


def _load_folder(folder: Path) -> PreTrainedTokenizerBase:
    _check_links(folder)
    own, model = _json_object(folder / TOKENIZER_CONFIG), _json_object(folder / MODEL_CONFIG)
    for file, config in ((TOKENIZER_CONFIG, own), (MODEL_CONFIG, model)):
        code = config.get("auto_map")
        if isinstance(code, dict):
            code = code.get("AutoTokenizer")
        if code:
            raise ValueError(
                f"{file} names code of its own (auto_map {code}), which is never run: remove auto_map there to use "
                f"{TOKENIZER} without that code"
            )
    check_settings(model)  # AutoTokenizer makes a config of it
    _check_named_files(own)
    _check_special_tokens(_json_object(folder / SPECIAL_TOKENS))
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    special = own.get("extra_special_tokens")
    if isinstance(special, list) and not hasattr(transformers, "TokenizersBackend"):
        # The name in transformers 5 of what 4 calls additional_special_tokens; in 4 it holds named ones.
        options |= {"extra_special_tokens": {}, "additional_special_tokens": special}
    name = own.get("tokenizer_class") or model.get("tokenizer_class")
    is_known = _is_tokenizer_class(name) if name else model.get("model_type") in TOKENIZER_MAPPING_NAMES
    if is_known:
        return AutoTokenizer.from_pretrained(folder, **options)
    if not (folder / TOKENIZER).is_file():
        raise ValueError(
            f"there is no {TOKENIZER}, and transformers {transformers.__version__} does not know its class "
            f"({name!r} in {TOKENIZER_CONFIG}): save it as a fast tokenizer first"
        )
    return PreTrainedTokenizerFast.from_pretrained(folder, **options)


def _is_tokenizer_class(name: Any) -> bool:
    for candidate in (f"{name}Fast", str(name)):
        found = tokenizer_class_from_name(candidate)
        if isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase):
            return True
    return False


def _check_links(folder: Path) -> None:
    root, templates = link_root(folder), folder / CHAT_TEMPLATES
    for path in (*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())):
        is_opened = path.suffix in SUFFIXES and not path.name.endswith(WEIGHTS_INDEX)
        if (is_opened or path == templates) and leads_out(path, root):
            raise ValueError(f"{path.name!r} is a link out of the folder: copy the file itself there")


def _check_named_files(config: dict[str, Any]) -> None:
    """Raise for a config that has transformers open files by a path, relative to the working directory or absolute.

    A folder saved by transformers names none of these, and finds its files by their usual names.
    """
    for key, value in config.items():
        is_path = key.endswith("_file") and key not in UNREAD_FILE_KEYS and value is not None
        if is_path or (key == "init_inputs" and value):
            raise ValueError(f"{TOKENIZER_CONFIG} names a file itself ({key} {value!r}): remove {key} there")
    versions = config.get("fast_tokenizer_files") or []
    for name in versions if isinstance(versions, list) else [versions]:
        if Path(str(name)).name != name:
            raise ValueError(f"{TOKENIZER_CONFIG} names a file in another folder (fast_tokenizer_files {name!r})")


def _check_special_tokens(tokens: dict[str, Any]) -> None:
    """Raise for a map that names more than tokens: transformers hands every key to the tokenizer, `vocab_file` too."""
    for key in tokens:
        if not key.endswith(("_token", "_special_tokens")):
            raise ValueError(f"{SPECIAL_TOKENS} names {key!r}, which is no special token: remove it there")


def _json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not file.is_file():
        return {}
    value = json.loads(file.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return value
