"""A step of ours over one of transformers' Qwen3, the fastest baseline that a user has: one process, taking turns."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_depthattn.benchmarks.model import Model, random_microbatch, synchronize
from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.shapes import config_of_length, shape_text
from megatron_depthattn.benchmarks.timing import bootstrap_interval, spread, taking_turns

if TYPE_CHECKING:
    from megatron_depthattn.config import RunConfig

QWEN3 = "transformers' Qwen3, sdpa"
VANILLA_GOAL, DEPTH_GOAL = 0.95, 1.0
"""What a step of ours may take over one of Qwen3's."""
BOUNDS = {"loss": 1e-6, "gradient norm": 1e-5}
"""Relative difference of two models with the same weights in fp32; a model with the mix is far above (a test)."""
GRADIENTS, STEP = "forward + backward", "step with AdamW"
LENGTHS, THREADS = [512, 2048], [1, 2]


def add_peers_arguments(parser: argparse.ArgumentParser) -> None:
    """What `measure_peers` reads beside the arguments of a step."""
    parser.add_argument("--peers", action="store_true", help="over transformers' Qwen3, with our exported models")
    several = "with --peers: several (default 512 2048)"
    parser.add_argument("--sequence-length", nargs="+", type=int, metavar="N", help=several)
    several = "with --peers, on a CPU: several (default 1 2)"
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", help=several)


def measure_peers(given: argparse.Namespace) -> Result:
    """Ratios are those of a step to Qwen3's of the same round; median, quartiles, and an interval of the median.

    Raises:
        ValueError: the shape has no counterpart in transformers, or two models of the same weights do not have the
            same loss and gradient.
    """
    from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
    from megatron_depthattn.parallel.launch_env import launch_environment

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = given.sequence_length or LENGTHS
    initial_threads = torch.get_num_threads()
    threads = (given.threads or THREADS) if kind == "cpu" else [initial_threads]
    configs = _configs(given, kind, max(lengths))
    device = initialize_distributed(launch_environment())
    try:
        initialize_model_parallel()
        entries = _build(configs, device, has_optimizer=not given.no_optimizer)
        result = _empty_result(configs["vanilla"], given, kind)
        for length in lengths:
            _set_length(entries, length)
            result.figures[f"{length} tokens"] = require_agreement(entries)
        for length in lengths:
            _set_length(entries, length)
            for count in threads:
                torch.set_num_threads(count)
                place = (
                    f"{length} tokens, {count} thread{'s' if count > 1 else ''}"
                    if kind == "cpu"
                    else f"{length} tokens"
                )
                clock = time.process_time if kind == "cpu" and count == 1 else time.perf_counter
                _add_rows(result, place, entries, _run(entries, given, place, device, clock))
    finally:
        torch.set_num_threads(initial_threads)
        shut_down()
    return result


