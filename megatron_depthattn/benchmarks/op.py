"""The depth mix alone: every implementation against the time in which the same bytes could be copied."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
import yaml
from torch import Tensor

from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.shapes import SHAPES, implementations_on
from megatron_depthattn.benchmarks.timing import Clock, last_level_cache_bytes, spread, taking_turns
from megatron_depthattn.ops import DEPTH_MIX_IMPLEMENTATIONS, depth_mix_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPILED = "torch.compile"
COPY = "copy"
LABELS = {"reference": "reference (authors' formulation, eager torch)", COMPILED: "torch.compile of the reference"}
MOST_ROTATED_BYTES = 512 << 20
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


def add_op(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("op", help="the depth mix: forward and backward as multiples of a copy's time")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="default: 360m and 3b on a GPU, else cpu")
    parser.add_argument("--sources", nargs="+", type=int, metavar="N", help="default: 1, 2 and all layers but one")
    for size in ("tokens", "heads", "kv-heads", "head-size"):
        parser.add_argument(f"--{size}", type=int, metavar="N", help="instead of the shape's")
    names = [*DEPTH_MIX_IMPLEMENTATIONS, COMPILED]
    parser.add_argument("--implementations", nargs="+", choices=names, help="default: all that run on the device")
    parser.add_argument("--runs", type=int, default=30, metavar="N", help="of each, taking turns (default 30)")
    parser.set_defaults(measure=measure_op)


def measure_op(given: argparse.Namespace) -> Result:
    """Medians and quartiles; the multiple is that of the median over the copy's median in the same run."""
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[given.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    result = Result(
        title=f"Depth mix on {device.type}, {str(dtype).removeprefix('torch.')}, {given.runs} runs, median (quartiles)",
        columns=["implementation", "sources", "forward, ms", "x copy", "backward, ms", "x copy", "both, x copy"],
        notes=[
            "the copy: `copy_` of a tensor that reads and writes as many bytes as the mix must at least move (forward: "
            "q, k, v, keys and values of the sources read, the mixed value written; backward: the same and its "
            "gradient read, all gradients written), in the same run",
            "on a GPU the L2 cache is overwritten before every call; on a CPU the calls go round sets of tensors as "
            f"large as the last-level cache, at most {MOST_ROTATED_BYTES >> 20} MiB, so they are not cache-hot",
        ],
    )
    for name in given.shape or (("360m", "3b") if device.type == "cuda" else ("cpu",)):
        for shape in _shapes(name, given):
            _measure_shape(name, shape, given, dtype, device, result)
    return result


def _shapes(name: str, given: argparse.Namespace) -> Iterator[MixShape]:
    config = yaml.safe_load(SHAPES[name].read_text())
    model = config["model"]
    tokens = given.tokens or config["train"]["micro_batch_size"] * config["data"]["sequence_length"]
    for sources in given.sources or (1, 2, model["num_layers"] - 1):
        yield MixShape(
            tokens=tokens,
            heads=given.heads or model["num_attention_heads"],
            kv_heads=given.kv_heads or model["num_query_groups"],
            head_size=given.head_size or model["kv_channels"],
            sources=sources,
        )


class _Calls:
    """Forward, backward and copy on sets of tensors that take turns."""

    def __init__(self, shape: MixShape, dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._scale = shape, shape.head_size**-0.5
        self.num_bytes = shape.bytes_moved(dtype.itemsize)
        num_sets = 1
        if device.type == "cpu":
            rotated = min(last_level_cache_bytes(), MOST_ROTATED_BYTES)
            num_sets = max(2, -(-rotated // self.num_bytes[0]))
        self._sets = [shape.inputs(dtype, device) for _ in range(num_sets)]
        sizes = [num_bytes // 2 for num_bytes in self.num_bytes]  # a copy of n bytes moves 2 n
        self._sources = torch.ones(num_sets, max(sizes), dtype=torch.uint8, device=device)
        self._targets = torch.zeros_like(self._sources)
        self._sizes, self._turn = sizes, count()

    def forward_and_backward(self, clock: Clock, mix: Mix) -> tuple[float, float]:
        """Seconds of each; the gradients are those of all inputs."""
        q, *others, grad = self._sets[next(self._turn) % len(self._sets)]
        n = self._shape.sources
        keys, values, k, v = others[:n], others[n : 2 * n], others[2 * n], others[2 * n + 1]
        forward, mixed = clock.time(lambda: mix(q, keys, values, k, v, self._scale))
        backward, _ = clock.time(lambda: torch.autograd.grad(mixed, [q, *others], grad))
        return forward, backward

    def copy(self, clock: Clock, _: object) -> tuple[float, float]:
        """Seconds in which forward's and backward's bytes are copied."""
        i = next(self._turn) % len(self._sets)
        forward, backward = (
            clock.time(partial(self._targets[i, :size].copy_, self._sources[i, :size]))[0] for size in self._sizes
        )
        return forward, backward


def _measure_shape(
    name: str,
    shape: MixShape,
    given: argparse.Namespace,
    dtype: torch.dtype,
    device: torch.device,
    result: Result,
) -> None:
    """Add the rows of one shape."""
    torch.compiler.reset()
    calls, clock = _Calls(shape, dtype, device), Clock(device)
    names = given.implementations or [*implementations_on(device.type), COMPILED]
    mixes: dict[str, Mix] = {name: DEPTH_MIX_IMPLEMENTATIONS[name] for name in names if name != COMPILED}
    if COMPILED in names:
        mixes[COMPILED] = torch.compile(depth_mix_reference, dynamic=False)
    failures: dict[str, str] = {}
    for label, mix in [*mixes.items()]:
        try:
            for _ in range(3):  # the first calls compile and allocate
                calls.forward_and_backward(clock, mix)
        except Exception as error:  # whatever a compiler or a kernel says on this machine: the row says so
            failures[label] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            del mixes[label]
    seconds: dict[str, list[tuple[float, float]]] = {COPY: [], **{label: [] for label in mixes}}
    calls.copy(clock, None)
    for turn in range(given.runs):
        for label in taking_turns([*seconds], turn):
            one = calls.copy(clock, None) if label == COPY else calls.forward_and_backward(clock, mixes[label])
            seconds[label].append(one)
    _add_rows(f"{name}, {shape.tokens} tokens", shape, calls.num_bytes, seconds, failures, result)
    print(f"{name}: {shape.sources} sources done", file=sys.stderr, flush=True)


def _add_rows(
    title: str,
    shape: MixShape,
    num_bytes: tuple[int, int],
    seconds: dict[str, list[tuple[float, float]]],
    failures: dict[str, str],
    result: Result,
) -> None:
    figures: dict[str, Any] = {"bytes": num_bytes, "failures": failures, "seconds": seconds}
    copies = [spread(of) for of in zip(*seconds[COPY], strict=True)]
    speed = num_bytes[1] / copies[1].median
    result.rows.append([f"**{title}**: copy at {speed / 1e9:.0f} GB/s", str(shape.sources), *_cells(copies), ""])
    for label, of in seconds.items():
        if label == COPY:
            continue
        spreads = [spread(times) for times in zip(*of, strict=True)]
        ratios = [one.median / copy.median for one, copy in zip(spreads, copies, strict=True)]
        both = sum(one.median for one in spreads) / sum(copy.median for copy in copies)
        cells = _cells(spreads, *ratios)
        result.rows.append([LABELS.get(label, label), str(shape.sources), *cells, f"{both:.2f}"])
        figures[label] = {"forward_ratio": ratios[0], "backward_ratio": ratios[1], "ratio": both}
    for label, why in failures.items():
        result.rows.append([f"{LABELS.get(label, label)}: {why}", str(shape.sources), "", "", "", "", ""])
    result.figures[f"{title}, {shape.sources} sources"] = figures


def _cells(spreads: list[Any], *ratios: float) -> list[str]:
    texts = [f"{ratio:.2f}" for ratio in ratios] or ["1", "1"]
    return [cell for one, text in zip(spreads, texts, strict=True) for cell in (one.text(1e-3, 3), text)]
