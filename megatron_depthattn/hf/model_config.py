"""Between the `model` section of a run's config and a Hugging Face config.json: pure dictionaries, both ways."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from megatron_depthattn.methods import definitions

Section = dict[str, Any]

SAME_MEANING = {
    # our key: Hugging Face's
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rotary_base": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
# By the model_type of those that come with model files of ours: how their classes' names begin.
CLASSES = {"depthattn": "DepthAttn", "denseformer": "DenseFormer", "attnres": "AttnRes", "mhc": "MHC"}
CODE = {kind: "depthattn" if kind == "depthattn" else "cross_layer" for kind in CLASSES}  # how their files' names end
AUTO_MAP = {
    kind: {
        "AutoConfig": f"configuration_{CODE[kind]}.{name}Config",
        "AutoModel": f"modeling_{CODE[kind]}.{name}Model",
        **{
            f"AutoModel{use}": f"modeling_{CODE[kind]}.{name}{use}"
            for use in ("ForCausalLM", "ForSequenceClassification")
        },
    }
    for kind, name in CLASSES.items()
}
# A method's own section, named as its model_type is: our key, and Hugging Face's.
METHOD_SETTINGS = {
    kind: {name: f"{kind}_{name}" for name in definitions.setting_names(kind)} for kind in definitions.DEFINITIONS
}
# What these keys may be. The first is meant where a checkpoint or config.json, older than the key, does not say.
WORDS = {
    "depth_attention_loop_sources": ("unrolled", "same_layer"),
    "depth_attention_weights": ("softmax", "uniform"),
    "depth_attention_mixes": ("value", "key", "key_value"),
}
CHOICES = {key.removeprefix("depth_attention_"): words[0] for key, words in WORDS.items()}
MODEL_TYPES = (*CLASSES, "qwen3", "llama")
# What config.json's settings are, where they are not null, which is absent. Others are handed to transformers.
INTEGERS = {"num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"}
INTEGERS |= {"intermediate_size", "vocab_size", "max_position_embeddings", "depth_attention_stride", "num_loops"}
INTEGERS |= {key for settings in METHOD_SETTINGS.values() for key in settings.values()}
NUMBERS = {"rope_theta", "rms_norm_eps", "initializer_range"}
SWITCHES = {"tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_qk_norm", "scale_embeds"}
SWITCHES |= {"use_depth_attention", "depth_attention_k_norm_after_rope"}
SECTIONS = {"rope_parameters", "rope_scaling"}
MAX_LAYERS = 10_000  # where the weights are not looked at
LAYER_COUNTS = re.compile("(?!max_).*layers?")  # not Qwen's max_window_layers, which builds nothing
MAX_COUNTS = {"num_loops": 1024, "num_labels": 1_000_000}  # of what no weight has, but work or memory is taken for
TRAINED_WITH_DOCUMENT_MASK = "trained_with_document_mask"  # in config.json, where it was: what `evaluate` notes
# What the released checkpoints carry and nothing reads, below whatever prefix.
UNUSED_IN_RELEASED = ("lm_head_layernorm.weight",)


def effective_method(model: Mapping[str, Any]) -> str:
    """What `ModelConfig.effective_method` says, of a plain section; old ones name no method."""
    return definitions.effective_method(model.get("method", "depth_attention"), model["depth_attention"]["enabled"])


def model_type(model: Mapping[str, Any]) -> str:
    """The model_type that a model section is exported as; "qwen3", which needs no files of ours, where it can be."""
    shared = effective_method(model)
    if shared in METHOD_SETTINGS:
        return shared
    return "qwen3" if shared == "vanilla" and model["num_loops"] == 1 else "depthattn"


def to_hf_config(model: Mapping[str, Any], *, dtype: str, special_tokens: Mapping[str, int | None]) -> Section:
    """config.json of a model section.

    Args:
        dtype: of the weights, as torch names it ("bfloat16").
        special_tokens: bos_token_id, eos_token_id, pad_token_id; None where there is none.
    """
    kind = model_type(model)
    config: Section = {
        "architectures": [f"{CLASSES.get(kind, 'Qwen3')}ForCausalLM"],
        "model_type": kind,
        **{theirs: model[ours] for ours, theirs in SAME_MEANING.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "use_cache": True,
        "torch_dtype": dtype,
        **special_tokens,
    }
    if kind in AUTO_MAP:
        config["auto_map"] = AUTO_MAP[kind]
    if kind in METHOD_SETTINGS:
        config |= {theirs: model[kind][ours] for ours, theirs in METHOD_SETTINGS[kind].items()}
    if kind == "depthattn":
        depth = CHOICES | model["depth_attention"]
        counted = model["num_layers"] * (model["num_loops"] if depth["loop_sources"] == "unrolled" else 1)
        config |= {
            "use_depth_attention": effective_method(model) == "depth_attention",
            "depth_attention_stride": depth["stride"] or max(1, counted // 2),
            "depth_attention_recent_window": depth["recent_window"],
            **{f"depth_attention_{key}": depth[key] for key in CHOICES},
            "depth_attention_k_norm_after_rope": False,
            "num_loops": model["num_loops"],
        }
    return config


def to_model_section(config: Mapping[str, Any]) -> Section:
    """The model section that a config.json describes: one of our exports, a Qwen3, or a released checkpoint.

    Of the sections of the methods it holds the model's own; vanilla is Depth-Attention that is not enabled.

    Raises:
        ValueError: the model is of another kind, or has parts that this stack cannot train.
    """
    config = {key: value for key, value in config.items() if value is not None}
    check_settings(config)
    _check_is_trainable(config)
    config = {"use_depth_attention": False, "depth_attention_recent_window": 0, "num_loops": 1, **config}
    rope = _rope(config)
    filled = {
        # transformers' defaults where config.json is silent
        "head_dim": config["hidden_size"] // config["num_attention_heads"] if config["model_type"] == "llama" else 128,
        "num_key_value_heads": config["num_attention_heads"],
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "rope_theta": rope.get("rope_theta", 10000.0),
    } | config
    section: Section = {ours: filled[theirs] for ours, theirs in SAME_MEANING.items()}
    heads, groups = section["num_attention_heads"], section["num_query_groups"]
    if heads % groups:
        raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}")
    section["rotary_base"] = float(section["rotary_base"])
    section["num_loops"] = config["num_loops"]
    choices = {key: config.get(f"depth_attention_{key}", default) for key, default in CHOICES.items()}
    if section["num_loops"] == 1 or not config["use_depth_attention"]:  # no rule: who starts from it has the default
        choices["loop_sources"] = "same_layer"
    if (kind := config["model_type"]) in METHOD_SETTINGS:
        own = {ours: config[theirs] for ours, theirs in METHOD_SETTINGS[kind].items()}
        return section | {"method": kind, kind: own}
    return section | {
        "method": "depth_attention",
        "depth_attention": {
            "enabled": bool(config["use_depth_attention"]),
            "stride": config.get("depth_attention_stride"),
            "recent_window": config["depth_attention_recent_window"],
            **choices,
        },
    }


def check_settings(config: Mapping[str, Any], num_tensors: int | None = None) -> None:
    """Raise for settings that are of another type than they should be, or would build more than the weights fill.

    Args:
        num_tensors: that the folder holds; every layer has one at least.

    Raises:
        ValueError: names the key, what it is and what it should be.
    """
    rules: list[tuple[set[str], Callable[[Any], bool], str]]
    rules = [(INTEGERS, _is_size, "an integer of at least 1"), (NUMBERS, _is_number, "a number")]
    rules += [(SWITCHES, lambda value: isinstance(value, bool), "true or false")]
    rules += [(SECTIONS, lambda value: isinstance(value, dict), "an object")]
    rules += [({"depth_attention_recent_window"}, lambda value: value == 0 or _is_size(value), "an integer")]
    rules += [({key}, words.__contains__, f"one of {', '.join(words)}") for key, words in WORDS.items()]
    rules += [({"layer_types"}, lambda value: isinstance(value, list), "a list")]
    for keys, is_right, wanted in rules if config.get("model_type") in MODEL_TYPES else ():
        for key in sorted(keys & config.keys()):
            if config[key] is not None and not is_right(config[key]):
                raise ValueError(f"{key}={config[key]!r} must be {wanted}")
    for key, limit in MAX_COUNTS.items():
        if isinstance(count := config.get(key), int) and count > limit:
            raise ValueError(f"{key}={count} is more than {limit}")
    if "configuration_files" in config:
        raise ValueError("configuration_files names other files to read in place of config.json: remove it")
    limit, reason = MAX_LAYERS, str(MAX_LAYERS)
    if num_tensors is not None:
        limit, reason = num_tensors, f"the weights can fill, which are {num_tensors} tensors"
    parts = [config]  # and those below, such as `text_config`
    while parts:
        part = parts.pop()
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key, count in part.items():
            if isinstance(count, int) and count > limit and LAYER_COUNTS.fullmatch(key):
                raise ValueError(f"{key}={count} is more than {reason}")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that is no float
        return False


def _rope(config: Mapping[str, Any]) -> Section:
    """Its settings, as transformers 5 or 4 writes them; null is absent."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {key: value for key, value in rope.items() if value is not None}


