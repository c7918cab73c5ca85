"""Which configs a number of ranks can run: one list of checks, and `validate`, which walks it.

The same mistakes found later are a hang, or an assertion inside Megatron on one rank. docs/support.md is generated
from the list (`tables.py`).
"""

import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

from megatron_depthattn.config.check import Check, Condition, checks
from megatron_depthattn.config.layout_checks import LAYOUT, MODEL, PRECISION, RECOMPUTE, model_ranks, samples_at_once
from megatron_depthattn.config.pipeline import PIPELINE, chunk_layers
from megatron_depthattn.config.schedule import SCHEDULES
from megatron_depthattn.config.schema import RunConfig
from megatron_depthattn.config.sizes import parse_bytes
from megatron_depthattn.config.stages import STAGES
from megatron_depthattn.methods.definitions import DEFINITIONS, method_of
from megatron_depthattn.switches import OVERLAPS


@dataclass(kw_only=True, frozen=True)
class Sizes:
    """What a config and a world size fix together."""

    data_parallel_size: int
    """Model replicas."""
    num_microbatches: int
    """Forward passes of one replica in one optimizer step, of the full batch."""
    chunk_layers: tuple[int, ...]
    """Effective layers of every pipeline chunk, in model order; chunk c runs on stage c % parallel.pipeline."""


def validate(config: RunConfig, world_size: int, *, needs_data: bool = True) -> Sizes:
    """Sizes of `config` on `world_size` ranks, or ValueError.

    `needs_data=False` skips data.path and run.dir, for tools that size a run without starting it.
    """
    for check in CHECKS:
        if (needs_data or check.section != "data") and (message := check.message(config, world_size)):
            raise ValueError(message)
    model = asdict(config.model)
    for method in DEFINITIONS:
        method_of(model | {"method": method})  # raises where a setting of it is out of range
    return Sizes(
        data_parallel_size=world_size // model_ranks(config),
        num_microbatches=config.train.global_batch_size // samples_at_once(config, world_size),
        chunk_layers=chunk_layers(config.model, config.parallel),
    )


# ---- ranges


def _ranges(keys: str, is_valid: Callable[[Any], bool], remedy: str) -> tuple[Check, ...]:
    def applies(key: str) -> Condition:
        return lambda config, _: (value := reduce(getattr, key.split("."), config)) is not None and not is_valid(value)

    return checks("ranges", *((f"{{{key} is}}; {remedy}", applies(key)) for key in keys.split()))


def _is_size(value: int | str) -> bool:
    with suppress(ValueError):
        return parse_bytes(value) > 0
    return False


RANGES = (
    # Libraries count elements and samples with 32 bits; the names of step folders have eight digits.
    *_ranges("model.num_layers model.num_loops", lambda n: 1 <= n <= 1 << 16, "set 1 to 65536"),
    *_ranges("train.steps", lambda n: 1 <= n < 10**8, "set 1 to 99999999"),
    *_ranges(
        "model.hidden_size model.num_attention_heads model.num_query_groups model.kv_channels model.ffn_hidden_size "
        "model.vocab_size model.max_position_embeddings model.depth_attention.stride recompute.num_layers "
        "data.sequence_length parallel.tensor parallel.pipeline parallel.virtual_pipeline parallel.context "
        "parallel.first_stage_layers parallel.last_stage_layers "
        "train.global_batch_size train.micro_batch_size train.stop_after train.eval_interval train.eval_batches "
        "train.log_interval train.depth_interval train.max_skipped_in_a_row train.max_restarts_without_progress "
        "checkpoint.interval checkpoint.keep optimizer.mup",
        lambda n: 1 <= n < 1 << 31,
        "set 1 to 2147483647",
    ),
    *_ranges("engine.zero_stage", lambda n: 0 <= n <= 3, "set one of DeepSpeed's stages: 0, 1, 2, 3"),
    *_ranges("data.num_workers", lambda n: 0 <= n <= 1024, "set 0 to 1024"),
    *_ranges("data.predownload", lambda n: 0 <= n <= 10**7, "set 0 to 10000000"),
    *_ranges("data.cache_limit", _is_size, "set a number of bytes, or one with kb, mb, gb or tb, such as 200gb"),
    *_ranges("data.skip_samples", lambda n: 0 <= n <= 10**15, "set 0 to 10^15"),
    *_ranges(
        "run.seed model.depth_attention.recent_window model.init_std precision.bf16_first_layers "
        "precision.bf16_last_layers optimizer.lr optimizer.weight_decay optimizer.grad_clip",
        lambda x: 0 <= x < math.inf,
        "set a number of 0 or more",
    ),
    *_ranges(
        "model.rotary_base model.norm_epsilon optimizer.eps optimizer.muon.extra_scale_factor",
        lambda x: 0 < x < math.inf,
        "set a number above 0",
    ),
    *_ranges(
        "train.hang_timeout preflight.timeout", lambda x: 0 < x <= 31 * 86400, "set seconds above 0, up to 2678400"
    ),
    *_ranges("optimizer.min_lr_ratio optimizer.warmup_ratio", lambda x: 0 <= x <= 1, "set a number from 0 to 1"),
    *_ranges("optimizer.decay_ratio", lambda x: 0 < x <= 1, "set a number above 0, up to 1"),
    *_ranges("optimizer.muon.ns_steps", lambda n: 1 <= n <= 100, "set 1 to 100"),
    *_ranges(
        "optimizer.beta1 optimizer.beta2 optimizer.muon.momentum",
        lambda x: 0 <= x < 1,
        "set a number from 0 to 1, 1 excluded",
    ),
)

