"""Load an exported folder, or any other Hugging Face model folder, whole or not at all. For transformers 4.57 and 5.

transformers fills tensors that it cannot find with fresh random numbers and says so in a log line, which would give
a perplexity that looks like a bad model's. Here such a folder is refused, by the name of the file or tensor at fault.
"""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from megatron_depthattn.hf.configuration_depthattn import DepthAttnConfig
from megatron_depthattn.hf.modeling_depthattn import DepthAttnForCausalLM

CONFIG_NAME = "config.json"
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
# In the order in which transformers looks for them.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_NAMES_SHOWN = 3


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto": a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts when it was built without CUDA
        raise ValueError(f"device {name!r} cannot be used here ({_one_line(error)}): set cpu or auto") from error
    return device


def read_config(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        ValueError: the folder or the file is missing, or the file is not a JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist: give one written by tools/convert_checkpoint.py to-hf")
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} has no {CONFIG_NAME}: give a Hugging Face model folder")
    config = _read_json(folder / CONFIG_NAME)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG_NAME} holds no JSON object: export the model again")
    return config


def load_causal_lm(
    folder: str | Path, dtype: torch.dtype | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Load a causal language model on the CPU, in evaluation mode.

    A folder of ``model_type`` "depthattn" is loaded with this package's own classes, any other with those of
    transformers; code that lies in the folder is never run and nothing is downloaded.

    Args:
        folder: a Hugging Face model folder.
        dtype: type of the weights; None: the type in ``config.json``, or else that of the stored weights.
        attn_implementation: "eager", "sdpa", ...; None: transformers' choice.

    Raises:
        ValueError: the folder is no model, its weights do not load, or a tensor is missing, unexpected or has
            another shape than the config asks for.
    """
    folder = Path(folder)
    config = read_config(folder)
    shapes = _check_weight_files(folder)
    options: dict[str, Any] = {
        "dtype": "auto" if dtype is None else dtype,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # so that they are reported, and refused below
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    load: Callable[..., Any]
    model_type = config.get("model_type")
    if model_type == DepthAttnConfig.model_type:
        load = DepthAttnForCausalLM.from_pretrained
    elif model_type in CONFIG_MAPPING:
        load = AutoModelForCausalLM.from_pretrained
        options["trust_remote_code"] = False
    else:
        raise ValueError(
            f"{folder / CONFIG_NAME} has model_type {model_type!r}, which transformers {transformers.__version__} does "
            "not know (code in the folder is never run): take another model or another transformers"
        )
    try:
        with _quiet():
            model, info = load(folder, **options)
    except Exception as error:  # the loaders raise nearly everything
        raise ValueError(f"{folder} does not load: {_one_line(error)}") from error
    _refuse_partly_loaded(folder, model, info, shapes)
    return model.eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        ValueError: there is none, or it does not load.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer: copy tokenizer.json and tokenizer_config.json into it")
    try:
        with _quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # the loaders raise bare Exception, among others
        raise ValueError(f"the tokenizer in {folder} does not load: {_one_line(error)}") from error
    return tokenizer


def _check_weight_files(folder: Path) -> dict[str, list[int]]:
    """Shape by tensor name. Refuses files that are missing, cut short or not what the index says.

    transformers 4 takes the index's word for what a shard holds, and loads a model without noticing what it lacks.
    """
    name = next((name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(f"{folder} has no weights ({' or '.join(_WEIGHT_FILES[:2])}): export the model again")
    if not name.endswith(".index.json"):
        return _stored_shapes(folder / name)
    index = _read_json(folder / name)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{folder / name} has no weight_map: export the model again")
    shapes: dict[str, list[int]] = {}
    for file in sorted(set(placed.values())):
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file} is missing ({name} names it): copy or export the model again")
        stored = _stored_shapes(folder / file)
        if lacking := {tensor for tensor, its_file in placed.items() if its_file == file} - stored.keys():
            raise ValueError(
                f"{folder / file} lacks {_some(lacking)} ({name} places them there): copy or export the model again"
            )
        shapes |= stored
    return shapes


def _stored_shapes(file: Path) -> dict[str, list[int]]:
    """Shape by tensor name; reads no data, but compares a header with the length of its file."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        stored = torch.load(file, map_location="meta", weights_only=True)
        return {name: list(tensor.shape) for name, tensor in stored.items()}
    except (SafetensorError, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} does not load ({_one_line(error)}): it is cut short or damaged; copy or export the model again"
        ) from error


def _refuse_partly_loaded(folder: Path, model: PreTrainedModel, info: Any, shapes: dict[str, list[int]]) -> None:
    """Refuse a model that has tensors of which the folder holds nothing, or not what it should."""
    # Names in transformers 4, (name, stored shape, model's shape) in 5.
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    complaints = []
    if missing := set(info["missing_keys"]) - mismatched:
        complaints.append(f"lacks {_some(missing)}")
    if unexpected := info["unexpected_keys"]:
        complaints.append(f"holds {_some(unexpected)}, which the config has no place for")
    if mismatched:
        wanted = model.state_dict()
        complaints.append(
            "holds "
            + _some(
                f"{name} of shape {shapes[name]}, not {list(wanted[name].shape)}"
                if name in shapes and name in wanted
                else f"{name} of another shape"
                for name in mismatched
            )
        )
    if info.get("error_msgs"):
        complaints.append(f"does not load: {_one_line(info['error_msgs'][0])}")
    if complaints:
        raise ValueError(f"{folder} {' and '.join(complaints)}: its weights are not those of its {CONFIG_NAME}")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - _NAMES_SHOWN
    return ", ".join(ordered[:_NAMES_SHOWN]) + (f" and {more} more tensors" if more > 0 else "")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{file} is not JSON ({_one_line(error)}): export the model again") from error


def _one_line(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings and bars: what they would say is checked here, and said in an error."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
