"""What the campaign of the DeepSpeed engine runs; the model, the batches and the optimizer of the parity campaign."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_depthattn.config import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    RunConfig,
)
from tests.parallel.cases import FULL, METHODS, MODEL, MUP, OPTIMIZER, RAMP, RECOMPUTE, SEQUENCE_LENGTH, TRAIN, Layout

LAYOUTS = {
    "single": Layout(1, ParallelConfig()),
    "dp2": Layout(2, ParallelConfig()),
    "tp2": Layout(2, ParallelConfig(tensor=2)),
    "tp2+sp": Layout(2, ParallelConfig(tensor=2, sequence=True)),
    "cp2": Layout(2, ParallelConfig(context=2)),
    "dp4": Layout(4, ParallelConfig()),
    "dp2xtp2": Layout(4, ParallelConfig(tensor=2)),
    "dp2xtp2+sp": Layout(4, ParallelConfig(tensor=2, sequence=True)),
    "tp2xcp2+sp": Layout(4, ParallelConfig(tensor=2, context=2, sequence=True)),
}
STEPS, SAVE_AFTER = (10, 5) if FULL else (4, 2)
CLIP = 0.3
"""Below every gradient norm of the reference, so that each step is clipped."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. All start from the same initial weights."""

    layout: str
    engine: str = "deepspeed"
    stage: int = 0
    method: str = "depth_attention"
    rows: int = 1
    """Sequences of a microbatch; the global batch has eight."""
    dtype: str = "fp32"
    offload: bool = False
    recompute: str = "none"
    tied: bool = False
    sabotage: str = ""
    """A deliberate mistake (see deepspeed_worker.py); the result must violate the bounds."""
    documents: str = ""
    alone: bool = False
    """As in cases.py."""
    ramp: bool = False
    """With batches of `RAMP`."""
    poison: bool = False
    """Make one step in the middle not finite, in addition to the others."""
    save: bool = False
    """Save after SAVE_AFTER steps."""
    resume: str = ""
    """Name of the saving job to continue from."""
    branch: bool = False
    """As a run of its own, with the optimizer and a schedule that has been advanced as far."""

    @property
    def name(self) -> str:
        engine = f"zero{self.stage}" if self.engine == "deepspeed" else self.engine
        parts = [engine, self.layout, *([self.method] if self.method in METHODS else [])]
        parts += [f"rows{self.rows}", self.dtype]
        parts += ["offload"] * self.offload + [self.recompute] * (self.recompute != "none") + ["tied"] * self.tied
        parts += [self.sabotage] * bool(self.sabotage) + ["poison"] * self.poison + ["save"] * self.save
        parts += ["ramp"] * self.ramp + [f"documents-{self.documents}"] * bool(self.documents) + ["alone"] * self.alone
        return "-".join(parts + [f"from-{self.resume}"] * bool(self.resume) + ["branch"] * self.branch)

    @property
    def reference(self) -> Job:
        """The Megatron engine in one process: the truth."""
        return Job(
            layout="single",
            engine="megatron",
            method=self.method,
            rows=2,
            dtype=self.dtype,
            tied=self.tied,
            ramp=self.ramp,
            documents=self.documents,
            alone=bool(self.documents),
        )

    def config(self) -> RunConfig:
        depth = dataclasses.replace(MODEL.depth_attention, stride=2, recent_window=1)
        return RunConfig(
            engine=EngineConfig(name=self.engine, zero_stage=self.stage, offload_optimizer=self.offload),
            model=dataclasses.replace(
                MODEL, num_layers=4, method=self.method, depth_attention=depth, tie_embeddings=self.tied
            ),
            parallel=LAYOUTS[self.layout].parallel,
            precision=PrecisionConfig(dtype=self.dtype),
            recompute=RECOMPUTE[self.recompute] if self.recompute != "none" else RecomputeConfig(),
            data=DataConfig(sequence_length=SEQUENCE_LENGTH, document_mask=self.documents == "mask"),
            train=dataclasses.replace(
                TRAIN,
                micro_batch_size=self.rows,
                steps=STEPS,
                **({"global_batch_size": RAMP[-1], "batch_ramp": [4, 4, 24]} if self.ramp else {}),
            ),
            # a warm-up to the step that is saved, as steep as the parity campaign's, then a decay
            optimizer=dataclasses.replace(
                OPTIMIZER,
                lr=1e-4 * SAVE_AFTER,
                schedule="wsd",
                decay_ratio=0.5,
                grad_clip=CLIP,
                mup=MUP.get(self.method),
            ),
            checkpoint=CheckpointConfig(start_from=self.resume if self.branch else None, start_optimizer=self.branch),
        )


