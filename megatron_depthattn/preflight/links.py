"""The links between ranks and the ranks' arithmetic, measured: is the sum right, and who is slow.

Rates, in GB/s (1e9 bytes), of the median of a few repetitions after one that is not timed:

- all-reduce: bus bandwidth, ``bytes / seconds * 2 (n - 1) / n`` over a group of n: what each rank sends and receives,
  so that groups of different sizes compare. ``bytes`` is the size of the tensor that is summed.
- neighbour: every rank receives from the one before it in its group, first the odd places and then the even ones, so
  that no rank does two things at once; ``bytes / seconds`` at the receiver.
- multiply: two square matrices, in TFLOP/s.

Like is compared with like: a link within a host with those at the same place on other hosts, a link between hosts with
the others of its kind, a device with all devices. On GPUs a rate below half of the median stops the start, but on a
single host, whose links may differ by design, a slow link is told only. CPU ranks share cores and memory with each
other: there a tenth of the median is told, and no more.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_depthattn.preflight.compare import Finding, Severity, group_by_host, who
from megatron_depthattn.preflight.report import RankReport

REPETITIONS = 5
_PERIOD, _MARKS = 1024, 64
"""The tensors hold whole numbers below the first, plus the sender's mark: sums are exact in fp32 up to 15,000 ranks."""


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
    buffer = pattern + _mark(dist.get_rank())
    dist.all_reduce(buffer, group=group)
    is_right = torch.equal(buffer, size * pattern + sum(_mark(rank) for rank in ranks))
    seconds = _median_seconds(lambda: dist.all_reduce(buffer, group=group), group, device)
    rate = buffer.nbytes / seconds * 2 * (size - 1) / size / 1e9
    return Sample(f"all-reduce ({kind})", tuple(ranks), rate, is_right)


def _neighbour(kind: str, group: Any, device: torch.device) -> Sample:
    ranks, rank = dist.get_process_group_ranks(group), dist.get_rank()
    place = ranks.index(rank)
    before, after = ranks[place - 1], ranks[(place + 1) % len(ranks)]
    pattern = _pattern(device)
    mine, theirs = pattern + _mark(rank), torch.zeros_like(pattern)
    seconds = 0.0
    for turn in (0, 1):
        does_receive = (place - 1) % len(ranks) % 2 == turn
        operations = [dist.P2POp(dist.irecv, theirs, before, group)] if does_receive else []
        operations += [dist.P2POp(dist.isend, mine, after, group)] if place % 2 == turn else []

        def exchange(operations: list[dist.P2POp] = operations) -> None:
            for request in dist.batch_isend_irecv(operations) if operations else ():
                request.wait()

        exchange()
        took = _median_seconds(exchange, group, device)
        seconds = took if does_receive else seconds
    is_right = torch.equal(theirs, pattern + _mark(before))
    return Sample(f"neighbour ({kind})", (before, rank), mine.nbytes / seconds / 1e9, is_right)


def _mark(rank: int) -> int:
    return rank % _MARKS


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
    """Findings, and a line for people on each kind of thing that was measured.

    Args:
        samples: of each rank, in their order.
        reports: of each rank, for the hosts.
        on_gpu: whether a slow one is a reason not to start.
    """
    hosts = group_by_host(reports)
    host_of = {report.rank: host for host, group in hosts.items() for report in group}
    alike: dict[Any, list[Sample]] = defaultdict(list)
    kinds: dict[str, list[Sample]] = defaultdict(list)
    for sample in (sample for of_rank in samples for sample in of_rank):
        is_in_host = len({host_of[rank] for rank in sample.ranks}) == 1
        where = "" if len(hosts) == 1 or len(sample.ranks) == 1 else " in a host" if is_in_host else " between hosts"
        kinds[sample.what + where].append(sample)
        place = tuple(reports[rank].local_rank for rank in sample.ranks) if where == " in a host" else ()
        alike[sample.what, where, place].append(sample)
    findings: list[Finding] = []
    for group in alike.values():
        is_reason = on_gpu and (len(hosts) > 1 or len(group[0].ranks) == 1)
        findings += _judge(group, reports, least=0.5 if on_gpu else 0.1, severity="stop" if is_reason else "warn")
    return findings, [_line(kind, group, reports) for kind, group in kinds.items()]


def _judge(
    alike: Sequence[Sample], reports: Sequence[RankReport], *, least: float, severity: Severity
) -> Iterator[Finding]:
    usual = statistics.median(sample.rate for sample in alike)
    wrong = {sample.ranks for sample in alike if not sample.is_right}  # one member of a group may see it alone
    for ranks in sorted(wrong):
        text = f"wrong result: {alike[0].what} of {_place(alike[0].what, ranks, reports)} is not what it must be. "
        yield Finding("stop", text + "Do not trust this hardware: leave the host out and test it.")
    slow = {sample.ranks: sample for sample in alike if sample.rate < least * usual and sample.ranks not in wrong}
    for ranks, sample in slow.items():
        text = f"slow: {sample.what} of {_place(sample.what, ranks, reports)} makes {sample.rate:.3g} {_unit(sample)}, "
        text += f"the median of its kind is {usual:.3g}. "
        yield Finding(severity, text + "All would wait for it: see what else runs there, or leave the host out.")


def _line(kind: str, samples: Sequence[Sample], reports: Sequence[RankReport]) -> str:
    slowest = min(samples, key=lambda sample: sample.rate)
    usual = statistics.median(sample.rate for sample in samples)
    place = _place(slowest.what, slowest.ranks, reports)
    return f"{kind}: median {usual:.3g} {_unit(slowest)}, least {slowest.rate:.3g} ({place})"


def _unit(sample: Sample) -> str:
    return "TFLOP/s" if sample.what == "multiply" else "GB/s"


def _place(what: str, ranks: Sequence[int], reports: Sequence[RankReport]) -> str:
    """``rank 3 (node1) -> rank 4 (node2)``, or who it was."""
    if what.startswith("neighbour"):
        return " -> ".join(who([reports[rank]]) for rank in ranks)
    return who([reports[rank] for rank in ranks])
