"""Table 2 of the paper: its figures as printed, ours beside them, and what a prefill really moves and holds."""

import json

import pytest
import torch

from megatron_depthattn.benchmarks.op import MixShape
from megatron_depthattn.cli.common import find_config
from megatron_depthattn.cli.estimate import main as estimate
from megatron_depthattn.config import load_config
from megatron_depthattn.estimate.paper import (
    TITLES,
    binary,
    by_the_paper,
    candidates,
    flops_difference,
    kernel_io,
    with_method,
)
from megatron_depthattn.estimate.prefill import TensorTracker, exported_model, fake_prefill
from megatron_depthattn.methods.attnres.definition import AttentionResiduals
from megatron_depthattn.methods.denseformer.definition import DenseFormer
from megatron_depthattn.model.source_plan import SourcePlan

# The page: FLOPs and I/O a token, memory to prefill 128K tokens; 3B.
PRINTED = {
    "Depth-Attention": ("2.40e5", "282 KiB", "0"),
    "DenseFormer": ("5.01e6", "4.97 MiB", "24.0 GiB"),
    "Attention Residuals": ("4.26e6", "4.44 MiB", "4.0 GiB"),
    "mHC": ("4.72e7", "8.63 MiB", "1.5 GiB"),
}
TINY = (
    *("num_layers=6", "hidden_size=32", "num_attention_heads=4", "num_query_groups=2", "kv_channels=8"),
    *("ffn_hidden_size=192", "vocab_size=64", "depth_attention.stride=2", "attnres.block_size=4"),
)


def tiny(method, *settings):
    return with_method(load_config(find_config("3b"), [*(f"model.{key}" for key in TINY), *settings]), method)


def test_the_table_is_the_papers_as_printed(tmp_path, capsys):
    assert estimate(["--paper", "--json", str(tmp_path / "table.json")]) == 0
    printed = capsys.readouterr().out
    rows = {c[1].strip(): [x.strip() for x in c[2:-1]] for x in printed.splitlines() if len(c := x.split("│")) == 9}
    assert {title: (cells[0].split()[0], cells[2], cells[4]) for title, cells in rows.items()} == PRINTED
    assert rows["Depth-Attention"][0] == "2.40e5 (0.004 %)"
    assert "table 2 of arXiv:2606.05014 for 3b" in printed
    values = json.loads((tmp_path / "table.json").read_text())
    depth, dense = values["Depth-Attention"], values["DenseFormer"]
    # 47 layers take the mean of 2048 numbers; DenseFormer's embedding and newest state are there in vanilla, too.
    assert depth["ours"]["flops"] == 4 * 512 * 117 + 47 * 2048 and "469 KiB in the Triton kernel" in printed
    assert dense["ours"]["flops"] == dense["paper"]["flops"] == 2 * 2048 * 1224
    assert binary(dense["kept"]) == "23.0 GiB" and binary(values["mHC"]["kept"]) == "1.5 GiB"
    assert depth["ours"]["memory"] * 128 * 1024 < 1 << 25  # its sources are in the cache
    assert all(of["ours"]["io"] > of["paper"]["io"] for of in values.values())


def test_candidates_are_those_of_the_page():
    plan = SourcePlan(48, 24)
    assert [plan.sources(layer) for layer in (0, 1, 24, 25, 47)] == [(), (0,), (0,), (0, 24), (0, 24)]
    assert candidates(plan) == [2] * 24 + [3] * 23 and sum(candidates(plan)) == 117
    assert [sum(candidates(SourcePlan(48, stride))) for stride in (23, 25)] == [119, 116]  # controls
    assert DenseFormer(num_layers=48, hidden_size=2048).num_parameters == 1224
    ours = AttentionResiduals(num_layers=48, hidden_size=1).total_flops // 4
    assert ours - 10 - 8 == sum((1 + b) + 11 * (2 + b) for b in range(8)) == 520


def test_counts_hold_for_other_shapes_and_settings():
    """The parts of a difference add up, or `flops_difference` names the rest; the I/O is that of the op's tensors."""
    for settings in (["model.denseformer.period=3"], ["model.denseformer.dilation=2"], ["model.attnres.block_size=5"],
                     ["model.mhc.num_streams=2"], ["model.depth_attention.recent_window=2"]):  # fmt: skip
        for method in TITLES:
            assert "does not count" not in flops_difference(tiny(method, *settings))
    shapes = [MixShape(1, 4, 2, 8, sources) for sources in (1, 1, 2, 2, 3)]
    assert kernel_io(tiny("depth_attention")) == sum(shape.bytes_moved(2)[0] for shape in shapes)
    none = by_the_paper(tiny("depth_attention", "model.depth_attention.stride=1", "model.num_layers=1"))
    assert none == (0, 0, 0)


@pytest.mark.parametrize("method", ["vanilla", *TITLES])
def test_fake_tensors_are_counted_as_real_ones_are(method):
    """The peak of real tensors is also the profiler's, which sees every allocation, but for kernels' own buffers."""
    config, ids = tiny(method), torch.zeros(1, 1024, dtype=torch.long)
    found, half = fake_prefill(config, 1024), fake_prefill(config, 512)
    given = {"attention_mask": {"full_attention": None}, "use_cache": True, "logits_to_keep": 1}
    torch.manual_seed(0)
    with torch.inference_mode():
        model = exported_model(config)
        with TensorTracker(model) as tracker:
            model(ids, **given)
        assert (tracker.moved, tracker.peak) == (found.moved, found.peak)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(ids, **given)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert found.peak == pytest.approx(peak, rel=0.1)
    assert 2 * half.peak == pytest.approx(found.peak, rel=0.02)  # proportional to the tokens
    assert tracker.live < tracker.peak


def test_a_tracker_by_hand():
    """An expanded tensor is read once, a view moves nothing, an operation in place writes, weights do not count."""
    layer = torch.nn.Linear(4, 2, bias=False)
    x = torch.ones(8, 4)
    with torch.inference_mode(), TensorTracker(layer) as tracker:
        y = layer(x)  # 32 in, 16 out
        y.view(16).add_(1)  # 16 in, 16 out
        wide = torch.ones(8, 1).expand(8, 100) + torch.zeros(1)  # 8 out; 1 out; 8 + 1 in, 800 out
        live = tracker.live
        del wide, y
    assert tracker.moved == 4 * (32 + 16 + 16 + 16 + 8 + 1 + 8 + 1 + 800)
    assert live == 4 * (16 + 800) and tracker.live == 0 and tracker.peak == 4 * (16 + 8 + 1 + 800)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--paper model.num_loops=2", "model.num_loops is 2: the paper's methods run each layer once, set "),
        ("--paper model.kv_channels=0", "model.kv_channels"),
        ("--paper 3b model.num_query_groups=7", "model.num_query_groups"),
        ("--paper model.depth_attention.stride=0", "model.depth_attention.stride"),
        ("--paper model.depth_attention.weights=uniform", "weights is uniform and mixes is value: the table counts"),
        ("--paper model.depth_attention.mixes=key", "set model.depth_attention.weights=softmax model.depth_attention."),
        ("--paper --layouts --world 8", "--world, --layouts: not with --paper"),
        ("--paper --json /nowhere/x.json", "--json /nowhere/x.json: its folder does not exist"),
        ("quickstart --json /nowhere/x.json", "--json /nowhere/x.json: its folder does not exist"),
    ],
)
def test_errors_come_before_the_table(words, said, capsys):
    assert estimate(words.split()) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1
