"""Which rank, layer and samples made a step not finite: the step is run once more while every tensor is looked at.

A NaN spreads: forward to every later layer and stage, backward to every earlier one, and through the sum of the
gradients to every replica, so what the optimizer sees says nothing about where it began. But until that sum the
microbatches of a data-parallel rank are a chain of their own. In the second run hooks note, on each rank and for each
microbatch, the first output and the first gradient that is not finite; the earliest of a chain, in the order of
execution over its stages, is where it began.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_depthattn.model.initialization import global_name, globally_named_parameters

MAX_LINES = 8
"""Offenders that are named, of the weights and of the step; the others are counted."""
_MAX_SENT = 16
"""Offending microbatches that a rank reports to the others; broken weights make every one of them offend."""
_MAX_IDS = 32


class Attempt(NamedTuple):
    """A forward and a backward pass over a global batch."""

    loss: float
    grad_norm: float
    suspects: tuple[int, ...]
    """On the last stage: this replica's microbatches whose loss is not finite."""
    statuses: Sequence[Sequence[float]]
    """What each rank had to say beside its part of loss and norm, by rank."""
    tokens: int
    """Of the global batch that are predicted."""


class RankCoordinates(NamedTuple):
    """A rank and where it is in the layout."""

    rank: int
    data_rank: int
    stage: int


class Finding(NamedTuple):
    """The first tensor of one microbatch that was not finite, in one direction, on one chunk of one rank."""

    place: RankCoordinates
    backward: bool
    microbatch: int
    chunk: int
    """Position of the pipeline chunk in the model."""
    order: int
    """Tensors that were looked at before, in this direction, for this microbatch and chunk."""
    what: str
    values: str

    @property
    def chain(self) -> tuple[int, int]:
        """What it can have spread to: microbatches and replicas meet only when gradients are summed."""
        return self.place.data_rank, self.microbatch

    @property
    def when(self) -> tuple[bool, int, int]:
        """Sorts the findings of a chain by the order of execution."""
        return self.backward, -self.chunk if self.backward else self.chunk, self.order


def diagnose(
    chunks: Sequence[torch.nn.Module],
    replay: Callable[[], Attempt],
    suspects: Sequence[int],
    sample_ids: Sequence[list[int] | None],
) -> list[str]:
    """Find what made a step not finite; collective, with the same result on all ranks.

    Args:
        chunks: this rank's pipeline chunks.
        replay: makes the attempt again; leaves gradients behind.
        suspects: the failed attempt's.
        sample_ids: for each microbatch of this rank its samples, None on stages that do not read any.

    Returns:
        Lines for the log, the earliest offender first.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    place = RankCoordinates(dist.get_rank(), parallel_state.get_data_parallel_rank(), stage)
    models: list[GPTModel] = unwrap_model(list(chunks))
    weights = [
        f"{_readable(path)} ({_count_values(parameter)})"
        for model in models
        for path, parameter in globally_named_parameters(model)
        if not math.isfinite(_largest(parameter))
    ]
    with ExitStack() as hooks:
        # The microbatch in backward, whichever chunk's: a looped model's gradients reach weights of another chunk.
        now = SimpleNamespace(backward=0)
        probes = [_Probe(model, place, stage + index * stages, now, hooks) for index, model in enumerate(models)]
        second = replay()
    largest = max(probe.largest_gradient for probe in probes)
    findings = [finding for probe in probes for finding in probe.sent()]
    is_transient = math.isfinite(second.loss) and math.isfinite(second.grad_norm)
    if is_transient:  # all that is known: whose loss it reached; any rank of that replica may be at fault
        what = ("loss of the first run", "not finite, on some rank of its replica")
        findings = [Finding(place, False, microbatch, 0, 0, *what) for microbatch in suspects[:_MAX_SENT]]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (place, weights, findings, largest, sample_ids))

    broken: dict[str, list[RankCoordinates]] = defaultdict(list)
    for where, names, *_ in everyone:
        for name in names:
            broken[name].append(where)
    before = "the weights are not finite already before this step"
    lines = [f"{_where(places)}: {before}: {name}" for name, places in broken.items()]
    lines = _first_of(lines, "weights that are not finite")
    origins = _origins([finding for _, _, findings, *_ in everyone for finding in findings])
    if is_transient:
        lines.append(
            f"run again, the same microbatches gave loss {second.loss:.6g} and gradient norm {second.grad_norm:.6g}: "
            "not reproduced, a transient fault (hardware?) or a nondeterministic kernel"
        )
    elif not origins:
        (size, name), where = max((largest, place) for place, _, _, largest, _ in everyone)
        lines.append(
            "run again, every output and every gradient of a microbatch is finite: the sum over microbatches and "
            f"ranks, or its norm, overflows; the largest gradient is that of {name} on rank {where.rank}, {size:.3g}"
        )
    ids = {  # which only the first and the last stage know
        (place.data_rank, microbatch): ids
        for place, *_, of_rank in everyone
        for microbatch, ids in enumerate(of_rank)
        if ids is not None
    }
    found = [_origin_line(group, ids, len(sample_ids)) for group in origins]
    return lines + _first_of(found, "places where values stopped being finite")


class _Probe:
    """Looks at every module's outputs, at their gradients and at the parameters' gradients, on one chunk.

    Nothing is changed: no hook returns a value, and gradients are looked at through hooks on the tensors, since
    module backward hooks would turn outputs into views, which Megatron's schedules cannot free.
    """

    def __init__(
        self, model: GPTModel, place: RankCoordinates, chunk: int, now: SimpleNamespace, hooks: ExitStack
    ) -> None:
        self.largest_gradient = (0.0, "")
        self._place, self._chunk, self._now = place, chunk, now
        self._findings: dict[tuple[bool, int], Finding] = {}
        self._looked: Counter[tuple[bool, int]] = Counter()
        self._num_started = 0
        self._forward: int | None = None  # the microbatch in forward; None in backward, when layers may be recomputed
        hooks.callback(model.register_forward_pre_hook(self._start).remove)
        for path, module in model.named_modules():
            name = _readable(global_name(model, path)) if path else "the loss" if model.post_process else "the chunk"
            hook = partial(self._after_module, name)
            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(self._end).remove)
        for path, parameter in globally_named_parameters(model):
            if parameter.requires_grad:
                hooks.callback(parameter.register_hook(partial(self._parameter_gradient, _readable(path))).remove)

    def sent(self) -> list[Finding]:
        """The findings of the first offending microbatches."""
        first = sorted({microbatch for _, microbatch in self._findings})[:_MAX_SENT]
        return [finding for (_, microbatch), finding in self._findings.items() if microbatch in first]

    # Microbatches enter a chunk in their order, under both of Megatron's schedules; backward of one begins with the
    # gradient of the chunk's output.

    def _start(self, *_: Any) -> None:
        self._forward = self._num_started
        self._num_started += 1

    def _end(self, _: Any, __: Any, output: Tensor) -> None:
        output.register_hook(partial(lambda microbatch, _: setattr(self._now, "backward", microbatch), self._forward))
        self._forward = None

    def _after_module(self, name: str, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        microbatch = self._now.backward if self._forward is None else self._forward
        for tensor in _tensors(output):
            if self._forward is not None:
                self._look(False, microbatch, f"output of {name}", tensor, inputs=(args, kwargs))
            if tensor.requires_grad:
                tensor.register_hook(partial(self._output_gradient, name, microbatch))

    def _output_gradient(self, name: str, microbatch: int, gradient: Tensor) -> None:
        self._look(True, microbatch, f"gradient of the output of {name}", gradient)

    def _parameter_gradient(self, name: str, gradient: Tensor) -> None:
        size = self._look(True, self._now.backward, f"gradient of {name}", gradient)
        if math.isfinite(size):
            self.largest_gradient = max(self.largest_gradient, (size, name))

    def _look(self, backward: bool, microbatch: int, what: str, tensor: Tensor, inputs: Any = ()) -> float:
        """The tensor's largest absolute value; NaN if it holds one."""
        key = (backward, microbatch)
        self._looked[key] += 1
        size = _largest(tensor)
        if key not in self._findings and not math.isfinite(size):
            values = _count_values(tensor)
            if inputs:
                finite = all(math.isfinite(_largest(given)) for given in _tensors(inputs))
                values += " from finite input" if finite else " from input that is not finite"
            self._findings[key] = Finding(self._place, *key, self._chunk, self._looked[key], what, values)
        return size


