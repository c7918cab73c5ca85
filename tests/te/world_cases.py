"""Worlds of several ranks on TransformerEngine's layers: what each is to do, and what it is compared with.

All are compared with one process on the local layers in fp32; in bf16 or FP8 they are to be no farther from it than one
process of the same kind.
``DEPTHATTN_TE_TESTS=full`` in the environment runs every method and precision under every layout (`make test-te`).
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from megatron_depthattn.config import RunConfig
from tests.parallel import cases

FULL = os.environ.get("DEPTHATTN_TE_TESTS") == "full"
FP32, BF16, DELAYED, TENSORWISE, BLOCKWISE = "fp32", "bf16", "delayed", "tensorwise", "blockwise"


@dataclass(frozen=True, kw_only=True)
class Job(cases.Job):
    """As the parity campaign's, of TransformerEngine's layers and a precision."""

    spec: str = "te"
    precision: str = FP32
    """fp32, bf16, or a recipe; ``recipe+params`` keeps weights in FP8."""
    steps: int = 2
    fused: bool = False
    """Layers add to their weights' gradients."""
    memory: bool = False
    """Only count what one microbatch keeps for the backward pass, and the FP8 copies of weights."""

    @property
    def name(self) -> str:
        return f"{super().name}-{self.spec}-{self.precision}" + "-fused" * self.fused + "-memory" * self.memory

    @property
    def reference(self) -> Job:
        kept = {name: getattr(self, name) for name in ("method", "loops", "unrolled", "documents")}
        return Job(layout="single", spec="local", alone=bool(self.documents), **kept)

    @property
    def in_one_process(self) -> Job:
        """The same in one process, without recompute."""
        return dataclasses.replace(self, layout="single", recompute="none", steps=2, save=False, sabotage="")

    @property
    def in_bf16(self) -> Job:
        return dataclasses.replace(self, precision=BF16)

    @property
    def recipe(self) -> str | None:
        return None if self.precision in (FP32, BF16) else self.precision.partition("+")[0]

    def config(self) -> RunConfig:
        config = super().config()
        model: Any = config.model
        precision: dict[str, Any] = {"dtype": FP32 if self.precision == FP32 else BF16, "fp8": self.recipe}
        precision["fp8_params"] = self.precision.endswith("+params")
        depth = dataclasses.replace(model.depth_attention, op="lean")  # tensors lie on the CPU
        return dataclasses.replace(
            config,
            model=dataclasses.replace(
                model, spec=self.spec, depth_attention=depth, fused_gradient_accumulation=self.fused
            ),
            precision=dataclasses.replace(config.precision, **precision),
        )


METHODS = ("depth_attention", "vanilla", *cases.METHODS)
LAYOUTS = ("dp2", "tp2", "tp2+sp", "pp2", "pp2xvpp2")
PARITY = [
    *(Job(layout=layout) for layout in ("single", "tp2+sp", "pp2xvpp2")),
    Job(layout="dp2", fused=True),
    *(Job(layout=layout, steps=1) for layout in ("tp2", "pp2")),
    *(Job(layout=layout, recompute="uniform1", steps=1) for layout in ("single", "pp2xvpp2")),
    Job(layout="pp2xvpp2", loops=2),
    Job(layout="tp2+sp", loops=2, recompute="uniform1", steps=1),
    *(Job(layout="tp2+sp", method=method, steps=1) for method in ("vanilla", *cases.METHODS)),
    Job(layout="pp2xvpp2", method="denseformer", recompute="uniform1", steps=1),
    Job(layout="pp2", method="attnres", steps=1),
    *(
        Job(layout=layout, documents="mask", recompute=recompute, steps=1)
        for layout, recompute in (
            *(("single", "uniform1"), ("dp2", "none"), ("tp2+sp", "none"), ("pp2xvpp2", "uniform1")),
            *(("cp2", "uniform1"), ("pp2", "none")),
        )
    ),
    *(Job(layout="cp2", documents="mask", method=method, steps=1) for method in ("vanilla", "attnres")),
]
"""Documents are compared with each alone."""
ROUNDED = [
    *(Job(layout=layout, precision=BF16, steps=1) for layout in ("tp2+sp", "pp2")),
    *(Job(layout=layout, precision=DELAYED) for layout in ("dp2", "pp2xvpp2")),
    Job(layout="single", precision=DELAYED, recompute="uniform2", steps=1),
    Job(layout="tp2+sp", precision=DELAYED, documents="mask", steps=1),
    Job(layout="cp2", precision=DELAYED, documents="mask", steps=1),
    Job(layout="pp2xvpp2", precision=DELAYED, recompute="uniform1", steps=1),
    Job(layout="dp2", precision=f"{TENSORWISE}+params", save=True),
    Job(layout="pp2xvpp2", loops=2, precision=DELAYED, save=True),
    Job(layout="dp2", loops=2, precision=f"{DELAYED}+params", save=True),
]
OVERLAPPED = [Job(layout="dp2", precision=precision, overlap=True) for precision in (DELAYED, *[FP32] * FULL)]
MEMORY = [
    Job(layout="single", precision=precision, loops=loops, memory=True)
    for precision in (DELAYED, TENSORWISE, BLOCKWISE, f"{TENSORWISE}+params")
    for loops in ((1, 2) if FULL else (2,))
]
CONTROLS = [
    Job(layout="pp2", steps=1, sabotage="payload_gradient_dropped"),
    Job(layout="pp2xvpp2", steps=1, recompute="uniform1", sabotage="shared_gradient_dropped"),
    Job(layout="tp2+sp", steps=1, sabotage="norms_not_reduced"),
    Job(layout="pp2xvpp2", loops=2, steps=1, sabotage="later_loop_gradient_dropped"),
    *(Job(layout=layout, documents="mask", steps=1, sabotage="border_leaks_a_token") for layout in ("pp2", "cp2")),
]
ROUNDED_CONTROLS = [
    *[Job(layout="tp2+sp", precision=TENSORWISE, steps=1, sabotage="amax_of_own_positions")] * FULL,
    Job(layout="dp2", precision=DELAYED, steps=1, sabotage="amax_not_reduced"),
    Job(layout="dp2", precision=f"{TENSORWISE}+params", sabotage="dtypes_gathered_together"),
]
INFINITE = [Job(layout="single", precision=one, sabotage="infinite_attention") for one in (BF16, DELAYED)]
if FULL:
    modes = ("none", "uniform1")
    more = [Job(layout=layout, method=m, recompute=r, steps=1) for layout in LAYOUTS for m in METHODS for r in modes]
    PARITY = [*dict.fromkeys([*PARITY, *more])]
    every = (BF16, DELAYED, TENSORWISE, BLOCKWISE)
    ROUNDED = [*dict.fromkeys([*ROUNDED, *(dataclasses.replace(job, precision=one) for job in more for one in every)])]


def needs(job: Job) -> list[Job]:
    """The job that this one is compared with, and the one that writes the weights that all begin with."""
    weights = Job(layout="single", spec="local", method=job.method if job.method in cases.METHODS else "vanilla")
    if job.memory:
        return [job.in_bf16]
    return [] if job.overlap else [weights, job.reference, *[job.in_one_process] * (job.precision != FP32)]