def normalises_keys_after_rope(config: Mapping[str, Any]) -> bool:
    """Whether keys are normalised after the rotary embedding: the released checkpoints, and ours made from them."""
    return config["model_type"] == "llama" or bool(config.get("depth_attention_k_norm_after_rope"))


def _check_is_trainable(config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type={kind!r} cannot be imported: this stack trains {', '.join(MODEL_TYPES)}")
    rope = _rope(config)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not _is_number(theta := rope.get("rope_theta", 1.0)):
        raise ValueError(f"rope_theta={theta!r} must be a number")
    unsupported = {
        "use_qk_norm: Llama models without q and k norms": kind == "llama" and not config.get("use_qk_norm"),
        "attention_bias=true": bool(config.get("attention_bias")),
        "mlp_bias=true": bool(config.get("mlp_bias")),
        f"hidden_act={config.get('hidden_act')!r} (only silu)": config.get("hidden_act", "silu") != "silu",
        "use_sliding_window=true": bool(config.get("use_sliding_window")),
        "layer_types other than full_attention": any(t != "full_attention" for t in config.get("layer_types", ())),
        f"rope type {rope_type!r} (only default)": rope_type != "default",
        "scale_embeds=true": bool(config.get("scale_embeds")),
    }
    found = [text for text, applies in unsupported.items() if applies]
    if found:
        raise ValueError(f"config.json asks for what this stack cannot train: {'; '.join(found)}")
    filled = {"num_key_value_heads", "head_dim", "rope_theta", "initializer_range", "tie_word_embeddings"}
    needed = {*SAME_MEANING.values(), *METHOD_SETTINGS.get(kind, {}).values()} - filled
    if missing := sorted(needed - config.keys()):
        raise ValueError(f"config.json does not say {', '.join(missing)}")
