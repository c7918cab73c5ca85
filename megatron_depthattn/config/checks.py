"""Which configs a number of ranks can run: one list of checks, and `validate`, which walks it.

The same mistakes found later are a hang, or an assertion inside Megatron on one rank. docs/support.md is generated
from the list (`tables.py`).
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

from megatron_depthattn.config.check import Check, first_unsupported
from megatron_depthattn.config.precision import RECIPES
from megatron_depthattn.config.schema import RunConfig
from megatron_depthattn.methods.definitions import DEFINITIONS, method_of
from megatron_depthattn.switches import OVERLAPS, has_chunks_of_same_weights
from megatron_depthattn.vocabulary import VOCAB_MULTIPLE, padded_vocab_size


@dataclass(kw_only=True, frozen=True)
class Sizes:
    """What a config and a world size fix together."""

    data_parallel_size: int
    """Model replicas."""
    num_microbatches: int
    """Forward passes of one replica in one optimizer step."""
    layers_per_chunk: int
    """Layers of one pipeline chunk; a stage holds parallel.virtual_pipeline chunks."""


def validate(config: RunConfig, world_size: int, *, needs_data: bool = True) -> Sizes:
    """Sizes of `config` on `world_size` ranks, or ValueError.

    `needs_data=False` skips data.path and run.dir, for tools that size a run without starting it.
    """
    for check in CHECKS:
        if (needs_data or check.section != "data") and (message := check.message(config, world_size)):
            raise ValueError(message)
    for method in DEFINITIONS:
        method_of(asdict(config.model) | {"method": method})  # raises where a setting of it is out of range
    replicas = world_size // _model_ranks(config)
    return Sizes(
        data_parallel_size=replicas,
        num_microbatches=config.train.global_batch_size // (config.train.micro_batch_size * replicas),
        layers_per_chunk=_layers_per_chunk(config),
    )


def unsupported_precision(config: RunConfig) -> str | None:
    """The message of the first check of the precision that applies."""
    return first_unsupported(PRECISION, config)


def unsupported_switches(config: RunConfig) -> str | None:
    """The same of the switches for speed; they are checked again once `auto` is resolved."""
    return first_unsupported(SWITCHES, config)


# ---- ranges


def _ranges(keys: str, is_valid: Callable[[Any], bool], remedy: str) -> tuple[Check, ...]:
    def check(key: str) -> Check:
        def applies(config: RunConfig, _: int) -> bool:
            value: Any = reduce(getattr, key.split("."), config)
            return value is not None and not is_valid(value)

        return Check("ranges", f"{{{key} is}}", applies, "", remedy)

    return tuple(check(key) for key in keys.split())


RANGES = (
    # Libraries count elements and samples with 32 bits; the names of step folders have eight digits.
    *_ranges("model.num_layers model.num_loops", lambda n: 1 <= n <= 1 << 16, "set 1 to 65536"),
    *_ranges("train.steps", lambda n: 1 <= n < 10**8, "set 1 to 99999999"),
    *_ranges(
        "model.hidden_size model.num_attention_heads model.num_query_groups model.kv_channels model.ffn_hidden_size "
        "model.vocab_size model.max_position_embeddings model.depth_attention.stride recompute.num_layers "
        "data.sequence_length parallel.tensor parallel.pipeline parallel.virtual_pipeline parallel.context "
        "train.global_batch_size train.micro_batch_size train.stop_after train.eval_interval train.eval_batches "
        "train.log_interval train.depth_interval train.max_skipped_in_a_row train.max_restarts_without_progress "
        "checkpoint.interval checkpoint.keep",
        lambda n: 1 <= n < 1 << 31,
        "set 1 to 2147483647",
    ),
    *_ranges("data.num_workers", lambda n: 0 <= n <= 1024, "set 0 to 1024"),
    *_ranges(
        "run.seed model.depth_attention.recent_window model.init_std precision.bf16_first_layers "
        "precision.bf16_last_layers optimizer.lr optimizer.weight_decay optimizer.grad_clip",
        lambda x: 0 <= x < math.inf,
        "set a number of 0 or more",
    ),
    *_ranges("model.rotary_base model.norm_epsilon optimizer.eps", lambda x: 0 < x < math.inf, "set a number above 0"),
    *_ranges(
        "train.hang_timeout preflight.timeout", lambda x: 0 < x <= 31 * 86400, "set seconds above 0, up to 2678400"
    ),
    *_ranges("optimizer.min_lr_ratio optimizer.warmup_ratio", lambda x: 0 <= x <= 1, "set a number from 0 to 1"),
    *_ranges("optimizer.beta1 optimizer.beta2", lambda x: 0 <= x < 1, "set a number from 0 to 1, 1 excluded"),
)

# ---- looped models and the engine


def _engine(name: str, given: str, applies: Callable[[RunConfig], bool], why: str, remedy: str) -> Check:
    return Check("engine", given, lambda c, _: c.engine.name == name and applies(c), why, remedy)


LOOPS = (
    Check(
        "looped models",
        "{model.num_loops is|above 1} with {model.method=|denseformer, attnres or mhc}",
        lambda c, _: c.model.num_loops > 1 and c.model.method not in ("depth_attention", "vanilla"),
        "the method has weights of its own for every place in depth and is not defined for a stack that is run again",
        "set model.num_loops=1, or model.method to depth_attention or vanilla",
    ),
    Check(
        "looped models",
        "{model.num_loops is|above 1} with {precision.fp8=}",
        lambda c, _: c.model.num_loops > 1 and c.precision.fp8,
        "scaling state has not been tried with weights that several layers use",
        "set precision.fp8=null or model.num_loops=1",
    ),
    Check(
        "looped models",
        "{model.num_loops is|above 1} with {parallel.pipeline=|above 1} and {parallel.virtual_pipeline=|another}",
        lambda c, _: 1 != c.model.num_loops != c.parallel.virtual_pipeline and c.parallel.pipeline > 1,
        "a stage keeps its layers' weights for all loops, so it holds one chunk for each",
        "set parallel.virtual_pipeline={model.num_loops}, or parallel.pipeline=1",
    ),
)
ENGINE = (
    _engine(
        "megatron",
        "{engine.zero_stage is|above 0} with engine.name=megatron",
        lambda c: c.engine.zero_stage != 0,
        "that engine has no ZeRO stages",
        "set engine.zero_stage=0 (its optimizer's state is always sharded over the data-parallel ranks)",
    ),
    _engine(
        "megatron",
        "engine.offload_optimizer=true with engine.name=megatron",
        lambda c: c.engine.offload_optimizer,
        "its optimizer stays on its device",
        "set engine.offload_optimizer=false, or engine.name=deepspeed with engine.zero_stage=1 or more",
    ),
    _engine(
        "deepspeed",
        "{engine.zero_stage is|outside 0 to 3} with engine.name=deepspeed",
        lambda c: not 0 <= c.engine.zero_stage <= 3,
        "",
        "set one of DeepSpeed's stages: 0, 1, 2, 3",
    ),
    _engine(
        "deepspeed",
        "{model.num_loops is|above 1} with engine.name=deepspeed",
        lambda c: c.model.num_loops > 1,
        "it expects every weight's gradient once in a backward pass and gathers ZeRO-3 weights for the one module that "
        "holds them",
        "set model.num_loops=1 or engine.name=megatron",
    ),
    *(
        _engine(
            "deepspeed",
            f"{{parallel.{key} is|above 1}} with engine.name=deepspeed",
            lambda c, key=key: getattr(c.parallel, key) > 1,  # type: ignore[misc]
            "it does not run Megatron's pipeline schedules",
            f"set parallel.{key}=1 (and more parallel.tensor, or a higher engine.zero_stage), or engine.name=megatron",
        )
        for key in ("virtual_pipeline", "pipeline")
    ),
    _engine(
        "deepspeed",
        "engine.offload_optimizer=true with engine.zero_stage=0",
        lambda c: c.engine.offload_optimizer and c.engine.zero_stage == 0,
        "DeepSpeed has no offload there",
        "set engine.zero_stage=1 or more, or engine.offload_optimizer=false",
    ),
    _engine(
        "deepspeed",
        "precision.dtype=bf16 with engine.name=deepspeed and engine.zero_stage=0",
        lambda c: c.precision.dtype == "bf16" and c.engine.zero_stage == 0,
        "DeepSpeed would sum gradients in bf16",
        "set engine.zero_stage=1 or more (they sum in fp32), or engine.name=megatron",
    ),
)

# ---- Megatron's switches for speed

_FUSED = "model.fused_gradient_accumulation"
_OVERLAP_NEEDS: dict[str, Callable[[RunConfig], bool]] = {
    "engine.name=megatron": lambda c: c.engine.name == "megatron",
    "model.spec=te": lambda c: c.model.spec != "local",
    "precision.dtype=bf16": lambda c: c.precision.dtype == "bf16",
    "parallel.tensor=2 or more": lambda c: c.parallel.tensor > 1,
    "parallel.sequence=true": lambda c: c.parallel.sequence,
}


def _overlap_lacks(config: RunConfig, _: int) -> dict[str, str]:
    missing = [setting for setting, is_there in _OVERLAP_NEEDS.items() if not is_there(config)]
    return {"missing": " and ".join(missing)} if config.parallel.tp_comm_overlap and missing else {}


def _is_deepspeed_with(section: str, key: str) -> Callable[[RunConfig, int], bool]:
    return lambda c, _: c.engine.name == "deepspeed" and bool(getattr(getattr(c, section), key))


SWITCHES = (
    *(
        Check(
            "switches",
            f"parallel.{key}=true with engine.name=deepspeed",
            _is_deepspeed_with("parallel", key),
            "it reduces and gathers in its own way",
            f"set parallel.{key}=null, or engine.name=megatron",
        )
        for key in OVERLAPS
    ),
    *(
        Check(
            "switches",
            f"parallel.{key}=true with {{model.num_loops=|above 1}} and {{parallel.virtual_pipeline=|above 1}}",
            lambda c, _, key=key: getattr(c.parallel, key) and has_chunks_of_same_weights(c),  # type: ignore[misc]
            "the chunks of a rank use the same weights, whose gradients are finished once for each chunk, so no bucket "
            "knows the last time",
            f"set parallel.{key}=null, or parallel.pipeline=1 and parallel.virtual_pipeline=1",
        )
        for key in OVERLAPS
    ),
    Check(
        "switches",
        "parallel.overlap_param_gather=true with parallel.overlap_grad_reduce=false",
        lambda c, _: c.parallel.overlap_param_gather and c.parallel.overlap_grad_reduce is False,
        "the buckets that are gathered one by one are those of the reduction",
        "set parallel.overlap_grad_reduce=true, or parallel.overlap_param_gather=false",
    ),
    Check(
        "switches",
        "model.compile=true with model.spec=te",
        lambda c, _: c.model.compile and c.model.spec == "te",
        "the norms of the local layers are compiled, TransformerEngine's are kernels already",
        "set model.compile=false, or model.spec=local",
    ),
    Check(
        "switches",
        "model.compile=true with engine.name=deepspeed",
        _is_deepspeed_with("model", "compile"),
        "it takes weights away from the modules and has not been tried with compiled ones",
        "set model.compile=false, or engine.name=megatron",
    ),
    Check(
        "switches",
        "model.fused_cross_entropy=true with precision.dtype=fp32",
        lambda c, _: c.model.fused_cross_entropy and c.precision.dtype != "bf16",
        "Megatron's kernel rounds the logits' gradient to bf16",
        "set model.fused_cross_entropy=false, or precision.dtype=bf16",
    ),
    Check(
        "switches",
        f"{_FUSED}=true with engine.name=deepspeed",
        _is_deepspeed_with("model", "fused_gradient_accumulation"),
        "its gradients are not summed in Megatron's buffers",
        f"set {_FUSED}=null, or engine.name=megatron",
    ),
    Check(
        "switches",
        f"{_FUSED}=true with {{model.num_loops=|above 1}}",
        lambda c, _: c.model.fused_gradient_accumulation and c.model.num_loops > 1,
        "TransformerEngine's first microbatch of a step overwrites a weight's gradient, also that of the loops before",
        f"set {_FUSED}=null, or model.num_loops=1",
    ),
    Check(
        "switches",
        "parallel.tp_comm_overlap=true without sequence parallel, TransformerEngine's layers and bf16",
        _overlap_lacks,
        "it overlaps the gathers and reductions of sequence parallel inside TransformerEngine's layers, in bf16",
        "set {missing}, or parallel.tp_comm_overlap=false",
    ),
)

# ---- data


def _stream(is_wrong: Callable[[Any, RunConfig], bool]) -> Callable[[RunConfig, int], dict[str, Any]]:
    def applies(config: RunConfig, _: int) -> dict[str, Any]:
        for number, stream in enumerate(config.data.sources):
            if is_wrong(stream, config):
                return {"stream": f"data.streams[{number}]" if config.data.streams else "data", **vars(stream)}
        return {}

    return applies


DATA = (
    Check(
        "data",
        "data.path is not set",
        lambda c, _: not c.data.path and c.data.streams is None,
        "the run has nothing to read",
        "set it to the folder or URL that tools/prepare_data.py --output wrote, such as data.path=data/quickstart (or "
        "several in data.streams)",
    ),
    Check(
        "data",
        "{data.path is} and data.streams is set as well",
        lambda c, _: c.data.path and c.data.streams is not None,
        "",
        "set data.path='' to read the streams, or data.streams=null to read data.path",
    ),
    Check(
        "data",
        "data.streams is an empty list",
        lambda c, _: c.data.streams == [],
        "",
        "give at least one entry of path and proportion, or set data.path",
    ),
    Check("data", "data.cache is empty", lambda c, _: c.data.cache == "", "", "set a local folder, or null for none"),
    Check(
        "data",
        "{stream}.path is empty",
        _stream(lambda stream, c: not stream.path),
        "",
        "set the folder or URL of a prepared corpus",
    ),
    Check(
        "data",
        "{stream}.proportion is {proportion}",
        _stream(lambda stream, c: not 0 < stream.proportion < math.inf),
        "",
        "set a number above 0",
    ),
    Check(
        "data",
        "{stream}.path is the remote {path} and data.cache is null",
        _stream(lambda stream, c: "://" in stream.path and c.data.cache is None),
        "shards have nowhere to go",
        "set data.cache to a local folder of each node",
    ),
    Check(
        "data",
        "run.dir is not set",
        lambda c, _: not c.run.dir,
        "the run has nowhere to write",
        "set a folder, such as run.dir=runs/first",
    ),
)

# ---- model and layout


def _multiples(value: int, step: int) -> str:
    """The multiples of `step` on both sides of `value`."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)


