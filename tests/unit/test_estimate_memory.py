"""The planner's memory of a rank against what torch and Megatron allocate: real models, to the byte."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from megatron_depthattn.config import load_config
from megatron_depthattn.estimate.in_flight import in_flight
from megatron_depthattn.estimate.memory import chunk_activations, rank_memory
from megatron_depthattn.estimate.storages import Storages
from megatron_depthattn.model.activation_memory import depth_activations
from megatron_depthattn.model.source_plan import SourcePlan

ROOT = Path(__file__).parents[2]
CPU_SHAPE = ROOT / "tools" / "benchmarks" / "cpu.yaml"
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
    "denseformer": {"model.method": "denseformer"},
    "attnres": {"model.method": "attnres", "model.attnres.block_size": 4},
    "mhc": {"model.method": "mhc"},
}
FULL = {"recompute.granularity": "full", "recompute.num_layers": 1}
RECOMPUTE = {
    "none": {},
    "selective": {"recompute.granularity": "selective"},
    "uniform": {**FULL, "recompute.method": "uniform"},
    "pairs": {**FULL, "recompute.method": "uniform", "recompute.num_layers": 2},
    "block": {**FULL, "recompute.method": "block"},
}
BOUND = 0.02
HELD_BOUND = 0.03
"""Of what is in flight: counted in whole micro-batches, and these layers are small beside what is not."""


def config_of(*settings):
    values = {"model.num_layers": 4}
    for one in settings:
        values |= one
    values.setdefault("train.global_batch_size", values.get("train.micro_batch_size", 1))
    return load_config(CPU_SHAPE, [f"{key}={value}" for key, value in values.items()])


def kept_by(*settings):
    return chunk_activations(config_of(*settings), 0, device="cpu").kept()


# ---- activations of one process


@pytest.mark.usefixtures("megatron_world_of_one")
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("method", METHODS)
def test_activations_are_what_autograd_saves(method, recompute):
    from tools.benchmarks.memory import kept

    for shape, dtype in product((SHORT_AND_WIDE, LONG_AND_NARROW), ("fp32", "bf16")):
        config = config_of(shape, METHODS[method], RECOMPUTE[recompute], {"precision.dtype": dtype})
        predicted = chunk_activations(config, 0, device="cpu").kept().total
        assert predicted == kept(config, torch.device("cpu")).saved, (shape, dtype)


@pytest.mark.parametrize(
    ("left_out", "settings"),
    [
        ("query.", [LONG_AND_NARROW]),
        ("gate_and_up.", [SHORT_AND_WIDE]),
        ("logits", [SHORT_AND_WIDE, {"model.vocab_size": 4000}]),
        ("projection.", [SHORT_AND_WIDE]),
        ("value.", [SHORT_AND_WIDE, METHODS["stride-1"], RECOMPUTE["uniform"]]),
        ("hidden.", [SHORT_AND_WIDE, METHODS["mhc"]]),
    ],
)
def test_control_each_term_is_more_than_the_bound(left_out, settings):
    kept = kept_by(*settings)
    rest = sum(size for name, size in kept.kept.items() if not name.startswith(left_out))
    assert rest < (1 - BOUND) * kept.total


@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("recompute", ["none", "selective", "uniform"])
def test_what_depth_attention_adds_is_what_the_plan_predicts(spec, stride, recompute):
    """Two countings of the same, written apart: a sum over the plan, and the ledger with minus without."""
    settings = [SHORT_AND_WIDE, RECOMPUTE[recompute], {"precision.dtype": "bf16", "model.spec": spec}]
    config = config_of(*settings, {"model.depth_attention.stride": stride})
    chunk = chunk_activations(config, 0)
    added = chunk.kept().total - chunk.vanilla().kept().total
    predicted = depth_activations(
        SourcePlan(4, stride),
        key_size=2 * 8,
        norm_keeps_projection=spec == "local",
        recomputed=recompute == "uniform",
    )
    if spec == "te" and recompute == "selective":
        return  # vanilla then keeps the whole projection, which that sum does not know
    assert added == predicted.total * 2 * 3 * 8


# ---- any rank of any layout


def measured_layouts(tmp_path, layouts, *more):
    """What the benchmark's verb measures, in a process of its own: this one has a world of its own already."""
    command = [sys.executable, "tools/benchmark.py", "--json", str(tmp_path / "figures.json"), "rank-memory", *more]
    for layout in layouts:
        command += ["--layout", *layout]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((tmp_path / "figures.json").read_text())["figures"]


