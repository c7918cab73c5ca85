"""The follower of a run, in one process: what it warns of."""

import shutil
import threading
from pathlib import Path

from megatron_depthattn.config import load_config, save_config
from megatron_depthattn.follow import Figures, Follower, Measure
from megatron_depthattn.hf.loading import load_causal_lm
from megatron_depthattn.train.line_files import append_durably, read_records
from megatron_depthattn.train.step_folders import digest_files, step_folder, write_manifest
from tests.checkpoints import model_section, random_weights, write_checkpoint


def test_what_is_lost_is_one_warning(tmp_path: Path, capsys):
    """The run began at step 100, so nothing before is lost; 110 is gone at the first look, 130 while 120 is scored.
    A file lies where Weights & Biases is to write."""
    run_dir = tmp_path / "run"
    settings = [f"run.dir={run_dir}", "checkpoint.interval=10", "log.wandb.project=one", "log.wandb.mode=offline"]
    save_config(load_config("configs/quickstart.yaml", settings), run_dir / "config.yaml")
    (run_dir / "wandb").touch()
    append_durably(run_dir / "history.jsonl", {"event": "start", "step": 100, "run_id": "one"})
    for step in (120, 130, 140):
        folder = step_folder(run_dir / "checkpoints", step)
        write_checkpoint(folder, model_section(), random_weights(model_section()))
        write_manifest(folder, digest_files(folder, [path.name for path in folder.iterdir()]))

    def score(*_) -> Figures:
        shutil.rmtree(step_folder(run_dir / "checkpoints", 130), ignore_errors=True)
        return Figures({"loss": 1.0}, 1, {})

    no_more = threading.Event()
    no_more.set()
    Follower(run_dir, [Measure(what={"task": "one"}, name="one", score=score)], load_causal_lm).run(no_more)
    assert [record["step"] for record in read_records(run_dir / "evaluations.jsonl")] == [120, 140]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    lost, curves, lost_meanwhile = warnings
    assert "no checkpoint is left of step 110: set checkpoint.keep (2) larger" in lost
    assert "step 120 is on record, but not in the curves: Weights & Biases: exit code 1, File" in curves
    assert "no checkpoint is left of step 130: set" in lost_meanwhile
