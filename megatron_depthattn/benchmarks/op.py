"""The depth mix alone: every implementation against the time in which the same bytes could be copied."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_depthattn.benchmarks.models import SHAPES, implementations_on
from megatron_depthattn.benchmarks.result import Result, failed, progress
from megatron_depthattn.benchmarks.timing import spread, taking_turns
from megatron_depthattn.config import load_config
from megatron_depthattn.ops import DEPTH_MIX_IMPLEMENTATIONS, depth_mix_reference

COMPILED = "torch.compile"
COPY = "copy"
LABELS = {"reference": "reference (authors' formulation, eager torch)", COMPILED: "torch.compile of the reference"}
MOST_ROTATED_BYTES = 512 << 20
FLUSH_BYTES = 512 << 20
"""Written before every timed call on a GPU: over ten times the L2 of an H100."""
Mix = Callable[..., Tensor]


@dataclass(frozen=True)
class MixShape:
    """Sizes of one call."""

    tokens: int
    heads: int
    kv_heads: int
    head_size: int
    sources: int

    def bytes_moved(self, element_size: int) -> tuple[int, int]:
        """Least bytes of forward and of backward: every input read once, every result written once.

        Forward reads q, the sources' keys and values, k and v and writes the mixed value. Backward reads the same
        and the gradient of the mixed value, and writes the gradients of all that it read.
        """
        key = self.kv_heads * self.head_size
        inputs = self.heads * self.head_size + 2 * (self.sources + 1) * key
        return self.tokens * element_size * (inputs + key), self.tokens * element_size * (2 * inputs + key)

    def inputs(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """q, the sources' keys and values, k, v, and a gradient for the mixed value."""
        shapes = [self.heads, *[self.kv_heads] * (2 * self.sources + 3)]
        tensors = [torch.randn(self.tokens, 1, heads, self.head_size, dtype=dtype, device=device) for heads in shapes]
        return [tensor.requires_grad_() for tensor in tensors[:-1]] + tensors[-1:]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="default: 410m and 3b on a GPU, else cpu")
    parser.add_argument("--sources", nargs="+", type=int, metavar="N", help="default: 1, 2 and all layers but one")
    parser.add_argument("--tokens", type=int, metavar="N", help="instead of the shape's")
    names = [*DEPTH_MIX_IMPLEMENTATIONS, COMPILED]
    parser.add_argument("--implementations", nargs="+", choices=names, help="default: all that run on the device")
    parser.add_argument("--runs", type=int, default=30, metavar="N", help="of each, taking turns (default 30)")


def measure(given: argparse.Namespace) -> Result:
    """Medians and quartiles; the multiple is that of the median over the copy's median in the same run."""
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    result = Result(
        title=f"Depth mix on {device.type}, {'bf16' if on_gpu else 'fp32'}, {given.runs} runs, median (quartiles)",
        columns=["implementation", "sources", "forward, ms", "x copy", "backward, ms", "x copy", "both, x copy"],
        notes=[
            "the copy: `copy_` of a tensor that reads and writes as many bytes as the mix must at least move (forward: "
            "q, k, v, keys and values of the sources read, the mixed value written; backward: the same and its "
            "gradient read, all gradients written), in the same run",
            "on a GPU the L2 cache is overwritten before every call; on a CPU the calls go round sets of tensors as "
            f"large as the last-level cache, at most {MOST_ROTATED_BYTES >> 20} MiB, so they are not cache-hot",
        ],
    )
    for name in given.shape or (("410m", "3b") if on_gpu else ("cpu",)):
        config = load_config(SHAPES[name])
        model, tokens = config.model, given.tokens or config.train.micro_batch_size * config.data.sequence_length
        heads = model.num_attention_heads, model.num_query_groups, model.kv_channels
        for sources in given.sources or (1, 2, model.num_layers - 1):
            _measure_shape(f"{name}, {tokens} tokens", MixShape(tokens, *heads, sources), given, device, result)
    return result


