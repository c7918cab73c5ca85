"""The models that are measured: the shipped sizes and one that a CPU trains in seconds, and steps of one of them."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_depthattn.cli.common import check, shipped_folder
from megatron_depthattn.config import RunConfig, load_config, to_dict, validate
from megatron_depthattn.config.pipeline import EVEN
from megatron_depthattn.estimate.memory import rank_memory
from megatron_depthattn.estimate.paper import TITLES
from megatron_depthattn.model.source_plan import default_stride

if TYPE_CHECKING:
    from megatron_depthattn.train.step import Microbatch, StepResult

SHAPES = {
    **{name: Path(__file__).parent / f"{name}.yaml" for name in ("cpu", "84m")},
    **{name: shipped_folder("configs") / f"{name}.yaml" for name in ("410m", "360m", "500m", "710m", "1.5b", "3b")},
}


SHARE_OF_MEMORY = 0.8
"""Of what is free, for models that stand side by side."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run_config` reads, and the strides."""
    parser.add_argument("--shape", choices=SHAPES, help="default: 410m on a GPU, else cpu (24 layers, hidden 384)")
    parser.add_argument("--layers", type=int, metavar="N", help="cut the depth to N layers; the title says so")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="sequences of a step; default: the shape's")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="default: the shape's")
    parser.add_argument("--strides", nargs="+", type=int, metavar="N", help="default: half the layers, and 1")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="other keys of the config"
    )


def run_config(given: argparse.Namespace, kind: str, keys: Mapping[str, Any] | None = None) -> RunConfig:
    """The config of one training process with one micro-batch a step on a device of this kind, with these keys.

    Raises:
        ValueError: an unknown key, one that is set twice, a value of the wrong type, or what this machine cannot run.
    """
    from megatron_depthattn.train.hardware import for_this_machine

    path = shape_path(given, kind)
    batch = given.micro_batch or load_config(path).train.micro_batch_size
    values = {"train.micro_batch_size": batch, "train.global_batch_size": batch}
    values |= {"train.batch_ramp": None, **(keys or {})}
    values |= {"model.num_layers": given.layers} if given.layers else {}
    if length := given.sequence_length:
        values |= {"data.sequence_length": length, "model.max_position_embeddings": length}
    twice = values.keys() & {text.partition("=")[0] for text in given.set}
    check((bool(twice), f"--set {' '.join(sorted(twice))}: the benchmark sets it by other options, leave it out"))
    settings = [f"{key}={'null' if value is None else value}" for key, value in values.items()]
    config = load_config(path, [*settings, *given.set])
    return for_this_machine(config, validate(config, 1, needs_data=False)).config


def mixing_configs(
    given: argparse.Namespace, kind: str, ops: list[str], keys: Mapping[str, Any] | None = None
) -> dict[str, RunConfig]:
    """By name: vanilla, then every stride with every implementation of the mix."""
    keys = keys or {}
    configs = {"vanilla": run_config(given, kind, {**keys, "model.depth_attention.enabled": False})}
    model = configs["vanilla"].model
    half = default_stride(model.num_layers, model.num_loops, model.depth_attention.loop_sources)
    for stride in given.strides or dict.fromkeys((half, 1)):
        for op in ops:
            mix = {} if op == "auto" else {"model.depth_attention.op": op}  # auto: --set may choose another
            config = run_config(given, kind, {**keys, **mix, "model.depth_attention.stride": stride})
            configs[f"stride {stride}, {config.model.depth_attention.op}"] = config
    return configs


