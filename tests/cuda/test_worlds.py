"""Worlds of rehearsed GPUs: what their steps wait for, that they compute what the CPU does, and that ranks agree.

`BUDGET` is the whole list of what may make the host wait in a step: a new `.item()` anywhere fails, and so does an
entry that no longer happens.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.cuda.messages import Message, differences
from tests.cuda.worker import Fault
from tests.e2e.commands import must_succeed
from tests.e2e.small_run import MODEL
from tests.forked import PRELOADED, REPOSITORY, forked

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: nothing to rehearse"),
    pytest.mark.timeout(900),
]

STEP, DATA, METRICS, SAVE = (f"megatron_depthattn/train/{name}.py" for name in ("step", "data", "metrics", "save"))
EXCHANGE = "tolist", STEP, "return everyone.view(-1, len(mine)).tolist()"
BUDGET = {
    "step": Counter({EXCHANGE: 1}),  # loss, norm and status of all ranks
    "asked": Counter({EXCHANGE: 1}),
    "depth": Counter({("copy pageable from device", METRICS, "totals, self._recorder = totals.cpu(), None"): 1}),
    "eval": Counter({EXCHANGE: 2}),  # may all continue, and one batch's loss
    "save": Counter({("torch.cuda.synchronize", SAVE, "torch.cuda.synchronize()"): 1}),
}
"""How often the host waits for what a step does: by kind, file and source line. Of a save the package's own lines."""
COPIES = {("pinned to device", STEP), ("pinned to device", DATA)}
"""A step's other copies, none of which is waited for."""

Line = tuple[str, str, str]

