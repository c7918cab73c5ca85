"""Worlds of rehearsed GPUs: what their steps wait for, that they compute what the CPU does, and that ranks agree."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.cuda.budget import BUDGET, COPIES, beyond_budget, other_copies
from tests.cuda.messages import Message, differences
from tests.cuda.planted import Planted
from tests.e2e.small_run import MODEL
from tests.forked import PRELOADED, forked

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: nothing to rehearse"),
    pytest.mark.timeout(900),
]

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
SAME_DEVICE = Planted(
    "megatron_depthattn.parallel.groups:initialize_distributed",
    'torch.device("cuda", environment.local_rank)',
    'torch.device("cuda", 0)',
)
OTHER_TYPE = Planted(
    "megatron_depthattn.train.build:finalize_gradients",
    "dist.all_reduce(num_tokens, group",
    "dist.all_reduce(num_tokens := num_tokens.float(), group",
    rank=1,
)
MESSAGE_ON_HOST = Planted(
    "megatron_depthattn.model.cross_layer:CrossLayerLayer._pack",
    "return self.message_out.pack(parts)",
    "return self.message_out.pack(parts).cpu()",
)
READ_TOO_EARLY = Planted(
    "megatron_depthattn.train.deepspeed_engine.engine:DeepSpeedEngine.attempt", 'self._device.type == "cuda"', "False"
)


class World(NamedTuple):
    """One training command in so many ranks; 0: without a launcher."""

    ranks: int
    overrides: tuple[str, ...]
    faults: tuple[Planted, ...] = ()


WORLDS = {
    "cp2": World(2, (*LEAN, "parallel.context=2")),
    "zero2_dp2": World(2, (*OFFLOADED, "engine.zero_stage=2")),
    "zero2_tp2": World(2, (*OFFLOADED, "engine.zero_stage=2", "parallel.tensor=2", "parallel.sequence=true")),
    "eight": World(8, (*EIGHT, "train.stop_after=3")),
    "eight, resumed": World(8, (*EIGHT, "checkpoint.load=latest")),
    "one on the CPU": World(0, LEAN),
    "eight on the CPU": World(8, EIGHT),  # in one go
    "differ": World(2, LEAN, (SAME_DEVICE, OTHER_TYPE)),
    "message on the host": World(2, (*LEAN, "parallel.pipeline=2"), (MESSAGE_ON_HOST,)),
    "read too early": World(2, (*OFFLOADED, "engine.zero_stage=2"), (READ_TOO_EARLY,)),
}
SOUND = ("cp2", "zero2_dp2", "zero2_tp2", "eight")


class Ran(NamedTuple):
    """A world that has ended."""

    folder: Path
    """Of the run."""
    ranks: list[dict[str, Any]]
    """What each rank left; nothing if one failed."""
    output: str

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in (self.folder / "metrics.jsonl").read_text().splitlines()]


Start = Callable[[str], Ran]


@pytest.fixture(scope="module")
def ran(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Runs an entry of `WORLDS`, once."""
    folder = tmp_path_factory.mktemp("worlds")
    config = folder / "run.yaml"
    config.write_text(json.dumps(COMMON | {"data": COMMON["data"] | {"path": str(corpus)}}))

    @functools.cache
    def start(name: str) -> Ran:
        world, own, left = WORLDS[name], folder / name.split(",")[0], tmp_path_factory.mktemp("ranks")
        command = ("tests.cuda.worker", left, json.dumps(world.faults), config, f"run.dir={own}", *world.overrides)
        options = {} if "CPU" in name else {"preloaded": ("tests.cuda.eight_gpus", *PRELOADED)}
        result = forked(world.ranks, *command, **options)
        files = [] if result.returncode else sorted(left.iterdir())
        output = f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        return Ran(own, [json.loads(file.read_text()) for file in files], output)

    return start


def parts(ran: Start, name: str) -> list[Ran]:
    """A run and what continues it."""
    done = [ran(each) for each in WORLDS if each.split(",")[0] == name]
    assert all(one.ranks for one in done), done[-1].output
    return done


@pytest.mark.parametrize("name", ["cp2", "eight"])
def test_a_step_waits_for_the_device_once(ran: Start, name: str) -> None:
    steps = [step for part in parts(ran, name) for rank in part.ranks for step in rank["steps"]]
    assert beyond_budget(steps) == (set(), set())
    assert {what for _, did, *_ in steps for what in did or ["step"]} == {*BUDGET}
    assert other_copies(steps) == COPIES


@pytest.mark.parametrize("name", SOUND)
def test_losses_are_the_cpus(ran: Start, name: str) -> None:
    """Those of one process, or of as many in bf16; that a run was stopped and resumed changes nothing either."""
    found = parts(ran, name)[-1].metrics()
    expected, bound = (
        (ran("eight on the CPU").metrics(), 1e-3) if name == "eight" else (ran("one on the CPU").metrics(), 1e-5)
    )
    assert len(found) == len(expected) >= 3
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in found] == pytest.approx([step[key] for step in expected], rel=bound)
    assert found[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], rel=bound)


@pytest.mark.parametrize("name", SOUND)
def test_all_ranks_of_a_group_ask_for_the_same(ran: Start, name: str) -> None:
    for part in parts(ran, name):
        assert [rank["device"] for rank in part.ranks] == [*range(WORLDS[name].ranks)]
        messages = [Message(*message) for rank in part.ranks for message in rank["messages"]]
        assert len(messages) > 100 and not differences(messages)
        assert not any(rank["objections"] for rank in part.ranks)


def test_control_ranks_that_differ(ran: Start) -> None:
    """gloo lets both pass: two ranks on one GPU, and a sum over an integer here and a real number there."""
    (done,) = parts(ran, "differ")
    assert [rank["device"] for rank in done.ranks] == [0, 0]
    (found,) = differences(Message(*message) for rank in done.ranks for message in rank["messages"])
    assert "rank 0: allreduce_ -1 int32[]" in found and "rank 1: allreduce_ -1 float32[]" in found
    assert "megatron_depthattn/train/build.py" in found


@pytest.mark.parametrize(
    ("name", "objection"),
    [
        ("message on the host", "No backend type associated with device type cpu"),
        ("read too early", "host memory is read, and nobody has waited for the copy"),
    ],
)
def test_control_faults_that_stop_a_world(ran: Start, name: str, objection: str) -> None:
    done = ran(name)
    assert not done.ranks and objection in done.output, done.output