def single_config(path: str | Path, settings: Sequence[str] = ()) -> RunConfig:
    """A config with one micro-batch a step on one device. One that is cut in depth has the default stride.

    Raises:
        ValueError: as `run_config`.
    """
    from megatron_depthattn.train.hardware import for_this_machine

    alone = [f"parallel.{axis}=1" for axis in ("tensor", "pipeline", "virtual_pipeline", "context")]
    alone += ["parallel.sequence=false", *(f"parallel.{key}=null" for key in EVEN)]
    settings, whole = [*alone, *settings], load_config(path)
    config = load_config(path, settings)
    if config.model.num_layers != whole.model.num_layers and not any(".stride=" in text for text in settings):
        settings.append("model.depth_attention.stride=null")
    batch = [f"train.global_batch_size={config.train.micro_batch_size}", "train.batch_ramp=null"]
    config = load_config(path, [*settings, *batch])
    return for_this_machine(config, validate(config, 1, needs_data=False)).config


def method_configs(given: argparse.Namespace, kind: str) -> dict[str, RunConfig]:
    """The models of the paper's table 3 by their titles, vanilla first, of one shape, cut as ``given`` says.

    Where it does not say how deep, they have the most layers (all, a half, a third, ...) with which they fit side by
    side into ``SHARE_OF_MEMORY`` of what is free.

    Raises:
        ValueError: as `run_config`; they do not fit with one layer.
    """
    keys = {"model.depth_attention.stride": given.strides[0] if given.strides else None}
    named = {"vanilla": "vanilla"} | {title: method for method, title in TITLES.items()}

    def configs(layers: int | None) -> dict[str, RunConfig]:
        own = {**keys, "model.num_layers": layers} if layers else keys
        return {title: run_config(given, kind, {**own, "model.method": method}) for title, method in named.items()}

    if given.layers:
        return configs(None)
    whole, free = [*configs(None).values()], free_bytes(kind)
    most = whole[0].model.num_layers
    for divisor in range(1, most + 1):
        models = [dataclasses.replace(config.model, num_layers=most // divisor) for config in whole]
        found = [dataclasses.replace(config, model=model) for config, model in zip(whole, models, strict=True)]
        ranks = [rank_memory(config, 1, pipeline_rank=0, on_gpu=kind == "cuda") for config in found]
        kept = sum(rank.weights + rank.gradients + (0 if given.no_optimizer else rank.optimizer) for rank in ranks)
        needed = kept + max(rank.activations + rank.sources + rank.working for rank in ranks)
        if needed <= SHARE_OF_MEMORY * free:
            return configs(most // divisor)
    raise ValueError(
        f"with one layer the five models need {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free: set "
        "--no-optimizer, a smaller --micro-batch or --set model.hidden_size=... model.vocab_size=..."
    )


def free_bytes(kind: str) -> int:
    """Memory of the first device of this kind, or of this machine, that nobody uses."""
    if kind == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return int(psutil.virtual_memory().available)


def shape_path(given: argparse.Namespace, kind: str) -> Path:
    """The config of ``--shape``, or the default on this kind of device."""
    return SHAPES[given.shape or ("410m" if kind == "cuda" else "cpu")]


def cuts_text(config: RunConfig, whole: RunConfig) -> str:
    """What of the whole model is cut, in a note; empty if nothing is."""
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
    pairs = [(size, getattr(config.model, size), getattr(whole.model, size)) for size in sizes]
    return ", ".join(f"{size} {own} of {all_}" for size, own, all_ in pairs if own != all_)


def shape_text(config: RunConfig, given: argparse.Namespace) -> str:
    """The model in a few words."""
    model, precision = config.model, config.precision
    cut = " (cut in depth)" if given.layers else ""
    cut += f" run {model.num_loops} times" if model.num_loops > 1 else ""
    weights = ", weights in FP8" if precision.fp8_params else ""
    return (
        f"{model.num_layers} layers{cut}, hidden {model.hidden_size}, {model.num_attention_heads} heads, "
        f"{model.num_query_groups} KV heads of {model.kv_channels}, {config.train.micro_batch_size} x "
        f"{config.data.sequence_length} tokens, {f'FP8 {precision.fp8}{weights}' if precision.fp8 else precision.dtype}"
    )


def implementations_on(kind: str) -> list[str]:
    """Names of the implementations of the mix that run on this kind of device, ``cpu`` or ``cuda``."""
    from megatron_depthattn.ops import DEPTH_MIX_IMPLEMENTATIONS
    from megatron_depthattn.ops.triton_mix import triton_unsupported

    unsupported = {"triton"} if triton_unsupported(torch.device(kind)) else set()
    return [name for name in DEPTH_MIX_IMPLEMENTATIONS if name not in unsupported]


class Model:
    """A model initialised as a run initialises it, with its optimizer; a step is on random tokens if none are given."""

    def __init__(
        self, config: RunConfig, device: torch.device, *, has_optimizer: bool = True, documents: int | None = None
    ) -> None:
        from megatron_depthattn.train.build import build_model, build_optimizer

        self.config, self.device = config, device
        self.chunks = build_model(config, device)
        built: tuple[Any, Any] = build_optimizer(config, self.chunks) if has_optimizer else (None, None)
        self.optimizer, self.schedule = built
        self.shape = (config.train.micro_batch_size, config.data.sequence_length)
        self._batches = [random_microbatch(config, device, documents)]

    def update(self, batches: list[Microbatch] | None = None) -> StepResult:
        """A whole training step."""
        from megatron_depthattn.train.step import train_step

        self.schedule.step(increment=1)
        return train_step(self.chunks, self.optimizer, batches or self._batches, self.shape)

    def gradients(self) -> float:
        """Forward and backward from zeroed gradients; the mean loss."""
        from megatron_depthattn.train.step import run_microbatches

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        return run_microbatches(self.chunks, self._batches, self.shape, forward_only=False)

    def gradient(self) -> dict[str, Tensor]:
        """What was left in the gradient buffers, by parameter: fp32."""
        from megatron.core.utils import unwrap_model

        (model,) = unwrap_model(self.chunks)
        return {name: parameter.main_grad.detach().clone() for name, parameter in model.named_parameters()}

    def exported(self, dtype: torch.dtype) -> torch.nn.Module:
        """Its export as transformers load it."""
        from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
        from megatron_depthattn.convert.to_hf import export
        from megatron_depthattn.hf.loading import load_causal_lm
        from megatron_depthattn.train.checkpoint import checkpoint_state
        from megatron_depthattn.train.megatron_state import MegatronState
        from megatron_depthattn.train.save import CheckpointSaver
        from megatron_depthattn.train.step_folders import Progress

        with tempfile.TemporaryDirectory() as work:
            state = checkpoint_state(MegatronState(self.chunks, None), None, config=to_dict(self.config))
            saver = CheckpointSaver(Path(work, "checkpoints"))
            saver.save(Progress(), state)
            if (outcome := saver.take_outcome()) and outcome.error:
                raise OSError(outcome.error)
            export(MegatronCheckpoint(Path(work, "checkpoints")), Path(work, "exported"))
            return load_causal_lm(Path(work, "exported"), dtype=dtype).to(self.device)


def random_microbatch(config: RunConfig, device: torch.device, documents: int | None = None) -> Microbatch:
    """``tokens`` and ``labels`` of one micro-batch, the same for every model of one vocabulary.

    ``documents``: the length of those that each sequence is cut into, which then do not see each other.
    """
    size, length = config.train.micro_batch_size, config.data.sequence_length
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.model.vocab_size, (size, length + 1), generator=generator).to(device)
    batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    if documents:
        is_last = (torch.arange(length) + 1) % documents == 0
        batch["loss_mask"] = ~is_last.expand(size, length).to(device)
        batch["cu_seqlens"] = document_borders(size, length, documents)
    return batch


def document_borders(size: int, length: int, documents: int) -> Tensor:
    """Of ``size`` sequences in one row, each cut into documents of one length and what is left."""
    starts = [row * length + start for row in range(size) for start in range(0, length, documents)]
    return torch.tensor([*starts, size * length], dtype=torch.int32)