def _unless_multiple(value: int, step: int) -> dict[str, Any]:
    return {"step": step, "multiples": _multiples(value, step)} if value % step else {}


def _divisors(number: int) -> str:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return ", ".join(str(divisor) for divisor in sorted({*small, *(number // divisor for divisor in small)}))


def _padded_rows(config: RunConfig, _: int) -> dict[str, Any]:
    rows, tensor = padded_vocab_size(config.model.vocab_size), config.parallel.tensor
    common = math.lcm(VOCAB_MULTIPLE, tensor)
    return {"rows": rows, "next": common * -(-rows // common)} if rows % tensor else {}


def _model_ranks(config: RunConfig) -> int:
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context


def _layers_per_chunk(config: RunConfig) -> int:
    """Layers of a chunk; those of all loops where there is no pipeline to cut them."""
    model, parallel = config.model, config.parallel
    if model.num_loops > 1:
        return model.num_layers // parallel.pipeline * (1 if parallel.pipeline > 1 else model.num_loops)
    return model.num_layers // (parallel.pipeline * parallel.virtual_pipeline)


def _world(config: RunConfig, ranks: int) -> dict[str, Any]:
    found = _unless_multiple(ranks, _model_ranks(config))
    return {"ranks": ranks, **found} if found else {}


def _batch(config: RunConfig, ranks: int) -> dict[str, Any]:
    replicas = ranks // _model_ranks(config)
    found = _unless_multiple(config.train.global_batch_size, config.train.micro_batch_size * replicas)
    return {"replicas": replicas, **found} if found else {}


def _groups(config: RunConfig, ranks: int) -> dict[str, Any]:
    batch, per_pass = config.train.global_batch_size, config.train.micro_batch_size * (ranks // _model_ranks(config))
    stages = config.parallel.pipeline
    if config.parallel.virtual_pipeline == 1 or batch // per_pass % stages == 0:
        return {}
    return {"microbatches": batch // per_pass, "multiples": _multiples(batch, per_pass * stages)}


def _sequence_share(config: RunConfig, _: int) -> dict[str, Any]:
    parallel = config.parallel
    shares = parallel.tensor * (2 * parallel.context if parallel.context > 1 else 1)
    return _unless_multiple(config.data.sequence_length, shares) if parallel.sequence else {}


MODEL = (
    Check(
        "model",
        "{model.num_attention_heads is} and {model.num_query_groups is|that does not divide it}",
        lambda c, _: (
            c.model.num_attention_heads % c.model.num_query_groups
            and {"divisors": _divisors(c.model.num_attention_heads)}
        ),
        "every key/value head serves the same number of query heads",
        "set num_query_groups to one of {divisors}",
    ),
    Check(
        "model",
        "{model.kv_channels is|odd}",
        lambda c, _: c.model.kv_channels % 2,
        "RoPE turns pairs of channels",
        "set an even number",
    ),
    Check(
        "model",
        "{parallel.tensor is} and {model.num_query_groups is|of which none divides the other}",
        lambda c, _: c.model.num_query_groups % c.parallel.tensor and c.parallel.tensor % c.model.num_query_groups,
        "a rank holds whole key/value heads, or ranks share one evenly",
        "set parallel.tensor to a divisor or a multiple of num_query_groups",
    ),
    *(
        Check(
            "model",
            f"{{model.{key} is}}, which {{parallel.tensor=}} does not divide",
            lambda c, _, key=key: _unless_multiple(getattr(c.model, key), c.parallel.tensor),  # type: ignore[misc]
            "each tensor-parallel rank holds an equal share",
            f"set model.{key}={{multiples}}, or another parallel.tensor",
        )
        for key in ("num_attention_heads", "ffn_hidden_size")
    ),
    Check(
        "model",
        f"{{model.vocab_size is}}, whose embedding of {{rows}} rows (padded to a multiple of {VOCAB_MULTIPLE}) "
        "{parallel.tensor=} does not divide",
        _padded_rows,
        "each tensor-parallel rank holds an equal share",
        "set model.vocab_size={next}, or parallel.tensor to a power of two",
    ),
)
LAYOUT = (
    Check(
        "layout",
        "{parallel.virtual_pipeline is|above 1} with parallel.pipeline=1",
        lambda c, _: c.parallel.virtual_pipeline > 1 and c.parallel.pipeline == 1,
        "chunks are interleaved over several stages",
        "set parallel.virtual_pipeline=1 or parallel.pipeline=2 or more",
    ),
    Check(
        "layout",
        "{model.num_layers is}, which is not a multiple of {parallel.pipeline=}, with {model.num_loops=|above 1}",
        lambda c, _: c.model.num_loops > 1 and _unless_multiple(c.model.num_layers, c.parallel.pipeline),
        "every stage holds the same number of layers, and runs them in each loop",
        "set model.num_layers={multiples}, or other stages",
    ),
    Check(
        "layout",
        "{model.num_layers is}, which is not a multiple of {step} ({parallel.pipeline=} times "
        "{parallel.virtual_pipeline=})",
        lambda c, _: (
            c.model.num_loops == 1
            and _unless_multiple(c.model.num_layers, c.parallel.pipeline * c.parallel.virtual_pipeline)
        ),
        "every chunk holds the same number of layers",
        "set model.num_layers={multiples}, or other stages",
    ),
    Check(
        "recompute",
        "{recompute.granularity is|null or selective} with {recompute.method=} and {recompute.num_layers=}",
        lambda c, _: c.recompute.granularity != "full" and (c.recompute.method or c.recompute.num_layers is not None),
        "these two belong to full recompute",
        "set both to null, or recompute.granularity=full",
    ),
    Check(
        "recompute",
        "recompute.granularity=full without recompute.method and recompute.num_layers",
        lambda c, _: c.recompute.granularity == "full" and None in (c.recompute.method, c.recompute.num_layers),
        "it needs both",
        "set recompute.method=uniform recompute.num_layers=1 to keep only each layer's input",
    ),
    Check(
        "recompute",
        "{recompute.num_layers is}, but a pipeline chunk holds {layers} layers",
        lambda c, _: (
            c.recompute.granularity == "full"
            and c.recompute.num_layers > (layers := _layers_per_chunk(c))
            and {"layers": layers}
        ),
        "",
        "set recompute.num_layers from 1 to {layers}",
    ),
    Check(
        "recompute",
        "{recompute.num_layers is}, which does not divide the {layers} layers of a pipeline chunk, with "
        "recompute.method=uniform",
        lambda c, _: (
            c.recompute.method == "uniform"
            and (layers := _layers_per_chunk(c)) % c.recompute.num_layers
            and {"layers": layers, "divisors": _divisors(layers)}
        ),
        "uniform recompute cuts a chunk into equal groups",
        "set it to one of {divisors}",
    ),
    Check(
        "layout",
        "the world has {ranks} ranks, which is not a multiple of {step} ({parallel.tensor=} times {parallel.pipeline=} "
        "times {parallel.context=})",
        lambda c, ranks: (ranks < 1 and {"ranks": ranks, "step": 1, "multiples": "1"}) or _world(c, ranks),
        "those are the ranks of one model replica",
        "start {multiples} ranks, or set another layout",
    ),
    Check(
        "layout",
        "{data.sequence_length is}, more than {model.max_position_embeddings=}",
        lambda c, _: c.data.sequence_length > c.model.max_position_embeddings,
        "",
        "set model.max_position_embeddings={data.sequence_length} or a shorter data.sequence_length",
    ),
    Check(
        "layout",
        "{data.sequence_length is}, which is not a multiple of {step}, with {parallel.context=}",
        lambda c, _: c.parallel.context > 1 and _unless_multiple(c.data.sequence_length, 2 * c.parallel.context),
        "each rank holds two equal pieces of the sequence, so that causal work is even",
        "set data.sequence_length={multiples}",
    ),
    Check(
        "layout",
        "parallel.sequence=true with parallel.tensor=1",
        lambda c, _: c.parallel.sequence and c.parallel.tensor == 1,
        "sequence parallel splits positions over the tensor-parallel ranks",
        "set parallel.sequence=false or parallel.tensor=2 or more",
    ),
    Check(
        "layout",
        "{data.sequence_length is}, which is not a multiple of {step}, with parallel.sequence=true",
        _sequence_share,
        "every one of {parallel.tensor} tensor-parallel ranks holds an equal share of the positions",
        "set data.sequence_length={multiples} or parallel.sequence=false",
    ),
)
BATCH = (
    Check(
        "layout",
        "{train.global_batch_size is}, which is not a multiple of {step} ({train.micro_batch_size=} times {replicas} "
        "data-parallel replicas)",
        _batch,
        "every replica runs the same number of microbatches",
        "set train.global_batch_size={multiples}, or another train.micro_batch_size",
    ),
    Check(
        "layout",
        "a step has {microbatches} microbatches, which is not a multiple of {parallel.pipeline=}, with "
        "{parallel.virtual_pipeline=}",
        _groups,
        "the interleaved schedule takes them in groups of one per stage",
        "set train.global_batch_size={multiples} or parallel.virtual_pipeline=1",
    ),
)

# ---- precision


def _fp8(given: str, applies: Callable[[RunConfig], Any], why: str, remedy: str) -> Check:
    return Check("precision", given, lambda c, _: c.precision.fp8 and applies(c), why, remedy)


def _option_without_fp8(config: RunConfig, _: int) -> dict[str, str]:
    precision = config.precision
    for key in ("fp8_params", "fp8_attention", "bf16_first_layers", "bf16_last_layers"):
        if precision.fp8 is None and (value := getattr(precision, key)):
            neutral = "false" if value is True else "0"
            return {"option": f"precision.{key}={str(value).lower()}", "off": f"precision.{key}={neutral}"}
    return {}


def _more_than_a_stage(key: str) -> Callable[[RunConfig], Any]:
    def applies(config: RunConfig) -> Any:
        layers = config.model.num_layers // config.parallel.pipeline
        return getattr(config.precision, key) > layers and {"layers": layers}

    return applies


def _unaligned(config: RunConfig) -> dict[str, Any]:
    """The first dimension of a matrix product that is no multiple of what the recipe takes."""
    model, tensor, multiple = config.model, config.parallel.tensor, RECIPES[str(config.precision.fp8)].multiple
    query, key = (heads * model.kv_channels for heads in (model.num_attention_heads, model.num_query_groups))
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.num_attention_heads times model.kv_channels, over parallel.tensor": query // tensor,
        "the rows of the QKV projection, over parallel.tensor": (query + 2 * key) // tensor,
        "model.ffn_hidden_size over parallel.tensor": model.ffn_hidden_size // tensor,
        "train.micro_batch_size times data.sequence_length, over parallel.context": (
            config.train.micro_batch_size * config.data.sequence_length // config.parallel.context
        ),
    }
    wrong = next((name for name, size in sizes.items() if size % multiple), None)
    return {"dimension": wrong, "size": sizes[wrong], "multiple": multiple} if wrong else {}


PRECISION = (
    Check(
        "precision",
        "{option} with precision.fp8=null",
        _option_without_fp8,
        "nothing is FP8",
        f"set precision.fp8 to one of {', '.join(RECIPES)}, or {{off}}",
    ),
    _fp8(
        "{precision.fp8=} with precision.dtype=fp32",
        lambda c: c.precision.dtype != "bf16",
        "FP8 is cast from bf16, and everything around the linear layers runs in that",
        "set precision.dtype=bf16",
    ),
    _fp8(
        "{precision.fp8=} with model.spec=local",
        lambda c: c.model.spec == "local",  # auto takes te here, or nothing
        "its linear layers would compute in bf16 and not say so",
        "set model.spec=te (needs TransformerEngine and an NVIDIA GPU), or precision.fp8=null",
    ),
    _fp8(
        "{precision.fp8=} with engine.name=deepspeed",
        lambda c: c.engine.name != "megatron",
        "the ZeRO optimizer has not been tried with FP8 scaling state",
        "set engine.name=megatron, or precision.fp8=null",
    ),
    _fp8(
        "{precision.bf16_first_layers=} and {precision.bf16_last_layers=} with precision.fp8=delayed",
        lambda c: (
            not RECIPES[c.precision.fp8 or ""].has_bf16_layers
            and c.precision.bf16_first_layers + c.precision.bf16_last_layers
        ),
        "its scales are brought up to date once for all layers",
        "set both to 0, or precision.fp8=tensorwise",
    ),
    _fp8(
        "{precision.bf16_first_layers=} and {precision.bf16_last_layers=} leave none of {model.num_layers} layers in "
        "FP8",
        lambda c: c.precision.bf16_first_layers + c.precision.bf16_last_layers >= c.model.num_layers,
        "",
        "set fewer, or precision.fp8=null",
    ),
    *(
        _fp8(
            f"{{precision.{key} is}}, but a pipeline stage holds {{layers}} layers",
            _more_than_a_stage(key),
            "Megatron-Core takes no more than one stage",
            f"set precision.{key}={{layers}} or fewer, or fewer stages",
        )
        for key in ("bf16_first_layers", "bf16_last_layers")
    ),
    _fp8(
        "precision.fp8_params=true with precision.fp8=mxfp8",
        lambda c: c.precision.fp8_params and not RECIPES[c.precision.fp8 or ""].has_fp8_params,
        "Megatron-Core gathers such weights through the gradient buffer while the forward pass runs, which this stack "
        "does not do",
        "set precision.fp8_params=false",
    ),
    _fp8(
        "precision.fp8_attention=true with {precision.fp8=} (not delayed or tensorwise)",
        lambda c: c.precision.fp8_attention and not RECIPES[c.precision.fp8 or ""].attention_gpus,
        "Megatron-Core 0.16 leaves core attention in bf16 there",
        "set precision.fp8_attention=false, or precision.fp8=delayed",
    ),
    _fp8(
        "precision.fp8_attention=true with recompute.granularity=selective",
        lambda c: c.precision.fp8_attention and c.recompute.granularity == "selective",
        "Megatron-Core would compute core attention again without the scales of the first pass",
        "set recompute.granularity=full or null, or precision.fp8_attention=false",
    ),
    _fp8(
        "{precision.fp8=} with {dimension}, which is {size} and not a multiple of {multiple} (mxfp8 32, others 16)",
        _unaligned,
        "FP8 matrix products take no other",
        "change it, or set precision.fp8=null",
    ),
)

CHECKS = (*RANGES, *LOOPS, *ENGINE, *SWITCHES, *DATA, *MODEL, *LAYOUT, *PRECISION, *BATCH)
