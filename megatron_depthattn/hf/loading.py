"""Load an exported folder, or any other Hugging Face model folder, whole or not at all. For transformers 4.57 and 5.

transformers fills tensors that it cannot find with fresh random numbers and says so in a log line, which would give
a perplexity that looks like a bad model's. Here such a folder is refused, by the name of the file or tensor at fault.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from megatron_depthattn.hf.modeling_attnres import AttnResForCausalLM
from megatron_depthattn.hf.modeling_denseformer import DenseFormerForCausalLM
from megatron_depthattn.hf.modeling_depthattn import DepthAttnForCausalLM
from megatron_depthattn.hf.modeling_mhc import MHCForCausalLM
from megatron_depthattn.hf.weights_folder import CONFIG, HFFolder, some_names

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
_OWN_CLASSES: dict[str, type[PreTrainedModel]] = {
    model.config_class.model_type: model
    for model in (DepthAttnForCausalLM, DenseFormerForCausalLM, AttnResForCausalLM, MHCForCausalLM)
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


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


def load_causal_lm(
    folder: str | Path, dtype: torch.dtype | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Load a causal language model on the CPU, in evaluation mode.

    A folder of a ``model_type`` of ours ("depthattn", "denseformer", "attnres", "mhc") is loaded with this package's
    own classes, any other with those of transformers; code that lies in the folder is never run and nothing is
    downloaded.

    Args:
        folder: a Hugging Face model folder with safetensors.
        dtype: type of the weights; None: the type in ``config.json``, or else that of the stored weights.
        attn_implementation: "eager", "sdpa", ...; None: transformers' choice.

    Raises:
        ValueError: the folder is no model, its weights do not load, or a tensor is missing, unexpected or has
            another shape than the config asks for.
    """
    folder = Path(folder)
    source = HFFolder(folder)
    options: dict[str, Any] = {
        "dtype": "auto" if dtype is None else dtype,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # so that they are reported, and refused below
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    load: Callable[..., Any]
    model_type = source.config.get("model_type")
    if model_type in _OWN_CLASSES:
        load = _OWN_CLASSES[model_type].from_pretrained
    elif model_type in CONFIG_MAPPING:
        load = AutoModelForCausalLM.from_pretrained
        options["trust_remote_code"] = False
    else:
        raise ValueError(
            f"{folder / CONFIG} has model_type {model_type!r}, which transformers {transformers.__version__} does "
            "not know (code in the folder is never run): take another model or another transformers"
        )
    try:
        with _quiet():
            model, info = load(folder, **options)
    except Exception as error:  # the loaders raise nearly everything
        raise ValueError(f"{folder} does not load: {_one_line(error)}") from error
    _refuse_partly_loaded(source, model, info)
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


def _refuse_partly_loaded(source: HFFolder, model: PreTrainedModel, info: Any) -> None:
    """Refuse a model that has tensors of which the folder holds nothing, or not what it should."""
    # Names in transformers 4, (name, stored shape, model's shape) in 5.
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    complaints = []
    if missing := set(info["missing_keys"]) - mismatched:
        complaints.append(f"lacks {some_names(missing)}")
    if unexpected := info["unexpected_keys"]:
        complaints.append(f"holds {some_names(unexpected)}, which the config has no place for")
    if mismatched:
        wanted = model.state_dict()
        complaints.append(
            "holds "
            + some_names(
                f"{name} of shape {list(source.shapes[name])}, not {list(wanted[name].shape)}"
                if name in source.shapes and name in wanted
                else f"{name} of another shape"
                for name in mismatched
            )
        )
    if info.get("error_msgs"):
        complaints.append(f"does not load: {_one_line(info['error_msgs'][0])}")
    if complaints:
        raise ValueError(f"{source.folder} {' and '.join(complaints)}: its weights are not those of its {CONFIG}")


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
