"""Which precision cannot run, and where; `config_check.validate` and `train.hardware` raise what they get.

Every message says what was given, why it is refused and what to set. The README's table has a row for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from megatron_depthattn.config.precision import NO_LIMIT, RECIPES, Version

if TYPE_CHECKING:
    from megatron_depthattn.config.schema import RunConfig


class Refusal(NamedTuple):
    """One combination that cannot run: its row in the README, and the words that the user will read."""

    name: str
    message: Callable[..., str | None]
    """Of the config (and of the machine, in `MACHINE_REFUSALS`): why it is refused; None: it is not."""


def precision_refusal(config: RunConfig) -> str | None:
    """What was given, why it is refused and what to set, from the config alone; None: nothing is refused."""
    return next((message for refusal in CONFIG_REFUSALS if (message := refusal.message(config))), None)


def _fp8_options(config: RunConfig) -> str | None:
    precision = config.precision
    if precision.fp8 is not None:
        return None
    given = {
        "fp8_params=true": precision.fp8_params,
        "fp8_attention=true": precision.fp8_attention,
        f"bf16_first_layers={precision.bf16_first_layers}": precision.bf16_first_layers,
        f"bf16_last_layers={precision.bf16_last_layers}": precision.bf16_last_layers,
    }
    key = next((key for key, value in given.items() if value), None)
    if key is None:
        return None
    neutral = "0" if key.startswith("bf16") else "false"
    return (
        f"precision.{key} with precision.fp8=null, where nothing is FP8; set precision.fp8 to one of "
        f"{', '.join(RECIPES)}, or precision.{key.partition('=')[0]}={neutral}"
    )


def _fp8_over_fp32(config: RunConfig) -> str | None:
    if config.precision.fp8 is None or config.precision.dtype == "bf16":
        return None
    return (
        f"precision.fp8={config.precision.fp8} with precision.dtype={config.precision.dtype}: FP8 is cast from bf16, "
        "and everything around the linear layers runs in that; set precision.dtype=bf16"
    )


def _fp8_in_local_layers(config: RunConfig) -> str | None:
    if config.precision.fp8 is None or config.model.spec != "local":  # auto takes te here, or nothing
        return None
    return (
        f"precision.fp8={config.precision.fp8} with model.spec={config.model.spec}, whose linear layers would compute "
        "in bf16 and not say so; set model.spec=te (needs TransformerEngine and an NVIDIA GPU), or precision.fp8=null"
    )


def _fp8_in_deepspeed(config: RunConfig) -> str | None:
    if config.precision.fp8 is None or config.engine.name == "megatron":
        return None
    return (
        f"precision.fp8={config.precision.fp8} with engine.name={config.engine.name}, whose ZeRO optimizer has not "
        "been tried with FP8 scaling state; set engine.name=megatron, or precision.fp8=null"
    )


def _bf16_layers_in_delayed(config: RunConfig) -> str | None:
    precision = config.precision
    if precision.fp8 is None or RECIPES[precision.fp8].has_bf16_layers:
        return None
    if not (precision.bf16_first_layers or precision.bf16_last_layers):
        return None
    return (
        f"precision.bf16_first_layers={precision.bf16_first_layers} and precision.bf16_last_layers="
        f"{precision.bf16_last_layers} with precision.fp8={precision.fp8}, whose scales are brought up to date once "
        "for all layers; set both to 0, or precision.fp8=tensorwise"
    )


def _too_many_bf16_layers(config: RunConfig) -> str | None:
    precision, layers = config.precision, config.model.num_layers
    first, last = precision.bf16_first_layers, precision.bf16_last_layers
    if first + last >= layers > 0 and (first or last):
        return (
            f"precision.bf16_first_layers={first} and precision.bf16_last_layers={last} leave none of the {layers} "
            "layers in FP8; set fewer, or precision.fp8=null"
        )
    per_stage = layers // config.parallel.pipeline
    for key, count in (("first", first), ("last", last)):
        if count > per_stage:
            return (
                f"precision.bf16_{key}_layers is {count}, but a pipeline stage holds {per_stage} layers and "
                f"Megatron-Core takes no more than one stage; set precision.bf16_{key}_layers={per_stage} or fewer, or "
                "fewer stages"
            )
    return None


def _fp8_params_in_mxfp8(config: RunConfig) -> str | None:
    precision = config.precision
    if precision.fp8 is None or not precision.fp8_params or RECIPES[precision.fp8].has_fp8_params:
        return None
    return (
        f"precision.fp8_params=true with precision.fp8={precision.fp8}: Megatron-Core gathers such weights through the "
        "gradient buffer while the forward pass runs, which this stack does not do; set precision.fp8_params=false"
    )


def _fp8_attention_in_blocks(config: RunConfig) -> str | None:
    precision = config.precision
    if precision.fp8 is None or not precision.fp8_attention or RECIPES[precision.fp8].attention_gpus:
        return None
    return (
        f"precision.fp8_attention=true with precision.fp8={precision.fp8}, in which Megatron-Core 0.16 leaves "
        "core attention in bf16; set precision.fp8_attention=false, or precision.fp8=delayed"
    )


def _fp8_attention_recomputed(config: RunConfig) -> str | None:
    if not config.precision.fp8_attention or config.recompute.granularity != "selective":
        return None
    return (
        "precision.fp8_attention=true with recompute.granularity=selective: Megatron-Core would compute core attention "
        "again without the scales of the first pass; set recompute.granularity=full or null, or "
        "precision.fp8_attention=false"
    )


def _unaligned(config: RunConfig) -> str | None:
    model, tensor = config.model, config.parallel.tensor
    if config.precision.fp8 is None:
        return None
    multiple = RECIPES[config.precision.fp8].multiple
    query, key = (heads * model.kv_channels for heads in (model.num_attention_heads, model.num_query_groups))
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.num_attention_heads times model.kv_channels, over parallel.tensor": query // tensor,
        "the rows of the QKV projection, over parallel.tensor": (query + 2 * key) // tensor,
        "model.ffn_hidden_size over parallel.tensor": model.ffn_hidden_size // tensor,
        "train.micro_batch_size times data.sequence_length, over parallel.context": (
            config.train.micro_batch_size * config.data.sequence_length // config.parallel.context
        ),
    }
    wrong = next((name for name, size in sizes.items() if size % multiple), None)
    if wrong is None:
        return None
    return (
        f"{wrong}, is {sizes[wrong]}, which is not a multiple of {multiple}: FP8 matrix products "
        f"({config.precision.fp8}) take no other; change it, or set precision.fp8=null"
    )


CONFIG_REFUSALS = (
    Refusal("an FP8 option without FP8", _fp8_options),
    Refusal("FP8 with `precision.dtype: fp32`", _fp8_over_fp32),
    Refusal("FP8 with `model.spec: local`", _fp8_in_local_layers),
    Refusal("FP8 with `engine.name: deepspeed`", _fp8_in_deepspeed),
    Refusal("`delayed` with first or last layers in bf16", _bf16_layers_in_delayed),
    Refusal("more first or last layers in bf16 than a pipeline stage holds, or all of them", _too_many_bf16_layers),
    Refusal("`mxfp8` with `precision.fp8_params`", _fp8_params_in_mxfp8),
    Refusal("`blockwise` or `mxfp8` with `precision.fp8_attention`", _fp8_attention_in_blocks),
    Refusal("`precision.fp8_attention` with `recompute.granularity: selective`", _fp8_attention_recomputed),
    Refusal("FP8 with sizes that are no multiple of 16 (`mxfp8`: 32)", _unaligned),
)


# ---- what this machine lacks


@dataclass(frozen=True)
class Machine:
    """What a precision may need."""

    gpu: str | None
    """Name of the GPU that torch sees; None: none."""
    capability: Version
    """Its compute capability."""
    cuda: str | None
    """Version of the CUDA that torch was built with."""
    transformer_engine: str | None
    """Version of the TransformerEngine that can be imported; None: none can."""
    import_error: str = ""
    """Why it cannot."""


def machine_refusal(config: RunConfig, machine: Machine) -> str | None:
    """What the config asks for and this machine does not have, and what to set; None: it has everything."""
    messages = (refusal.message(config, machine) for refusal in MACHINE_REFUSALS)
    return next((message for message in messages if message), None)


_SPEC = "model.spec=te needs"
INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]'"


def _no_transformer_engine(config: RunConfig, machine: Machine) -> str | None:
    if config.model.spec != "te" or machine.transformer_engine:
        return None
    return (
        f"{_SPEC} TransformerEngine, which cannot be imported here ({machine.import_error}): {INSTALL}, or set "
        "model.spec=local"
    )


def _no_gpu(config: RunConfig, machine: Machine) -> str | None:
    if config.model.spec != "te" or machine.gpu:
        return None
    return f"{_SPEC} an NVIDIA GPU and torch sees none: TransformerEngine has no CPU kernels; set model.spec=local"


def _old_transformer_engine(fp8: str | None, machine: Machine) -> str | None:
    least = RECIPES[fp8].transformer_engine if fp8 else ()
    if machine.transformer_engine is None or _version(machine.transformer_engine) >= least:
        return None
    return (
        f"precision.fp8={fp8} needs TransformerEngine {_dotted(least)} or later and this is "
        f"{machine.transformer_engine}: upgrade it, or set precision.fp8 to one of {_others(machine)}"
    )


def _old_cuda(fp8: str | None, machine: Machine) -> str | None:
    least = RECIPES[fp8].cuda if fp8 else ()
    if _version(machine.cuda or "0") >= least:
        return None
    return (
        f"precision.fp8={fp8} needs a torch built with CUDA {_dotted(least)} or later and this one has {machine.cuda}: "
        f"install another torch, or set precision.fp8 to one of {_others(machine)}"
    )


def _wrong_gpu(fp8: str | None, machine: Machine) -> str | None:
    if fp8 is None or _fits(machine.capability, RECIPES[fp8].gpus):
        return None
    return (
        f"precision.fp8={fp8} needs a GPU of compute capability {span(RECIPES[fp8].gpus)} and {machine.gpu} has "
        f"{_dotted(machine.capability)}: set precision.fp8 to one of {_others(machine)}"
    )


def _wrong_gpu_for_attention(config: RunConfig, machine: Machine) -> str | None:
    fp8 = config.precision.fp8
    gpus = RECIPES[fp8].attention_gpus if fp8 and config.precision.fp8_attention else None
    if gpus is None or _fits(machine.capability, gpus):
        return None
    return (
        f"precision.fp8_attention=true with precision.fp8={fp8} needs a GPU of compute capability {span(gpus)} and "
        f"{machine.gpu} has {_dotted(machine.capability)}: set precision.fp8_attention=false"
    )


def _heads_for_attention(config: RunConfig, machine: Machine) -> str | None:
    size = config.model.kv_channels
    if not config.precision.fp8_attention or size == 128 or machine.capability >= (10, 0):
        return None
    return (
        f"precision.fp8_attention=true with model.kv_channels={size} on {machine.gpu} (compute capability "
        f"{_dotted(machine.capability)}): below 10.0 cuDNN's FP8 attention trains with heads of 128 only; set "
        "precision.fp8_attention=false"
    )


def _of_recipe(message: Callable[[str | None, Machine], str | None]) -> Callable[[RunConfig, Machine], str | None]:
    return lambda config, machine: message(config.precision.fp8, machine)


def recipe_refusal(fp8: str, machine: Machine) -> str | None:
    """`machine_refusal` of a recipe alone, for a machine with TransformerEngine and a GPU."""
    checks = (_old_transformer_engine, _old_cuda, _wrong_gpu)
    return next((message for check in checks if (message := check(fp8, machine))), None)


MACHINE_REFUSALS = (
    Refusal("`model.spec: te` without TransformerEngine", _no_transformer_engine),
    Refusal("`model.spec: te` without a GPU", _no_gpu),
    Refusal("an FP8 recipe that this TransformerEngine does not have", _of_recipe(_old_transformer_engine)),
    Refusal("an FP8 recipe that this CUDA does not have", _of_recipe(_old_cuda)),
    Refusal("an FP8 recipe that this GPU does not have", _of_recipe(_wrong_gpu)),
    Refusal("FP8 attention that this GPU does not have", _wrong_gpu_for_attention),
    Refusal("FP8 attention below capability 10.0 with heads of another size than 128", _heads_for_attention),
)


def _others(machine: Machine) -> str:
    """The recipes that this machine has."""
    names = [
        name
        for name, recipe in RECIPES.items()
        if _fits(machine.capability, recipe.gpus)
        and _version(machine.cuda or "0") >= recipe.cuda
        and _version(machine.transformer_engine or "0") >= recipe.transformer_engine
    ]
    return ", ".join([*names, "null"])


def _fits(capability: Version, gpus: tuple[Version, Version]) -> bool:
    return gpus[0] <= capability < gpus[1]


def span(gpus: tuple[Version, Version]) -> str:
    """A range of compute capabilities in words."""
    least, above = gpus
    return f"{_dotted(least)} or later" + ("" if above == NO_LIMIT else f", below {_dotted(above)}")


def _version(text: str) -> Version:
    """The leading numbers of a version, as many as there are: 2.3.0.dev0+5fdd7bb is (2, 3, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match.group().split("."))) if match else ()


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