# ---- looped models and the engine

LOOPS = checks(
    "looped models",
    (
        "{model.num_loops is|above 1} with {model.method=|denseformer, attnres or mhc}: the method has weights of its "
        "own for every place in depth and is not defined for a stack that is run again; set model.num_loops=1, or "
        "model.method to depth_attention or vanilla",
        lambda c, _: c.model.num_loops > 1 and c.model.method in DEFINITIONS,
    ),
    (
        "{model.num_loops is|above 1} with {parallel.pipeline=|above 1} and {parallel.virtual_pipeline=|no multiple of "
        "it}: a stage keeps its layers' weights for all loops, so it has the same number of chunks in each, and a "
        "plain pipeline (1F1B) passes each stage once; set parallel.virtual_pipeline={model.num_loops} or a "
        "multiple of it, or parallel.pipeline=1",
        lambda c, _: c.parallel.virtual_pipeline % c.model.num_loops and c.parallel.pipeline > 1,
    ),
)
ENGINE = checks(
    "engine",
    "{engine.zero_stage is|above 0} with engine.name=megatron: that engine has no ZeRO stages; set engine.zero_stage=0 "
    "(its optimizer's state is always sharded over the data-parallel ranks)",
    "engine.offload_optimizer=true with engine.name=megatron: its optimizer stays on its device; set "
    "engine.offload_optimizer=false, or engine.name=deepspeed with engine.zero_stage=1 or more",
    "{model.num_loops is|above 1} with engine.name=deepspeed: it expects every weight's gradient once in a backward "
    "pass and gathers ZeRO-3 weights for the one module that holds them; set model.num_loops=1 or engine.name=megatron",
    *(
        f"{{parallel.{key} is|above 1}} with engine.name=deepspeed: it does not run Megatron's pipeline schedules; set "
        f"parallel.{key}=1 (and more parallel.tensor, or a higher engine.zero_stage), or engine.name=megatron"
        for key in ("virtual_pipeline", "pipeline")
    ),
    "engine.offload_optimizer=true with engine.zero_stage=0: DeepSpeed has no offload there; set engine.zero_stage=1 "
    "or more, or engine.offload_optimizer=false",
    "precision.dtype=bf16 with engine.name=deepspeed and engine.zero_stage=0: DeepSpeed would sum gradients in bf16; "
    "set engine.zero_stage=1 or more (they sum in fp32), or engine.name=megatron",
)

