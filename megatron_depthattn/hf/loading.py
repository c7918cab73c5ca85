"""Load an exported folder, or any other Hugging Face model folder, whole or not at all. For transformers 4.57 and 5.

transformers fills tensors that it cannot find with fresh random numbers and says so in a log line, which would give
a perplexity that looks like a bad model's. Here such a folder is an error that names the file or tensor at fault.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from megatron_depthattn.hf.modeling_cross_layer import AttnResForCausalLM, DenseFormerForCausalLM, MHCForCausalLM
from megatron_depthattn.hf.modeling_depthattn import DepthAttnForCausalLM
from megatron_depthattn.hf.quietly import one_line, quiet
from megatron_depthattn.hf.weights_folder import CONFIG, HFFolder, some_names

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
_OWN_CLASSES: dict[str, type[PreTrainedModel]] = {
    model.config_class.model_type: model
    for model in (DepthAttnForCausalLM, DenseFormerForCausalLM, AttnResForCausalLM, MHCForCausalLM)
}
_ADAPTER = "adapter_config.json"
MAX_PARAMETERS_PER_TENSOR = 8  # a file may hold as one what a model has as several, such as query, key and value


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
        raise ValueError(f"device {name!r} cannot be used here ({one_line(error)}): set cpu or auto") from error
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
        attn_implementation: "eager", "sdpa", ...; None: "sdpa" where the model has it. Never what config.json says,
            which can name code to download.

    Raises:
        ValueError: the folder is no model, its weights do not load, or a tensor is missing, unexpected or has
            another shape than the config asks for.
    """
    folder = Path(folder)
    source = _open_folder(folder)
    model_class = _model_class(source)
    attention = attn_implementation or ("sdpa" if model_class._supports_sdpa else "eager")
    options = {"attn_implementation": attention, "local_files_only": True}
    try:
        with quiet():
            config = model_class.config_class.from_pretrained(folder, **options)
            config._attn_implementation = attention
            with torch.device("meta"), _at_most_parameters(MAX_PARAMETERS_PER_TENSOR * len(source.shapes)):
                empty = model_class(config)
    except Exception as error:  # the configs and models raise nearly everything
        raise ValueError(f"{folder} does not load: {one_line(error)}") from error
    _check_held(source, empty)
    options |= {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        with quiet():
            model, info = model_class.from_pretrained(folder, config=config, dtype=dtype or "auto", **options)
    except Exception as error:
        raise ValueError(f"{folder} does not load: {one_line(error)}") from error
    complaints = {
        f"lacks {some_names(info['missing_keys'])}": info["missing_keys"],
        f"holds {some_names(info['unexpected_keys'])}, which the config has no place for": info["unexpected_keys"],
        f"does not load: {one_line(next(iter(info.get('error_msgs') or ()), ''))}": info.get("error_msgs"),
    }
    if any(complaints.values()):
        _raise_fault(source, " and ".join(text for text, keys in complaints.items() if keys))
    return model.eval()


def load_causal_config(folder: str | Path) -> PretrainedConfig:
    """Load the config alone of what `load_causal_lm` loads.

    Raises:
        ValueError: the folder is no model, or a file of it is damaged.
    """
    config_class = _model_class(_open_folder(Path(folder))).config_class
    try:
        with quiet():
            options = {"attn_implementation": "eager", "local_files_only": True}
            config: PretrainedConfig = config_class.from_pretrained(folder, **options)
            return config
    except Exception as error:
        raise ValueError(f"{folder} does not load: {one_line(error)}") from error


def _open_folder(folder: Path) -> HFFolder:
    source = HFFolder(folder)
    if (folder / _ADAPTER).exists():
        raise ValueError(f"{folder} has {_ADAPTER}, which names another model to load: merge it into that model")
    return source


def _model_class(source: HFFolder) -> type[PreTrainedModel]:
    kind = str(source.config.get("model_type"))
    if kind in _OWN_CLASSES:
        return _OWN_CLASSES[kind]
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{source.folder / CONFIG} has model_type {kind!r}, which transformers {transformers.__version__} does "
            "not know (code in the folder is never run): take another model or another transformers"
        )
    found: type[PreTrainedModel] | None = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[kind], None)
    if found is None:
        raise ValueError(f"{source.folder / CONFIG} has model_type {kind!r}, which is no causal language model")
    return found


def _check_held(source: HFFolder, model: nn.Module) -> None:
    """Raise before memory is taken for what the config asks for, which may be far more than the folder holds.

    That is tensors of other shapes, or more numbers, under whatever names; tied ones count once.
    """
    shapes, total = source.shapes, sum(math.prod(parameter.shape) for parameter in model.parameters())
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    held = sum(map(math.prod, shapes.values()))
    if source.config.get("quantization_config"):  # they are packed: a weight takes a bit at least
        wanted, held = {}, 8 * source.file_bytes()
    others = [name for name, shape in wanted.items() if shapes.get(name, shape) != shape]
    if others:
        listed = some_names(f"{name} of shape {list(shapes[name])}, not {list(wanted[name])}" for name in others)
        _raise_fault(source, f"holds {listed}")
    if total > held:
        lacking = dict(model.named_parameters()).keys() - shapes.keys()
        few = f"has {source.file_bytes()} bytes for {total} numbers"
        _raise_fault(source, f"lacks {some_names(lacking)}" if lacking else few)


def _raise_fault(source: HFFolder, fault: str) -> None:
    raise ValueError(f"{source.folder} {fault}: its weights are not those of its {CONFIG}")


@contextmanager
def _at_most_parameters(limit: int) -> Iterator[None]:
    """Stop the making of a model that has more: layers and experts, however the config names their numbers."""
    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1
        if made > limit:
            raise ValueError(f"{CONFIG} asks for more than {limit} tensors, which is more than the weights can fill")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
