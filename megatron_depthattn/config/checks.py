"""Which configs a number of ranks can run: one list of checks, and `validate`, which walks it.

The same mistakes found later are a hang, or an assertion inside Megatron on one rank. docs/support.md is generated
from the list (`tables.py`).
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

from megatron_depthattn.config.check import Check, Condition, checks
from megatron_depthattn.config.pipeline import PIPELINE, chunk_layers, is_even
from megatron_depthattn.config.precision import RECIPES
from megatron_depthattn.config.schedule import SCHEDULES
from megatron_depthattn.config.schema import ModelConfig, RunConfig
from megatron_depthattn.methods.definitions import DEFINITIONS, method_of
from megatron_depthattn.switches import OVERLAPS
from megatron_depthattn.vocabulary import VOCAB_MULTIPLE, padded_vocab_size


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
        data_parallel_size=world_size // _model_ranks(config),
        num_microbatches=config.train.global_batch_size // _samples_at_once(config, world_size),
        chunk_layers=_chunk_layers(config),
    )


# ---- ranges


def _ranges(keys: str, is_valid: Callable[[Any], bool], remedy: str) -> tuple[Check, ...]:
    def applies(key: str) -> Condition:
        return lambda config, _: (value := reduce(getattr, key.split("."), config)) is not None and not is_valid(value)

    return checks("ranges", *((f"{{{key} is}}; {remedy}", applies(key)) for key in keys.split()))


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
    for number, stream in enumerate(config.data.streams or []):
        if not 0 < stream.proportion < math.inf:
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
    ("{corpus} is empty; set the folder or URL of a prepared corpus", _corpus(lambda path, _: not path)),
    ("{stream}.proportion is {proportion}; set a number above 0", _unweighted_stream),
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

# ---- model and layout


def _unless_multiple(value: int, step: int, **more: int) -> dict[str, Any]:
    """For the texts, the multiples of `step` on both sides of `value`; empty if it is one."""
    below = value // step * step
    return (
        {"step": step, "multiples": f"{below} or {below + step}" if below > 0 else str(step), **more}
        if value < 1 or value % step
        else {}
    )


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _tensor_sizes(model: ModelConfig, multiple: int = 1) -> str:
    """Every parallel.tensor that heads, key/value heads, FFN and vocabulary allow, with `_dimensions` of a multiple."""
    groups, others = model.num_query_groups, (model.ffn_hidden_size, padded_vocab_size(model.vocab_size))
    allowed = (
        str(size)
        for size in _divisors(model.num_attention_heads)
        if not (groups % size and size % groups)
        and not any(number % size for number in others)
        and not any(number % multiple for number in _dimensions(model, size).values())
    )
    return ", ".join(allowed) or "none"


def _unsplit(key: str) -> Condition:
    """Whether a size of the model is none that tensor-parallel ranks can share."""
    return lambda c, _: getattr(c.model, key) % c.parallel.tensor and {"sizes": _tensor_sizes(c.model)}


def _padded_rows(config: RunConfig, _: int) -> dict[str, Any]:
    rows, tensor = padded_vocab_size(config.model.vocab_size), config.parallel.tensor
    common = math.lcm(VOCAB_MULTIPLE, tensor)
    next_rows = common * -(-rows // common)
    return {"rows": rows, "next": next_rows, "sizes": _tensor_sizes(config.model)} if rows % tensor else {}


def _model_ranks(config: RunConfig) -> int:
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context


def _samples_at_once(config: RunConfig, ranks: int) -> int:
    """Samples of one forward pass of all model replicas."""
    return config.train.micro_batch_size * (ranks // _model_ranks(config))


def _chunk_layers(config: RunConfig) -> tuple[int, ...]:
    return chunk_layers(config.model, config.parallel)


def _chunks_of_loop(config: RunConfig) -> int:
    return config.parallel.pipeline * max(1, config.parallel.virtual_pipeline // config.model.num_loops)


def _groups(config: RunConfig, ranks: int) -> Any:
    batch, at_once = config.train.global_batch_size, _samples_at_once(config, ranks)
    group = at_once * config.parallel.pipeline
    return config.parallel.virtual_pipeline > 1 and _unless_multiple(batch, group, microbatches=batch // at_once)


def _ramp_unsplit(config: RunConfig, ranks: int) -> dict[str, Any]:
    """What every batch size of a ramp must be a multiple of, where one is not, and starts that are."""
    unit = _samples_at_once(config, ranks) * (config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1)
    if not config.train.batch_ramp or config.train.batch_sizes.divisor % unit == 0:
        return {}
    starts = range(unit, config.train.global_batch_size, unit)
    several = [*starts[:3], "...", starts[-1]] if len(starts) > 5 else starts
    return {"unit": unit, "replicas": ranks // _model_ranks(config), "starts": ", ".join(map(str, several)) or "none"}


def _pieces(config: RunConfig) -> int:
    """Equal pieces of a sequence: two for each context-parallel rank, so that causal work is even."""
    return 2 * config.parallel.context if config.parallel.context > 1 else 1


MODEL = checks(
    "model",
    (
        "{model.num_attention_heads is} and {model.num_query_groups is|that does not divide it}: every key/value head "
        "serves the same number of query heads; set num_query_groups to one of {divisors}",
        lambda c, _: (
            c.model.num_attention_heads % c.model.num_query_groups
            and {"divisors": ", ".join(map(str, _divisors(c.model.num_attention_heads)))}
        ),
    ),
    (
        "{model.kv_channels is|odd}: RoPE turns pairs of channels; set an even number",
        lambda c, _: c.model.kv_channels % 2,
    ),
    (
        "{parallel.tensor is} and {model.num_query_groups is|of which none divides the other}: a rank holds whole "
        "key/value heads, or ranks share one evenly; set parallel.tensor to what this model allows: {sizes}",
        lambda c, _: (
            c.model.num_query_groups % c.parallel.tensor
            and c.parallel.tensor % c.model.num_query_groups
            and {"sizes": _tensor_sizes(c.model)}
        ),
    ),
    *(
        (
            f"{{model.{key} is}}, which {{parallel.tensor=}} does not divide: each tensor-parallel rank holds an equal "
            "share; set parallel.tensor to what this model allows: {sizes}",
            _unsplit(key),
        )
        for key in ("num_attention_heads", "ffn_hidden_size")
    ),
    (
        f"{{model.vocab_size is}}, whose embedding of {{rows}} rows (padded to a multiple of {VOCAB_MULTIPLE}) "
        "{parallel.tensor=} does not divide: each tensor-parallel rank holds an equal share; set "
        "model.vocab_size={next}, or parallel.tensor to what this model allows: {sizes}",
        _padded_rows,
    ),
)
LAYOUT = checks(
    "layout",
    "{parallel.virtual_pipeline is|above 1} with parallel.pipeline=1: chunks are interleaved over several stages; set "
    "parallel.virtual_pipeline=1 or parallel.pipeline=2 or more",
    (
        "{model.num_layers is}, which is not a multiple of {step} ({parallel.pipeline=} times "
        "{parallel.virtual_pipeline=} over {model.num_loops=|above 1}): every chunk of a loop holds the same number of "
        "layers; set model.num_layers={multiples}, or other stages",
        lambda c, _: (
            c.model.num_loops > 1 and is_even(c.parallel) and _unless_multiple(c.model.num_layers, _chunks_of_loop(c))
        ),
    ),
    (
        "{model.num_layers is}, which is not a multiple of {step} ({parallel.pipeline=} times "
        "{parallel.virtual_pipeline=}): every chunk holds the same number of layers; set model.num_layers={multiples}, "
        "or other stages, or parallel.first_stage_layers or parallel.last_stage_layers",
        lambda c, _: (
            c.model.num_loops == 1
            and is_even(c.parallel)
            and _unless_multiple(c.model.num_layers, c.parallel.pipeline * c.parallel.virtual_pipeline)
        ),
    ),
    (
        "the world has {ranks} ranks, which is not a multiple of {step} ({parallel.tensor=} times {parallel.pipeline=} "
        "times {parallel.context=}): those are the ranks of one model replica; start {multiples} ranks, or set another "
        "layout",
        lambda c, ranks: _unless_multiple(ranks, _model_ranks(c), ranks=ranks),
    ),
    (
        "{data.sequence_length is}, more than {model.max_position_embeddings=}; set "
        "model.max_position_embeddings={data.sequence_length} or a shorter data.sequence_length",
        lambda c, _: c.data.sequence_length > c.model.max_position_embeddings,
    ),
    (
        "{data.sequence_length is}, which is not a multiple of {step}, with {parallel.context=}: each rank holds two "
        "equal pieces of the sequence, so that causal work is even; set data.sequence_length={multiples}",
        lambda c, _: _unless_multiple(c.data.sequence_length, _pieces(c)),
    ),
    "parallel.sequence=true with parallel.tensor=1: sequence parallel splits positions over the tensor-parallel ranks; "
    "set parallel.sequence=false or parallel.tensor=2 or more",
    (
        "{data.sequence_length is}, which is not a multiple of {step}, with parallel.sequence=true: every one of "
        "{parallel.tensor} tensor-parallel ranks holds an equal share of the positions; set "
        "data.sequence_length={multiples} or parallel.sequence=false",
        lambda c, _: c.parallel.sequence and _unless_multiple(c.data.sequence_length, c.parallel.tensor * _pieces(c)),
    ),
    (
        "{train.global_batch_size is}, which is not a multiple of {step} ({train.micro_batch_size=} times {replicas} "
        "data-parallel replicas): every replica runs the same number of microbatches; set "
        "train.global_batch_size={multiples}, or another train.micro_batch_size",
        lambda c, ranks: _unless_multiple(
            c.train.global_batch_size, _samples_at_once(c, ranks), replicas=ranks // _model_ranks(c)
        ),
    ),
    (
        "a step has {microbatches} microbatches, which is not a multiple of {parallel.pipeline=}, with "
        "{parallel.virtual_pipeline=}: the interleaved schedule takes them in groups of one per stage; set "
        "train.global_batch_size={multiples} or parallel.virtual_pipeline=1",
        _groups,
    ),
    (
        "{train.batch_ramp is}, of which a batch size is not a multiple of {unit} ({train.micro_batch_size=} times "
        "{replicas} data-parallel replicas, with {parallel.virtual_pipeline=|above 1} times {parallel.pipeline=}): "
        "every step is split as the full batch is; set a start of {starts}, and an increment of a multiple of {unit}",
        _ramp_unsplit,
    ),
)
RECOMPUTE = checks(
    "recompute",
    (
        "{recompute.granularity is|null or selective} with {recompute.method=} and {recompute.num_layers=}: these two "
        "belong to full recompute; set both to null, or recompute.granularity=full",
        lambda c, _: c.recompute.granularity != "full" and (c.recompute.method or c.recompute.num_layers is not None),
    ),
    (
        "recompute.granularity=full without recompute.method and recompute.num_layers: it needs both; set "
        "recompute.method=uniform recompute.num_layers=1 to keep only each layer's input",
        lambda c, _: c.recompute.granularity == "full" and None in (c.recompute.method, c.recompute.num_layers),
    ),
    (
        "{recompute.num_layers is}, but no pipeline chunk holds more than {layers} layers; set recompute.num_layers "
        "from 1 to {layers}",
        lambda c, _: (
            c.recompute.granularity == "full"
            and c.recompute.num_layers > (layers := max(_chunk_layers(c)))
            and {"layers": layers}
        ),
    ),
    (
        "{recompute.num_layers is}, which does not divide the {layers} layers of a pipeline chunk, with "
        "recompute.method=uniform: uniform recompute cuts every chunk into equal groups; set it to one of {divisors}",
        lambda c, _: (
            c.recompute.method == "uniform"
            and (common := math.gcd(*(sizes := _chunk_layers(c)))) % c.recompute.num_layers
            and {
                "layers": " or ".join(map(str, sorted({*sizes} - {0}))),
                "divisors": ", ".join(map(str, _divisors(common))),
            }
        ),
    ),
)

# ---- precision


def _option_without_fp8(config: RunConfig, _: int) -> dict[str, str]:
    for key in ("fp8_params", "fp8_attention", "bf16_first_layers", "bf16_last_layers"):
        if config.precision.fp8 is None and (value := getattr(config.precision, key)):
            neutral = "false" if value is True else "0"
            return {"option": f"precision.{key}={str(value).lower()}", "off": f"precision.{key}={neutral}"}
    return {}


def _more_than_a_stage(key: str) -> Condition:
    return lambda c, _: (
        getattr(c.precision, key) > (layers := c.model.num_layers // c.parallel.pipeline) and {"layers": layers}
    )


def _bf16_layers(config: RunConfig) -> int:
    return config.precision.bf16_first_layers + config.precision.bf16_last_layers


def _dimensions(model: ModelConfig, tensor: int) -> dict[str, int]:
    """Of the matrix products of a tensor-parallel rank, beside its tokens."""
    query, key = (heads * model.kv_channels for heads in (model.num_attention_heads, model.num_query_groups))
    return {
        "model.hidden_size": model.hidden_size,
        "model.num_attention_heads times model.kv_channels, over parallel.tensor": query // tensor,
        "the rows of the QKV projection, over parallel.tensor": (query + 2 * key) // tensor,
        "model.ffn_hidden_size over parallel.tensor": model.ffn_hidden_size // tensor,
    }


def _unaligned(config: RunConfig, _: int) -> dict[str, Any]:
    """The first dimension that is no multiple of what the recipe takes."""
    multiple = RECIPES[config.precision.fp8].multiple if config.precision.fp8 else 1
    for name, size in _dimensions(config.model, config.parallel.tensor).items():
        if size % multiple:
            sizes = _tensor_sizes(config.model, multiple)
            return {"dimension": name, "size": size, "multiple": multiple, "sizes": sizes}
    return {}


def _unaligned_tokens(config: RunConfig, _: int) -> dict[str, Any]:
    tokens = config.train.micro_batch_size * config.data.sequence_length // config.parallel.context
    multiple = RECIPES[config.precision.fp8].multiple if config.precision.fp8 else 1
    return {"tokens": tokens, "multiple": multiple} if tokens % multiple else {}


PRECISION = checks(
    "precision",
    (
        "{option} with precision.fp8=null: nothing is FP8; set precision.fp8 to one of "
        f"{', '.join(RECIPES)}, or {{off}}",
        _option_without_fp8,
    ),
    "{precision.fp8=} with precision.dtype=fp32: FP8 is cast from bf16, and everything around the linear layers runs "
    "in that; set precision.dtype=bf16",
    # auto takes te here, or nothing
    "{precision.fp8=} with model.spec=local: its linear layers would compute in bf16 and not say so; set model.spec=te "
    "(needs TransformerEngine and an NVIDIA GPU), or precision.fp8=null",
    "{precision.fp8=} with engine.name=deepspeed: the ZeRO optimizer has not been tried with FP8 scaling state; set "
    "engine.name=megatron, or precision.fp8=null",
    (
        "{precision.bf16_first_layers=} and {precision.bf16_last_layers=} with precision.fp8=delayed: its scales are "
        "brought up to date once for all layers; set both to 0, or precision.fp8=tensorwise",
        lambda c, _: c.precision.fp8 == "delayed" and _bf16_layers(c),
    ),
    (
        "{precision.bf16_first_layers=} and {precision.bf16_last_layers=} leave none of {model.num_layers} layers in "
        "FP8; set fewer, or precision.fp8=null",
        lambda c, _: _bf16_layers(c) >= c.model.num_layers,
    ),
    *(
        (
            f"{{precision.{key} is}}, but a pipeline stage holds {{layers}} layers: Megatron-Core takes no more than "
            f"a stage of an even cut; set precision.{key}={{layers}} or fewer, or fewer stages",
            _more_than_a_stage(key),
        )
        for key in ("bf16_first_layers", "bf16_last_layers")
    ),
    "precision.fp8_params=true with precision.fp8=mxfp8: Megatron-Core gathers such weights through the gradient "
    "buffer while the forward pass runs, which this stack does not do; set precision.fp8_params=false",
    (
        "precision.fp8_attention=true with {precision.fp8=} (not delayed or tensorwise): Megatron-Core has no such "
        "switch for blockwise, and for mxfp8 as of 0.19 only, so core attention may stay in bf16; set "
        "precision.fp8_attention=false, or precision.fp8=delayed",
        lambda c, _: c.precision.fp8_attention and not RECIPES[c.precision.fp8].attention_gpus,
    ),
    "precision.fp8_attention=true with recompute.granularity=selective: Megatron-Core would compute core attention "
    "again without the scales of the first pass; set recompute.granularity=full or null, or "
    "precision.fp8_attention=false",
    (
        "{precision.fp8=} with {dimension}, which is {size} and not a multiple of {multiple} (mxfp8 32, others 16): "
        "FP8 matrix products take no other; set precision.fp8=null, or parallel.tensor to what this model allows with "
        "it: {sizes}",
        _unaligned,
    ),
    (
        "{precision.fp8=} with {tokens} tokens a pass (train.micro_batch_size times data.sequence_length, over "
        "parallel.context), not a multiple of {multiple} (mxfp8 32, others 16): FP8 matrix products take no other; "
        "set another train.micro_batch_size or data.sequence_length, or precision.fp8=null",
        _unaligned_tokens,
    ),
)

CHECKS = (
    *(*RANGES, *SCHEDULES, *LOOPS, *ENGINE, *MUON, *SWITCHES, *DATA, *CHECKPOINT, *LOG, *MODEL, *PIPELINE, *LAYOUT),
    *(*RECOMPUTE, *PRECISION),
)