MUON = checks(
    "optimizer",
    "optimizer.name=muon with engine.name=deepspeed: it steps shares of flattened weights and Muon steps whole "
    "matrices; set optimizer.name=adamw, or engine.name=megatron",
    "optimizer.name=muon with precision.fp8_params=true: Megatron-Core's Muon steps weights that are bf16 or fp32; set "
    "precision.fp8_params=false, or optimizer.name=adamw",
    (
        "{optimizer.mup=} with optimizer.name=muon: its rules are AdamW's, and Muon's updates keep their size at every "
        "width by optimizer.muon.scale_mode; set optimizer.mup=null, or optimizer.name=adamw",
        lambda c, _: c.optimizer.mup and c.optimizer.name == "muon",
    ),
    (
        "optimizer.name=muon with {parallel.tensor=} and {model.num_query_groups=|smaller}: ranks share a key/value "
        "head, and Megatron-Core would orthogonalize query, key and value as one matrix; set "
        "parallel.tensor={model.num_query_groups} or less, or optimizer.name=adamw",
        lambda c, _: c.optimizer.name == "muon" and c.parallel.tensor > c.model.num_query_groups,
    ),
)

# ---- Megatron's switches for speed

_FUSED = "model.fused_gradient_accumulation"


def _overlap_lacks(config: RunConfig, _: int) -> dict[str, str]:
    needs = {
        "engine.name=megatron": config.engine.name == "megatron",
        "model.spec=te": config.model.spec != "local",
        "precision.dtype=bf16": config.precision.dtype == "bf16",
        "parallel.tensor=2 or more": config.parallel.tensor > 1,
        "parallel.sequence=true": config.parallel.sequence,
    }
    missing = " and ".join(setting for setting, is_there in needs.items() if not is_there)
    return {"missing": missing} if config.parallel.tp_comm_overlap and missing else {}


SWITCHES = checks(
    "switches",
    *(
        f"parallel.{key}=true with engine.name=deepspeed: it reduces and gathers in its own way; set "
        f"parallel.{key}=null, or engine.name=megatron"
        for key in OVERLAPS
    ),
    *(
        f"parallel.{key}=true with {{model.num_loops=|above 1}} and {{parallel.virtual_pipeline=|above 1}}: the chunks "
        "of a rank use the same weights, whose gradients are finished once for each chunk, so no bucket knows the last "
        f"time; set parallel.{key}=null, or parallel.pipeline=1 and parallel.virtual_pipeline=1"
        for key in OVERLAPS
    ),
    "parallel.overlap_param_gather=true with parallel.overlap_grad_reduce=false: the buckets that are gathered one by "
    "one are those of the reduction; set parallel.overlap_grad_reduce=true, or parallel.overlap_param_gather=false",
    "model.compile=true with model.spec=te: the norms of the local layers are compiled, TransformerEngine's are "
    "kernels already; set model.compile=false, or model.spec=local",
    "model.compile=true with engine.name=deepspeed: it takes weights away from the modules and has not been tried with "
    "compiled ones; set model.compile=false, or engine.name=megatron",
    "model.fused_cross_entropy=true with precision.dtype=fp32: Megatron's kernel rounds the logits' gradient to bf16; "
    "set model.fused_cross_entropy=false, or precision.dtype=bf16",
    f"{_FUSED}=true with engine.name=deepspeed: its gradients are not summed in Megatron's buffers; set {_FUSED}=null, "
    "or engine.name=megatron",
    f"{_FUSED}=true with {{model.num_loops=|above 1}}: TransformerEngine's first microbatch of a step overwrites a "
    f"weight's gradient, also that of the loops before; set {_FUSED}=null, or model.num_loops=1",
    (
        "parallel.tp_comm_overlap=true without sequence parallel, TransformerEngine's layers and bf16: it overlaps the "
        "gathers and reductions of sequence parallel inside TransformerEngine's layers, in bf16; set {missing}, or "
        "parallel.tp_comm_overlap=false",
        _overlap_lacks,
    ),
)

# ---- data


def _corpus(is_wrong: Callable[[str, RunConfig], bool]) -> Condition:
    def applies(config: RunConfig, _: int) -> dict[str, str]:
        return next(({"corpus": key, "path": p} for key, p in config.data.paths.items() if is_wrong(p, config)), {})

    return applies


def _unweighted_stream(config: RunConfig, _: int) -> dict[str, Any]:
    streams, stages = config.data.streams or [], config.data.stages or []
    for number, stream in enumerate(streams):
        begins = any(any(stage.proportions[number : number + 1]) for stage in stages)
        rests = begins and stream.proportion == 0 and any(other.proportion for other in streams)
        if not rests and not 0 < stream.proportion < math.inf:
            return {"stream": f"data.streams[{number}]", "proportion": stream.proportion}
    return {}


