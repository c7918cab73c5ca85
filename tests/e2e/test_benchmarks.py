"""The benchmark tools: what is pure, by hand; every verb once, tiny; and no figure while the op's tests are red."""

import json
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch

from megatron_depthattn.benchmarks import checkpoint
from megatron_depthattn.benchmarks import command as benchmark
from megatron_depthattn.benchmarks.generate import generate, prefill_peak, random_model
from megatron_depthattn.benchmarks.memory import saved_tensors
from megatron_depthattn.benchmarks.models import Model, method_configs, run_config, single_config
from megatron_depthattn.benchmarks.op import Calls, MixShape
from megatron_depthattn.benchmarks.peers import BOUNDS, Peer, compare
from megatron_depthattn.benchmarks.result import Result, machine_facts, markdown, table
from megatron_depthattn.benchmarks.timing import bootstrap_interval, spread, taking_turns
from megatron_depthattn.cli.common import find_config
from megatron_depthattn.estimate.paper import with_method
from megatron_depthattn.ops import DEPTH_MIX_IMPLEMENTATIONS
from megatron_depthattn.parallel.microbatch_state import MicrobatchState
from tools import gpu

CPU = torch.device("cpu")


# ---- statistics and bytes


def test_bytes_of_a_mix_are_those_of_its_tensors():
    """Forward: what goes in and the mixed value. Backward: that (its gradient), and a gradient of all that went in."""
    shape = MixShape(tokens=5, heads=6, kv_heads=2, head_size=4, sources=3)
    *inputs, grad = shape.inputs(torch.float32, CPU)
    read = sum(tensor.nbytes for tensor in inputs)
    assert shape.bytes_moved(4) == (read + grad.nbytes, 2 * read + grad.nbytes)
    assert shape.bytes_moved(4) == tuple(2 * num_bytes for num_bytes in shape.bytes_moved(2))


def test_calls_go_round_sets_that_no_cache_holds(monkeypatch):
    shape = MixShape(tokens=4, heads=2, kv_heads=1, head_size=4, sources=1)
    monkeypatch.setattr("megatron_depthattn.benchmarks.op.last_level_cache_bytes", lambda: 7 * shape.bytes_moved(4)[0])
    calls = Calls(shape, CPU)
    assert len(calls.sets) == 7
    seen = []

    def mix(q, keys, values, k, v, scale):
        assert (len(keys), len(values), scale) == (1, 1, 0.5)
        assert keys[0].shape == k.shape == v.shape
        seen.append(q.data_ptr())
        return DEPTH_MIX_IMPLEMENTATIONS["lean"](q, keys, values, k, v, scale)

    for _ in range(14):
        assert min(calls.mix(mix)) > 0
    assert len(set(seen[:7])) == 7
    assert seen[:7] == seen[7:]


def test_spread_and_bootstrap():
    values = [float(i) for i in range(1, 102)]
    assert spread(values) == (51.0, 26.0, 76.0)
    assert spread(values).text(10, 1) == "5.1 (2.6 to 7.6)"
    low, high = bootstrap_interval(values)
    # The median of n = 101 uniform values has a standard error of about range / (2 sqrt(n)) = 5.
    assert 36 < low < 46
    assert 56 < high < 66
    assert bootstrap_interval(values) == (low, high)  # seeded: the same figures give the same interval
    assert bootstrap_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)


