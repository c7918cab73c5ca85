"""Traffic, step time and layouts: against closed forms, the bound that runs are held to, and brute force."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from megatron_depthattn.cli.estimate import GPUS
from megatron_depthattn.cli.estimate import main as estimate_tool
from megatron_depthattn.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    TrainConfig,
    load_config,
    validate,
)
from megatron_depthattn.config.pipeline import EVEN
from megatron_depthattn.estimate.counts import decoder_shape, rank_weights
from megatron_depthattn.estimate.fits import check_fit
from megatron_depthattn.estimate.hardware import GPUS as PRESETS
from megatron_depthattn.estimate.hardware import Cost, find_gpu, resolve_for
from megatron_depthattn.estimate.layouts import best_layouts, candidate_layouts
from megatron_depthattn.estimate.report import estimate_config
from megatron_depthattn.estimate.step_time import step_time
from megatron_depthattn.estimate.traffic import CrossLayer, hop_sizes, traffic
from megatron_depthattn.train.build import transformer_config
from tests.parallel.cases import LAYOUTS, METHODS, Job
from tests.parallel.cases import LOOPED as CAMPAIGN
from tests.parallel.least_bytes import least_bytes

ROOT = Path(__file__).parents[2]
H100 = PRESETS["H100"]
SMALL = RunConfig(
    model=ModelConfig(num_layers=4, vocab_size=256),
    data=DataConfig(sequence_length=64),
    train=TrainConfig(global_batch_size=16, micro_batch_size=2),
)


def shared_by(config):
    return CrossLayer.of(config)


def sent(config, world, stage=0):
    """(axis, kind): bytes that a rank of the stage sends in a step."""
    found = {}
    for each in traffic(config, shared_by(config), validate(config, world, needs_data=False), stage):
        key = each.axis, each.kind
        found[key] = found.get(key, 0) + each.sent * each.count
    return found


def seconds(config, world, machine=H100):
    config = resolve_for(machine, config).config
    return step_time(config, shared_by(config), validate(config, world, needs_data=False), machine)


def with_layout(config, **parallel):
    return replace(config, parallel=ParallelConfig(**parallel))


ABLATIONS = [{"mixes": "key_value"}, {"weights": "uniform"}, {"weights": "uniform", "mixes": "key_value"}]
PIPELINES = [Job(layout=name) for name, each in LAYOUTS.items() if each.parallel.pipeline > 1 and name != "pp2xvpp3"]
LOOPED = [job for job in CAMPAIGN if job.method == "depth_attention" and LAYOUTS[job.layout].parallel.pipeline > 1]
ABLATED = [replace(job, **ablation) for job in PIPELINES for ablation in ABLATIONS]


@pytest.mark.parametrize(
    "job",
    [*PIPELINES, *LOOPED, *ABLATED, *(replace(job, method=method) for job in PIPELINES for method in METHODS)],
    ids=lambda job: job.name,
)
def test_hops_are_the_least_bytes_that_runs_are_held_to(job):
    """tests/parallel counts what is really sent and asserts that it is this bound, written without the package."""
    config, where = job.config(), LAYOUTS[job.layout]
    sizes = validate(config, where.world_size, needs_data=False)
    found = {}
    for stage in range(where.parallel.pipeline):
        for each in traffic(config, shared_by(config), sizes, stage):
            if each.axis == "pipeline":
                step = 1 if each.phase == "forward" else -1
                edge = f"{stage}>{(stage + step) % where.parallel.pipeline}"
                found[edge] = found.get(edge, 0) + each.sent * each.count
    bound = least_bytes(job, where, sizes.num_microbatches)
    assert found == bound
    narrower = replace(config, model=replace(config.model, kv_channels=8))
    changed, unchanged = (hop_sizes(each, shared_by(each)) for each in (narrower, config))
    assert (changed != unchanged) == (job.method == "depth_attention")


UNEVEN = [job for job in PIPELINES if LAYOUTS[job.layout].cut]


@pytest.mark.parametrize("method", ["depth_attention", *METHODS])
@pytest.mark.parametrize("job", UNEVEN, ids=lambda job: job.layout)
def test_an_uneven_cut_moves_work_and_weights_between_stages(job, method):
    """Together the stages hold and compute what one process does, each for its own layers."""
    config = replace(job, method=method).config()
    alone, even = with_layout(config), replace(config, parallel=replace(config.parallel, **EVEN))
    stages, world = range(config.parallel.pipeline), config.parallel.pipeline
    assert sum(rank_weights(config, stage).total for stage in stages) == rank_weights(alone, 0).total
    found, as_even = estimate_config(config, world, H100), estimate_config(even, world, H100)
    assert [len(layers) for layers in found.layers] == [sum(LAYOUTS[job.layout].cut[s::world]) for s in stages]
    assert sorted(layer for layers in found.layers for layer in layers) == [*range(8)]
    assert found.flops == as_even.flops and found.parameters == as_even.parameters
    assert [each.activations for each in found.memory] != [each.activations for each in as_even.memory]
    assert found.layout.step_seconds > as_even.layout.step_seconds


@pytest.mark.parametrize(("name", "pipeline", "virtual"), [("410m", 4, 1), ("500m", 2, 2)])
def test_a_faster_cut_is_the_fastest_of_all_first_and_last_stages(name, pipeline, virtual):
    """Brute force over every pair of counts; where the vocabulary weighs nothing, none is proposed."""
    layout = {"pipeline": pipeline, "virtual_pipeline": virtual}
    config = with_layout(load_config(ROOT / f"configs/{name}.yaml"), **layout)
    config = replace(config, train=replace(config.train, global_batch_size=96, micro_batch_size=2))
    found, times = estimate_config(config, pipeline, H100), {}
    for first, last in product(range(1, config.model.num_layers), repeat=2):
        cut = with_layout(config, **layout, first_stage_layers=first, last_stage_layers=last)
        with contextlib.suppress(ValueError):
            times[first, last] = seconds(cut, pipeline).total
    fastest = min(times.values())
    assert found.faster_cut == (*found.faster_cut[:2], pytest.approx(fastest))
    assert times[found.faster_cut[:2]] == pytest.approx(fastest) and fastest < 0.99 * found.layout.step_seconds
    small = replace(config, model=replace(config.model, vocab_size=128, method="vanilla"))
    assert estimate_config(small, pipeline, H100).faster_cut is None


def test_a_vanilla_hop_is_the_hidden_state():
    config = with_layout(SMALL, pipeline=2)
    vanilla = replace(config, model=replace(config.model, method="vanilla"))
    assert hop_sizes(vanilla, shared_by(vanilla)) == [2 * 64 * 192 * 4]
    assert hop_sizes(config, shared_by(config)) == [2 * 64 * (192 + 2 * 2 * 32) * 4]  # layer 0 is a source


def test_data_parallel_traffic_in_closed_form():
    numbers = decoder_shape(SMALL).parameters
    assert sent(SMALL, 4) == {
        ("data", "reduce_scatter"): 4 * numbers * 3 // 4,
        ("data", "all_gather"): 4 * numbers * 3 // 4,
    }
    assert sent(SMALL, 1) == {}
    bf16 = replace(SMALL, precision=replace(SMALL.precision, dtype="bf16"))
    assert sent(bf16, 4)["data", "all_gather"] * 2 == sent(bf16, 4)["data", "reduce_scatter"]


@pytest.mark.parametrize(("stage", "times"), [(1, 1), (2, 4), (3, 4)])
def test_deepspeed_reduces_as_often_as_its_stage(stage, times):
    config = replace(SMALL, engine=EngineConfig(name="deepspeed", zero_stage=stage))
    numbers = 4 * decoder_shape(SMALL).parameters // 2
    gathers = 2 * 4 if stage == 3 else 1
    assert sent(config, 2) == {("data", "reduce_scatter"): times * numbers, ("data", "all_gather"): gathers * numbers}
    plain = replace(SMALL, engine=EngineConfig(name="deepspeed"))
    assert sent(plain, 2) == {("data", "all_reduce"): 2 * numbers}


def test_sequence_parallel_gathers_half_as_much_again():
    """An all-reduce is a reduce-scatter and a gather; sequence parallel gathers each input again in backward."""
    plain = sent(with_layout(SMALL, tensor=2), 2)
    spread = sent(with_layout(SMALL, tensor=2, sequence=True), 2)
    hidden = 2 * 64 * 192 * 4 // 2
    products = 4 * 2 + 1  # a layer's inputs of attention and MLP, forward and backward ... and the output layer's
    assert spread["tensor", "reduce_scatter"] == 8 * hidden * (4 * 4 + 2)
    assert spread["tensor", "all_gather"] == 8 * hidden * (4 * 4 + 2 + products)
    small = 8 * 3 * 2 * 64 * 4 + 4 * 4 * 2 * 32  # cross entropy, and the norms of q and k
    assert plain["tensor", "all_reduce"] == 8 * 2 * hidden * (4 * 4 + 2) + small


def test_recompute_repeats_what_lies_in_the_recomputed_part():
    full = RecomputeConfig(granularity="full", method="uniform", num_layers=1)
    for parallel, repeated in (({"tensor": 2}, ("full",)), ({"context": 2}, ("full", "selective"))):
        config = with_layout(SMALL, **parallel)
        base = sum(sent(config, 2).values())
        modes = {"full": full, "selective": RecomputeConfig(granularity="selective")}
        more = {
            mode
            for mode, recompute in modes.items()
            if sum(sent(replace(config, recompute=recompute), 2).values()) > base
        }
        assert more == set(repeated)


def test_a_step_is_the_sum_of_its_parts():
    """On a machine that takes a second a FLOP of a product, and nothing for the rest: three times forward."""
    free = Cost(0.0, float("inf"))
    machine = replace(
        H100, products={"fp32": Cost(0.0, 1.0)}, attention={"fp32": free}, elementwise=free,
        host_seconds=(0.0, 0.0), intra_node=free, inter_node=free,
    )  # fmt: skip
    flops = estimate_config(SMALL, 1, H100).flops
    tokens = 16 * 64
    assert seconds(SMALL, 1, machine).total == pytest.approx(3 * tokens * (flops["projections"] + flops["logits"]))
    assert seconds(SMALL, 2, machine).total == pytest.approx(seconds(SMALL, 1, machine).total / 2)


def test_the_bubble_is_that_of_the_schedule():
    """Equal stages (a vocabulary that costs next to nothing): (p - 1) / (m v) of the work."""
    config = load_config(ROOT / "configs/3b.yaml", ["model.vocab_size=128", "model.method=vanilla"])
    for virtual in (1, 2, 3):
        time = seconds(with_layout(config, pipeline=4, virtual_pipeline=virtual), 4)
        work = time.total - time.bubble - time.data - time.optimizer
        assert time.bubble / work == pytest.approx(3 / (256 * virtual), rel=0.03)
    assert seconds(config, 4).bubble == 0


def test_more_work_takes_longer_and_a_slower_link_never_less():
    base = seconds(with_layout(SMALL, tensor=2), 2).total
    full = RecomputeConfig(granularity="full", method="uniform", num_layers=1)
    assert seconds(replace(with_layout(SMALL, tensor=2), recompute=full), 2).total > base
    slow = Cost(1e-3, 1e9)
    assert seconds(with_layout(SMALL, tensor=2), 2, replace(H100, intra_node=slow)).total > base
    assert seconds(SMALL, 1, replace(H100, intra_node=slow)).total == seconds(SMALL, 1).total  # control: none is used
    across = replace(H100, devices_per_node=1)
    assert seconds(with_layout(SMALL, tensor=2), 2, across).total > base


@pytest.mark.parametrize(
    ("num_loops", "chunks", "ramp"), [(1, {1, 2}, None), (1, {1, 2}, [4, 4, 64]), (2, {2, 4}, None)]
)
def test_candidates_are_all_that_validate_accepts(num_loops, chunks, ramp):
    """Brute force over every combination of integers up to the world's size; ``chunks`` are a stage's of two."""
    world, small = 4, replace(SMALL, train=replace(SMALL.train, global_batch_size=8, batch_ramp=ramp))
    small = replace(small, model=replace(small.model, num_loops=num_loops))
    found = {tuple(sorted(each.overrides.items(), key=str)) for each in candidate_layouts(small, world, H100)}
    expected = set()
    modes = [(None, None, None), ("selective", None, None), ("full", "uniform", 1)]
    sizes = range(1, world + 1)
    for tp, pp, vp, cp, sp, micro, mode in product(sizes, sizes, sizes, sizes, (False, True), range(1, 9), modes):
        config = replace(
            small,
            parallel=ParallelConfig(tensor=tp, pipeline=pp, virtual_pipeline=vp, context=cp, sequence=sp),
            train=replace(small.train, micro_batch_size=micro),
            recompute=RecomputeConfig(granularity=mode[0], method=mode[1], num_layers=mode[2]),
        )
        try:
            validate(config, world, needs_data=False)
            transformer_config(config)
        except ValueError:
            continue
        sizes_of = ("tensor", "pipeline", "virtual_pipeline", "context", "sequence")
        keys = {f"parallel.{k}": getattr(config.parallel, k) for k in (*sizes_of, *EVEN)}
        keys |= {f"recompute.{k}": v for k, v in dataclasses.asdict(config.recompute).items()}
        expected.add(tuple(sorted((keys | {"train.micro_batch_size": micro}).items(), key=str)))
    assert found == expected
    assert len(found) > 50
    assert {dict(keys)["parallel.virtual_pipeline"] for keys in found if dict(keys)["parallel.pipeline"] == 2} == chunks
    assert found > {
        tuple(sorted(each.overrides.items(), key=str))
        for each in candidate_layouts(small, world, replace(H100, devices_per_node=1))
    }


@pytest.mark.parametrize(("name", "world"), [("360m", 8), ("500m", 32), ("1.5b", 8), ("3b", 8), ("3b", 32)])
def test_the_papers_sizes_fit(name, world):
    """With what a study would fix, so that few candidates are left; printed with their memory (pytest -s)."""
    config = load_config(ROOT / f"configs/{name}.yaml")
    best = best_layouts(
        config, world, H100, limit=3, accept=lambda c: c.parallel.context == 1 and c.parallel.virtual_pipeline == 1
    )
    assert [each.step_seconds for each in best] == sorted(each.step_seconds for each in best)
    for each in best:
        print(f"{name}: {each.name}, {each.step_seconds:.2f} s, {each.memory.total / 1e9:.1f} GB")
        assert each.memory.total < 0.92 * 80e9
        assert 0 < each.mfu < 1
        settings = [f"{key}={'null' if value is None else value}" for key, value in each.overrides.items()]
        validate(load_config(ROOT / f"configs/{name}.yaml", settings), world, needs_data=False)


def test_what_does_not_fit_says_so():
    with pytest.raises(ValueError, match=r"none of \d+ layouts on 2 x H100 fits 0\.0 GB .* the smallest, .* needs"):
        best_layouts(SMALL, 2, replace(H100, memory_gb=0.001))
    with pytest.raises(ValueError, match="no layout of this config runs on 3 ranks"):
        best_layouts(SMALL, 3, H100)


def test_the_tool_prints_and_writes(tmp_path, capsys):
    settings = [str(ROOT / "configs/quickstart.yaml"), "--world", "2", "--layouts", "--json", str(tmp_path / "e.json")]
    assert estimate_tool(settings) == 0
    written = json.loads((tmp_path / "e.json").read_text())
    config = load_config(ROOT / "configs/quickstart.yaml")
    assert written["parameters"] == decoder_shape(config).parameters
    assert written["hops"] == [4 * 256 * (128 + 2 * 2 * 32) * 4]
    assert set(written["memory_by_recompute"]) == {"none", "selective", "full"}
    assert written["layouts"][0]["step_seconds"] <= written["layout"]["step_seconds"]
    printed = capsys.readouterr().out
    for said in (f"{written['parameters']:,}", "mix", f"{written['hops'][0]:,} bytes", "assumed, not measured"):
        assert said in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "T4"], "set --gpu to one of"),
        (["--world", "3"], "not a multiple of 2"),
        (["--world", "0"], "set both to 1 or more"),
        (["train.step=1"], "train.steps"),
        (["--gpu", "A100", "model.spec=te", "precision.dtype=bf16", "precision.fp8=delayed"], "no figures for fp8"),
    ],
)
def test_the_tool_rejects_in_one_line(arguments, said, capsys):
    assert estimate_tool([str(ROOT / "configs/quickstart.yaml"), *arguments]) == 1
    reported = capsys.readouterr().err
    assert said in reported
    assert reported.count("\n") == 1


def test_the_tool_names_every_preset():
    assert set(GPUS) == set(PRESETS)
    with pytest.raises(ValueError, match="set --gpu to one of H100"):
        find_gpu("T4")
    assert find_gpu("A100-40GB").memory_gb == 40 and find_gpu("A100").memory_gb == 80
    with pytest.raises(ValueError, match=r"'A100-PCIE'.* A100-40GB"):
        find_gpu("A100-PCIE")


def test_a_study_of_transformer_engines_layers_has_no_negative_memory():
    found = estimate_config(load_config(ROOT / "configs/3b.yaml", ["model.spec=te"]), 32, H100)
    for memory in (*found.memory, *found.memory_by_recompute.values()):
        assert min(dataclasses.asdict(memory).values()) >= 0 and memory.sources > 0


def test_layouts_that_differ_in_chunks_are_one_line():
    config = load_config(ROOT / "configs/410m.yaml")
    accept = lambda c: c.parallel.pipeline == 2 and c.parallel.context == c.parallel.tensor == 1  # noqa: E731
    best = best_layouts(config, 8, H100, limit=6, accept=accept)
    lines = [(each.name.split(" mb")[1], each.overrides["parallel.context"]) for each in best]
    assert len(set(lines)) == len(lines)
    assert any(each.other_chunks for each in best)


def test_what_does_not_fit_is_known_before_it_is_queued():
    config = load_config(ROOT / "configs/3b.yaml")
    fit, problem = check_fit(config, 32, "H100-80GB")
    assert problem is None and fit.fits and "32 x H100" in fit.line and fit.run_hours > 1
    large = replace(config, train=replace(config.train, micro_batch_size=32))
    fit, problem = check_fit(large, 32)
    assert not fit.fits and f"needs {fit.needed_gb:.1f} GB" in problem and "recompute.granularity=full" in problem


def test_steps_of_a_batch_ramp_take_as_long_as_such_steps_do():
    """Two steps of 64 sequences, one of 128 and the rest of 192, each as a run of that batch size has them."""
    config = load_config(ROOT / "configs/410m.yaml", ["train.micro_batch_size=2", "train.steps=10"])

    def hours(size: int, **train) -> float:
        return check_fit(replace(config, train=replace(config.train, global_batch_size=size, **train)), 16)[0].run_hours

    ramped = hours(192, batch_ramp=[64, 64, 256])
    assert ramped == pytest.approx((2 * hours(64) + hours(128) + 7 * hours(192)) / 10)
    assert ramped < hours(192)


def test_the_check_imports_no_torch():
    code = "import sys, megatron_depthattn.estimate.fits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_tool_ranks_layouts_of_a_config_that_does_not_run_as_it_stands(capsys):
    arguments = [str(ROOT / "configs/410m.yaml"), "--world", "24"]
    assert estimate_tool(arguments) == 1
    assert "not a multiple of" in capsys.readouterr().err
    assert estimate_tool([*arguments, "parallel.pipeline=4", "train.global_batch_size=513", "--layouts"]) == 0
    reported = capsys.readouterr().out
    assert (
        "as it stands it does not run on 24 ranks: train.global_batch_size" in reported
        and "layouts that fit" in reported
    )


def test_a_mode_that_the_config_rejects_is_left_out(capsys):
    fp8 = ["model.spec=te", "precision.fp8_attention=true", "recompute.granularity=null"]
    arguments = [str(ROOT / "configs/3b.yaml"), str(ROOT / "configs/precision/fp8.yaml"), *fp8, "--world", "32"]
    assert estimate_tool(arguments) == 0, capsys.readouterr().err
    assert "selective" not in capsys.readouterr().out
