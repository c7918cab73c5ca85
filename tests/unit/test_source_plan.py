"""The source plan: against the definition transcribed, against brute force, and against numbers worked out by hand."""

import bisect
import dataclasses
import itertools
import re
from collections import Counter

import pytest
import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_depthattn.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig, validate
from megatron_depthattn.config.pipeline import chunk_starts, stages_of_layout
from megatron_depthattn.estimate import counts
from megatron_depthattn.model.gpt import qwen3_style_config
from megatron_depthattn.model.source_plan import SourcePlan, default_stride, hop_bytes
from megatron_depthattn.model.transformer_config import pipeline_chunk_starts
from megatron_depthattn.train.build import transformer_config

PLANS = [
    SourcePlan(num_layers, stride, window)
    for num_layers in (1, 2, 3, 5, 8, 12, 13)
    for stride in (1, 2, 3, 4, 6, 8, 12, 20)
    for window in (0, 1, 2, 3, 20)
]
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}


def defined_sources(layer: int, stride: int, window: int) -> set[int]:
    """S(l) = { i < l : i mod stride == 0 }  ∪  { i : l - window <= i < l }, with layers counted from 0."""
    return {i for i in range(layer) if i % stride == 0} | {i for i in range(layer - window, layer) if i >= 0}


def defined_loop_sources(effective: int, num_layers: int, stride: int, window: int) -> set[int]:
    """S(r,l) = { (r,i) : i in S(l) }  ∪  { (r',l) : r' < r }, layer l of loop r standing at r * num_layers + l."""
    loop, layer = divmod(effective, num_layers)
    in_loop = {loop * num_layers + i for i in defined_sources(layer, stride, window)}
    return in_loop | {earlier * num_layers + layer for earlier in range(loop)}


def live_by_brute_force(plan: SourcePlan, layer: int) -> set[int]:
    return {
        i
        for i in range(layer)
        if any(i in defined_sources(m, plan.stride, plan.recent_window) for m in range(layer, plan.num_layers))
    }


def test_sources_and_live_sets_follow_the_definition():
    for plan in PLANS:
        for layer in range(plan.num_layers):
            assert plan.sources(layer) == tuple(sorted(defined_sources(layer, plan.stride, plan.recent_window))), plan
            assert plan.held(layer) == tuple(sorted(live_by_brute_force(plan, layer + 1))), plan
        assert plan.sources(0) == plan.held(plan.num_layers - 1) == ()


