"""The lines that a run closes with: they fit the run."""

from megatron_depthattn.config import load_config
from megatron_depthattn.train.metrics import Meter, next_lines
from megatron_depthattn.train.step import StepResult
from megatron_depthattn.train.step_folders import Progress

GOODPUT = {"goodput": 1.0, "useful_seconds": 1.0, "wall_seconds": 1.0, "starts": 1}


def hints(*settings: str) -> str:
    config = load_config("configs/quickstart.yaml", ["run.dir=runs/own", "parallel.pipeline=1", *settings])
    return "\n".join(next_lines(config))


def test_hints_fit_the_method():
    assert "model.method=vanilla" in hints() and "stride=1" in hints()
    vanilla = hints("model.method=vanilla")
    assert "model.method=vanilla" not in vanilla and "model.method=depth_attention" in vanilla
    assert "stride" not in vanilla
    assert "model.depth_attention.enabled=true" in hints("model.depth_attention.enabled=false")


def test_hints_name_the_run_s_own_folders():
    text = hints("checkpoint.dir=elsewhere/steps")
    assert "--checkpoint elsewhere/steps --output runs/own/hf" in text
    assert "depthattn compare runs/own " in text and "--logdir runs/own" in text


def test_one_held_out_loss_is_said_once():
    meter = Meter(load_config("configs/quickstart.yaml", []), 1)
    meter.record(Progress(step=1), StepResult(7.0, 1.0, statuses=[(0, 0, 0, 1)]), samples=16, lr=0.1, seconds=1.0)
    meter.add_held_out(0, {"": 7.6534, "code": 5.0})
    lines = meter.closing_lines(Progress(step=1), {"outcome": "stop_after", "goodput": GOODPUT})
    assert "held-out loss in nats per token: 7.6534 at step 0" in lines
    assert lines[0].startswith("trained 1 step to step 1:") and " on 1 rank in " in lines[0]
    meter.add_held_out(1, {"": 7.0})
    lines = meter.closing_lines(Progress(step=1), {"outcome": "stop_after", "goodput": GOODPUT})
    assert "held-out loss in nats per token: 7.6534 at step 0, 7.0000 at step 1 (down 0.65)" in lines
    assert "held-out loss of code in nats per token: 5.0000 at step 0" in lines
