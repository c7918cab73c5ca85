"""The shapes that are measured: the released ones as `configs/` has them, and one that a CPU trains in seconds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron_depthattn.config import RunConfig

_PACKAGE = Path(__file__).resolve().parents[1]
_CONFIGS = next(each for each in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if each.is_dir())
SHAPES = {
    "cpu": Path(__file__).parent / "cpu.yaml",
    **{name: _CONFIGS / f"{name}.yaml" for name in ("360m", "1.5b", "3b")},
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run_config` reads."""
    parser.add_argument("--shape", choices=SHAPES, help="default: 360m on a GPU, else cpu (24 layers, hidden 384)")
    parser.add_argument("--layers", type=int, metavar="N", help="cut the depth to N layers; the title says so")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="sequences of a step; default: the shape's")
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=c", help="other keys of the config")


def run_config(given: argparse.Namespace, device: str, **more: Any) -> RunConfig:
    """The config of one training process with one micro-batch a step; ``more``: keys, with ``__`` for the dots.

    Raises:
        ValueError: an unknown key, a value of the wrong type, or what cannot run on this machine.
    """
    from megatron_depthattn.config import load_config, validate
    from megatron_depthattn.train.hardware import for_this_machine

    path = SHAPES[given.shape or ("360m" if device == "cuda" else "cpu")]
    values = {key.replace("__", "."): value for key, value in more.items()}
    if given.layers:
        values["model.num_layers"] = given.layers
    batch = given.micro_batch or load_config(path).train.micro_batch_size
    values["train.micro_batch_size"] = values["train.global_batch_size"] = batch
    settings = [f"{key}={'null' if value is None else value}" for key, value in values.items()]
    config = load_config(path, [*settings, *given.set])
    return for_this_machine(config, validate(config, 1, needs_data=False)).config


def config_of_length(given: argparse.Namespace, device: str, length: int, **more: Any) -> RunConfig:
    """`run_config` of sequences of ``length`` positions; as many are prepared.

    Raises:
        ValueError: as `run_config`, or ``--set`` gives another length.
    """
    config = run_config(given, device, data__sequence_length=length, model__max_position_embeddings=length, **more)
    if config.data.sequence_length != length:
        raise ValueError(
            f"--set data.sequence_length={config.data.sequence_length} where --sequence-length says {length}: give "
            "the latter alone"
        )
    return config


def shape_text(config: RunConfig, given: argparse.Namespace) -> str:
    """The model in a few words."""
    model = config.model
    cut = " (cut in depth)" if given.layers else ""
    cut += f" run {model.num_loops} times" if model.num_loops > 1 else ""
    return (
        f"{model.num_layers} layers{cut}, hidden {model.hidden_size}, {model.num_attention_heads} heads, "
        f"{model.num_query_groups} KV heads of {model.kv_channels}, {config.train.micro_batch_size} x "
        f"{config.data.sequence_length} tokens, {precision_text(config)}"
    )


def precision_text(config: RunConfig) -> str:
    """The precision in a few words."""
    precision = config.precision
    weights = ", weights in FP8" if precision.fp8_params else ""
    return f"FP8 {precision.fp8}{weights}" if precision.fp8 else precision.dtype


def implementations_on(kind: str) -> list[str]:
    """Names of the implementations of the mix that run on this kind of device, ``cpu`` or ``cuda``."""
    from megatron_depthattn.ops import DEPTH_MIX_IMPLEMENTATIONS
    from megatron_depthattn.ops.triton_mix import triton_refusal

    refused = {"triton"} if triton_refusal(torch.device(kind)) else set()
    return [name for name in DEPTH_MIX_IMPLEMENTATIONS if name not in refused]