def _bad_name(config: RunConfig, _: int) -> dict[str, str]:
    return next(({"name": repr(n)} for n in config.data.held_out or {} if not re.fullmatch(r"[\w.-]{1,64}", n)), {})


DATA = checks(
    "data",
    (
        "data.path is not set: the run has nothing to read; set it to the folder or URL that tools/prepare_data.py "
        "--output wrote, such as data.path=data/quickstart (or several in data.streams)",
        lambda c, _: not c.data.path and c.data.streams is None,
    ),
    (
        "{data.path is} and data.streams is set as well; set data.path='' to read the streams, or data.streams=null to "
        "read data.path",
        lambda c, _: c.data.path and c.data.streams is not None,
    ),
    (
        "data.streams is an empty list; give at least one entry of path and proportion, or set data.path",
        lambda c, _: c.data.streams == [],
    ),
    ("data.cache is empty; set a local folder, or null for none", lambda c, _: c.data.cache == ""),
    (
        "{data.cache_limit=} with data.cache=null: there is no cache that it could limit; set data.cache to a local "
        "folder, or data.cache_limit=null",
        lambda c, _: c.data.cache_limit is not None and c.data.cache is None,
    ),
    ("{corpus} is empty; set the folder or URL of a prepared corpus", _corpus(lambda path, _: not path)),
    (
        "{stream}.proportion is {proportion}; set a number above 0 (or 0 where data.stages gives it more later, and "
        "another stream has more until then)",
        _unweighted_stream,
    ),
    (
        "{corpus} is the remote {path} and data.cache is null: shards have nowhere to go; set data.cache to a local "
        "folder of each node",
        _corpus(lambda path, c: "://" in path and c.data.cache is None),
    ),
    (
        "data.held_out has a split named {name}: it becomes part of a curve's name; give 1 to 64 letters, digits, "
        "dots, dashes and underscores",
        _bad_name,
    ),
    (
        "data.held_out with train.eval_interval=null: nothing is ever evaluated; set train.eval_interval, or "
        "data.held_out=null",
        lambda c, _: c.data.held_out and c.train.eval_interval is None,
    ),
    (
        "run.dir is not set: the run has nowhere to write; set a folder, such as run.dir=runs/first",
        lambda c, _: not c.run.dir,
    ),
)

# ---- checkpoints

CHECKPOINT = checks(
    "checkpoint",
    (
        "checkpoint.start_from is empty; set a step folder, or null to begin with initial weights",
        lambda c, _: c.checkpoint.start_from == "",
    ),
    (
        "{checkpoint.load=|a step folder} with {checkpoint.start_from=}: the first resumes a run, the second begins "
        "one; set checkpoint.load=latest or null, or checkpoint.start_from=null",
        lambda c, _: c.checkpoint.start_from and c.checkpoint.load not in (None, "latest"),
    ),
    "checkpoint.start_optimizer=true with checkpoint.start_from=null: there is nothing to take the optimizer's state "
    "from; set checkpoint.start_from to a step folder, or checkpoint.start_optimizer=false",
    (
        "checkpoint.keep_steps holds {step}; set steps from 1 to {train.steps=}",
        lambda c, _: next(
            ({"step": step} for step in c.checkpoint.keep_steps or [] if not 1 <= step <= c.train.steps), {}
        ),
    ),
)

# ---- Weights & Biases

LOG = checks(
    "log",
    (
        "{log.wandb.project is|empty or has one of / \\ # ? % :}; set a name without these characters, or null for no "
        "Weights & Biases",
        lambda c, _: (name := c.log.wandb.project) is not None and (not name or set(name) & set("/\\#?%:")),
    ),
)

# ---- all of them

CHECKS = (
    *(*RANGES, *SCHEDULES, *LOOPS, *ENGINE, *MUON, *SWITCHES, *DATA, *STAGES, *CHECKPOINT, *LOG, *MODEL, *PIPELINE),
    *(*LAYOUT, *RECOMPUTE, *PRECISION),
)
