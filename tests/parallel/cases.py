"""What the parity campaign runs: the layouts, the jobs of each world, and the small model they share.

A job is one thing a world of processes does and leaves one result for; the tests assert on results. By default
every layout takes one, three or six steps at one stride and window; the layouts in ``THOROUGH`` run
every stride and window and every kind of recompute for one loss and gradient as well, the others one more of each.
``DEPTHATTN_PARITY=full`` in the environment runs everything, ten steps everywhere.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

from megatron_depthattn.config import (
    AttnResConfig,
    CheckpointConfig,
    DataConfig,
    DepthConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    RunConfig,
    TrainConfig,
)

SEQUENCE_LENGTH = 32
SUBLAYERS_A_SNAPSHOT = 4
METHODS = ("denseformer", "attnres", "mhc")
MUP = {"attnres": 16}
"""muP's base width, by the methods whose jobs train with it: four groups of parameters, and a fourth of most rates."""
FULL = os.environ.get("DEPTHATTN_PARITY") == "full"
STEPS, SAVE_AFTER = (10, 5) if FULL else (6, 3)

# Two key/value heads, so that four tensor ranks have to share them; heads times head size is not the hidden size.
MODEL = ModelConfig(
    num_layers=8,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=16,
    ffn_hidden_size=128,
    vocab_size=250,
    max_position_embeddings=64,
    init_std=0.1,
    attnres=AttnResConfig(block_size=SUBLAYERS_A_SNAPSHOT),
)
# Micro-batches of two rows: with one row a mixed-up order of positions and rows would go unnoticed.
TRAIN = TrainConfig(steps=20, global_batch_size=8, micro_batch_size=2)
RAMP = (4, 4, 4, 8, 8, 12, 12, 12, 12, 12)
"""Sequences of each step of the jobs with a batch ramp: from 4, 4 more after every 12 samples."""
# Adam's first steps are nearly lr * sign(gradient), also where the gradient is nothing but rounding. With eps near
# the size of a small gradient and a warm-up, what ten steps add to the rounding of one stays below the bound.
OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_ratio=0.5, eps=1e-5)


@dataclass(frozen=True)
class Layout:
    """How many processes, and what they share out."""

    world_size: int
    parallel: ParallelConfig
    cut: tuple[int, ...] = ()
    """Of an uneven pipeline the layers of every chunk in model order, by hand."""

    @property
    def shared_divisor(self) -> int:
        """The most layers that divide those of every chunk."""
        return math.gcd(*self.cut) or MODEL.num_layers // (self.parallel.pipeline * self.parallel.virtual_pipeline)


def group_sizes(parallel: ParallelConfig) -> dict[str, int]:
    """What the process groups are built from."""
    return {name: getattr(parallel, name) for name in ("tensor", "pipeline", "virtual_pipeline", "context")}


def _layout(world_size: int, cut: tuple[int, ...] = (), **parallel: Any) -> Layout:
    return Layout(world_size, ParallelConfig(**parallel), cut)


# The optimizer's state is sharded over the data-parallel ranks in all of them; there is no other mode.
LAYOUTS = {
    "single": _layout(1),
    "dp2": _layout(2),
    "tp2": _layout(2, tensor=2),
    "tp2+sp": _layout(2, tensor=2, sequence=True),
    "cp2": _layout(2, context=2),
    "pp2": _layout(2, pipeline=2),
    "pp2xvpp2": _layout(2, pipeline=2, virtual_pipeline=2),
    "tp4": _layout(4, tensor=4),
    "tp4+sp": _layout(4, tensor=4, sequence=True),
    "pp4": _layout(4, pipeline=4),
    "pp4xvpp2": _layout(4, pipeline=4, virtual_pipeline=2),
    "tp2xpp2+sp": _layout(4, tensor=2, pipeline=2, sequence=True),
    "tp2xcp2+sp": _layout(4, tensor=2, context=2, sequence=True),
    "cp2xpp2": _layout(4, context=2, pipeline=2),
    "dp2xpp2": _layout(4, pipeline=2),
    "dp2xpp2xvpp2": _layout(4, pipeline=2, virtual_pipeline=2),
    "dp2xtp2": _layout(4, tensor=2),
    "pp2xvpp4": _layout(2, pipeline=2, virtual_pipeline=4),
    "pp2xvpp3": _layout(2, pipeline=2, virtual_pipeline=3),
    "pp2-first3": _layout(2, (3, 5), pipeline=2, first_stage_layers=3),
    "pp2xvpp2-last2": _layout(2, (3, 1, 3, 1), pipeline=2, virtual_pipeline=2, last_stage_layers=2),
    "pp2xvpp2-uneven": _layout(2, (2, 3, 1, 2), pipeline=2, virtual_pipeline=2, pipeline_layout="Ett|t*3,|t|ttL"),
    "pp4-first1-last1": _layout(4, (1, 3, 3, 1), pipeline=4, first_stage_layers=1, last_stage_layers=1),
    "pp4-alone": _layout(4, (0, 4, 4, 0), pipeline=4, pipeline_layout="E|(t*4|)*2L"),
}
LOOPS_ALONE = ("pp2xvpp4", "pp2xvpp3")
"""Layouts of looped models alone: two chunks of each loop, and three loops of two layers."""

