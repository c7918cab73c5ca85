"""Faults that only a GPU would notice, one of a kind, each put into the source of the function that it would be in.

The rehearsal must stop at each, or count it; on the CPU the same run must pass.
"""

from __future__ import annotations

import contextlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

STEP, DATA, SAVE = ("megatron_depthattn.train." + name for name in ("step", "data", "save"))
METRICS, CHECKPOINT = "megatron_depthattn.train.metrics", "megatron_depthattn.train.checkpoint"


class Planted(NamedTuple):
    """A fault: in ``function``, ``old`` becomes ``new``."""

    function: str
    """``module:name``."""
    old: str
    new: str
    found: str
    """What the rehearsal says of it, a pattern; for `counted` ones the kind."""
    counted: bool = False
    """Whether it is right, but makes the host wait: it is counted at a line of the function's file."""
    overrides: tuple[str, ...] = ()
    resumes: bool = False
    """Whether the run begins from a checkpoint."""


FAULTS = {
    "CPU tensor to NCCL": Planted(
        f"{STEP}:exchange", "has_gpu = torch.cuda.is_available()", "has_gpu = False", "NCCL group is given .*float64"
    ),
    "loss sum on the CPU": Planted(
        f"{STEP}:_share", ".double().sum(),", ".double().sum().cpu(),", "stack: expected all"
    ),
    "labels left on the CPU": Planted(
        f"{DATA}:GlobalBatches.next",
        "if name == SAMPLE_IDS",
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
        "dist.all_reduce(totals)",
        "dist.all_reduce(totals.transpose(0, 1))",
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
        f"{STEP}:sum_of_losses", "losses.float().sum()", "losses[losses > 0].sum()", "index with a mask", counted=True
    ),
    "item in a layer": Planted(
        "megatron_depthattn.model.attention:DepthSelfAttention._norm_keeps_projection",
        "return ",
        "assert value.sum().item() < 1e9; return ",
        "item",
        counted=True,
    ),
    "number made on the device": Planted(
        f"{STEP}:sum_of_losses", "torch.full((), losses", "torch.tensor(losses", "copy pageable to device", counted=True
    ),
}


@contextlib.contextmanager
def planted(fault: Planted) -> Iterator[None]:
    """The fault is in the function, wherever that has been imported to."""
    function = inspect.unwrap(pkgutil.resolve_name(fault.function))
    lines, first = inspect.getsourcelines(function)
    source = textwrap.dedent("".join(lines))
    assert fault.old in source, f"{fault.function} has no {fault.old!r} any more: plant the fault elsewhere"
    text, file = "\n" * (first - 1) + source.replace(fault.old, fault.new), inspect.getsourcefile(function)
    made = dict(function.__globals__)
    exec(compile(text, file, "exec", annotations.compiler_flag), made)
    own, function.__code__ = function.__code__, inspect.unwrap(made[function.__name__]).__code__
    try:
        yield
    finally:
        function.__code__ = own