def test_every_stage_of_layouts_is_what_megatron_builds(tmp_path):
    layouts = [
        ["parallel.tensor=2", "model.tie_embeddings=true", "parallel.pipeline=2"],
        ["parallel.tensor=4", "parallel.sequence=true", "precision.dtype=bf16"],
        ["parallel.context=2", "model.depth_attention.enabled=false"],
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.num_layers=2", "model.num_loops=2"],
        ["parallel.pipeline=3", "model.method=mhc", "precision.dtype=bf16", "model.num_layers=3"],
    ]
    shape = SHORT_AND_WIDE | {"model.num_attention_heads": 8, "model.num_layers": 4, "train.global_batch_size": 54}
    shape |= {"model.depth_attention.stride": 1, "data.sequence_length": 32}
    settings = [f"{key}={value}" for key, value in shape.items() if key != "model.num_layers"]
    layouts = [
        [*layout, *(["model.num_layers=4"] * all("num_layers" not in key for key in layout))] for layout in layouts
    ]
    figures = measured_layouts(tmp_path, layouts, "--data", "3", "--set", *settings)
    assert len(figures) == 2 + 1 + 1 + 2 + 3
    for stage, figure in figures.items():
        predicted, measured = figure["predicted"], figure["measured"]
        for part in ("parameters", "weights", "gradients", "optimizer", "kept"):
            assert predicted[part] == measured[part], (stage, part)
        assert predicted["held"] == pytest.approx(measured["held"], rel=HELD_BOUND), stage


def test_control_a_rank_is_not_another():
    """Stages, replicas and engines differ, so the equalities above are not those of one number with itself."""
    config = config_of({"parallel.pipeline": 2, "train.global_batch_size": 8, "precision.dtype": "bf16"})
    first, last = (rank_memory(config, 2, pipeline_rank=stage, device="cpu") for stage in (0, 1))
    assert first.parameters != last.parameters
    assert first.activations > 1.3 * last.activations
    assert rank_memory(config, 4, pipeline_rank=0).optimizer < 0.6 * first.optimizer
    with pytest.raises(ValueError, match="pipeline_rank is 2"):
        rank_memory(config, 2, pipeline_rank=2)


# ---- schedules and ledger


@pytest.mark.parametrize("rank", range(4))
def test_one_chunk_is_1f1b(rank):
    assert in_flight([7], rank=rank, num_ranks=4, num_microbatches=16) == (4 - rank,)
    assert in_flight([7], rank=rank, num_ranks=4, num_microbatches=1) == (1,)


def test_interleaved_chunks_hold_what_megatron_runs_ahead():
    """Warm-up forwards and one more, by hand for two ranks of two chunks: orders 0 0 1 1 0 0 1 1."""
    assert in_flight([1, 1], rank=0, num_ranks=2, num_microbatches=8) == (3, 2)
    assert in_flight([1, 1], rank=1, num_ranks=2, num_microbatches=8) == (2, 1)
    assert in_flight([1, 1], rank=0, num_ranks=2, num_microbatches=2) == (2, 2)


def test_a_storage_is_counted_once_whatever_keeps_it():
    ledger = Storages()
    ledger.make("projection", 12)
    ledger.view("value", of="projection")
    ledger.view("row", of="value")
    ledger.make("unused", 5)
    ledger.keep("row", "value", "projection")
    with ledger.paused(True):
        ledger.keep_new("recomputed", 3)
    assert ledger.kept == {"projection": 12}
    assert ledger.total == 12
