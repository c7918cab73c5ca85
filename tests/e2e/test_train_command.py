"""``python -m megatron_depthattn.train`` as a user runs it: record, resume, other layouts, errors."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.commands import must_succeed
from tests.e2e.small_run import train

METRICS = {
    *("step", "loss", "grad_norm", "lr", "tokens", "samples", "step_seconds", "data_seconds", "tokens_per_second"),
    *("tflops_per_device", "mfu", "memory_gb", "eval_loss", "data_seconds_min", "data_slowest_rank"),
    *("checkpoint_seconds", "skipped_steps", "predicted_tokens", "stream_samples", "depth", "held_out"),
}
OWN_LINE = re.compile(
    r"$|  |(preflight|model|model\.[a-z_.]+|depth attention|layout|hop [\d >-]+|schedule|batch ramp|start|stream \d+|"
    r"stage \d+|engine|step|saved|trained|held-out|held-out [\w ]+|goodput|record|what to try next|vocabulary|"
    r"switches|data|documents|parallel)[ :=,]"
)
"""The forms of line that a run prints."""
OP = "model.depth_attention.op=reference"
SAME_EVERYWHERE = ("step", "loss", "grad_norm", "lr", "tokens", "samples", "eval_loss")


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def trajectory(run_dir: Path) -> list[tuple]:
    return [tuple(record[name] for name in SAME_EVERYWHERE) for record in records(run_dir)]


@pytest.fixture(scope="module")
def undisturbed(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    must_succeed(train(config_file, f"run.dir={run_dir}"))
    return run_dir


def test_run_directory(undisturbed: Path):
    steps = records(undisturbed)
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert all(set(record) == METRICS for record in steps)
    assert all(record["mfu"] is None for record in steps), "there is no MFU on CPU"
    assert [record["step"] for record in steps if record["eval_loss"] is not None] == [6, 12]
    assert steps[-1]["samples"] == 96
    assert steps[-1]["tokens"] == 96 * 32
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2
    assert steps[0]["lr"] > 0, "the first step is not wasted at learning rate 0"
    assert steps[-1]["lr"] == pytest.approx(5e-4, rel=1e-6), "the last step is at min_lr_ratio"
    saved = yaml.safe_load((undisturbed / "config.yaml").read_text())
    assert saved["model"]["depth_attention"]["recent_window"] == 1
    assert (saved["model"]["spec"], saved["model"]["depth_attention"]["op"]) == ("local", "lean"), "what auto became"
    assert (undisturbed / "checkpoints/latest").read_text().strip() == "step_00000012"
    assert [record["step"] for record in steps if record["depth"] is not None] == [1, 12]
    depth = steps[-1]["depth"]
    assert (depth["tokens"], [*depth["layers"]]) == (2 * 32, ["1", "2", "3"])
    assert all(sum(entry["weights"]) == pytest.approx(1, abs=1e-5) for entry in depth["layers"].values())
    events = EventAccumulator(str(undisturbed / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    curve = [(event.step, event.value) for event in events.Scalars("depth/layer_003/source_002")]
    assert curve == [(step, pytest.approx(steps[step - 1]["depth"]["layers"]["3"]["weights"][1])) for step in (1, 12)]
    log = (undisturbed / "log.txt").read_text()
    assert "model.spec=local (auto: no GPU)" in log
    assert "depth attention: stride 2" in log
    assert "held-out loss in nats per token:" in log
    assert "step 12/12" in log


def test_resumed_run_obeys_its_own_config(config_file: Path, tmp_path: Path):
    """More steps, another lr, schedule and op than the run that saved: the closing lines advise the first."""
    command = (config_file, f"run.dir={tmp_path}", "checkpoint.load=latest")
    must_succeed(train(*command, "train.stop_after=4"))
    schedule = ("optimizer.schedule=wsd", "optimizer.decay_ratio=0.875", "optimizer.decay_style=exponential")
    must_succeed(train(*command, "train.steps=24", "train.stop_after=2", "optimizer.lr=1e-3", *schedule, OP))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["depth_attention"]["op"] == "reference"
    resumed = records(tmp_path)[-1]
    assert resumed["step"] == 6
    # No warm-up step at 2 % of 24; constant to step 3, and from there down to 1e-4 over 21 steps.
    assert resumed["lr"] == pytest.approx(1e-4 + 9e-4 * (2 * 0.5 ** (3 / 21) - 1), rel=1e-12)
    line = "schedule: wsd, lr 0.001 after 0 of 24 steps, exponential decay over the last 21 to 0.0001"
    assert line in (tmp_path / "log.txt").read_text()


# tests/parallel resumes under many more; this is the command's way there.
def test_resume_under_another_layout_while_the_batch_size_rises(config_file: Path, corpus: Path, tmp_path: Path):
    """Two processes continue what one process began; the record is that of one process, the console only the run's.

    At the end they are evaluated on splits by name alone: the loss of the one that is the first process's val split is
    that one's. The ramp: 3 steps of 4 samples, 2 of 8, then 12.
    """
    ramp = ("train.batch_ramp=[4,4,24]", "train.global_batch_size=12")
    ramp += ("optimizer.schedule=wsd", "optimizer.warmup_ratio=0.25", "optimizer.decay_ratio=0.5", "optimizer.lr=1e-3")
    undisturbed = tmp_path / "undisturbed"
    must_succeed(train(config_file, f"run.dir={undisturbed}", *ramp))
    command = (config_file, f"run.dir={tmp_path / 'run'}", *ramp, "checkpoint.load=latest")
    must_succeed(train(*command, "train.stop_after=2"))
    must_succeed(train(*command, "train.stop_after=2"))
    begun = [record[:-1] for record in trajectory(tmp_path / "run")]  # without held-out losses: a stop brings one
    assert begun == [record[:-1] for record in trajectory(undisturbed)[:4]], "resumed in the ramp, to the bit"
    failed = train(*command, "train.batch_ramp=null")
    assert failed.returncode == 1 and "train.batch_ramp (was [4, 4, 24], is None)" in failed.stderr
    must_succeed(train(*command, "train.stop_after=2", ranks=2))
    bare = tmp_path / "bare"  # a corpus without a val split
    bare.mkdir()
    shutil.copy(corpus / "manifest.json", bare)
    (bare / "train").symlink_to(corpus / "train")
    splits = (f"data.path={bare}", f"data.held_out={{code: {corpus}, seen: {bare}}}")
    result = must_succeed(train(*command, *splits, "parallel.pipeline=2", "parallel.virtual_pipeline=2", ranks=2))
    assert "hop 0 -> 1:" in result.stdout
    log = (undisturbed / "log.txt").read_text()
    assert "lr 0.001 after 28 of 112 samples, minus_sqrt decay over the last 56 to 0.0001 (with train.batch_ramp" in log
    assert "batch ramp: 4 sequences a step, 4 more at a time over 24 samples, 12 from step 6 on" in log
    consumed = [4, 8, 12, 20, 28, *range(40, 113, 12)]
    for run_dir in (undisturbed, tmp_path / "run"):
        steps = records(run_dir)
        assert [step["samples"] for step in steps] == consumed
        assert [step["tokens"] for step in steps] == [32 * samples for samples in consumed]
        for step, samples in zip(steps, consumed, strict=True):
            x = max(0, samples - 56) / 56
            falling = 1e-4 + 9e-4 * (1 - x**0.5)
            assert step["lr"] == pytest.approx(min(1e-3 * samples / 28, falling), rel=1e-12)
    foreign = [line for line in result.stdout.splitlines() + result.stderr.splitlines() if not OWN_LINE.match(line)]
    assert not foreign
    for ours, theirs in zip(records(tmp_path / "run"), records(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        if theirs["eval_loss"] is None:
            assert ours["held_out"] is None
        elif ours["held_out"] is None:
            assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
        else:
            assert ours["eval_loss"] is None and [*ours["held_out"]] == ["code", "seen"]
            assert ours["held_out"]["code"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
            assert ours["held_out"]["seen"] != ours["held_out"]["code"], "of other text"
    assert f"held-out code: {corpus}/val" in result.stdout and f"held-out seen: {bare}/train" in result.stdout
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("eval_loss/seen")]
    seen = {line["step"]: line["held_out"]["seen"] for line in records(tmp_path / "run") if line["held_out"]}
    assert curve == [(step, pytest.approx(loss)) for step, loss in seen.items()]


def test_tied_embeddings_over_two_stages(config_file: Path, tmp_path: Path):
    """Both ends of the pipeline hold the embedding: same initial weights, and gradients summed over the two copies."""
    command = (config_file, "model.tie_embeddings=true", "train.stop_after=6")
    must_succeed(train(*command, f"run.dir={tmp_path / 'one'}"))
    must_succeed(train(*command, f"run.dir={tmp_path / 'two'}", "parallel.pipeline=2", ranks=2))
    for ours, theirs in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


REFUSED = [
    (["model.num_layer=3"], "model.num_layers"),
    (["parallel.pipeline=2"], "start 2 ranks"),
    (["data.path=nowhere"], "nowhere"),
    (["data.sequence_length=16"], "sequence_length"),
    (["data.held_out={code: nowhere}"], "nowhere/train has no index.json"),
    (["model.vocab_size=256"], "model.vocab_size=384"),
    (["checkpoint.load=nowhere/step_00000001"], "holds no complete checkpoint"),
    (["precision.fp8=delayed", "precision.dtype=bf16"], "auto cannot take them here: no GPU; change that, or set"),
    (["model.spec=te"], "TransformerEngine, which cannot be imported here"),
]
# The weights would load; the function would be another one.
ANOTHER_MODEL = ["checkpoint.load=latest", "model.depth_attention.stride=1", "train.steps=24"]
REFUSED_HERE = [  # in the folder of a finished run
    (ANOTHER_MODEL, "model.depth_attention.stride (was 2, is 1)"),
    ([], "checkpoint.load=latest"),
]


def test_refusals_are_one_line_and_change_nothing(undisturbed: Path, config_file: Path, tmp_path: Path):
    before = trajectory(undisturbed)
    commands = [[config_file, f"run.dir={tmp_path / 'run'}", *settings] for settings, _ in REFUSED]
    commands += [[config_file, f"run.dir={undisturbed}", *settings] for settings, _ in REFUSED_HERE]
    results = [train(*command) for command in commands]
    for (settings, message), result in zip([*REFUSED, *REFUSED_HERE], results, strict=True):
        assert result.returncode == 1, settings
        errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
        assert len(errors) == 1, result.stderr
        assert message in errors[0], settings
        assert "Traceback" not in result.stderr
    assert trajectory(undisturbed) == before


def test_a_mistake_in_the_config_is_said_once(config_file: Path):
    """By rank 0: all ranks read the same config."""
    result = train(config_file, "run.dir=none", "model.num_layer=3", ranks=2)
    assert result.returncode == 1
    assert sum(line.startswith("error") for line in result.stderr.splitlines()) == 1, result.stderr
