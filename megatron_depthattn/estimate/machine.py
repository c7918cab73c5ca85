"""What a device and its links can do: vendors' figures with what is assumed on top of them, or measured figures.

Everything is a `Cost`: seconds as a function of an amount, piecewise linear, so that a start-up time, a rate and a
measured curve are one thing.

Vendors' figures (dense peaks; NVIDIA's data sheets of H100, H200 and A100 SXM and of DGX/HGX B200): memory and its
bandwidth, NVLink one way (half of the advertised sum of both), one network adapter a GPU (DGX: 400 Gb/s; A100: 200).
Assumed on top, and said in the output: the shares of those peaks that are reached, latencies and the host's time.
`calibrate.py` measures the same figures on the machine at hand; none of them is taken from a whole training step.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_depthattn.backends import CPU, SPEC, Available, Resolved, resolve
from megatron_depthattn.config import RunConfig
from megatron_depthattn.train.metrics import PEAK_TFLOPS_BF16

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "send")

PRODUCT_SHARE, MEMORY_SHARE, LINK_SHARE = 0.70, 0.80, 0.75
KERNEL_SECONDS, INTRA_SECONDS, INTER_SECONDS = 4e-6, 12e-6, 25e-6
HOST_FORWARD, HOST_BACKWARD = 0.4e-3, 0.5e-3


@dataclass(frozen=True)
class Cost:
    """Seconds that an amount (operations, bytes) takes, from points (amount, seconds) in ascending order."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def line(cls, start: float, rate: float) -> Cost:
        """``start`` seconds and then ``rate`` units a second."""
        return cls(((0.0, start), (rate, start + 1.0)))

    def seconds(self, amount: float) -> float:
        """Between two points linear, below the first constant, above the last at the rate of the last two."""
        if amount <= self.points[0][0] or len(self.points) == 1:
            return self.points[0][1]
        last = min(bisect_left(self.points, (amount,)), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[last - 1], self.points[last]
        return y0 + (amount - x0) * max(0.0, y1 - y0) / (x1 - x0)

    def in_proportion(self, amount: float) -> float:
        """The same, but below the first point in proportion: of work that a start-up time is no part of."""
        return self.seconds(amount) * min(1.0, amount / self.points[0][0])


@dataclass(frozen=True)
class LayerCost:
    """Seconds of one whole layer, and of what stands around the layers, by the positions of a micro-batch on a rank."""

    forward: Cost
    backward: Cost
    ends: Cost
    """Embedding, output layer and cross entropy, both ways."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A kind of device, several to a node, and the links between them."""

    name: str
    memory_gb: float | None
    """Memory of one device, 10^9 bytes; None: not limited here."""
    devices_per_node: int
    products: Mapping[str, Cost]
    """Seconds of one matrix product by its operations, by type: fp32, bf16, fp8."""
    attention: Mapping[str, Cost]
    """The same of causal core attention, by the operations of what is not masked."""
    passes: Cost
    """Seconds of one operation that is bound by memory, by the bytes that it reads and writes."""
    exponential_seconds: float = 0.0
    """What an element costs above its bytes where an exponential is taken of it (softmax, SiLU)."""
    host_seconds: tuple[float, float]
    """Time in which the host issues one layer's operations, forward and backward."""
    is_host: bool = False
    """The device is the host: their times add up, and nothing is sent while something is computed."""
    intra_node: Mapping[str, Cost]
    """Seconds of one collective (`COLLECTIVES`) by the bytes that a rank sends in it, see `traffic.Transfer.sent`."""
    inter_node: Mapping[str, Cost]
    layers: Mapping[str, LayerCost] = field(default_factory=dict)
    """Of the config that was calibrated, by over how many tensor ranks a layer is cut; in place of the sum over its
    operations."""
    calibrated_for: Mapping[str, Any] = field(default_factory=dict)
    """What of a config those layers depend on (`layer_settings`)."""
    peak_tflops: Mapping[str, float] = field(default_factory=dict)
    """By type; what MFU is a fraction of."""
    assumed: tuple[str, ...] = ()
    """What of this was neither measured nor said by the vendor, in lines for people."""
    measured: tuple[str, ...] = ()
    """How the rest was measured."""


def layer_settings(config: RunConfig) -> dict[str, Any]:
    """What the time of one layer depends on, but for layout, micro-batch and how many layers it reads."""
    model = config.model
    keys = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size")
    return {f"model.{key}": getattr(model, key) for key in (*keys, "spec", "method")} | {
        "model.depth_attention.enabled": model.depth_attention.enabled,
        "data.sequence_length": config.data.sequence_length,
        "precision.dtype": config.precision.dtype,
    }


def resolve_for(machine: Machine, config: RunConfig) -> Resolved:
    """``config`` with `auto` replaced by what this machine takes: a preset has TransformerEngine and Triton, a measured
    one the layers that were measured.

    Raises:
        ValueError: FP8 is asked for and the machine has no TransformerEngine layers.
    """
    is_local = machine.calibrated_for.get(SPEC) == "local"
    gpu = Available(True, f"{machine.name} was calibrated with local layers" if is_local else "")
    return resolve(config, CPU if machine.is_host else gpu)


def check_calibration(machine: Machine, config: RunConfig, world_size: int) -> None:
    """That a machine's figures say something of this config.

    Raises:
        ValueError: it was calibrated with another model, or by fewer processes and nothing is known of other links.
    """
    settings = layer_settings(config)
    other = [
        f"{key} is {settings[key]}, not {measured}"
        for key, measured in machine.calibrated_for.items()
        if settings.get(key) != measured
    ]
    if other:
        raise ValueError(
            f"{machine.name} was calibrated with another config: {'; '.join(other)}: calibrate with this one"
        )
    if world_size > machine.devices_per_node and not machine.assumed:
        raise ValueError(
            f"{machine.name} was calibrated by {machine.devices_per_node} process(es), which says nothing of the links "
            f"of {world_size} ranks: calibrate with --world {world_size}, or set a smaller --world"
        )


def _node(
    name: str, *, gb: float, bandwidth_tb: float, fp32: float, fp8: float | None, nvlink_gb: float, network_gb: float
) -> Machine:
    """A node of eight: memory in GB and TB/s, peaks in TFLOP/s, links in GB/s of one device, one way."""
    peaks = {"fp32": fp32, "bf16": PEAK_TFLOPS_BF16[name]} | ({"fp8": fp8} if fp8 else {})
    products = {kind: Cost.line(KERNEL_SECONDS, PRODUCT_SHARE * peak * 1e12) for kind, peak in peaks.items()}
    links = {
        latency: dict.fromkeys(COLLECTIVES, Cost.line(latency, LINK_SHARE * speed * 1e9))
        for latency, speed in ((INTRA_SECONDS, nvlink_gb), (INTER_SECONDS, network_gb))
    }
    return Machine(
        name=name,
        memory_gb=gb,
        devices_per_node=8,
        products=products,
        attention={kind: Cost.line(KERNEL_SECONDS, 0.5 * peak * 1e12) for kind, peak in peaks.items()},
        passes=Cost.line(KERNEL_SECONDS, MEMORY_SHARE * bandwidth_tb * 1e12),
        host_seconds=(HOST_FORWARD, HOST_BACKWARD),
        intra_node=links[INTRA_SECONDS],
        inter_node=links[INTER_SECONDS],
        peak_tflops=peaks,
        assumed=(
            f"matrix products reach {PRODUCT_SHARE:.0%} of the peak, attention's 50%; passes over memory "
            f"{MEMORY_SHARE:.0%} of its bandwidth; links {LINK_SHARE:.0%} of theirs",
            f"{KERNEL_SECONDS * 1e6:.0f} us to start a kernel, {INTRA_SECONDS * 1e6:.0f} us a collective in a node, "
            f"{INTER_SECONDS * 1e6:.0f} us between nodes",
            f"the host issues a layer in {HOST_FORWARD * 1e3:.1f} ms forward and {HOST_BACKWARD * 1e3:.1f} ms backward",
        ),
    )


PRESETS = {
    machine.name: machine
    for machine in (
        _node("H100", gb=80, bandwidth_tb=3.35, fp32=67, fp8=1979, nvlink_gb=450, network_gb=50),
        _node("H200", gb=141, bandwidth_tb=4.8, fp32=67, fp8=1979, nvlink_gb=450, network_gb=50),
        _node("A100", gb=80, bandwidth_tb=2.039, fp32=19.5, fp8=None, nvlink_gb=300, network_gb=25),
        _node("B200", gb=180, bandwidth_tb=8.0, fp32=75, fp8=4500, nvlink_gb=900, network_gb=50),
    )
}


def find_machine(name: str) -> Machine:
    """A preset by its name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in PRESETS:
        raise ValueError(
            f"no figures for a GPU named {name!r}: set --gpu to one of {', '.join(PRESETS)}, or measure the machine "
            "with --calibrate FILE and give --machine FILE"
        )
    return PRESETS[name]


def save_machine(machine: Machine, path: Path) -> None:
    """Write what `load_machine` reads."""
    path.write_text(json.dumps(asdict(machine), indent=1) + "\n", encoding="utf-8")


def load_machine(path: Path) -> Machine:
    """A machine that was measured.

    Raises:
        ValueError: there is no such file, or it is not one of these.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        costs: dict[str, Any] = {
            key: {kind: _cost(cost) for kind, cost in values.pop(key).items()}
            for key in ("products", "attention", "intra_node", "inter_node")
        }
        layers = {
            degree: LayerCost(**{part: _cost(cost) for part, cost in costs.items()})
            for degree, costs in values.pop("layers").items()
        }
        lists: dict[str, Any] = {key: tuple(values.pop(key)) for key in ("host_seconds", "assumed", "measured")}
        return Machine(**costs, **lists, layers=layers, passes=_cost(values.pop("passes")), **values)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--machine {path} cannot be read ({type(error).__name__}: {error}): write it with --calibrate {path}"
        ) from error


def _cost(values: Mapping[str, Any]) -> Cost:
    return Cost(tuple((float(amount), float(seconds)) for amount, seconds in values["points"]))
