"""Faults that only a GPU would notice, one of a kind, each put into the source of the function that it would be in.

The rehearsal must stop at each, or count it; on the CPU the same run must pass.
"""

from __future__ import annotations

import contextlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import NamedTuple

from tests.forked import REPOSITORY

STEP, DATA, SAVE = ("megatron_depthattn.train." + name for name in ("step", "data", "save"))
METRICS, CHECKPOINT = "megatron_depthattn.train.metrics", "megatron_depthattn.train.checkpoint"


class Planted(NamedTuple):
    """A fault: in ``function``, ``old`` becomes ``new``, on the same line."""

    function: str
    """``module:qualified.name``."""
    old: str
    """What is once in the function."""
    new: str
    found: str = ""
    """What the rehearsal says of it, a pattern; for `counted` ones the kind."""
    counted: bool = False
    """Whether it is right, but makes the host wait: that is counted at its line."""
    resumes: bool = False
    """Whether the run begins from a checkpoint."""
    rank: int = -1
    """Whose fault it is; -1: all ranks'."""


FAULTS = {
    "CPU tensor to NCCL": Planted(
        f"{STEP}:exchange", "has_gpu = torch.cuda.is_available()", "has_gpu = False", "NCCL group is given .*float64"
    ),
    "loss sum on the CPU": Planted(f"{STEP}:_share", ".double().sum()", ".double().sum().cpu()", "cat: expected all"),
    "labels left on the CPU": Planted(
        f"{DATA}:GlobalBatches.next",
        "if name in ON_HOST",
        "if name != 'tokens'",
        "expected all tensors to be on the same",
    ),
    "CPU generator": Planted(
        "megatron_depthattn.model.initialization:initialize_weights",
        "torch.Generator(device=parameter.device)",
        "torch.Generator()",
        "expected a 'cuda' device type for generator",
    ),
    "generator of a device for a CPU tensor": Planted(
        "megatron_depthattn.model.initialization:initialize_weights",
        "torch.empty(shape, device=parameter.device)",
        "torch.empty(shape)",
        "expected a 'cpu' device type for generator",
    ),
    "CUDA tensor to a gloo group": Planted(
        f"{METRICS}:DepthRecord.collect",
        "dist.all_reduce(totals)",
        'dist.all_reduce(totals, group=dist.new_group(backend="gloo"))',
        "given to a gloo group",
    ),
    "message that is not contiguous": Planted(
        f"{METRICS}:DepthRecord.collect",
        "all_reduce(totals",
        "all_reduce(totals.transpose(0, 1)",
        "tensors must be contiguous",
    ),
    "tensor on another rank's device": Planted(
        f"{STEP}:exchange", 'mine.to("cuda",', 'mine.to("cuda:0",', "cuda:0.* while this process's device is cuda:1"
    ),
    "numpy of a CUDA tensor": Planted(
        f"{SAVE}:_CopyToHost._copy",
        "return buffer.copy_(source, non_blocking=True)",
        "return torch.from_numpy(source.numpy().copy())",
        "to numpy",
    ),
    "copy to the host that nobody waits for": Planted(
        f"{SAVE}:_CopyToHost.async_save", "if torch.cuda.is_available():", "if False:", "nobody has waited .* into it"
    ),
    "pinned memory overwritten while it is read": Planted(
        f"{DATA}:GlobalBatches.next",
        "tensor.to(self._device, non_blocking=True)",
        "(tensor.to(self._device, non_blocking=True), tensor.zero_())[0]",
        "nobody has waited .* out of it",
    ),
    "state of a generator on the device": Planted(
        f"{CHECKPOINT}:restore_generators", 'state["cuda"])', 'state["cuda"].to(_device()))', "ByteTensor", resumes=True
    ),
    "mask in the step": Planted(
        f"{STEP}:sum_of_losses",
        "losses.float().sum()",
        "losses.float().sum() + 0 * losses.detach()[losses > 0].sum()",
        "index with a mask",
        counted=True,
    ),
    "number made on the device": Planted(
        f"{STEP}:sum_of_losses", "torch.full((), losses", "torch.tensor(losses", "copy pageable to device", counted=True
    ),
    "item in a layer": Planted(
        "megatron_depthattn.model.attention:DepthSelfAttention.get_query_key_value_tensors",
        'own["mixed_key"], own["value"]',
        'own["mixed_key"], own["value"] + 0 * key.sum().item()',
        "item",
        counted=True,
    ),
    "item in the schedule": Planted(
        "megatron_depthattn.parallel.schedule:run_schedule",
        "return reported  #",
        "return [reported, reported[0].total.item()][0]  #",
        "item",
        counted=True,
    ),
    "item in the optimizer's step": Planted(
        f"{STEP}:clip",
        "factor = clip_factor(grad_norm, largest)",
        "factor = clip_factor(grad_norm, largest) + 0 * gradients[0].sum().item()",
        "item",
        counted=True,
    ),
}
"""In this order they can be planted together."""
COUNTED = [fault for fault in FAULTS.values() if fault.counted]


def place(fault: Planted) -> str:
    """The ``path:line`` that `Planted.old` is at."""
    function = inspect.unwrap(pkgutil.resolve_name(fault.function))
    lines, first = inspect.getsourcelines(function)
    found = [number for number, line in enumerate(lines, first) if fault.old in line]
    assert len(found) == 1, f"{fault.function} has {fault.old!r} on {len(found)} lines: plant the fault elsewhere"
    return f"{Path(inspect.getsourcefile(function)).relative_to(REPOSITORY)}:{found[0]}"


@contextlib.contextmanager
def planted(*faults: Planted) -> Iterator[None]:
    """The faults are in their functions, wherever those have been imported to."""
    files: dict[str, list[str]] = {}
    for fault in faults:
        path, _, number = place(fault).partition(":")
        lines, index = files.setdefault(path, (REPOSITORY / path).read_text().split("\n")), int(number) - 1
        assert fault.old in lines[index], f"another fault is planted over {fault.old!r}"
        lines[index] = lines[index].replace(fault.old, fault.new)
    functions = {inspect.unwrap(pkgutil.resolve_name(fault.function)) for fault in faults}
    with contextlib.ExitStack() as restored:
        for path, lines in files.items():
            file = str(REPOSITORY / path)
            codes = {code.co_qualname: code for code in _codes(compile("\n".join(lines), file, "exec"))}
            for function in functions:
                if inspect.getsourcefile(function) == file:
                    restored.callback(setattr, function, "__code__", function.__code__)
                    function.__code__ = codes[function.__qualname__]
        yield


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