def test_everyone_comes_first_and_last_equally_often():
    orders = [taking_turns(["a", "b", "c"], turn) for turn in range(6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    for place in (0, -1):
        assert sorted(order[place] for order in orders) == ["a", "a", "b", "b", "c", "c"]


def test_saved_tensors_are_storages_once_and_without_parameters():
    layer, state = torch.nn.Linear(4, 4, bias=False), MicrobatchState()
    x = torch.ones(3, 4, requires_grad=True)
    detached = torch.ones(5)
    with saved_tensors(layer, state) as saved:
        layer(x)
        x[:1].square()  # a view: all of x is kept, and it is kept already
        state.publish({"detached": detached})  # not through autograd, but kept for later layers
    assert sorted(tuple(t.shape) for t in saved.tensors) == [(1, 4), (3, 4), (5,)]
    assert saved.num_bytes == x.nbytes + detached.nbytes


# ---- what is written


def test_a_page_has_a_table_and_says_how_where_and_when():
    text = table(["name", "x | y"], [["a", "1"], ["long name", "10"]])
    rows = ["| name      | x \\| y |", "| --------- | -----: |", "| a         |      1 |", "| long name |     10 |"]
    assert text.splitlines() == rows
    facts, result = machine_facts(), Result("Title", ["a"], [["1"]], notes=["a note"])
    text = markdown(result, facts, ["depthattn", "benchmark", "op", "--runs", "3"])
    said = f"torch {torch.__version__.partition('+')[0]}", facts["date"], f"{facts['cores']} cores"
    assert all(part in text for part in ("### Title", "- a note", "`depthattn benchmark op --runs 3`", *said))


# ---- the verbs


def run(tmp_path, *arguments):
    """The figures and the page."""
    files = tmp_path / "figures.json", tmp_path / "page.md"
    assert benchmark.main(["--json", str(files[0]), "--markdown", str(files[1]), *arguments]) == 0
    written = json.loads(files[0].read_text())
    assert all(len(row) == len(written["columns"]) for row in written["rows"])
    assert written["machine"]["torch"]
    return written["figures"], files[1].read_text()


@pytest.fixture
def world(megatron_world_of_one, monkeypatch):
    """The verbs make a world of their own; in a process of many tests they take the one that is there."""
    groups = "megatron_depthattn.parallel.groups."
    monkeypatch.setattr(f"{groups}initialize_distributed", lambda _: CPU)
    monkeypatch.setattr(f"{groups}initialize_model_parallel", lambda: None)
    monkeypatch.setattr(f"{groups}shut_down", lambda: None)


TINY_MODEL = ("--layers", "2", "--set", "model.hidden_size=32", "model.num_attention_heads=4")
TINY = (
    *TINY_MODEL,
    "model.num_query_groups=2",
    "model.kv_channels=8",
    "model.vocab_size=64",
    "data.sequence_length=16",
)


def test_step(tmp_path, world, monkeypatch):
    more = ("--rounds", "3", "--warm-up", "1", "--no-optimizer")
    figures, page = run(tmp_path, "step", *TINY, "--ops", "lean", *more)
    assert sorted(figures) == ["stride 1, lean", "vanilla"]
    own, vanilla = figures["stride 1, lean"], figures["vanilla"]
    ratios = sorted(a / b for a, b in zip(own["seconds"], vanilla["seconds"], strict=True))
    assert own["ratio"] == pytest.approx(ratios[1])
    assert own["interval"][0] <= own["ratio"] <= own["interval"][1]
    assert own["tokens_per_second"] == pytest.approx(16 / sorted(own["seconds"])[1])
    assert own["mfu"] is None and "cut in depth" in page
    figures, _ = run(tmp_path, "step", *TINY, "--documents", "5", "16", *more)
    assert [*figures] == ["whole sequences", "documents of 5 tokens", "documents of 16 tokens"]
    assert all(len(of["seconds"]) == 3 for of in figures.values())
    assert benchmark.main(["step", "--documents", "0", *TINY]) == 1

    calls, real = [], Model.gradients

    def cut(self):
        calls.append(self)
        return real(self) if len(calls) <= 6 else sys.exit(9)  # both once when they are built, then by rounds

    monkeypatch.setattr(Model, "gradients", cut)
    with pytest.raises(SystemExit):
        run(tmp_path, "step", *TINY, "--ops", "lean", *more)
    partial = json.loads((tmp_path / "figures.json").read_text())
    assert partial["until"] == "round 1 of 3" and [len(of["seconds"]) for of in partial["figures"].values()] == [1, 1]


def test_step_of_the_papers_methods(tmp_path, world, monkeypatch, capsys):
    """Table 3: five models of one shape; without --layers as deep as they fit into what is free."""
    rounds = ("--rounds", "2", "--warm-up", "0")
    figures, page = run(tmp_path, "step", "--methods", "--shape", "3b", *TINY, "model.ffn_hidden_size=64", *rounds)
    assert [*figures] == ["vanilla", "Depth-Attention", "DenseFormer", "Attention Residuals", "mHC"]
    rows = {cells[1].strip(): cells for line in page.splitlines() if len(cells := line.split("|")) > 6}
    own, base = (figures[name]["seconds"] for name in ("mHC", "vanilla"))
    percent = 50 * sum(a / b for a, b in zip(own, base, strict=True)) - 100  # the median of two
    assert rows["mHC"][3].split()[0] == f"{percent:.1f}" and rows["mHC"][-2].strip() == "18.85 (+308 %)"
    assert "cut from 3b: num_layers 2 of 48, hidden_size 32 of 2048" in page and "MFU" not in page
    given = benchmark.build_parser("step").parse_args(["step", "--methods", *TINY[2:], "precision.dtype=fp32"])
    depths = []
    for free in (10**9, 10**8, 3 * 10**7):
        monkeypatch.setattr("megatron_depthattn.benchmarks.models.free_bytes", lambda _, free=free: free)
        depths += {config.model.num_layers for config in method_configs(given, "cpu").values()}
    assert depths[0] == 24 > depths[1] > depths[2]
    monkeypatch.setattr("megatron_depthattn.benchmarks.models.free_bytes", lambda _: 1000)
    with pytest.raises(ValueError, match="with one layer the five models need"):
        method_configs(given, "cpu")
    assert benchmark.main(["step", "--methods", "--peers", *TINY]) == 1
    assert "leave out --models, --peers and --ops" in capsys.readouterr().err


GENERATION = ("model.num_layers=4", *TINY_MODEL[3:], *TINY[len(TINY_MODEL) : -1], "precision.dtype=fp32")


def test_generate(tmp_path, capsys):
    """Table 4, and errors of one line."""
    size = ("--batch-size", "2", "--prompt-length", "5", "--new-tokens", "3", "--rounds", "2")
    methods = ("--methods", "vanilla", "depth_attention", "mhc", "--set", *GENERATION)
    figures, page = run(tmp_path, "generate", "3b", *size, *methods)
    assert [*figures] == ["vanilla", "Depth-Attention", "mHC"]
    for of in figures.values():
        assert len(of["prefill_seconds"]) == len(of["decode_seconds"]) == 2 and min(of["prefill_seconds"]) > 0
        both = sorted(map(sum, zip(of["prefill_seconds"], of["decode_seconds"], strict=True)))
        assert of["tokens_per_second"] == pytest.approx(2 * 3 / (sum(both) / 2))
    peaks = [of["weight_bytes"] + of["prefill_peak_bytes"] for of in figures.values()]
    assert peaks[0] < peaks[1] < peaks[2]
    assert "2 x 5 + 3 tokens" in page and "532.8 (+1.18 %)" in page and "cut from 3b: num_layers 4 of 48" in page
    capsys.readouterr()
    for arguments, said in ((("--new-tokens", "0"), "set 1 or more"), (("--batch-size", "9" * 9), "GB are free: set")):
        assert benchmark.main(["generate", "3b", *arguments]) == 1
        reported = capsys.readouterr().err
        assert said in reported and reported.count("\n") == 1


@pytest.mark.parametrize("method", ["vanilla", "depth_attention"])
def test_generated_tokens_are_those_of_the_model(method):
    """With our timing, by transformers alone, and by argmax of whole forward passes; and its memory is seen."""
    whole = single_config(find_config("3b"))
    config = with_method(single_config(find_config("3b"), ["model.init_std=0.5", *GENERATION]), method)
    strides = [each.model.depth_attention.stride for each in (whole, config)]
    assert strides == [24, None]  # cut in depth: half the layers
    model, prompt = random_model(config, CPU), torch.randint(64, (3, 6), generator=torch.Generator().manual_seed(1))
    tokens, prefill, decode = generate(model, prompt, 5)
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    again = prompt
    for _ in range(5):
        again = torch.cat([again, model(again, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, plain) and torch.equal(tokens, again) and len(set(tokens[:, 6:].flatten().tolist())) > 3
    assert prefill > 0 and decode > 0

    weights, peak = prefill_peak(model, prompt)
    assert weights == sum(p.numel() for p in model.parameters()) * 4 and prefill_peak(model, prompt) == (weights, peak)
    copies = []
    for layer in model.model.layers:  # the control: what a model keeps is seen
        layer.register_forward_hook(lambda _, __, out: copies.append((out if method == "vanilla" else out[0]).clone()))
    more = prefill_peak(model, prompt)[1] - peak
    assert 3 * copies[0].nbytes <= more <= 4 * copies[0].nbytes


PEERS = ("--sequence-length", "16", *TINY[:-1], "model.vocab_size=128", "model.init_std=0.3")


def test_peers(tmp_path, world):
    """Ours beside transformers, the independent side; the mix must show, or agreement would prove little."""
    ops = ("--ops", "lean", "reference")
    figures, page = run(tmp_path, "step", "--peers", *PEERS, *ops, "--rounds", "3", "--warm-up", "0", "--strides", "1")
    assert [*figures] == [
        *("vanilla, in transformers", "stride 1, in transformers", "vanilla", "stride 1, lean", "stride 1, reference")
    ]
    for what, bound in BOUNDS["fp32"].items():
        peer, exported = (of[what] for of in [*figures.values()][:2])
        assert abs(exported / peer - 1) > 100 * bound
    own, base = figures["vanilla"], figures["vanilla, in transformers"]
    times = zip(own["seconds"], base["seconds"], strict=True)
    assert own["ratio"] == pytest.approx(sorted(a / b for a, b in times)[1])
    assert "over vanilla, in transformers" in page
    lean = figures["stride 1, lean"]
    assert [*lean["over"]] == ["stride 1, in transformers", "vanilla", "stride 1, reference"]
    for name, (median, low, high) in lean["over"].items():
        pairs = zip(lean["seconds"], figures[name]["seconds"], strict=True)
        assert median == pytest.approx(sorted(a / b for a, b in pairs)[1]) and low <= median <= high
    assert "agreed before anything was timed" in page


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_peers_of_other_weights_are_reported(dtype, world, tmp_path, monkeypatch, capsys):
    given = benchmark.build_parser("step").parse_args(["step", *PEERS, f"precision.dtype={dtype}"])
    ours = Model(run_config(given, "cpu", {"model.depth_attention.stride": 1}), CPU)
    peer = Peer(ours)
    for _ in range(2):  # the same after a step, too: the clipped gradient, AdamW and its schedule are the same
        found, over = compare("ours", ours, "theirs", peer)
        assert not over and [*found] == ["ours", "theirs"]
        assert ours.update().loss == pytest.approx(peer.update(), rel=BOUNDS[dtype]["loss"])
        assert ours.gradients() != pytest.approx(found["ours"]["loss"], rel=1e-4)
    with torch.no_grad():
        named = ours.chunks[0].named_parameters()
        norm = next(p for name, p in named if name.endswith("decoder.layers.1.self_attention.k_layernorm.weight"))
        norm *= 1.01 if dtype == "fp32" else 3
    _, over = compare("ours", ours, "theirs", peer)
    assert " of ours is " in over[0] and " of theirs with the same weights: they do not" in over[0]


def test_what_does_not_run_has_its_traceback_and_the_others_are_timed(world, tmp_path, monkeypatch, capsys):
    """As of a kernel that does not compile: Triton's errors are neither RuntimeError nor ValueError."""

    class CompilationError(Exception):
        pass

    def broken(*_, **__):
        raise CompilationError("at 3:4")

    held, build = [], Peer.__init__

    def build_alone(peer, ours):
        assert not any(other() for other in held), "what failed before still takes memory"
        build(peer, ours)
        held.append(weakref.ref(peer))

    monkeypatch.setitem(DEPTH_MIX_IMPLEMENTATIONS, "reference", broken)
    monkeypatch.setattr(Peer, "__init__", build_alone)
    monkeypatch.setattr(Peer, "update", broken)  # its optimizer's state, for which there may be no memory
    file, rounds = tmp_path / "x.json", ("--rounds", "2", "--warm-up", "0", "--strides", "1")
    given = ("step", "--peers", *PEERS, "--ops", "reference", "lean", *rounds)
    assert benchmark.main(["--json", str(file), *given]) == 0
    result = json.loads(file.read_text())
    timed = [name for name, of in result["figures"].items() if "seconds" in of]
    assert timed == ["vanilla", "stride 1, lean"] and not result["until"]
    assert [*result["failures"]] == ["stride 1, reference", "vanilla, in transformers", "stride 1, in transformers"]
    assert len(held) == 2 and all(
        "in broken\n" in why and "CompilationError: at 3:4" in why for why in result["failures"].values()
    )
    monkeypatch.setattr("megatron_depthattn.benchmarks.step.Model", broken)
    assert benchmark.main(["--traceback", *given]) == 1
    assert (
        "vanilla did not run, so there is nothing to compare with: CompilationError: at 3:4" in capsys.readouterr().err
    )


def test_peers_need_a_counterpart(world, capsys):
    assert benchmark.main(["step", "--peers", *PEERS, "model.vocab_size=100"]) == 1
    assert "set a multiple of 128" in capsys.readouterr().err
    assert benchmark.main(["step", "--peers", *PEERS, "model.num_layers=9"]) == 1
    assert "--set model.num_layers: the benchmark sets it by other options" in capsys.readouterr().err


HAS_TE = gpu.is_installed("transformer_engine")  # in tests/te/test_inside.py
GPU_PARTS = [p for p in gpu.PARTS if not p.is_tests and p.name != "checkpoint"]


@pytest.mark.parametrize(
    "part", [p for p in GPU_PARTS if HAS_TE or "precision.fp8=" not in str(p.arguments)], ids=lambda part: part.name
)
def test_a_part_of_make_gpu(part, tmp_path, world):
    """Its own command line, at a size of seconds; where TransformerEngine can be imported with its layers and FP8."""
    base, own = tmp_path / part.name, gpu.tiny(part, has_te=HAS_TE)
    exit_code = benchmark.main(["--traceback", "--json", f"{base}.json", *own.arguments])
    outcome = gpu.outcome_of(own, base, exit_code, 1.0)
    assert outcome.state == "ran", outcome.page
    assert len(outcome.figures["rows"]) > 1
    if "--peers" in own.arguments:
        names = ["vanilla, in transformers", "stride 1, in transformers", "vanilla"]
        assert [*outcome.figures["figures"]][:3] == names
    if fp8 := re.search(r"precision.fp8=(\w+)", str(part.arguments)):
        assert f"FP8 {fp8[1]}" in outcome.page and "layers: te" in outcome.page


def test_the_checkpoint_of_make_gpu(tmp_path, world, monkeypatch):
    """Its process of its own is this one; what goes there and back is JSON. Not every machine shows the most memory."""

    def run_world(verb, processes, parallel, work):
        assert (verb, processes, parallel) == ("checkpoint", 1, {"tensor": 1})
        return json.loads(json.dumps(checkpoint.work(CPU, **json.loads(json.dumps(work)))))

    monkeypatch.setattr(checkpoint, "run_world", run_world)
    (part,) = (gpu.tiny(part) for part in gpu.PARTS if part.name == "checkpoint")
    for where in (checkpoint.CLEAR_REFS, Path("/proc/no-such-file")):
        monkeypatch.setattr(checkpoint, "CLEAR_REFS", where)
        assert benchmark.main(["--json", str(tmp_path / "x.json"), *part.arguments, "--runs", "1"]) == 0
        found = json.loads((tmp_path / "x.json").read_text())
        assert [row[1] for row in found["rows"]] == [*checkpoint.WAYS.values()] and float(found["rows"][1][5]) > 0
        assert all(bool(cell) == where.exists() for row in found["rows"] for cell in row[-2:])
        assert ("not measured" in found["notes"][0]) != where.exists()


def test_memory(tmp_path, world):
    figures, _ = run(tmp_path, "memory", *TINY)
    assert [*figures] == [f"stride 1, lean, {mode}" for mode in ("none", "selective", "full")]
    for name, of in figures.items():
        assert of["bytes_per_token_above_vanilla"] == of["predicted"] > 0, name
        assert of["vanilla_bytes_per_token"] > of["predicted"]
        assert of["allocated_above_vanilla"] is None  # no GPU
    chosen = (*TINY, "model.depth_attention.op=reference")
    assert [*run(tmp_path, "memory", *chosen, "--recompute", "none")[0]] == ["stride 1, reference, none"]
    figures, _ = run(tmp_path, "memory", *TINY[:-1], "--documents", "24", "--lengths", "256", "512")
    (whole, own, masked), (longer, twice, square) = ([way["saved"] for way in of.values()] for of in figures.values())
    assert 1.9 < longer / whole < 2.01 and 1.9 < twice / own < 2.01
    assert square - longer > 3 * (masked - whole)


PRECISIONS = (
    "fp32",
    "fp32:train.log_interval=7",  # the same run by another name
    "bf16",
    "fp32:run.seed=7",  # other weights
    "fp32:optimizer.lr=0",
    "fp32:model.init_std=1e38",
    "tensorwise",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensorwise would run here, and fp32 in TransformerEngine")
def test_precision(tmp_path, world):
    """Paired runs, and controls that must be over: other weights, no learning, a loss that is not finite."""
    keys = ("num_layers=2", "hidden_size=32", "num_attention_heads=4", "kv_channels=8", "ffn_hidden_size=64")
    sizes = ("train.micro_batch_size=4", "train.global_batch_size=8", "train.eval_batches=2", "data.sequence_length=16")
    tiny = ("--set", *(f"model.{key}" for key in keys), *sizes)
    json_file = tmp_path / "figures.json"
    verb = ("precision", "--precisions", *PRECISIONS, "--steps", "6", "--seeds", "2")
    assert benchmark.main(["--json", str(json_file), *verb, *tiny]) == 1
    figures = json.loads(json_file.read_text())["figures"]
    runs, found = figures["runs"], figures["over"]
    assert runs["fp32"] == runs["fp32:train.log_interval=7"]
    assert [run["losses"] for run in runs["fp32"]] != [run["losses"] for run in runs["bf16"]]
    assert runs["fp32"][0]["losses"] != runs["fp32"][1]["losses"]
    for run in runs["fp32"] + runs["bf16"]:
        assert run["held_out"] == pytest.approx(run["exported"], rel=1e-3) and run["cosine"]["model"] > 0.99
        assert len(run["losses"]) == 6
    assert sorted(found) == ["fp32:model.init_std=1e38", "fp32:optimizer.lr=0", "fp32:run.seed=7"]
    assert "gradient cosine" in " ".join(found["fp32:run.seed=7"])
    assert found["fp32:optimizer.lr=0"][0].startswith("loss gap")
    assert "not finite" in found["fp32:model.init_std=1e38"][0]
    assert "TransformerEngine" in figures["unsupported"]["tensorwise"]


def test_hop_of_methods(tmp_path):
    """Four layers in four chunks on two ranks, or in two: DenseFormer then sends three hidden states, mHC four."""
    sizes = ("--layers", "4", "--hidden", "64", "--sequence-length", "16", "--microbatches", "2")
    methods = ("vanilla", "depth_attention", "denseformer", "mhc")
    figures, page = run(tmp_path, "hop", "--layouts", "pp2", "--methods", *methods, *sizes)
    assert all(of["sent"] == of["bound"] > 0 and of["messages"] == of["least_messages"] for of in figures.values())
    assert {of["layers"] for of in figures.values()} == {"local"}  # what this machine takes for auto
    ratios = [of["sent"] / of["vanilla_sent"] for of in figures.values()]
    assert ratios == [1, 3, 3, 4]  # one head, so a source of Depth-Attention is two hidden states here
    assert "4 of 4" in page


def test_data(tmp_path):
    sizes = ("--samples", "32", "--sequence-length", "16", "--batch", "4", "--micro-batch", "2", "--steps", "2")
    figures, page = run(tmp_path, "data", *sizes, "--runs", "1", "--workers", "0", "1", "--consumption", "1000")
    speeds = [figures[f"{workers} workers"]["tokens_per_second"][0] for workers in (0, 1)]
    assert min(speeds) > 0
    (row,) = (line for line in page.splitlines() if "| 0 (in the training process) |" in line)
    assert row.endswith(f" {speeds[0] / 1000:.1f} |")


def test_store(tmp_path, monkeypatch):
    """Nothing is waited for where the store is fast; a cache of half the corpus evicts."""
    monkeypatch.setattr("megatron_depthattn.benchmarks.store.SHARD_BYTES", 2000)
    monkeypatch.setattr("megatron_depthattn.data.shard_writer.SHARD_BYTES", 2000)  # put back afterwards
    sizes = ("--sequence-length", "64", "--batch", "4", "--steps", "24", "--step-seconds", "0.002", "--delay", "0")
    figures, page = run(tmp_path, "store", *sizes, "--bandwidths", "100", "--share", "0.5")
    assert len(figures) == 4 and {figure["least"] for figure in figures.values()} == {0.0}
    (row,) = (line for line in page.splitlines() if "| 0.5 of the corpus |" in line)
    assert int(row.split("|")[-2]) > 0


def test_prepare(tmp_path):
    sizes = ("--sequence-length", "128", "--vocab-size", "300", "--max-bytes", "200000", "--runs", "1")
    figures, page = run(tmp_path, "prepare", *sizes)
    assert all(speed > 0 for (speed,) in figures.values()) and [*figures] == ["tokenizer", "concat", "best-fit"]
    assert "concat" in page and " 0.00% |" in page


def test_layouts(tmp_path, monkeypatch):
    """Every layout of the planner's is run in every round, with its keys."""
    from megatron_depthattn.benchmarks import layouts

    ran = []

    def steps(given, keys, run_dir):
        ran.append(keys)
        return [float(len(ran))] * (given.steps - 1)

    monkeypatch.setattr(layouts, "_steps", steps)
    figures, page = run(tmp_path, "layouts", "--world", "2", "--limit", "3", "--rounds", "2", "--steps", "3")
    assert len(figures) == 3 and len(ran) == 6
    assert all(len(of["steps"]) == 4 and of["predicted"] > 0 for of in figures.values())
    assert "recompute" in page