UNEVEN = tuple(name for name, layout in LAYOUTS.items() if layout.cut)

# Where strides, windows and recompute meet the most code. What other layouts add is how the groups are laid out: two
# cases show that.
THOROUGH = ("single", "pp2xvpp2")

RECOMPUTE = {
    "none": RecomputeConfig(),
    "selective": RecomputeConfig(granularity="selective"),
    "uniform1": RecomputeConfig(granularity="full", method="uniform", num_layers=1),
    "uniform2": RecomputeConfig(granularity="full", method="uniform", num_layers=2),
    "block1": RecomputeConfig(granularity="full", method="block", num_layers=1),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a layout. All start from the same weights."""

    layout: str
    method: str = "depth_attention"
    stride: int = 2
    window: int = 1
    weights: str = "softmax"
    mixes: str = "value"
    recompute: str = "none"
    steps: int = STEPS
    sabotage: str = ""
    """A deliberate mistake (see worker.py); the result must violate the bounds."""
    loops: int = 1
    """Times that the model's first layers are run; the model has as many layers in all as without, or nearly."""
    unrolled: bool = False
    """Of looped models: stride and window count through all loops."""
    save: bool = False
    """Save weights, optimizer and schedule after SAVE_AFTER steps."""
    resume: str = ""
    """Layout of the saving job to continue from, in place of the common weights."""
    branch: bool = False
    """Continue as a run of its own, with the optimizer and a schedule that has been advanced as far."""
    overlap: bool = False
    """Run twice, without and with overlapped data-parallel communication, see overlap.py."""
    grad_clip: float = 0.0
    """Of these two runs."""
    gathered: bool = False
    """Continue from its other checkpoint, which Megatron has gathered: one writer of whole tensors."""
    ramp: bool = False
    """With batches of `RAMP`."""
    agreement: bool = False
    """Only call ``check_same_on_all_ranks``."""
    optimizer: str = "adamw"
    dtype: str = "fp32"
    documents: str = ""
    """Samples of documents and padding, in micro-batches of unequal real tokens: ``mask``, documents do not see each
    other; ``padding``, they do."""
    alone: bool = False
    """In place of the samples a micro-batch for each of their documents (``padding``: for each sample), as long as it
    is: nothing is masked, nothing is packed."""

    @property
    def name(self) -> str:
        spacing = [f"stride{self.stride}", f"window{self.window}"]
        spacing += [self.weights] * (self.weights != "softmax") + [self.mixes] * (self.mixes != "value")
        parts = [self.layout, *(spacing if self.method == "depth_attention" else [self.method]), self.recompute]
        parts += [self.sabotage] * bool(self.sabotage) + ["save"] * self.save + ["agreement"] * self.agreement
        parts += [f"loops{self.loops}"] * (self.loops > 1) + ["unrolled"] * self.unrolled
        parts += [f"overlap-clip{self.grad_clip:g}"] * self.overlap
        parts += ["ramp"] * self.ramp
        parts += [f"from-{self.resume}"] * bool(self.resume) + ["gathered"] * self.gathered
        parts += [self.optimizer] * (self.optimizer != "adamw") + [self.dtype] * (self.dtype != "fp32")
        parts += ["branch"] * self.branch + [f"documents-{self.documents}"] * bool(self.documents)
        parts += ["alone"] * self.alone
        return "-".join(parts)

    @property
    def reference(self) -> Job:
        """The single-process job whose losses and gradients are the truth."""
        if self.documents:
            same = {key: getattr(self, key) for key in (*SAME_NUMBERS, "documents")}
            return Job(layout="single", alone=True, steps=DOCUMENT_STEPS, **same)
        if self.ramp:
            return RAMPED_REFERENCE
        if self.optimizer != "adamw":
            return next(
                job
                for job in MUON
                if job.layout == "single" and all(getattr(job, key) == getattr(self, key) for key in SAME_NUMBERS)
            )
        if self.method in METHODS:
            return Job(layout="single", method=self.method)
        if self.loops > 1:
            return LOOPED_REFERENCES[self.method, self.loops, self.unrolled]
        ablation = next((job for job in ABLATED if (job.weights, job.mixes) == (self.weights, self.mixes)), None)
        return ablation or REFERENCES[self.stride, self.window]

    @property
    def checkpoint(self) -> str:
        """The folder of the checkpoint that this job saves or continues from."""
        parts = ["checkpoint", self.resume or self.layout, self.method, f"loops{self.loops}", self.optimizer]
        parts += ["ramp"] * self.ramp + ["gathered"] * self.gathered
        return "-".join(parts)

    def config(self) -> RunConfig:
        rule: Any = "unrolled" if self.unrolled else "same_layer"
        depth = DepthConfig(
            stride=self.stride, recent_window=self.window, loop_sources=rule, weights=self.weights, mixes=self.mixes
        )
        layers = MODEL.num_layers // self.loops
        return RunConfig(
            model=dataclasses.replace(
                MODEL, num_layers=layers, num_loops=self.loops, method=self.method, depth_attention=depth
            ),
            parallel=LAYOUTS[self.layout].parallel,
            recompute=RECOMPUTE[self.recompute],
            data=DataConfig(sequence_length=SEQUENCE_LENGTH, document_mask=self.documents == "mask"),
            train=dataclasses.replace(TRAIN, global_batch_size=RAMP[-1], batch_ramp=[4, 4, 24]) if self.ramp else TRAIN,
            optimizer=dataclasses.replace(OPTIMIZER, name=self.optimizer, mup=MUP.get(self.method)),
            precision=PrecisionConfig(dtype=self.dtype),
            checkpoint=CheckpointConfig(
                start_from=self.checkpoint if self.branch else None, start_optimizer=self.branch
            ),
        )


SPACINGS = [(1, 0), *((stride, window) for stride in (2, MODEL.num_layers // 2) for window in (0, 1))]
SAVED = ("single", "tp2xpp2+sp", "pp4xvpp2", "dp2", "dp2xtp2", "pp2xvpp2-uneven")
"""Layouts whose ten steps at stride 2 and window 1 are saved on the way, with the optimizer."""
REFERENCES = {
    (stride, window): Job(layout="single", stride=stride, window=window, save=(stride, window) == (2, 1))
    for stride, window in SPACINGS
}
LOOPED_REFERENCES = {
    (job.method, job.loops, job.unrolled): job
    for job in (
        Job(layout="single", loops=2, save=True),
        Job(layout="single", loops=2, steps=1, unrolled=True),
        Job(layout="single", loops=3, steps=1),
        Job(layout="single", loops=2, steps=3, method="vanilla"),
    )
}
RAMPED_REFERENCE = Job(layout="single", ramp=True, save=True)
ABLATED = [
    Job(layout="single", steps=STEPS if FULL else 1, **ablation)
    for ablation in ({"mixes": "key_value"}, {"weights": "uniform"})
]
"""References of the ablations: three tensors of a source, or one; in place of a spacing under layouts of theirs."""
ABLATIONS = [
    *(("tp4+sp", "key_value", "none"), ("cp2", "key_value", "uniform1"), ("pp2xvpp2", "key_value", "uniform1")),
    *(("tp4", "uniform", "none"), ("pp2xvpp2", "uniform", "uniform1")),
]


def _parity_of(layout: str) -> list[Job]:
    if layout not in THOROUGH and not FULL:
        # Collectives take most of the time on two cores.
        steps = STEPS if layout in (*SAVED, "pp2") else 1 if LAYOUTS[layout].world_size == 4 else 3
        jobs = [Job(layout=layout, steps=steps, save=layout in SAVED)]
        if layout not in {layout for layout, *_ in ABLATIONS}:
            jobs.append(Job(layout=layout, steps=1, stride=1, window=0, recompute="uniform1"))
        return jobs
    jobs = []
    if layout != "single":
        for stride, window in SPACINGS:
            steps = STEPS if FULL or (stride, window) == (2, 1) else 1
            save = layout in SAVED and (stride, window) == (2, 1)
            jobs.append(Job(layout=layout, stride=stride, window=window, steps=steps, save=save))
    for name, recompute in RECOMPUTE.items():
        if name != "none" and LAYOUTS[layout].shared_divisor % (recompute.num_layers or 1) == 0:
            jobs.append(Job(layout=layout, recompute=name, steps=STEPS if FULL else 1))
    return jobs


OTHERWISE = ("dp2xpp2xvpp2", *LOOPS_ALONE, *(() if FULL else UNEVEN))
"""Layouts whose jobs are not those of `_parity_of`."""
PARITY = [job for layout in LAYOUTS if layout not in OTHERWISE for job in _parity_of(layout)]
PARITY += [
    dataclasses.replace(reference, layout=layout, recompute=recompute, steps=STEPS if FULL else 1)
    for reference in ABLATED
    for layout, ablation, recompute in ABLATIONS
    if ablation in (reference.weights, reference.mixes)
]

METHOD_LAYOUTS = ("tp2+sp", "pp4", "tp2xpp2+sp", *(("dp2", "cp2", "pp2xvpp2", "pp4xvpp2") if FULL else ()))


SAVING = ("tp2xpp2+sp", "pp4xvpp2")


def _parity_of_method(method: str) -> list[Job]:
    few = STEPS if FULL else 2
    return [
        Job(layout="pp2", method=method, save=True),
        *(Job(layout=layout, method=method, steps=few, save=FULL and layout in SAVING) for layout in METHOD_LAYOUTS),
        Job(layout="single", method=method, steps=few, recompute="uniform1"),
        # a rank's chunks and recomputed layers share what they read
        Job(layout="pp2xvpp2", method=method, steps=STEPS if FULL else 1, recompute="uniform1"),
    ]


PARITY += [job for method in METHODS for job in _parity_of_method(method)]
# Each way to cut unevenly; between them all kinds of spacings and recompute, and what the methods hand on.
PARITY += (
    []
    if FULL
    else [
        Job(layout="pp2-first3", steps=3),
        Job(layout="pp2-first3", stride=1, window=0, steps=1, recompute="uniform1"),
        Job(layout="pp2xvpp2-last2", stride=4, window=0, steps=1),
        Job(layout="pp2xvpp2-last2", stride=1, window=0, steps=1, recompute="block1"),
        Job(layout="pp2xvpp2-uneven", save=True),
        Job(layout="pp2xvpp2-uneven", stride=4, steps=1),
        Job(layout="pp4-first1-last1", stride=1, window=0, steps=1),
        Job(layout="pp4-first1-last1", stride=4, steps=1, recompute="block1"),
        Job(layout="pp4-alone", steps=1),
        Job(layout="pp4-alone", stride=1, window=0, steps=1, recompute="uniform2"),
    ]
)
PARITY += [
    Job(layout=layout, method=method, steps=1, recompute=recompute)
    for layout, recompute in (("pp2xvpp2-uneven", "uniform1"), ("pp4-alone", "none"))
    for method in METHODS
]

NO_GRADIENT = ("decoder.layers.0.attention_aggregator.",)
"""How names of parameters begin whose gradient is zero by definition: that aggregator's two candidates are equal."""
# The first half of the layers, twice. A pipeline runs each loop as chunks of its own.
LOOPED = [
    Job(layout="pp2xvpp2", loops=2, save=True),
    Job(layout="pp2xvpp2", loops=2, steps=1, recompute="uniform2"),
    Job(layout="pp2xvpp2", loops=2, steps=1, unrolled=True),
    Job(layout="pp2xvpp4", loops=2, steps=STEPS if FULL else 3),
    Job(layout="pp2xvpp3", loops=3, steps=1),
    Job(layout="tp2+sp", loops=2, steps=STEPS if FULL else 1),
    Job(layout="dp2", loops=2, steps=STEPS if FULL else 1),
    Job(layout="cp2", loops=2, steps=STEPS if FULL else 1),
    Job(layout="pp4xvpp2", loops=2, steps=STEPS if FULL else 1),
    Job(layout="pp2xvpp2-last2", loops=2, steps=1),
]
PARITY += LOOPED
PARITY += [Job(layout=layout, ramp=True, steps=STEPS if FULL else 6) for layout in ("dp2", "pp2", "pp2xvpp2", "tp2+sp")]
VANILLA_LOOPED = [
    Job(layout="pp2xvpp4", loops=2, method="vanilla", steps=3),
    Job(layout="tp2+sp", loops=2, method="vanilla", steps=1),
    Job(layout="pp2xvpp2-last2", loops=2, method="vanilla", steps=1),
]

DOCUMENT_STEPS = 2
DOCUMENTS = [
    *(
        Job(layout=layout, documents="mask", steps=DOCUMENT_STEPS, recompute=recompute)
        for layout, recompute in (
            *(("single", "selective"), ("dp2", "none"), ("tp2+sp", "none"), ("cp2", "uniform1"), ("pp2", "none")),
            *(("pp2xvpp2", "uniform1"), ("tp2xcp2+sp", "none"), ("cp2xpp2", "none"), ("pp4xvpp2", "none")),
        )
    ),
    Job(layout="pp2xvpp2", documents="mask", steps=DOCUMENT_STEPS, loops=2),
    Job(layout="tp2+sp", documents="mask", steps=DOCUMENT_STEPS, method="attnres"),
    Job(layout="cp2xpp2", documents="mask", steps=DOCUMENT_STEPS, method="vanilla"),
    *(Job(layout=layout, documents="padding", steps=DOCUMENT_STEPS) for layout in ("dp2", "cp2", "pp2xvpp2")),
]
"""Compared with each document alone."""

CONTROLS = [
    Job(layout="dp2", steps=1, documents="padding", sabotage="mean_of_means"),
    Job(layout="cp2", steps=1, documents="mask", sabotage="mean_of_means"),
    Job(layout="pp2", steps=1, documents="mask", sabotage="border_leaks_a_token"),
    Job(layout="pp2", method="denseformer", steps=1, sabotage="source_dropped"),
    Job(layout="pp2", method="attnres", steps=1, sabotage="source_dropped"),
    Job(layout="pp2", method="mhc", steps=1, sabotage="stream_dropped"),
    Job(layout="pp2", method="attnres", steps=1, sabotage="payload_gradient_dropped"),
    Job(layout="pp2xvpp2", method="denseformer", steps=1, recompute="uniform1", sabotage="shared_gradient_dropped"),
    Job(layout="tp2+sp", method="mhc", steps=1, sabotage="method_parameters_not_reduced"),
    Job(layout="pp2", steps=1, sabotage="payload_gradient_dropped"),
    Job(layout="pp4xvpp2", steps=1, sabotage="payload_gradient_dropped"),
    Job(layout="pp2xvpp2", steps=1, sabotage="shared_gradient_dropped"),
    Job(layout="pp2", steps=1, sabotage="two_sources_swapped"),
    Job(layout="tp4+sp", steps=1, sabotage="mean_query_of_own_heads"),
    Job(layout="tp4+sp", steps=1, mixes="key_value", sabotage="last_rank_mixes_values_alone"),
    Job(layout="tp2+sp", steps=1, sabotage="norms_not_reduced"),
    Job(layout="single", recompute="uniform1", steps=1, sabotage="shared_gradient_dropped"),
    Job(layout="pp2xvpp4", loops=2, steps=1, sabotage="later_loop_gradient_dropped"),
    Job(layout="tp2+sp", loops=2, steps=1, sabotage="another_rule_on_one_rank"),
]

EVEN_PLAN = Job(layout="pp2xvpp2-uneven", steps=1, sabotage="plan_of_an_even_cut")
"""Fails: what is sent is not what is waited for."""

SAME_NUMBERS = ("method", "loops", "optimizer", "dtype")
MUON = [
    Job(layout="single", optimizer="muon", save=True),
    Job(layout="tp2+sp", optimizer="muon", steps=2, documents="mask"),
    Job(layout="dp2", optimizer="muon", save=True),
    *(Job(layout=layout, optimizer="muon") for layout in ("tp2", "tp2+sp", "cp2", "pp2-first3", "pp2xvpp2")),
    Job(layout="dp2xpp2xvpp2", optimizer="muon", sabotage="matrices_first"),
    Job(layout="single", optimizer="muon", steps=3, loops=2),
    Job(layout="pp2xvpp2", optimizer="muon", steps=3, loops=2),
    Job(layout="single", optimizer="muon", steps=3, method="mhc"),
    Job(layout="tp2+sp", optimizer="muon", steps=3, method="mhc", recompute="uniform1"),
    *(Job(layout=layout, optimizer="muon", steps=5, dtype="bf16") for layout in ("single", "dp2", "tp2+sp")),
]
MUON_CONTROLS = [
    Job(layout="tp2", optimizer="muon", sabotage="blockwise"),
    Job(layout="pp2", optimizer="muon", sabotage="unsplit_qkv"),
    Job(layout="dp2xpp2xvpp2", optimizer="muon", sabotage="matrices_and_norms_in_one_group"),
]

CHATTY = Job(layout="pp2xvpp2", steps=1, sabotage="shapes_exchanged")
"""Right numbers, but more is sent than has to be."""

OVERLAPPED = [
    Job(layout=layout, method=method, overlap=True, grad_clip=clip)
    for layout in ("dp2", "dp2xpp2", "dp2xpp2xvpp2")
    for method in ("depth_attention", "vanilla", *METHODS)
    for clip in (0.0, 0.05)
]
if not FULL:
    some = {("dp2", "depth_attention", 0.0), ("dp2xpp2", "denseformer", 0.05), ("dp2xpp2xvpp2", "attnres", 0.0)}
    OVERLAPPED = [job for job in OVERLAPPED if (job.layout, job.method, job.grad_clip) in some]
OVERLAP_CONTROLS = [
    Job(layout="dp2", overlap=True, sabotage=mistake)
    for mistake in ("weights_not_waited_for", "reduced_with_the_first_gradient")
]

AGREEMENT = Job(layout="tp4", agreement=True)

# Saved with the optimizer under one layout, continued under others; and under the same one, bit for bit.
MUON_OVERLAPPED = [
    Job(layout=layout, optimizer="muon", overlap=True, grad_clip=clip)
    for layout, clip in (("dp2", 0.0), ("dp2xpp2xvpp2", 0.05))
]
SAVES = [job for job in (*REFERENCES.values(), *LOOPED_REFERENCES.values(), RAMPED_REFERENCE, *PARITY) if job.save]
RESUMES = [
    Job(layout=to, resume=saved)
    for saved, targets in {
        "single": ("single", "dp2", "pp4", "pp4-alone"),
        "pp2xvpp2-uneven": ("pp2xvpp2-uneven", "pp2xvpp2", "single"),
        "tp2xpp2+sp": ("tp2xpp2+sp", "single", "pp2xvpp2", *(("dp2", "cp2", "tp4", "pp4", "dp2xpp2") if FULL else ())),
        "pp4xvpp2": ("pp4xvpp2", "tp2xpp2+sp"),
        "dp2": ("dp2",),
        "dp2xtp2": ("dp2xtp2", "dp2", "pp2"),
    }.items()
    for to in targets
]
RESUMES += [Job(layout=to, resume="tp2xpp2+sp", branch=True) for to in ("tp2xpp2+sp", "pp2xvpp2", "dp2", "tp2+sp")]
RESUMES += [Job(layout=to, resume="single", ramp=True) for to in ("single", "dp2")]
RESUMES += [Job(layout=to, resume="dp2xtp2", gathered=True) for to in ("dp2xtp2", "pp2")]
RESUMES += [Job(layout="tp2+sp", method=method, resume="pp2") for method in (METHODS if FULL else ("attnres",))]
if FULL:
    RESUMES += [Job(layout="pp2xvpp2", method=method, resume="tp2xpp2+sp") for method in METHODS]
    RESUMES += [Job(layout="single", method=method, resume="pp4xvpp2") for method in METHODS]
RESUMES += [Job(layout="pp2xvpp4", loops=2, resume="single"), Job(layout="single", loops=2, resume="pp2xvpp2")]
MUON_RESUMES = [
    Job(layout=to, resume=saved, optimizer="muon")
    for saved, to in (("dp2", "dp2"), ("single", "dp2"), ("dp2", "tp2+sp"), ("dp2", "pp2xvpp2"), ("dp2", "pp4-alone"))
]


def needs(job: Job) -> list[Job]:
    """Jobs whose results or files this one, or the test of it, reads."""
    if job.agreement or job.overlap:
        return []
    same = ("method", "loops", "optimizer", "ramp")
    saver = [
        save
        for save in (*SAVES, *MUON)
        if save.save and save.layout == job.resume and all(getattr(save, key) == getattr(job, key) for key in same)
    ]
    return [job.reference] * (job != job.reference) + saver
