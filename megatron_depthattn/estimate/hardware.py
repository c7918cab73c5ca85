"""What a GPU and its links can do: vendors' figures, with what is assumed on top of them.

Dense peaks, memory and its bandwidth from NVIDIA's data sheets of H100, H200 and A100 SXM and of DGX/HGX B200; NVLink
one way (half of the advertised sum of both), one network adapter a GPU (DGX: 400 Gb/s; A100: 200). Assumed, and said in
the output: the shares of those peaks that are reached, latencies and the host's time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_depthattn.config import RunConfig
from megatron_depthattn.config.resolve import GPU, Resolved, resolve
from megatron_depthattn.estimate.counts import PEAK_TFLOPS_BF16

PRODUCT_SHARE, ATTENTION_SHARE, MEMORY_SHARE, LINK_SHARE = 0.70, 0.50, 0.80, 0.75
KERNEL_SECONDS, INTRA_SECONDS, INTER_SECONDS = 4e-6, 12e-6, 25e-6
HOST_FORWARD, HOST_BACKWARD = 0.4e-3, 0.5e-3
ASSUMED = (
    f"matrix products reach {PRODUCT_SHARE:.0%} of the peak, attention's {ATTENTION_SHARE:.0%}; memory-bound "
    f"operations {MEMORY_SHARE:.0%} of its bandwidth; links {LINK_SHARE:.0%} of theirs",
    f"{KERNEL_SECONDS * 1e6:.0f} us to start a kernel, {INTRA_SECONDS * 1e6:.0f} us a collective in a node, "
    f"{INTER_SECONDS * 1e6:.0f} us between nodes",
    f"the host issues a layer in {HOST_FORWARD * 1e3:.1f} ms forward and {HOST_BACKWARD * 1e3:.1f} ms backward",
)


@dataclass(frozen=True)
class Cost:
    """Seconds that an amount (operations, bytes) takes."""

    start: float
    rate: float

    def seconds(self, amount: float) -> float:
        """``start`` seconds and then ``rate`` units a second."""
        return self.start + amount / self.rate


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A kind of GPU, several to a node, and the links between them."""

    name: str
    memory_gb: float
    """Memory of one GPU, 10^9 bytes."""
    devices_per_node: int = 8
    products: Mapping[str, Cost]
    """Seconds of one matrix product by its operations, by type: fp32, bf16, fp8."""
    attention: Mapping[str, Cost]
    """The same of causal core attention, by the operations of what is not masked."""
    elementwise: Cost
    """Seconds of one memory-bound operation, by the bytes that it reads and writes."""
    host_seconds: tuple[float, float] = (HOST_FORWARD, HOST_BACKWARD)
    """Time in which the host issues one layer's operations, forward and backward."""
    intra_node: Cost
    """Seconds of one collective by the bytes that a rank sends in it, see `traffic.Transfer.sent`."""
    inter_node: Cost
    peak_tflops: Mapping[str, float]
    """By type; what MFU is a fraction of."""


def resolve_for(hardware: Hardware, config: RunConfig) -> Resolved:
    """``config`` with `auto` replaced by what this GPU takes with TransformerEngine and Triton installed.

    Raises:
        ValueError: FP8 is asked for and the GPU, or the config's layers, have none.
    """
    resolved = resolve(config, GPU)
    kind = "fp8" if config.precision.fp8 else config.precision.dtype
    if kind not in hardware.products:
        raise ValueError(
            f"{hardware.name} has no figures for {kind}: set precision.dtype and precision.fp8 to one of "
            f"{', '.join(sorted(hardware.products))}, or another --gpu"
        )
    return resolved


def _node(
    name: str, *, gb: float, bandwidth_tb: float, fp32: float, fp8: float | None, nvlink_gb: float, network_gb: float
) -> Hardware:
    """A node of eight: memory in GB and TB/s, peaks in TFLOP/s, links in GB/s of one device, one way."""
    peaks = {"fp32": fp32, "bf16": PEAK_TFLOPS_BF16[name]} | ({"fp8": fp8} if fp8 else {})
    return Hardware(
        name=name,
        memory_gb=gb,
        products={kind: Cost(KERNEL_SECONDS, PRODUCT_SHARE * peak * 1e12) for kind, peak in peaks.items()},
        attention={kind: Cost(KERNEL_SECONDS, ATTENTION_SHARE * peak * 1e12) for kind, peak in peaks.items()},
        elementwise=Cost(KERNEL_SECONDS, MEMORY_SHARE * bandwidth_tb * 1e12),
        intra_node=Cost(INTRA_SECONDS, LINK_SHARE * nvlink_gb * 1e9),
        inter_node=Cost(INTER_SECONDS, LINK_SHARE * network_gb * 1e9),
        peak_tflops=peaks,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _node("H100", gb=80, bandwidth_tb=3.35, fp32=67, fp8=1979, nvlink_gb=450, network_gb=50),
        _node("H200", gb=141, bandwidth_tb=4.8, fp32=67, fp8=1979, nvlink_gb=450, network_gb=50),
        _node("A100", gb=80, bandwidth_tb=2.039, fp32=19.5, fp8=None, nvlink_gb=300, network_gb=25),
        _node("B200", gb=180, bandwidth_tb=8.0, fp32=75, fp8=4500, nvlink_gb=900, network_gb=50),
    )
}


def find_gpu(name: str) -> Hardware:
    """A GPU by its name, which may have another memory behind it, such as A100-40GB.

    Raises:
        ValueError: there is none of this name.
    """
    model, dash, memory = name.partition("-")
    size = re.fullmatch(r"([1-9]\d{0,3})GB", memory)
    if model not in GPUS or bool(dash) != bool(size):
        raise ValueError(
            f"no figures for a GPU named {name!r}: set --gpu to one of {', '.join(GPUS)}, or with another memory, "
            "such as A100-40GB"
        )
    return replace(GPUS[model], memory_gb=float(size[1])) if size else GPUS[model]
