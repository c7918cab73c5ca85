"""Which configs can run in a world of a given size: integers in, sizes or a refusal out.

Every refusal says what was given, why it is refused and what to set. Checked here, before processes talk to
each other, because the same mistakes found later are a hang, or an assertion inside Megatron on one rank.
"""

import functools
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from megatron_depthattn.engine_check import engine_refusal
from megatron_depthattn.loops_check import loops_refusal
from megatron_depthattn.methods.definitions import DEFINITIONS, method_of
from megatron_depthattn.precision_check import precision_refusal
from megatron_depthattn.switches import switches_refusal
from megatron_depthattn.vocabulary import VOCAB_MULTIPLE, padded_vocab_size

if TYPE_CHECKING:  # the config module re-exports `validate`, so the import goes one way at run time
    from megatron_depthattn.config.schema import RunConfig

MOST = 2**31 - 1
"""Largest count where no other is given: libraries count elements and samples with 32 bits."""
COUNTS = (
    *(f"model.{name}" for name in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups")),
    *(f"model.{name}" for name in ("kv_channels", "ffn_hidden_size", "vocab_size", "max_position_embeddings")),
    *("model.num_loops", "model.depth_attention.stride", "recompute.num_layers", "data.sequence_length"),
    *(f"parallel.{name}" for name in ("tensor", "pipeline", "virtual_pipeline", "context")),
    *(f"train.{name}" for name in ("steps", "global_batch_size", "micro_batch_size", "stop_after", "eval_interval")),
    *(f"train.{name}" for name in ("eval_batches", "log_interval", "depth_interval", "max_skipped_in_a_row")),
    *("train.max_restarts_without_progress", "checkpoint.interval", "checkpoint.keep"),
)
AT_LEAST_ZERO = (
    *("run.seed", "model.depth_attention.recent_window", "model.init_std", "data.num_workers"),
    *("precision.bf16_first_layers", "precision.bf16_last_layers"),
    *("optimizer.lr", "optimizer.weight_decay", "optimizer.grad_clip"),
)
ABOVE_ZERO = ("model.rotary_base", "model.norm_epsilon", "optimizer.eps", "train.hang_timeout", "preflight.timeout")
FRACTIONS = {
    "optimizer.min_lr_ratio": True,
    "optimizer.warmup_ratio": True,
    "optimizer.beta1": False,
    "optimizer.beta2": False,
}
"""Whether 1 is valid."""
LARGEST: dict[str, float] = {
    "model.num_layers": 1 << 16,
    "model.num_loops": 1 << 16,
    "train.steps": 10**8 - 1,  # the names of step folders have eight digits
    "data.num_workers": 1024,
    "train.hang_timeout": 31 * 86400,
    "preflight.timeout": 31 * 86400,
}


@dataclass(kw_only=True, frozen=True)
class Sizes:
    """What a config and a world size fix together."""

    data_parallel_size: int
    """Model replicas."""
    num_microbatches: int
    """Forward passes of one replica in one optimizer step."""
    layers_per_chunk: int
    """Layers of one pipeline chunk; a stage holds parallel.virtual_pipeline chunks."""


def validate(config: "RunConfig", world_size: int, *, needs_data: bool = True) -> Sizes:
    """Sizes of `config` on `world_size` ranks, or ValueError.

    `needs_data=False` skips data.path and run.dir, for tools that size a run without starting it.
    """
    _check_ranges(config)
    for method in DEFINITIONS:
        method_of(asdict(config.model) | {"method": method})  # raises where a setting of it is out of range
    for refusal in (loops_refusal(config), engine_refusal(config), switches_refusal(config)):
        _require(refusal is None, refusal or "")
    if needs_data:
        _check_paths(config)
    _check_model(config)
    layers_per_chunk = _check_pipeline(config)
    _check_recompute(config, layers_per_chunk)
    data_parallel_size = _check_world(config, world_size)
    _check_sequence(config)
    refusal = precision_refusal(config)
    _require(refusal is None, refusal or "")
    num_microbatches = _check_batch(config, data_parallel_size)
    return Sizes(
        data_parallel_size=data_parallel_size,
        num_microbatches=num_microbatches,
        layers_per_chunk=layers_per_chunk,
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _neighbours(value: int, step: int) -> str:
    """The multiples of `step` on both sides of `value`, for 'set one of these'."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)


def _check_ranges(config: "RunConfig") -> None:
    def value_of(key: str) -> Any:
        return functools.reduce(getattr, key.split("."), config)

    for key in COUNTS:
        count, largest = value_of(key), LARGEST.get(key, MOST)
        _require(count is None or count >= 1, f"{key} is {count}; set 1 or more")
        _require(count is None or count <= largest, f"{key} is {count}; set {largest} or less")
    for key in AT_LEAST_ZERO:
        number, largest = value_of(key), LARGEST.get(key, math.inf)
        _require(0 <= number < math.inf, f"{key} is {number}; set a number of 0 or more")
        _require(number <= largest, f"{key} is {number}; set {largest} or less")
    for key in ABOVE_ZERO:
        number, largest = value_of(key), LARGEST.get(key, math.inf)
        _require(number is None or 0 < number < math.inf, f"{key} is {number}; set a number above 0")
        _require(number is None or number <= largest, f"{key} is {number}; set {largest} or less")
    for key, one_is_valid in FRACTIONS.items():
        number = value_of(key)
        _require(
            0 <= number < 1 or (one_is_valid and number == 1),
            f"{key} is {number}; set a number from 0 to 1{'' if one_is_valid else ', 1 excluded'}",
        )


def _check_paths(config: "RunConfig") -> None:
    data = config.data
    _require(
        bool(data.path) or data.streams is not None,
        "data.path is not set: the run has nothing to read; set it to the folder or URL that "
        "tools/prepare_data.py --output wrote, such as data.path=data/quickstart (or several in data.streams)",
    )
    _require(
        not data.path or data.streams is None,
        f"data.path is {data.path} and data.streams is set as well: set data.path='' to read the streams, or "
        "data.streams=null to read data.path",
    )
    _require(
        data.streams != [], "data.streams is an empty list; give at least one {path, proportion}, or set data.path"
    )
    _require(data.cache != "", "data.cache is empty; set a local folder, or null for none")
    for number, stream in enumerate(data.sources):
        key = f"data.streams[{number}]" if data.streams else "data"
        _require(bool(stream.path), f"{key}.path is empty; set the folder or URL of a prepared corpus")
        _require(0 < stream.proportion < float("inf"), f"{key}.proportion is {stream.proportion}; set a number above 0")
        _require(
            "://" not in stream.path or data.cache is not None,
            f"{key}.path is the remote {stream.path} and data.cache is null, so shards have nowhere to go; "
            "set data.cache to a local folder of each node",
        )
    _require(
        bool(config.run.dir),
        "run.dir is not set: the run has nowhere to write; set a folder, such as run.dir=runs/first",
    )


def _check_model(config: "RunConfig") -> None:
    model, tensor = config.model, config.parallel.tensor
    heads, groups = model.num_attention_heads, model.num_query_groups
    _require(
        heads % groups == 0,
        f"model.num_attention_heads is {heads} and model.num_query_groups is {groups}: every key/value "
        f"head serves the same number of query heads; set num_query_groups to one of {_divisors(heads)}",
    )
    _require(
        model.kv_channels % 2 == 0,
        f"model.kv_channels is {model.kv_channels}: RoPE turns pairs of channels; set an even number",
    )
    _require(
        groups % tensor == 0 or tensor % groups == 0,
        f"parallel.tensor is {tensor} and model.num_query_groups is {groups}: a rank holds whole key/value "
        "heads, or ranks share one evenly; set parallel.tensor to a divisor or a multiple of "
        "num_query_groups",
    )
    for key, size in {
        "model.num_attention_heads": heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
    }.items():
        _require(
            size % tensor == 0,
            f"{key} is {size}, which parallel.tensor={tensor} does not divide: each tensor-parallel rank "
            f"holds an equal share; set {key}={_neighbours(size, tensor)}, or another parallel.tensor",
        )
    rows = padded_vocab_size(model.vocab_size)
    _require(
        rows % tensor == 0,
        f"model.vocab_size is {model.vocab_size}, whose embedding of {rows} rows (padded to a multiple of "
        f"{VOCAB_MULTIPLE}) parallel.tensor={tensor} does not divide: each tensor-parallel rank holds an equal share; "
        f"set model.vocab_size={math.lcm(VOCAB_MULTIPLE, tensor) * -(-rows // math.lcm(VOCAB_MULTIPLE, tensor))}, or "
        "parallel.tensor to a power of two",
    )


def _divisors(number: int) -> str:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return ", ".join(str(divisor) for divisor in sorted({*small, *(number // divisor for divisor in small)}))


def _check_pipeline(config: "RunConfig") -> int:
    """Layers of a chunk; those of all loops where there is no pipeline to cut them."""
    stages, chunks, layers, loops = (
        config.parallel.pipeline,
        config.parallel.virtual_pipeline,
        config.model.num_layers,
        config.model.num_loops,
    )
    _require(
        chunks == 1 or stages > 1,
        f"parallel.virtual_pipeline is {chunks} with parallel.pipeline=1: chunks are interleaved over "
        "several stages; set parallel.virtual_pipeline=1 or parallel.pipeline=2 or more",
    )
    if loops > 1:
        _require(
            layers % stages == 0,
            f"model.num_layers is {layers}, which is not a multiple of parallel.pipeline={stages}: every stage holds "
            f"the same number of layers, and runs them in each of {loops} loops; "
            f"set model.num_layers={_neighbours(layers, stages)}, or other stages",
        )
        return layers // stages if stages > 1 else layers * loops
    parts = stages * chunks
    _require(
        layers % parts == 0,
        f"model.num_layers is {layers}, which is not a multiple of {parts} (parallel.pipeline={stages} times "
        f"parallel.virtual_pipeline={chunks}): every chunk holds the same number of layers; "
        f"set model.num_layers={_neighbours(layers, parts)}, or other stages",
    )
    return layers // parts


def _check_recompute(config: "RunConfig", layers_per_chunk: int) -> None:
    granularity, method, num_layers = (
        config.recompute.granularity,
        config.recompute.method,
        config.recompute.num_layers,
    )
    if granularity != "full":
        shown = "null" if granularity is None else granularity
        _require(
            method is None and num_layers is None,
            f"recompute.granularity is {shown} with recompute.method={method or 'null'} and "
            f"recompute.num_layers={'null' if num_layers is None else num_layers}: these two belong to "
            "full recompute; set both to null, or recompute.granularity=full",
        )
        return
    if method is None or num_layers is None:
        raise ValueError(
            "recompute.granularity=full needs recompute.method and recompute.num_layers; "
            "set recompute.method=uniform recompute.num_layers=1 to keep only each layer's input"
        )
    _require(
        num_layers <= layers_per_chunk,
        f"recompute.num_layers is {num_layers}, but a pipeline chunk holds {layers_per_chunk} layers; "
        f"set recompute.num_layers from 1 to {layers_per_chunk}",
    )
    _require(
        method == "block" or layers_per_chunk % num_layers == 0,
        f"recompute.num_layers is {num_layers}, which does not divide the {layers_per_chunk} layers of a "
        f"pipeline chunk: uniform recompute cuts a chunk into equal groups; "
        f"set it to one of {_divisors(layers_per_chunk)}",
    )


def _check_world(config: "RunConfig", world_size: int) -> int:
    parallel = config.parallel
    replica = parallel.tensor * parallel.pipeline * parallel.context
    _require(
        world_size >= 1 and world_size % replica == 0,
        f"the world has {world_size} ranks, which is not a multiple of {replica} "
        f"(parallel.tensor={parallel.tensor} times parallel.pipeline={parallel.pipeline} times "
        f"parallel.context={parallel.context}), the ranks of one model replica; start "
        f"{_neighbours(world_size, replica)} ranks, or set another layout",
    )
    return world_size // replica


def _check_sequence(config: "RunConfig") -> None:
    parallel, length = config.parallel, config.data.sequence_length
    longest = config.model.max_position_embeddings
    _require(
        longest >= length,
        f"data.sequence_length is {length}, more than model.max_position_embeddings={longest}; "
        f"set model.max_position_embeddings={length} or a shorter data.sequence_length",
    )
    pieces = 2 * parallel.context
    _require(
        parallel.context == 1 or length % pieces == 0,
        f"data.sequence_length is {length}, which is not a multiple of {pieces}: with "
        f"parallel.context={parallel.context} each rank holds two equal pieces of the sequence, so that "
        f"causal work is even; set data.sequence_length={_neighbours(length, pieces)}",
    )
    if parallel.sequence:
        _require(
            parallel.tensor > 1,
            "parallel.sequence=true with parallel.tensor=1: sequence parallel splits positions over the "
            "tensor-parallel ranks; set parallel.sequence=false or parallel.tensor=2 or more",
        )
        shares = parallel.tensor * pieces if parallel.context > 1 else parallel.tensor
        _require(
            length % shares == 0,
            f"data.sequence_length is {length}, which is not a multiple of {shares}: with "
            f"parallel.sequence=true every one of {parallel.tensor} tensor-parallel ranks holds an equal "
            f"share of the positions; set data.sequence_length={_neighbours(length, shares)} or "
            "parallel.sequence=false",
        )


def _check_batch(config: "RunConfig", data_parallel_size: int) -> int:
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    micro, batch = config.train.micro_batch_size, config.train.global_batch_size
    per_pass = micro * data_parallel_size
    _require(
        batch % per_pass == 0,
        f"train.global_batch_size is {batch}, which is not a multiple of {per_pass} "
        f"(train.micro_batch_size={micro} times {data_parallel_size} data-parallel replicas): every "
        "replica runs the same number of microbatches; set "
        f"train.global_batch_size={_neighbours(batch, per_pass)}, or another train.micro_batch_size",
    )
    num_microbatches = batch // per_pass
    _require(
        chunks == 1 or num_microbatches % stages == 0,
        f"a step has {num_microbatches} microbatches, which is not a multiple of "
        f"parallel.pipeline={stages}: the interleaved schedule (parallel.virtual_pipeline={chunks}) takes "
        "them in groups of one per stage; set "
        f"train.global_batch_size={_neighbours(batch, per_pass * stages)} or parallel.virtual_pipeline=1",
    )
    return num_microbatches
