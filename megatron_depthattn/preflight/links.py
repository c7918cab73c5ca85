"""The links between ranks and the ranks' arithmetic, measured: is the sum right, and who is slow.

Rates, in GB/s (1e9 bytes), of the median of a few repetitions after one that is not timed:

- all-reduce: bus bandwidth, ``bytes / seconds * 2 (n - 1) / n`` over a group of n: what each rank sends and receives,
  so that groups of different sizes compare. ``bytes`` is the size of the tensor that is summed.
- neighbour: every rank sends to the next of its group and receives from the one before, all at once;
  ``bytes / seconds``, where the seconds end when this rank has received and sent.
- multiply: two square matrices, in TFLOP/s.

On GPUs a rate below half of the median stands out, and stops the start. CPU ranks share cores and memory with each
other: there a tenth of the median is told, and no more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_depthattn.preflight.compare import Finding, Severity, who
from megatron_depthattn.preflight.report import RankReport

REPETITIONS = 5
_PERIOD = 1024
"""The tensors hold whole numbers below this, plus a rank: sums are exact in fp32 up to 10,000 ranks."""


class Sample(NamedTuple):
    """One measurement of one rank, of something that it took part in."""

    what: str
    """all-reduce, neighbour or multiply, and in which kind of group."""
    ranks: tuple[int, ...]
    """Who took part: a group, the sender and the receiver, or one rank."""
    rate: float
    """GB/s, or TFLOP/s for a multiplication."""
    is_right: bool = True
    """Whether the result is what it must be."""


def measure(device: torch.device) -> list[Sample]:
    """This rank's samples; all ranks together, in the same order, after Megatron's groups exist."""
    samples = [_multiply(device)]
    for kind, group in _groups():
        samples.append(_all_reduce(kind, group, device))
        if kind in ("world", "pipeline"):
            samples.append(_neighbour(kind, group, device))
    return samples


def _groups() -> Iterator[tuple[str, Any]]:
    """The world, and the kinds of groups that are smaller than it and larger than one rank."""
    world_size = dist.get_world_size()
    yield "world", dist.group.WORLD
    for kind, group in (
        ("tensor", parallel_state.get_tensor_model_parallel_group()),
        ("pipeline", parallel_state.get_pipeline_model_parallel_group()),
        ("data", parallel_state.get_data_parallel_group()),
    ):
        if 1 < group.size() < world_size:
            yield kind, group


def _all_reduce(kind: str, group: Any, device: torch.device) -> Sample:
    ranks, size = dist.get_process_group_ranks(group), group.size()
    pattern = _pattern(device)
    total = size * pattern + sum(ranks)
    buffer = pattern + dist.get_rank()
    dist.all_reduce(buffer, group=group)
    is_right = torch.equal(buffer, total)
    seconds = _median_seconds(lambda: dist.all_reduce(buffer.zero_(), group=group), group, device)
    rate = buffer.nbytes / seconds * 2 * (size - 1) / size / 1e9
    return Sample(f"all-reduce ({kind})", tuple(ranks), rate, is_right)


def _neighbour(kind: str, group: Any, device: torch.device) -> Sample:
    ranks, rank = dist.get_process_group_ranks(group), dist.get_rank()
    place = ranks.index(rank)
    before, after = ranks[place - 1], ranks[(place + 1) % len(ranks)]
    pattern = _pattern(device)
    mine, theirs = pattern + rank, torch.zeros_like(pattern)

    def exchange() -> None:
        sends_and_receives = [
            dist.P2POp(dist.irecv, theirs, before, group),
            dist.P2POp(dist.isend, mine, after, group),
        ]
        for request in dist.batch_isend_irecv(sends_and_receives):
            request.wait()

    exchange()
    is_right = torch.equal(theirs, pattern + before)
    seconds = _median_seconds(exchange, group, device)
    return Sample(f"neighbour ({kind})", (before, rank), mine.nbytes / seconds / 1e9, is_right)


def _multiply(device: torch.device) -> Sample:
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (256, torch.float32)
    left = torch.full((size, size), 0.5, device=device, dtype=dtype)
    product = left @ left
    is_right = bool((product == size / 4).all())  # a sum of quarters: exact in fp32, and a power of two in bf16
    seconds = _median_seconds(lambda: torch.matmul(left, left, out=product), None, device)
    return Sample("multiply", (dist.get_rank(),), 2 * size**3 / seconds / 1e12, is_right)


def _pattern(device: torch.device) -> torch.Tensor:
    """64 MiB on a GPU, 1 MiB on CPU, of whole numbers that tell places apart."""
    num_elements = 2**24 if device.type == "cuda" else 2**18
    return torch.arange(num_elements, device=device, dtype=torch.float32) % _PERIOD


def _median_seconds(run: Callable[[], Any], group: Any, device: torch.device) -> float:
    seconds = []
    for _ in range(REPETITIONS):
        if group is not None:
            dist.barrier(group)
        _synchronize(device)
        started = time.perf_counter()
        run()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- what the samples of all ranks say: pure


def compare_samples(
    samples: Sequence[Sequence[Sample]], reports: Sequence[RankReport], *, on_gpu: bool
) -> tuple[list[Finding], list[str]]:
    """Findings, and a line for people on each thing that was measured.

    Args:
        samples: of each rank, in their order; the same things in the same order on each.
        reports: of each rank, for the names of hosts.
        on_gpu: whether a slow one is a reason not to start.
    """
    findings: list[Finding] = []
    lines: list[str] = []
    by_thing = list(zip(*samples, strict=True))
    for of_ranks in by_thing:
        usual = statistics.median(sample.rate for sample in of_ranks)
        slowest = min(of_ranks, key=lambda sample: sample.rate)
        unit = "TFLOP/s" if slowest.what == "multiply" else "GB/s"
        at = f"; slowest {_place(slowest, reports)}: {slowest.rate:.3g}" if len(of_ranks) > 1 else ""
        lines.append(f"{slowest.what}: {usual:.3g} {unit}{at}")
        findings += _judge(of_ranks, reports, usual, unit, on_gpu)
    return findings, lines


def _judge(
    of_ranks: Sequence[Sample], reports: Sequence[RankReport], usual: float, unit: str, on_gpu: bool
) -> Iterator[Finding]:
    least, severity = (0.5, "stop") if on_gpu else (0.1, "warn")
    told: set[tuple[int, ...]] = set()
    for sample in sorted(of_ranks, key=lambda each: each.rate):
        if sample.ranks in told:  # all members of a group measured the same thing
            continue
        place, kind = _place(sample, reports), _severity(severity)
        if not all(each.is_right for each in of_ranks if each.ranks == sample.ranks):
            told.add(sample.ranks)
            text = f"wrong result: {sample.what} of {place} is not what it must be. "
            yield Finding("stop", text + "Do not trust this hardware: leave the host out and test it.")
        elif sample.rate < least * usual:
            told.add(sample.ranks)
            text = f"slow: {sample.what} of {place} makes {sample.rate:.3g} {unit}, the median is {usual:.3g}. "
            yield Finding(kind, text + "All would wait for it: see what else runs there, or leave the host out.")


def _severity(name: str) -> Severity:
    return "stop" if name == "stop" else "warn"


def _place(sample: Sample, reports: Sequence[RankReport]) -> str:
    """``rank 3 (node1) -> rank 4 (node2)``, or who it was."""
    named = [who([reports[rank]]) for rank in sample.ranks]
    if sample.what.startswith("neighbour"):
        return " -> ".join(named)
    return who([reports[rank] for rank in sample.ranks])