COMMON = {
    "model": MODEL | {"fused_swiglu": False, "fused_cross_entropy": False, "spec": "local"},
    "data": {"sequence_length": 32, "num_workers": 0},
    "train": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 1, "log_interval": 1}
    | {"eval_interval": 100, "eval_batches": 1, "depth_interval": 100},
    "optimizer": {"lr": 5.0e-3},
    "checkpoint": {"interval": 2},
    "preflight": {"timeout": 240, "on_problem": "warn"},
}
LEAN = ("model.depth_attention.op=lean",)
EIGHT = (
    *LEAN,
    *("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    *("precision.dtype=bf16", "recompute.granularity=full", "recompute.method=uniform", "recompute.num_layers=1"),
    *("parallel.overlap_grad_reduce=true", "checkpoint.async_save=true", "checkpoint.interval=3", "train.steps=5"),
    "optimizer.lr=2e-4",  # at a high one Adam's first steps make much of what sums in another order round elsewhere
)
OFFLOADED = (*LEAN, "engine.name=deepspeed", "engine.offload_optimizer=true")
RUNS = {
    "one": {
        "depth_attention": LEAN,
        "reference": ("model.depth_attention.op=reference", "recompute.granularity=selective"),
        "loops": (*LEAN, "model.num_loops=2", "model.num_layers=2", "model.tie_embeddings=true"),
        "vanilla": ("model.method=vanilla",),
        "denseformer": ("model.method=denseformer",),
        "attnres": ("model.method=attnres", "model.attnres.block_size=2"),
        "mhc": ("model.method=mhc", "precision.dtype=bf16"),
    },
    "two": {
        "cp2": (*LEAN, "parallel.context=2"),
        "zero2_dp2": (*OFFLOADED, "engine.zero_stage=2"),
        "zero2_tp2": (*OFFLOADED, "engine.zero_stage=2", "parallel.tensor=2", "parallel.sequence=true"),
    },
    "eight": {"first": (*EIGHT, "train.stop_after=3"), "resumed": (*EIGHT, "checkpoint.load=latest")},
}
RUNS["one"] = {run: (*overrides, "train.global_batch_size=2") for run, overrides in RUNS["one"].items()}
RANKS = {"one": 0, "two": 2, "eight": 8}
WAITS = [
    Fault(
        "megatron_depthattn.model.attention:DepthSelfAttention.get_query_key_value_tensors",
        'return query, own["mixed_key"], own["value"]',
        'return query, own["mixed_key"], own["value"] + 0 * key.sum().item()',
    ),
    Fault(
        "megatron_depthattn.parallel.schedule:run_schedule",
        "return reported  #",
        "return [reported, reported[0].total.item()][0]  #",
    ),
    Fault(
        "megatron_depthattn.train.step:clip",
        "factor = clip_factor(grad_norm, largest)",
        "factor = clip_factor(grad_norm, largest) + 0 * gradients[0].sum().item()",
    ),
]
"""In a layer, in the schedule, in the optimizer's step."""
SAME_DEVICE = Fault(
    "megatron_depthattn.parallel.groups:initialize_distributed",
    'torch.device("cuda", environment.local_rank)',
    'torch.device("cuda", 0)',
)
OTHER_TYPE = Fault(
    "megatron_depthattn.train.build:finalize_gradients",
    "dist.all_reduce(num_tokens, group",
    "dist.all_reduce(num_tokens := num_tokens.float(), group",
    rank=1,
)
MESSAGE_ON_HOST = Fault(
    "megatron_depthattn.model.cross_layer:CrossLayerLayer._pack",
    "return self.message_out.pack(parts)",
    "return self.message_out.pack(parts).cpu()",
)
READ_TOO_EARLY = Fault(
    "megatron_depthattn.train.deepspeed_engine.engine:DeepSpeedEngine.attempt",
    'self._device.type == "cuda"',
    "False",
)
Runs = dict[str, tuple[tuple[str, ...], tuple[Fault, ...]]]

WORLDS: dict[str, Runs] = {
    **{name: {run: (overrides, ()) for run, overrides in runs.items()} for name, runs in RUNS.items()},
    "two on the CPU": {"first": (LEAN, ())},
    "eight on the CPU": {"first": (EIGHT, ())},  # in one go
    "waits": {"waits": ((*LEAN, "optimizer.grad_clip=0.1"), tuple(WAITS))},
    "differ": {"differ": (LEAN, (SAME_DEVICE, OTHER_TYPE))},
    "message on the host": {"pp2": ((*LEAN, "parallel.pipeline=2"), (MESSAGE_ON_HOST,))},
    "read too early": {"dp2": ((*OFFLOADED, "engine.zero_stage=2"), (READ_TOO_EARLY,))},
}


class Ran(NamedTuple):
    """A world that has ended."""

    folder: Path
    ranks: list[dict[str, Any]]
    """What each rank left; nothing if one failed."""
    output: str

    def metrics(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(text) for text in (self.folder / run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ran]:
    """Runs an entry of `WORLDS`, once."""
    folder = tmp_path_factory.mktemp("worlds")
    prepare = ("prepare", "--input", REPOSITORY / "megatron_depthattn" / "train", "--output", folder / "corpus")
    prepare += ("--tokenizer", "train-bpe:384", "--sequence-length", "32", "--validation-fraction", "0.2")
    must_succeed(forked(0, "megatron_depthattn.cli", *prepare))
    config = folder / "run.yaml"
    config.write_text(json.dumps(COMMON | {"data": COMMON["data"] | {"path": str(folder / "corpus")}}))

    @functools.cache
    def start(name: str, ranks: int) -> Ran:
        own, is_rehearsed = tmp_path_factory.mktemp(name.replace(" ", "_")), "CPU" not in name
        asked = [
            (run, [str(config), f"run.dir={own / ('first' if run == 'resumed' else run)}", *overrides], faults)
            for run, (overrides, faults) in WORLDS[name].items()
        ]
        records: list[dict[str, Any]] = [{"runs": {}} for _ in range(max(1, ranks))]
        # A world that was left cannot be joined again; a process alone can train again.
        for world in [[one] for one in asked] if ranks else [asked]:
            options = {"preloaded": ("tests.cuda.eight_gpus", *PRELOADED)} if is_rehearsed else {}
            result = forked(ranks, "tests.cuda.worker", own, json.dumps(world), **options)
            output = f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
            if result.returncode:
                return Ran(own, [], output)
            for rank, record in enumerate(records if is_rehearsed else []):
                left = json.loads((own / f"{rank}.json").read_text())
                record |= {"device": left["device"], "runs": record["runs"] | left["runs"]}
        return Ran(own, records, output)

    return start


def line(kind: str, where: str) -> Line:
    """With the line's own text, which stays when others are written above it."""
    path, number = where.split(":")
    file = REPOSITORY / path
    text = file.read_text().splitlines()[int(number) - 1].split("  #")[0].strip() if file.exists() else number
    return kind, path, text


def beyond_budget(steps: list[Any]) -> tuple[set[Line], set[Line]]:
    """What steps waited for more often than they may, and what they may wait for and did not."""
    more: Counter[Line] = Counter()
    less: Counter[Line] = Counter()
    for _, did, syncs, _ in steps:
        found = Counter({line(kind, where): number for kind, where, number in syncs})
        if did == ["save"]:  # the rest is Megatron's
            found = Counter({key: number for key, number in found.items() if key[1].startswith("megatron_depthattn/")})
        budget = sum((BUDGET[what] for what in did), Counter() if did == ["save"] else BUDGET["step"])
        more, less = more | (found - budget), less | (budget - found)
    return {*more}, {*less}


@pytest.mark.parametrize("name", RANKS)
def test_a_step_waits_for_the_device_once(ran: Callable[..., Ran], name: str) -> None:
    done = ran(name, RANKS[name])
    assert done.ranks, done.output
    steps = [step for one in done.ranks for run, of in one["runs"].items() if "zero" not in run for step in of["steps"]]
    assert beyond_budget(steps) == (set(), set())
    assert {what for _, did, *_ in steps for what in did or ["step"]} == {*BUDGET}
    plain = [copies for _, did, _, copies in steps if not {"depth", "save"} & {*did}]
    assert {(kind, where.split(":")[0]) for copies in plain for kind, where, _ in copies} == COPIES


def test_control_three_more_waits(ran: Callable[..., Ran]) -> None:
    done = ran("waits", 0)
    assert done.ranks, done.output
    more, less = beyond_budget(done.ranks[0]["runs"]["waits"]["steps"])
    expected = set()
    for fault in WAITS:
        path = fault.function.partition(":")[0].replace(".", "/") + ".py"
        (text,) = (text for text in (REPOSITORY / path).read_text().splitlines() if fault.old in text)
        expected.add(("item", path, text.split("  #")[0].strip()))
    assert more == expected and not less


@pytest.mark.parametrize(
    ("name", "run"), [(name, run) for name in ("two", "eight") for run in RUNS[name] if run != "resumed"]
)
def test_losses_are_the_cpus(ran: Callable[..., Ran], name: str, run: str) -> None:
    """Those of one process, or of as many in bf16; that a run was stopped and resumed changes nothing either."""
    rehearsed, on_cpu = ran(name, RANKS[name]), ran(f"{name} on the CPU", RANKS[name] if name == "eight" else 0)
    assert rehearsed.ranks, rehearsed.output
    found, expected = rehearsed.metrics(run), on_cpu.metrics("first")
    bound = 1e-3 if name == "eight" else 1e-5
    assert len(found) == len(expected) >= 3
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in found] == pytest.approx([step[key] for step in expected], rel=bound)
    assert found[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], rel=bound)