PRODUCT = [
    Job(layout=layout, stage=stage, rows=rows)
    for layout, one in LAYOUTS.items()
    for stage in range(4)
    for rows in (1, 8 // (one.world_size // (one.parallel.tensor * one.parallel.context)))  # several, and one
]
# By default a case of each kind on two processes; what SAVES and POISONED run as well is not in it.
BRIEF = [Job(layout="dp2", stage=1), Job(layout="tp2+sp", stage=0)]
PARITY = [
    *(PRODUCT if FULL else BRIEF),
    Job(layout="dp2", stage=3, recompute="uniform1"),
    Job(layout="dp2", stage=2, rows=2, ramp=True),
    *(Job(layout="dp2", stage=stage, rows=2, documents="mask") for stage in range(1, 4)),
    Job(layout="cp2", stage=1, rows=2, documents="padding"),
    *([Job(layout="dp2", stage=2, offload=True)] if FULL else []),
]
# A layout and a stage for each method: its parameters reduced over tensor ranks, cut in pieces, gathered for a module.
PARITY += [
    Job(layout="tp2+sp", stage=0, rows=8, method="denseformer"),
    Job(layout="tp2+sp", stage=2, rows=4, method="attnres"),
    Job(layout="dp2", stage=3, rows=4, method="mhc", recompute="uniform1"),
]
BF16 = [Job(layout="dp2", stage=3, dtype="bf16"), Job(layout="dp2", stage=1, rows=2, dtype="bf16", documents="mask")]
CONTROLS = [
    Job(layout="tp2+sp", stage=0, sabotage="norms_not_reduced"),
    Job(layout="dp2", stage=2, sabotage="last_microbatch_only"),
    Job(layout="dp2", stage=2, rows=2, documents="mask", sabotage="constant_divisor"),
    *([Job(layout="tp2", stage=2, sabotage="norm_of_own_tensor_rank")] if FULL else []),
]
POISONED = [Job(layout="dp2", stage=stage, poison=True) for stage in ((0, 2, 3) if FULL else (3,))]

SAVES = [
    Job(layout="single", engine="megatron", rows=2, save=True),
    Job(layout="dp2", stage=3, save=True),
    *([Job(layout="tp2+sp", stage=2, save=True)] if FULL else []),
]
_MEGATRON, _Z3, *_ = (job.name for job in SAVES)
RESUMES = [
    Job(layout="dp2", stage=3, resume=_MEGATRON),
    *(Job(layout="single", engine="megatron", rows=2, resume=job.name) for job in SAVES[1:]),
    Job(layout="dp2", stage=3, resume=_MEGATRON, branch=True),
    Job(layout="dp2", stage=3, resume=_Z3, branch=True),
    Job(layout="single", engine="megatron", rows=2, resume=_Z3, branch=True),
]

if FULL:
    PARITY += [
        Job(layout="dp2", stage=1, recompute="uniform1"),
        Job(layout="tp2+sp", stage=3, recompute="selective"),
        *(Job(layout="dp2", stage=stage, tied=True) for stage in (2, 3)),
        *(Job(layout="dp2", stage=stage, offload=True) for stage in (1, 3)),
        *(
            Job(layout=layout, stage=stage, method=method)
            for method in METHODS
            for layout in ("dp2", "tp2+sp")
            for stage in range(4)
        ),
        *(Job(layout="tp2+sp", stage=3, method=method, recompute="uniform1") for method in METHODS),
    ]
    PARITY = list(dict.fromkeys(PARITY))
    BF16 += [
        Job(layout="dp2", stage=2, dtype="bf16"),
        Job(layout="dp2xtp2+sp", stage=1, dtype="bf16"),
        Job(layout="dp2", stage=2, dtype="bf16", offload=True),
    ]
    POISONED += [Job(layout="dp2xtp2", stage=stage, poison=True) for stage in (1, 3)]
    CONTROLS += [
        Job(layout="dp2xtp2", stage=2, sabotage="norm_of_own_tensor_rank"),
        Job(layout="tp2+sp", stage=3, sabotage="norms_not_reduced"),
        Job(layout="tp2", stage=1, sabotage="norms_not_reduced"),  # the norms of queries and keys
        Job(layout="dp2", stage=1, sabotage="last_microbatch_only"),
        Job(layout="dp2xtp2", stage=0, sabotage="norm_counts_copies"),
        Job(layout="dp2", stage=1, sabotage="not_clipped"),
    ]
    more = [
        Job(layout="dp2xtp2", stage=1, save=True),
        Job(layout="dp2", stage=0, save=True),
        Job(layout="dp2", stage=1, dtype="bf16", save=True),
        Job(layout="dp2", stage=3, method="mhc", save=True),
    ]
    _Z1, _Z0, _BF16, _MHC = (job.name for job in more)
    SAVES += more
    _Z2 = SAVES[2].name
    RESUMES += [
        *(Job(layout="dp2", stage=stage, resume=_MEGATRON) for stage in range(3)),
        Job(layout="dp2", stage=3, resume=_Z3),
        Job(layout="dp2xtp2", stage=3, resume=_MEGATRON),
        *(Job(layout="single", engine="megatron", rows=2, resume=name) for name in (_Z1, _Z0)),
        Job(layout="dp2", engine="megatron", rows=2, resume=_Z2),
        Job(layout="tp2+sp", stage=2, resume=_Z2),
        Job(layout="dp2xtp2", stage=1, resume=_Z1),
        Job(layout="dp2", stage=0, resume=_Z0),
        Job(layout="dp2xtp2+sp", stage=3, resume=_Z1),
        Job(layout="dp2", stage=1, dtype="bf16", resume=_BF16),
        Job(layout="dp2", stage=3, dtype="bf16", resume=_BF16),
        Job(layout="single", engine="megatron", rows=2, dtype="bf16", resume=_BF16),
        Job(layout="tp2+sp", stage=1, method="mhc", resume=_MHC),
        Job(layout="single", engine="megatron", method="mhc", rows=2, resume=_MHC),
    ]


def needs(job: Job) -> list[Job]:
    """Jobs whose results or files this one, or the test of it, reads."""
    return [*([job.reference] if job != job.reference else []), *([saver_of(job)] if job.resume else [])]


def saver_of(job: Job) -> Job:
    """The job that saved what a resuming one continues from."""
    return next(save for save in SAVES if save.name == job.resume)