@pytest.mark.parametrize(("num_layers", "num_loops"), [(4, 3), (8, 2)])
@pytest.mark.parametrize(("stride", "window"), [(1, 0), (2, 0), (3, 2), (9, 1)])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("chunks_per_loop", [1, 2])
def test_loops_of_same_layer_sources(num_layers, num_loops, stride, window, ranks, chunks_per_loop):
    """The sources are the page's; where each rank holds the same layers of every loop, only its own loop's cross."""
    starts = tuple(range(0, num_layers * num_loops, num_layers // (ranks * chunks_per_loop)))
    plan = SourcePlan(num_layers * num_loops, stride, window, starts, ranks, layers_per_loop=num_layers)
    for layer in range(plan.num_layers):
        assert set(plan.sources(layer)) == defined_loop_sources(layer, num_layers, stride, window)
        assert list(plan.sources(layer)) == sorted(plan.sources(layer))
    assert not sources_of_earlier_loops(plan, num_layers)
    unrolled = dataclasses.replace(plan, layers_per_loop=None, stride=1)
    assert ranks == 1 or sources_of_earlier_loops(unrolled, num_layers)  # control


def sources_of_earlier_loops(plan: SourcePlan, num_layers: int) -> list[int]:
    """Those that cross an edge between ranks."""
    starts = plan.chunk_starts
    return [i for c in range(1, len(starts)) for i in plan.entering(c) if i < starts[c] // num_layers * num_layers]


def pipelines() -> list[SourcePlan]:
    """Every plan above under every layout that cuts its layers evenly, and under some that do not."""
    even = [
        dataclasses.replace(plan, chunk_starts=tuple(range(0, plan.num_layers, layers)), num_ranks=ranks)
        for plan, ranks in itertools.product(PLANS, (1, 2, 3, 4))
        for layers in (1, 2, 3)
        if plan.num_layers in (8, 12) and plan.recent_window < 3 and plan.num_layers % (layers * ranks) == 0
    ]
    cuts = [(0, 0, 4, 8), (0, 2, 5, 6), (0, 3, 4, 7), (0, 0, 1, 3, 7, 8), (0, 1, 2, 3, 4, 8)]
    uneven = [
        dataclasses.replace(plan, chunk_starts=cut, num_ranks=ranks)
        for plan, cut, ranks in itertools.product(PLANS, cuts, (2, 3, 4))
        if plan.num_layers == 8 and plan.recent_window < 3 and len(cut) % ranks == 0
    ]
    return even + uneven


def walk(plan: SourcePlan, starts: tuple[int, ...]) -> None:
    """Run the layers as the model does where chunks begin at ``starts``, and take from ``plan`` what to do."""
    ranks = plan.num_ranks or 1
    rank_of = [(bisect.bisect_right(starts, layer) - 1) % ranks for layer in range(plan.num_layers)]
    holds: list[set[int]] = [set() for _ in range(ranks)]
    for layer, rank in enumerate(rank_of):
        if plan.enters_chunk(layer):
            assert layer in starts[1:], f"{plan}: nothing arrives before {layer}"
            entering = plan.entering(plan.chunk_of(layer))
            assert not holds[rank] & set(entering), f"{plan}: {entering} cross a boundary twice"
            holds[rank] |= set(entering)
        assert holds[rank] >= set(plan.sources(layer)), f"{plan}: a source was dropped too early or never came"
        if plan.leaves_chunk(layer):
            assert holds[rank] | {layer} >= set(plan.entering(plan.chunk_of(layer) + 1)), plan
        assert set(plan.held(layer)) <= holds[rank] | {layer}
        holds[rank] = set(plan.held(layer))
        in_chunk = plan.chunk_of(layer) if not plan.leaves_chunk(layer) else None
        for source in holds[rank]:
            read_here = any(source in plan.sources(r) and rank_of[r] == rank for r in range(layer + 1, plan.num_layers))
            assert read_here or (in_chunk is not None and source in plan.entering(in_chunk + 1)), f"{plan}: {source}"
    assert not any(holds)


def test_what_a_rank_holds_is_enough_and_nothing_more():
    for plan in pipelines():
        walk(plan, plan.chunk_starts)


def test_control_the_plan_of_an_even_cut_does_not_do_for_another():
    for plan in pipelines():
        even = tuple(i * plan.num_layers // len(plan.chunk_starts) for i in range(len(plan.chunk_starts)))
        if even != plan.chunk_starts and plan.num_ranks > 1:
            with pytest.raises(AssertionError):
                walk(dataclasses.replace(plan, chunk_starts=even), plan.chunk_starts)


def test_a_source_crosses_the_boundaries_on_its_way_to_the_farthest_reader_and_no_other():
    for plan in pipelines():
        ranks = plan.num_ranks or 1
        crossings = Counter(source for edge in plan.edges() for source in edge)
        for source in range(plan.num_layers):
            readers = [r for r in range(plan.num_layers) if source in plan.sources(r)]
            distances = [(plan.chunk_of(r) - plan.chunk_of(source)) % ranks for r in readers]
            assert crossings[source] == max(distances, default=0), (plan, source)


def test_kept_sources_of_an_interleaved_model_by_hand():
    """8 layers in chunks of two on two ranks: rank 0 has layers 0, 1, 4, 5. Each source crosses once."""
    plan = SourcePlan(num_layers=8, stride=2, chunk_starts=(0, 2, 4, 6), num_ranks=2)
    assert plan.edges() == ((0,), (2,), (4,))
    assert [plan.kept(chunk) for chunk in range(4)] == [(0,), (0, 2), (), ()]
    assert [plan.held(layer) for layer in range(8)] == [(0,), (0,), (0, 2), (0, 2), (0, 2, 4), (), (0, 2, 4, 6), ()]


def test_sources_of_a_small_model_by_hand():
    plan = SourcePlan(num_layers=8, stride=3, recent_window=2, chunk_starts=(0, 3, 6))
    expected = [(), (0,), (0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4), (0, 3, 4, 5), (0, 3, 5, 6)]
    assert [plan.sources(layer) for layer in range(8)] == expected
    assert plan.edges() == ((0, 1, 2), (0, 3, 4, 5))


@pytest.mark.parametrize(("num_layers", "stride"), [(48, 24), (32, 16), (7, 3), (3, 1), (2, 1), (1, 1)])
def test_default_stride_is_half_the_layers(num_layers, stride):
    assert default_stride(num_layers) == stride
    assert qwen3_style_config(num_layers=num_layers, **SMALL).source_plan.stride == stride
    for rule, counted in (("same_layer", num_layers), ("unrolled", 3 * num_layers)):
        looped = {"num_layers": 3 * num_layers, "num_loops": 3, "depth_attention_loop_sources": rule}
        half = qwen3_style_config(**looped, **SMALL).source_plan.stride
        assert half == default_stride(num_layers, 3, rule) == max(1, counted // 2)
    if num_layers % 2 == 0:
        plan = SourcePlan(num_layers, stride)
        assert max(len(plan.sources(layer)) for layer in range(num_layers)) == min(2, num_layers - 1)


@pytest.mark.parametrize(
    ("fields", "given", "remedy"),
    [
        ({"stride": 0}, "depth_attention_stride is 0", "set it to 1 or more"),
        ({"stride": -2}, "depth_attention_stride is -2", "set it to 1 or more"),
        ({"recent_window": -1}, "depth_attention_recent_window is -1", "set it to 0 or more"),
        ({"chunk_starts": ()}, "cuts 4 layers at []", "use fewer pipeline or virtual stages"),
        ({"chunk_starts": (1, 2)}, "cuts 4 layers at [1, 2]", "use fewer pipeline or virtual stages"),
        ({"chunk_starts": (0, 2, 2)}, "cuts 4 layers at [0, 2, 2]", "use fewer pipeline or virtual stages"),
        ({"chunk_starts": (0, 3, 2)}, "cuts 4 layers at [0, 3, 2]", "use fewer pipeline or virtual stages"),
        ({"chunk_starts": (0, 5)}, "cuts 4 layers at [0, 5]", "use fewer pipeline or virtual stages"),
        ({"chunk_starts": (0, 0, 0, 2)}, "but for that of the embedding and that of the loss", "or more layers"),
        ({"chunk_starts": (0, 1, 2), "num_ranks": 2}, "2 pipeline ranks cannot take turns at 3", "the same number"),
    ],
)
def test_impossible_plans_are_rejected(fields, given, remedy):
    with pytest.raises(ValueError, match=re.escape(given)) as error:
        SourcePlan(**({"num_layers": 4, "stride": 2} | fields))
    assert remedy in str(error.value)


def test_digest_tells_plans_apart():
    plan = SourcePlan(num_layers=8, stride=4, recent_window=1, chunk_starts=(0, 4))
    others = [{"num_layers": 9}, {"stride": 3}, {"recent_window": 0}, {"chunk_starts": (0, 3)}, {"num_ranks": 1}]
    others += [{"layers_per_loop": 4}, {"kinds": ("key", "mixed_key")}]
    digests = [plan.digest(), *(dataclasses.replace(plan, **other).digest() for other in others)]
    assert len(set(digests)) == len(digests)
    assert SourcePlan(8, 4, 1, (0, 4)).digest() == plan.digest()
    assert {field.name for field in dataclasses.fields(SourcePlan)} == {name for other in others for name in other}


def test_hop_bytes_of_the_3b_model():
    """48 layers on 4 stages, stride 24: source 0 crosses every edge, source 24 the last one only.

    Per token: hidden 2048, one source 2 * 8 * 64 = 1024. 2048 tokens in bf16 (4096 bytes per number a token).
    """
    plan = SourcePlan(num_layers=48, stride=24, chunk_starts=(0, 12, 24, 36))
    assert plan.edges() == ((0,), (0,), (0, 24))
    sizes = hop_bytes(plan, hidden_size=2048, source_size=1024, tokens=2048, bytes_per_element=2)
    assert list(sizes) == [12 * 2**20, 12 * 2**20, 16 * 2**20]  # vanilla: 8 MiB
    no_cut = dataclasses.replace(plan, chunk_starts=(0,))
    assert list(hop_bytes(no_cut, hidden_size=2048, source_size=1024, tokens=2048, bytes_per_element=2)) == []


CUTS = [
    {"pipeline": 4},
    {"pipeline": 4, "virtual_pipeline": 3},
    {"pipeline": 4, "first_stage_layers": 3},
    {"pipeline": 4, "last_stage_layers": 6, "virtual_pipeline": 3},
    {"pipeline": 4, "first_stage_layers": 4, "last_stage_layers": 4, "virtual_pipeline": 2},
    {"pipeline": 2, "first_stage_layers": 5, "last_stage_layers": 19},
    {"pipeline": 4, "pipeline_layout": "E|t*10,|t*14|L"},
    {"pipeline": 2, "virtual_pipeline": 4, "pipeline_layout": "E(t*2,|t|)*3,t*7|t*8L"},
    {"pipeline": 3, "virtual_pipeline": 2, "pipeline_layout": "Et|(t*3|t|)*2,t*15L"},
]


@pytest.mark.parametrize("parallel", CUTS, ids=str)
def test_the_runs_cut_is_megatrons(parallel):
    train = TrainConfig(global_batch_size=12, micro_batch_size=1)
    config = RunConfig(model=ModelConfig(num_layers=24), parallel=ParallelConfig(**parallel), train=train)
    validate(config, config.parallel.pipeline, needs_data=False)
    megatron = transformer_config(config)
    assert chunk_starts(config.model, config.parallel) == pipeline_chunk_starts(megatron)
    ours = counts.source_plan(config)
    theirs = megatron.source_plan
    assert (ours.edges(), ours.chunk_starts) == (theirs.edges(), theirs.chunk_starts)
    if layout := config.parallel.pipeline_layout:
        letters = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.loss: "L"}
        parts = PipelineParallelLayerLayout.parse_str_to_list(layout)
        assert stages_of_layout(layout) == tuple("".join(letters[layer] for layer in part) for part in parts)


def test_a_chunk_without_layers_is_rejected():
    """Unless it holds the embedding, or the output layer."""
    fields = {"num_layers": 2, **SMALL, "pipeline_dtype": torch.float32}
    accounted = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    config = qwen3_style_config(**fields, pipeline_model_parallel_size=4, **accounted)
    assert config.source_plan.chunk_starts == (0, 0, 1, 2)
    with pytest.raises(ValueError, match=r"cuts 2 layers at \[0, 1, 1\]: every chunk must hold at least one layer"):
        qwen3_style_config(**fields, pipeline_model_parallel_size=3, pipeline_model_parallel_layout="Et||tL")