@pytest.mark.parametrize("name", ["two", "eight"])
def test_all_ranks_of_a_group_ask_for_the_same(ran: Callable[..., Ran], name: str) -> None:
    done = ran(name, RANKS[name])
    assert [rank["device"] for rank in done.ranks] == [*range(RANKS[name])], done.output
    for run in RUNS[name]:
        messages = [Message(*message) for rank in done.ranks for message in rank["runs"][run]["messages"]]
        assert len(messages) > 100 and not differences(messages)
        assert not any(rank["runs"][run]["objections"] for rank in done.ranks)


def test_control_ranks_that_differ(ran: Callable[..., Ran]) -> None:
    """gloo lets both pass: two ranks on one GPU, and a sum over an integer here and a real number there."""
    done = ran("differ", 2)
    assert [rank["device"] for rank in done.ranks] == [0, 0], done.output
    (found,) = differences(Message(*message) for rank in done.ranks for message in rank["runs"]["differ"]["messages"])
    assert "rank 0: allreduce_ -1 int32[]" in found and "rank 1: allreduce_ -1 float32[]" in found
    assert "megatron_depthattn/train/build.py" in found


@pytest.mark.parametrize(
    ("name", "objection"),
    [
        ("message on the host", "No backend type associated with device type cpu"),
        ("read too early", "host memory is read, and nobody has waited for the copy"),
    ],
)
def test_control_faults_that_stop_a_world(ran: Callable[..., Ran], name: str, objection: str) -> None:
    done = ran(name, 2)
    assert not done.ranks and objection in done.output, done.output