def _tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested containers."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@torch.no_grad()
def _largest(tensor: Tensor) -> float:
    # Not abs().max(), which would make a copy: memory may be what there is least of.
    return float(torch.linalg.vector_norm(tensor.detach(), ord=math.inf)) if tensor.numel() else 0.0


def _count_values(tensor: Tensor) -> str:
    """``3 NaN and 1 inf of 64 values``: inf is an overflow, NaN what becomes of one, or of a wrong operation."""
    counts = {"NaN": int(tensor.isnan().sum()), "inf": int(tensor.isinf().sum())}
    return " and ".join(f"{count} {kind}" for kind, count in counts.items() if count) + f" of {tensor.numel()} values"


def _readable(path: str) -> str:
    """``decoder.layers.3.mlp`` as ``layer 3 mlp``."""
    return re.sub(r"^decoder\.layers\.(\d+)\.?", r"layer \1 ", path).strip().removeprefix("decoder.")


# ---- from every rank's findings to lines


def _origins(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Where values stopped being finite, earliest first; each as the findings that share a replica and a tensor."""
    first: dict[tuple[int, int], tuple[bool, int, int]] = {}
    for one in findings:
        first[one.chain] = min(one.when, first.get(one.chain, one.when))
    groups: dict[tuple[int, str], list[Finding]] = defaultdict(list)
    for one in findings:
        if one.when == first[one.chain]:  # on several ranks where these are tensor- or context-parallel
            groups[one.place.data_rank, one.what].append(one)
    return sorted(groups.values(), key=lambda group: min((one.when, one.chain, one.place.rank) for one in group))


def _origin_line(group: list[Finding], ids: dict[tuple[int, int], list[int]], num_microbatches: int) -> str:
    first = min(group, key=lambda finding: (finding.microbatch, finding.place.rank))
    chains = sorted({finding.chain for finding in group})
    samples = [sample for chain in chains for sample in ids.get(chain, [])]
    return (
        f"{_where([finding.place for finding in group])}: {first.what}: {first.values}; "
        f"microbatch {_listed([microbatch for _, microbatch in chains])} of {num_microbatches} (from 0), "
        f"sample ids {_listed(samples) if samples else 'unknown'}"
    )


def _where(places: Iterable[RankCoordinates]) -> str:
    columns = [sorted(set(column)) for column in zip(*places, strict=True)]
    names = ("rank", "data-parallel rank", "pipeline stage")
    ranks, *more = (
        f"{name}{'s' * (len(numbers) > 1)} {_listed(numbers)}" for name, numbers in zip(names, columns, strict=True)
    )
    return f"{ranks} ({', '.join(more)})"


def _listed(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _MAX_IDS} more" if len(numbers) > _MAX_IDS else ""
    return ", ".join(map(str, numbers[:_MAX_IDS])) + more


def _first_of(lines: list[str], what: str) -> list[str]:
    return lines[:MAX_LINES] + [f"and {len(lines) - MAX_LINES} more {what}"] * (len(lines) > MAX_LINES)