def _configs(given: argparse.Namespace, kind: str, longest: int) -> dict[str, RunConfig]:
    """Ours, vanilla first; each has a counterpart in transformers."""
    from megatron_depthattn.vocabulary import VOCAB_MULTIPLE

    keys: dict[str, Any] = {}
    if given.ops:
        if len(given.ops) > 1:
            raise ValueError(f"--ops {' '.join(given.ops)}: --peers compares one, give one")
        keys["model__depth_attention__op"] = given.ops[0]
    vanilla = config_of_length(given, kind, longest, **keys, model__depth_attention__enabled=False)
    model, precision = vanilla.model, vanilla.precision
    if precision.dtype != "fp32" or precision.fp8:
        raise ValueError(
            f"--peers in {precision.fp8 or precision.dtype}: losses are compared, set precision.dtype=fp32"
        )
    if model.num_loops > 1:
        raise ValueError(f"--peers with model.num_loops={model.num_loops}: Qwen3 has no loops, set model.num_loops=1")
    if model.vocab_size % VOCAB_MULTIPLE:
        raise ValueError(
            f"--peers with model.vocab_size={model.vocab_size}: Megatron pads it and transformers does not, set a "
            f"multiple of {VOCAB_MULTIPLE}"
        )
    strides = dict.fromkeys((max(1, model.num_layers // 2), 1)) if given.strides is None else given.strides
    depth = {
        f"stride {n}": config_of_length(given, kind, longest, **keys, model__depth_attention__stride=n) for n in strides
    }
    return {"vanilla": vanilla, **depth}


@dataclass(frozen=True)
class Entry:
    """A model of the table, the name of the one with the same weights and arithmetic, and its goal over Qwen3."""

    name: str
    model: Model | Peer
    twin: str
    goal: float | None = None


def _build(configs: Mapping[str, RunConfig], device: torch.device, *, has_optimizer: bool) -> list[Entry]:
    """Qwen3, ours, and ours in transformers, all with the same initial weights."""
    ours, theirs = [], []
    for name, config in configs.items():
        model = Model(config, device, has_optimizer=has_optimizer)
        peer = Peer(config, model.weights(), device, has_optimizer=has_optimizer)
        is_vanilla = name == "vanilla"
        twin = QWEN3 if is_vanilla else f"{name}, exported, in transformers"
        ours.append(Entry(name, model, twin, VANILLA_GOAL if is_vanilla else DEPTH_GOAL))
        theirs.append(Entry(twin, peer, name))
        print(f"{name}: ready", file=sys.stderr, flush=True)
    return [theirs[0], *ours, *theirs[1:]]


def _set_length(entries: list[Entry], length: int) -> None:
    for entry in entries:
        entry.model.set_length(length)


class Peer:
    """What a model of ours is in transformers, with torch's AdamW, stepped as its users write it."""

    def __init__(
        self, config: RunConfig, weights: Mapping[str, Tensor], device: torch.device, *, has_optimizer: bool
    ) -> None:
        self._model = transformers_model(config).to(device).train()
        load_weights(self._model, config, weights)
        self._parameters = [*self._model.parameters()]
        self._clip = config.optimizer.grad_clip
        self._optimizer = self._build_optimizer(config) if has_optimizer else None
        self._whole = self._batch = random_microbatch(config, device)

    def _build_optimizer(self, config: RunConfig) -> tuple[torch.optim.AdamW, Any]:
        """torch's fastest variant, with our settings and schedule."""
        from megatron_depthattn.train.build import build_schedule

        settings = config.optimizer
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._parameters if p.dim() > 1]},
            {"params": [p for p in self._parameters if p.dim() <= 1], "wd_mult": 0.0},
        ]
        betas = (settings.beta1, settings.beta2)
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
        return optimizer, build_schedule(config, optimizer)

    def update(self) -> float:
        """A whole training step; the mean loss."""
        assert self._optimizer, "built without an optimizer"
        optimizer, schedule = self._optimizer
        schedule.step(increment=1)
        loss = self.gradients()
        if self._clip > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip, foreach=True)
        optimizer.step()
        return loss

    def gradients(self) -> float:
        """Forward and backward from gradients that are not there; the mean loss."""
        self._model.zero_grad(set_to_none=True)
        tokens, labels = self._batch["tokens"], self._batch["labels"]
        # With the mask that collators make, all ones, 4.57 attends by is_causal; without a mask and a cache it makes
        # one of [length, length] and repeats the keys: 0.94 of the time at 512 tokens, 0.71 at 2048.
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
        loss = self._model(**given, labels=labels, shift_labels=labels).loss
        loss.backward()
        return float(loss.detach())

    def gradient_norm(self) -> float:
        """L2 norm of what `gradients` left."""
        return float(torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None]))

    def set_length(self, length: int) -> None:
        """Take the first ``length`` positions of every sequence from now on."""
        self._batch = {name: tensor[:, :length].contiguous() for name, tensor in self._whole.items()}


def transformers_model(config: RunConfig) -> torch.nn.Module:
    """The class that an export of this config names, in fp32, attending by `scaled_dot_product_attention`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_depthattn.hf.configuration_depthattn import DepthAttnConfig
    from megatron_depthattn.hf.model_config import to_hf_config
    from megatron_depthattn.hf.modeling_depthattn import DepthAttnForCausalLM

    settings = to_hf_config(dataclasses.asdict(config.model), dtype="float32", special_tokens={})
    is_vanilla = settings["model_type"] == "qwen3"
    hf_config = (Qwen3Config if is_vanilla else DepthAttnConfig)(**settings, attn_implementation="sdpa")
    return (Qwen3ForCausalLM if is_vanilla else DepthAttnForCausalLM)(hf_config)


def load_weights(model: torch.nn.Module, config: RunConfig, weights: Mapping[str, Tensor]) -> None:
    """Fill the parameters of `transformers_model` with ``weights``, named as Megatron's local modules are."""
    from megatron_depthattn.hf.name_mapping import ModelShape, weight_groups

    local = {
        "self_attention.linear_qkv.layer_norm": "input_layernorm.",
        "mlp.linear_fc1.layer_norm": "pre_mlp_layernorm.",
    }
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for group in weight_groups(ModelShape.from_model_section(dataclasses.asdict(config.model))):
            name = group.megatron
            for checkpoint, module in local.items():
                name = name if name in weights else name.replace(f"{checkpoint}_", module)
            for theirs, part in zip(group.hf, group.split(weights[name]), strict=True):
                parameters.pop(theirs).copy_(part)
    assert not parameters, f"not filled: {[*parameters]}"