def last_level_cache_bytes() -> int:
    """Bytes of the largest cache of the first core; 0 where Linux does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]] for text in sizes), default=0)


class Calls:
    """Forward, backward and copy on sets of tensors that take turns; each returns seconds of forward and backward."""

    def __init__(self, shape: MixShape, device: torch.device) -> None:
        self._shape, self._is_cuda = shape, device.type == "cuda"
        dtype = torch.bfloat16 if self._is_cuda else torch.float32
        self.num_bytes = shape.bytes_moved(dtype.itemsize)
        rotated = min(last_level_cache_bytes(), MOST_ROTATED_BYTES)
        num_sets = 1 if self._is_cuda else max(2, -(-rotated // self.num_bytes[0]))
        self.sets = [shape.inputs(dtype, device) for _ in range(num_sets)]
        self._sizes = [num_bytes // 2 for num_bytes in self.num_bytes]  # a copy of n bytes moves 2 n
        self._sources = torch.ones(num_sets, max(self._sizes), dtype=torch.uint8, device=device)
        self._targets = torch.zeros_like(self._sources)
        self._flush = torch.empty(FLUSH_BYTES if self._is_cuda else 0, dtype=torch.int8, device=device)
        self._turn = count()

    def mix(self, mix: Mix) -> tuple[float, float]:
        """The gradients are those of all inputs."""
        q, *others, grad = self.sets[next(self._turn) % len(self.sets)]
        n = self._shape.sources
        keys, values, k, v = others[:n], others[n : 2 * n], others[2 * n], others[2 * n + 1]
        forward, mixed = self._time(lambda: mix(q, keys, values, k, v, self._shape.head_size**-0.5))
        backward, _ = self._time(lambda: torch.autograd.grad(mixed, [q, *others], grad))
        return forward, backward

    def copy(self) -> tuple[float, float]:
        """Copies forward's bytes, and backward's."""
        i = next(self._turn) % len(self.sets)
        forward, backward = (
            self._time(partial(self._targets[i, :size].copy_, self._sources[i, :size]))[0] for size in self._sizes
        )
        return forward, backward

    def _time(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds and result. On a GPU the flush is still running when the call is made: launches hide behind it."""
        if not self._is_cuda:
            started = time.perf_counter()
            result = function()
            return time.perf_counter() - started, result
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, result


def _measure_shape(
    title: str, shape: MixShape, given: argparse.Namespace, device: torch.device, result: Result
) -> None:
    """Add the rows of one shape."""
    torch.compiler.reset()
    calls = Calls(shape, device)
    compiled = torch.compile(depth_mix_reference, dynamic=False)
    mixes: dict[str, Mix] = {COMPILED: compiled, **DEPTH_MIX_IMPLEMENTATIONS}
    timed: dict[str, Callable[[], tuple[float, float]]] = {COPY: calls.copy}
    failures: dict[str, str] = {}
    for label in given.implementations or [*implementations_on(device.type), COMPILED]:
        try:
            for _ in range(3):  # the first calls compile and allocate
                calls.mix(mixes[label])
            timed[label] = partial(calls.mix, mixes[label])
        except Exception as error:  # whatever a compiler or a kernel says on this machine: the row says so
            failures[label], result.failures[f"{title}, {shape.sources} sources: {label}"] = failed(error)
    seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in timed}
    calls.copy()
    for turn in range(given.runs):
        for label in taking_turns([*timed], turn):
            seconds[label].append(timed[label]())

    spreads = {label: [spread(of) for of in zip(*times, strict=True)] for label, times in seconds.items()}
    copies, sources = spreads[COPY], str(shape.sources)
    figures: dict[str, Any] = {"bytes": calls.num_bytes, "failures": failures, "seconds": seconds}
    for label, own in spreads.items():
        ratios = [one.median / copy.median for one, copy in zip(own, copies, strict=True)]
        cells = [cell for one, ratio in zip(own, ratios, strict=True) for cell in (one.text(1e-3, 3), f"{ratio:.2f}")]
        both = sum(one.median for one in own) / sum(copy.median for copy in copies)
        if label == COPY:
            name = f"**{title}**: copy at {calls.num_bytes[1] / copies[1].median / 1e9:.0f} GB/s"
        else:
            name = LABELS.get(label, label)
            figures[label] = {"forward_ratio": ratios[0], "backward_ratio": ratios[1], "ratio": both}
        result.rows.append([name, sources, *cells, f"{both:.2f}"])
    result.rows += [[f"{LABELS.get(label, label)}: {why}", sources, *[""] * 5] for label, why in failures.items()]
    result.figures[f"{title}, {sources} sources"] = figures
    progress(given, f"{title}: {sources} sources done", lambda: result)
