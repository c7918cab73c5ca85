"""Measure this machine for `machine.py`: torchrun -m megatron_depthattn.estimate.calibrate CONFIG.json MACHINE.json

All ranks of the world measure at the same time, since in training they share caches, memory and links. Measured are one
layer of the config and what stands around the layers, for micro-batches of several sizes, whole and cut for all ranks;
its matrix products one by one, passes over memory, and collectives of several sizes. No layout, no schedule and no
optimizer step is run.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_depthattn.config import ModelConfig, RunConfig, from_dict
from megatron_depthattn.estimate.machine import (
    COLLECTIVES,
    PRESETS,
    Cost,
    LayerCost,
    Machine,
    layer_settings,
    save_machine,
)
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.train.build import build_chunk, transformer_config
from megatron_depthattn.train.hardware import resolve_here
from megatron_depthattn.vocabulary import padded_vocab_size

PASS_BYTES = [3 << 10, 3 << 14, 3 << 17, 3 << 20, 3 << 22, 3 << 24]
LINK_BYTES = [1 << 10, 1 << 14, 1 << 17, 1 << 19, 1 << 21, 1 << 23, 1 << 25]


def calibrate(config: RunConfig, device: torch.device, budget: float = 0.05) -> Machine:
    """Measure; call on all ranks, after `initialize_distributed` and `initialize_model_parallel`.

    Args:
        config: whose products are measured.
        budget: seconds for each single figure.
    """
    config, clock = resolve_here(config).config, _Clock(device, budget)
    world, dtype = dist.get_world_size(), config.precision.dtype
    passes = _passes(clock, device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    preset = next((preset for key, preset in PRESETS.items() if key in name), None)
    links = {kind: Cost(((0.0, 0.0),)) for kind in COLLECTIVES}
    assumed: tuple[str, ...] = ()
    if world > 1:
        links = {kind: _link(clock, kind, device) for kind in COLLECTIVES}
    between, node = links, world
    if preset:
        between = dict(preset.inter_node)
        assumed = (f"links between nodes are those of {preset.name}: {preset.assumed[0]}",)
        if world == 1:
            links, node = dict(preset.intra_node), preset.devices_per_node
            assumed = (f"links of {preset.name} (one process measures none): {preset.assumed[0]}",)
    return Machine(
        name=f"{world} x {name}",
        memory_gb=torch.cuda.get_device_properties(device).total_memory / 1e9 if on_gpu else None,
        devices_per_node=node,
        products={dtype: _products(clock, config, device)},
        attention={dtype: _attention(clock, config, device)},
        passes=passes,
        exponential_seconds=_exponential(clock, config, passes, device),
        host_seconds=_host_seconds(_Clock(device, 20 * budget), config, device),
        is_host=not on_gpu,
        layers={str(degree): _layer(clock, config, device, degree) for degree in _degrees(config)},
        calibrated_for=layer_settings(config),
        intra_node=links,
        inter_node=between,
        peak_tflops=dict(preset.peak_tflops) if preset else {},
        assumed=assumed,
        measured=(
            f"all {world} ranks at once, {dist.get_backend()}, {torch.get_num_threads()} threads a rank: one layer "
            f"(hidden {config.model.hidden_size}, FFN {config.model.ffn_hidden_size}, {dtype}) and the ends of the "
            "model, for several micro-batches; passes over memory, collectives; no training step",
        ),
    )


class _Clock:
    """Seconds of repeated calls, the mean over ranks."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self._device, self._budget = device, budget

    def seconds(self, function: Callable[[], object]) -> float:
        """The lower decile: what other programs do in between only ever adds."""
        repeats = self._repeats(function)
        return self._mean(statistics.quantiles([self._once(function) for _ in range(repeats)], n=10)[0])

    def added(self, collective: Callable[[], object], work: Callable[[], object]) -> float:
        """What a collective adds to work before it, by medians of calls in turns: waiting for others is part of it."""

        def both() -> None:
            work()
            collective()

        pairs = [(self._once(work), self._once(both)) for _ in range(2 * self._repeats(both))]
        alone, together = (statistics.median(taken) for taken in zip(*pairs, strict=True))
        return self._mean(max(0.0, together - alone))

    def _repeats(self, function: Callable[[], object]) -> int:
        """As many as the budget allows, equally many everywhere, since collectives are among them."""
        for _ in range(2):
            self._once(function)
        dist.barrier()
        repeats = max(10, min(300, int(self._budget / max(1e-6, self._once(function)))))
        agreed = torch.tensor([repeats], device=self._device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return int(agreed)

    def _mean(self, seconds: float) -> float:
        mean = torch.tensor([seconds], dtype=torch.float64, device=self._device)
        dist.all_reduce(mean)
        return float(mean) / dist.get_world_size()

    def _once(self, function: Callable[[], object]) -> float:
        self._synchronize()
        started = time.perf_counter()
        function()
        self._synchronize()
        return time.perf_counter() - started

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _cost(points: Iterable[tuple[float, float]]) -> Cost:
    """Amounts closer than a tenth are one point; more never takes less time."""
    groups: list[list[tuple[float, float]]] = []
    for point in sorted(points):
        if groups and point[0] <= 1.1 * groups[-1][0][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    found: list[tuple[float, float]] = []
    for group in groups:
        amount, seconds = (statistics.fmean(values) for values in zip(*group, strict=True))
        found.append((amount, max(seconds, found[-1][1] if found else 0.0)))
    return Cost(tuple(found))


def _dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32


def _degrees(config: RunConfig) -> list[int]:
    """Over how many tensor ranks the products are cut: none, and the whole world if it divides them."""
    model, world = config.model, dist.get_world_size()
    divides = all(size % world == 0 for size in (model.num_attention_heads, model.ffn_hidden_size))
    return sorted({1, world if divides else 1})


def _rows(config: RunConfig) -> list[int]:
    """Positions: of one sequence, its share of a context rank, and of the config's micro-batch."""
    length = config.data.sequence_length
    return sorted({length // dist.get_world_size(), length, config.train.micro_batch_size * length})


def _products(clock: _Clock, config: RunConfig, device: torch.device) -> Cost:
    """Forward and both backward products of a layer's matrices and of the output layer, the mean of the three."""
    model, points = config.model, []
    query, key = (n * model.kv_channels for n in (model.num_attention_heads, model.num_query_groups))
    for degree in _degrees(config):
        vocab = padded_vocab_size(model.vocab_size) // degree
        widths = {(query + 2 * key) // degree, query // degree, 2 * model.ffn_hidden_size // degree, vocab}
        for rows in _rows(config):
            for width in sorted(widths):
                x = torch.randn(rows, model.hidden_size, device=device, dtype=_dtype(config))
                weight = torch.randn(width, model.hidden_size, device=device, dtype=_dtype(config))
                y = torch.randn(rows, width, device=device, dtype=_dtype(config))
                kinds = (lambda: x @ weight.t(), lambda: y @ weight, lambda: y.t() @ x)  # noqa: B023
                seconds = statistics.fmean(clock.seconds(kind) for kind in kinds)
                points.append((2.0 * rows * model.hidden_size * width, seconds))
    return _cost(points)


def _attention(clock: _Clock, config: RunConfig, device: torch.device) -> Cost:
    """The causal kernel over a micro-batch's heads: a third of its forward and backward, which count as three."""
    model, length, points = config.model, config.data.sequence_length, []
    for degree in _degrees(config):
        heads = model.num_attention_heads // degree
        for rows in _rows(config):
            batch, positions = max(1, rows // length), min(rows, length)
            shape = (batch, heads, positions, model.kv_channels)
            q, k, v = (torch.randn(shape, device=device, dtype=_dtype(config), requires_grad=True) for _ in range(3))
            gradient = torch.ones_like(q)

            def both_ways() -> None:
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).backward(gradient)  # noqa: B023

            points.append((2.0 * q.numel() * positions, clock.seconds(both_ways) / 3))
    return _cost(points)


def _passes(clock: _Clock, device: torch.device) -> Cost:
    """An addition reads two tensors and writes one."""
    points = []
    for size in PASS_BYTES:
        a, b, c = (torch.zeros(size // 12, device=device) for _ in range(3))
        points.append((float(size), clock.seconds(lambda: torch.add(a, b, out=c))))  # noqa: B023
    return _cost(points)


def _exponential(clock: _Clock, config: RunConfig, passes: Cost, device: torch.device) -> float:
    """What softmax takes above its bytes, an element."""
    scores = torch.randn(config.data.sequence_length, config.model.ffn_hidden_size, device=device)
    above = clock.seconds(lambda: scores.softmax(-1)) - passes.seconds(2 * scores.nbytes)
    return max(0.0, above / scores.numel())


def _link(clock: _Clock, kind: str, device: torch.device) -> Cost:
    """By the bytes that a rank sends if a ring does it; ``send``: half a round trip between two neighbours.

    What it adds to arithmetic before it, as in training: ranks come to it a little apart, with cold caches and with
    threads asleep.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    points = []
    x = torch.randn(1024, 1024, device=device)

    def arithmetic() -> Tensor:
        return (x @ x).add_(1.0)

    for size in LINK_BYTES:
        whole = torch.zeros(size // 4 // ranks * ranks, device=device)
        share = torch.zeros(whole.numel() // ranks, device=device)
        sent = whole.nbytes * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)

        def pass_on() -> None:
            if rank < 2:
                first, second = (dist.send, dist.recv) if rank == 0 else (dist.recv, dist.send)
                first(whole, 1 - rank)  # noqa: B023
                second(whole, 1 - rank)  # noqa: B023

        call = {
            "all_reduce": lambda: dist.all_reduce(whole),  # noqa: B023
            "all_gather": lambda: dist.all_gather_into_tensor(whole, share),  # noqa: B023
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(share, whole),  # noqa: B023
            "send": pass_on,
        }[kind]
        seconds = clock.added(call, arithmetic)
        if kind == "send":
            sent, seconds = whole.nbytes, seconds / 2 * ranks / 2  # ranks that do not take part count no time
        points.append((float(sent), seconds))
    return _cost(points)


def _layer(clock: _Clock, config: RunConfig, device: torch.device, degree: int) -> LayerCost:
    """One layer cut for ``degree`` tensor ranks: half of what two more layers add to a model of one."""
    model = config.model
    cut = dataclasses.replace(
        model,
        num_attention_heads=model.num_attention_heads // degree,
        num_query_groups=max(1, model.num_query_groups // degree),
        ffn_hidden_size=model.ffn_hidden_size // degree,
        vocab_size=padded_vocab_size(model.vocab_size) // degree,
    )
    points: dict[str, list[tuple[float, float]]] = {"forward": [], "backward": [], "ends": []}
    for sequences in sorted({1, config.train.micro_batch_size, 4 * config.train.micro_batch_size}):
        one, three = (
            _there_and_back(clock, dataclasses.replace(config, model=shallow), device, sequences)
            for shallow in (_shallow(cut, layers) for layers in (1, 3))
        )
        forward, backward = (max(0.0, more - less) / 2 for less, more in zip(one, three, strict=True))
        rows = float(sequences * config.data.sequence_length)
        points["forward"].append((rows, forward))
        points["backward"].append((rows, backward))
        points["ends"].append((rows, max(0.0, sum(one) - forward - backward)))
    return LayerCost(**{part: _cost(found) for part, found in points.items()})


def _shallow(model: ModelConfig, layers: int) -> ModelConfig:
    depth = dataclasses.replace(model.depth_attention, stride=None)
    return dataclasses.replace(model, num_layers=layers, num_loops=1, depth_attention=depth)


def _there_and_back(clock: _Clock, config: RunConfig, device: torch.device, sequences: int) -> tuple[float, float]:
    """Seconds of one forward and of one backward pass of the whole model on this rank alone."""
    alone = RunConfig(model=config.model, precision=config.precision)
    chunk = build_chunk(alone, transformer_config(alone)).to(device, _dtype(config))
    tokens = torch.zeros(sequences, config.data.sequence_length, dtype=torch.long, device=device)

    def forward() -> torch.Tensor:
        return chunk(tokens, None, None, labels=tokens).sum()  # type: ignore[no-any-return]

    ahead = clock.seconds(forward)
    return ahead, max(0.0, clock.seconds(lambda: forward().backward()) - ahead)


def _host_seconds(clock: _Clock, config: RunConfig, device: torch.device) -> tuple[float, float]:
    """Of one layer forward and backward: what more layers add to a model with next to no arithmetic."""
    tiny = dataclasses.replace(
        config.model,
        hidden_size=16,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=8,
        ffn_hidden_size=16,
        vocab_size=128,
    )
    short = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sequence_length=16),
        precision=dataclasses.replace(config.precision, fp8=None),
    )
    (f1, b1), (f3, b3) = (
        _there_and_back(clock, dataclasses.replace(short, model=_shallow(tiny, layers)), device, 1) for layers in (1, 3)
    )
    return max(0.0, f3 - f1) / 2, max(0.0, b3 - b1) / 2


def main(config_file: Path, output: Path) -> None:
    """One rank's part."""
    device = initialize_distributed(launch_environment())
    initialize_model_parallel()
    machine = calibrate(from_dict(json.loads(config_file.read_text()), str(config_file)), device)
    if dist.get_rank() == 0:
        save_machine(machine, output)
    shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
