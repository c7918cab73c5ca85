"""Checks of the model's shape, its layout over ranks, recompute and precision; see `checks.py`."""

import math
from typing import Any

from megatron_depthattn.config.check import Condition, checks
from megatron_depthattn.config.pipeline import chunk_layers, is_even
from megatron_depthattn.config.precision import RECIPES
from megatron_depthattn.config.schema import ModelConfig, RunConfig
from megatron_depthattn.vocabulary import VOCAB_MULTIPLE, padded_vocab_size

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


def model_ranks(config: RunConfig) -> int:
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context


def samples_at_once(config: RunConfig, ranks: int) -> int:
    """Samples of one forward pass of all model replicas."""
    return config.train.micro_batch_size * (ranks // model_ranks(config))


def _chunk_layers(config: RunConfig) -> tuple[int, ...]:
    return chunk_layers(config.model, config.parallel)


def _chunks_of_loop(config: RunConfig) -> int:
    return config.parallel.pipeline * max(1, config.parallel.virtual_pipeline // config.model.num_loops)


def _groups(config: RunConfig, ranks: int) -> Any:
    batch, at_once = config.train.global_batch_size, samples_at_once(config, ranks)
    group = at_once * config.parallel.pipeline
    return config.parallel.virtual_pipeline > 1 and _unless_multiple(batch, group, microbatches=batch // at_once)


def _ramp_unsplit(config: RunConfig, ranks: int) -> dict[str, Any]:
    """What every batch size of a ramp must be a multiple of, where one is not, and starts that are."""
    unit = samples_at_once(config, ranks) * (config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1)
    if not config.train.batch_ramp or config.train.batch_sizes.divisor % unit == 0:
        return {}
    starts = range(unit, config.train.global_batch_size, unit)
    several = [*starts[:3], "...", starts[-1]] if len(starts) > 5 else starts
    return {"unit": unit, "replicas": ranks // model_ranks(config), "starts": ", ".join(map(str, several)) or "none"}


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
        lambda c, ranks: _unless_multiple(ranks, model_ranks(c), ranks=ranks),
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
            c.train.global_batch_size, samples_at_once(c, ranks), replicas=ranks // model_ranks(c)
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
    "precision.fp8_attention=true with data.document_mask=true: the FP8 attention kernels have no borders between "
    "documents; set precision.fp8_attention=false, or data.document_mask=false",
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