def require_agreement(entries: list[Entry]) -> dict[str, dict[str, float]]:
    """Loss and gradient norm of every model.

    Raises:
        ValueError: one of ours is further from its twin's than its bound, so the two do not compute the same.
    """
    found: dict[str, dict[str, float]] = {}
    for entry in entries:
        loss = entry.model.gradients()
        found[entry.name] = {"loss": loss, "gradient norm": entry.model.gradient_norm()}
    for entry in entries:
        for what, bound in BOUNDS.items():
            own, other = found[entry.name][what], found[entry.twin][what]
            if not abs(own / other - 1) <= bound:
                raise ValueError(
                    f"{what} of {entry.name} is {own:.9g}, of {entry.twin} with the same weights {other:.9g}: they do "
                    "not compute the same, so nothing is measured"
                )
    return found


Seconds = dict[str, dict[str, list[float]]]
"""By what was timed and the model's name, one a round."""


def _run(
    entries: list[Entry], given: argparse.Namespace, place: str, device: torch.device, clock: Callable[[], float]
) -> Seconds:
    """Gradients and whole steps of every model, in turns."""
    works = [GRADIENTS] if given.no_optimizer else [GRADIENTS, STEP]
    seconds: Seconds = {work: {entry.name: [] for entry in entries} for work in works}
    for turn in range(-given.warm_up, given.rounds):
        for entry in taking_turns(entries, turn):
            for work in works:
                synchronize(device)
                started = clock()
                entry.model.gradients() if work == GRADIENTS else entry.model.update()
                synchronize(device)
                if turn >= 0:
                    seconds[work][entry.name].append(clock() - started)
        print(f"{place}: round {turn + 1} of {given.rounds}", file=sys.stderr, flush=True)
    return seconds


def _empty_result(config: RunConfig, given: argparse.Namespace, kind: str) -> Result:
    works = [GRADIENTS] if given.no_optimizer else [GRADIENTS, STEP]
    columns = [(f"{work}, ms: median", "over Qwen3: median (quartiles)", "95 % of the median") for work in works]
    shape = shape_text(config, given).replace(f"x {config.data.sequence_length} tokens", "x n tokens")
    return Result(
        title=f"A step over one of transformers' Qwen3: {shape}, {given.rounds} rounds",
        columns=["model", *(column for three in columns for column in three), "goal", "verdict"],
        notes=[
            f"recompute: {config.recompute.granularity or 'none'}, layers: {config.model.spec}, mix: "
            f"{config.model.depth_attention.op}; all models in one process with the same weights, taking turns; a "
            "ratio is that of two steps of the same round; interval: percentile bootstrap",
            "before anything is timed: loss and gradient norm of ours and of the same model in transformers agree to "
            f"{BOUNDS['loss']:.0e} and {BOUNDS['gradient norm']:.0e} at every length",
            "a step: zeroed gradients, forward, backward, clipping, AdamW, the schedule, the loss on the host; of "
            "transformers without a cache, attention_mask all ones (is_causal), torch's AdamW(fused=True): the fastest "
            "here",
            *(["seconds: CPU time of the process with one thread, on the wall with several"] if kind == "cpu" else []),
            "verdict: met or missed if all of the interval is on one side of the goal, else open; of every figure in "
            "the row",
        ],
    )


def _add_rows(result: Result, place: str, entries: list[Entry], seconds: Seconds) -> None:
    for entry in entries:
        cells, verdicts, figures = [], [], {}
        for work, times in seconds.items():
            own, base = times[entry.name], times[QWEN3]
            ratios = [one / other for one, other in zip(own, base, strict=True)]
            low, high = bootstrap_interval(ratios)
            figures[work] = {"seconds": own, "ratio": spread(ratios).median, "interval": [low, high]}
            is_base = entry.name == QWEN3
            cells += [f"{spread(own).median * 1e3:.1f}", "1" if is_base else spread(ratios).text(1, 3)]
            cells += ["" if is_base else f"{low:.3f} to {high:.3f}"]
            if entry.goal is not None:
                verdicts.append("met" if high <= entry.goal else "missed" if low > entry.goal else "open")
        name = f"**{place}**: {entry.name}" if entry.name == QWEN3 else entry.name
        goal = "" if entry.goal is None else f"{entry.goal:.2f}"
        result.rows.append([name, *cells, goal, ", ".join(verdicts)])
        result.figures[f"{place}, {entry.name}"] = figures | {"goal": entry.goal, "verdicts": verdicts}
        result.is_over |= "missed" in verdicts
