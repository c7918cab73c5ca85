"""The planner's memory of a rank against what torch and Megatron allocate, at stated tolerances."""

from itertools import product
from pathlib import Path

import pytest
import torch

from megatron_depthattn.benchmarks.memory import kept
from megatron_depthattn.config import load_config
from megatron_depthattn.estimate.activations import chunk_memory
from megatron_depthattn.estimate.memory import in_flight, rank_memory
from megatron_depthattn.train.build import build_model, build_optimizer

ROOT = Path(__file__).parents[2]
CPU_SHAPE = ROOT / "megatron_depthattn" / "benchmarks" / "cpu.yaml"
SHORT_AND_WIDE = {
    **{"model.hidden_size": 96, "model.num_attention_heads": 6, "model.num_query_groups": 2, "model.kv_channels": 8},
    **{"model.ffn_hidden_size": 200, "model.vocab_size": 300, "data.sequence_length": 8, "train.micro_batch_size": 3},
}
LONG_AND_NARROW = {
    **{"model.hidden_size": 32, "model.num_attention_heads": 4, "model.num_query_groups": 4, "model.kv_channels": 8},
    **{"model.ffn_hidden_size": 40, "model.vocab_size": 100, "data.sequence_length": 72, "train.micro_batch_size": 1},
}
METHODS = {
    "vanilla": {"model.method": "vanilla"},
    "stride-half": {"model.depth_attention.stride": 2},
    "stride-1": {"model.depth_attention.stride": 1},
    "looped": {"model.num_layers": 2, "model.num_loops": 2, "model.depth_attention.stride": 1},
    "denseformer": {"model.method": "denseformer"},
    "attnres": {"model.method": "attnres", "model.attnres.block_size": 4},
    "mhc": {"model.method": "mhc"},
}
RECOMPUTE = {
    "none": {},
    "selective": {"recompute.granularity": "selective"},
    "uniform": {"recompute.granularity": "full", "recompute.num_layers": 1, "recompute.method": "uniform"},
    "block": {"recompute.granularity": "full", "recompute.num_layers": 1, "recompute.method": "block"},
}
TOLERANCE = 0.05


def config_of(*settings):
    values = {"model.num_layers": 4}
    for one in settings:
        values |= one
    values.setdefault("train.global_batch_size", values.get("train.micro_batch_size", 1))
    return load_config(CPU_SHAPE, [f"{key}={value}" for key, value in values.items()])


@pytest.mark.usefixtures("megatron_world_of_one")
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("method", METHODS)
def test_activations_are_what_autograd_saves(method, recompute):
    for shape in (SHORT_AND_WIDE, LONG_AND_NARROW):
        config = config_of(shape, METHODS[method], RECOMPUTE[recompute])
        found = chunk_memory(config, 0, on_gpu=False)
        measured = kept(config, torch.device("cpu")).saved
        assert found.activations + found.sources == pytest.approx(measured, rel=TOLERANCE), shape


ABLATIONS = [
    {"stride": 1, "weights": weights, "mixes": m}
    for weights in ("softmax", "uniform")
    for m in ("value", "key", "key_value")
]
SPACINGS = [{"stride": stride, "recent_window": window} for stride, window in ((1, 0), (2, 1), (3, 0), (4, 0))]


@pytest.mark.usefixtures("megatron_world_of_one")
@pytest.mark.parametrize(
    ("mixing", "recompute"),
    [*product(ABLATIONS, ("none", "selective")), *product(SPACINGS, ("none", "selective", "uniform"))],
    ids=str,
)
def test_what_depth_attention_adds_is_what_autograd_saves(mixing, recompute):
    """To the byte."""
    common = SHORT_AND_WIDE | RECOMPUTE[recompute]
    depth = {f"model.depth_attention.{key}": value for key, value in mixing.items()}
    mixed, vanilla = (config_of(common, one) for one in (depth, METHODS["vanilla"]))
    measured, below = (kept(config, torch.device("cpu")).saved for config in (mixed, vanilla))
    assert chunk_memory(mixed, 0, on_gpu=False).sources == measured - below


@pytest.mark.parametrize("change", [METHODS["mhc"], METHODS["attnres"], {"model.num_layers": 5}, RECOMPUTE["uniform"]])
def test_control_each_term_is_more_than_the_tolerance(change):
    one, other = (chunk_memory(config_of(SHORT_AND_WIDE, more), 0, on_gpu=False) for more in ({}, change))
    assert one.activations + one.sources != pytest.approx(other.activations + other.sources, rel=TOLERANCE)


@pytest.mark.usefixtures("megatron_world_of_one")
@pytest.mark.parametrize("method", ["stride-1", "mhc"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_gradients_and_optimizer_are_what_megatron_allocates(method, dtype):
    config = config_of(METHODS[method], {"precision.dtype": dtype, "model.num_layers": 2, "model.vocab_size": 512})
    chunks = build_model(config, torch.device("cpu"))
    optimizer, _ = build_optimizer(config, chunks)
    found = rank_memory(config, 1, pipeline_rank=0, on_gpu=False)
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
    assert found.parameters == sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    assert found.weights == pytest.approx(sum(buffer.param_data.nbytes for buffer in buffers), rel=TOLERANCE)
    assert found.gradients == pytest.approx(sum(buffer.grad_data.nbytes for buffer in buffers), rel=TOLERANCE)
    assert optimizer is not None


def test_control_a_rank_is_not_another():
    config = config_of({"parallel.pipeline": 2, "train.global_batch_size": 8, "precision.dtype": "bf16"})
    first, last = (rank_memory(config, 2, pipeline_rank=stage) for stage in (0, 1))
    assert first.parameters != last.parameters
    assert first.activations > 1.1 * last.activations
    assert rank_memory(config, 4, pipeline_rank=0).optimizer < 0.6 * first.optimizer
    with pytest.raises(ValueError, match="pipeline_rank is 2"):
        rank_memory(config, 2, pipeline_rank=2)


@pytest.mark.parametrize("rank", range(4))
def test_one_chunk_is_1f1b(rank):
    assert in_flight([7], rank=rank, num_ranks=4, num_microbatches=16) == (4 - rank,)
    assert in_flight([7], rank=rank, num_ranks=4, num_microbatches=1) == (1,)


def test_interleaved_chunks_hold_what_megatron_runs_ahead():
    """Warm-up forwards and one more, by hand for two ranks of two chunks: orders 0 0 1 1 0 0 1 1."""
    assert in_flight([1, 1], rank=0, num_ranks=2, num_microbatches=8) == (3, 2)
    assert in_flight([1, 1], rank=1, num_ranks=2, num_microbatches=8) == (2, 1)
    assert in_flight([1, 1], rank=0, num_ranks=2, num_microbatches=2) == (2, 2)
