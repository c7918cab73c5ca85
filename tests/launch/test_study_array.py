"""A scale study as Slurm arrays: trunks train as tasks, then the points; the next `run` finds them finished."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.launch.jobs import FULL, run
from tests.launch.test_slurm import must_end

pytestmark = [pytest.mark.usefixtures("slurm"), pytest.mark.timeout(1200)]


def study_of(config: Path, folder: Path) -> Path:
    """Two points on the small corpus, each on a trunk: one rung, two methods, one seed."""
    study = {
        "title": "array",
        "config": str(config),
        "ladder": {"layers": [2], "hidden_per_layer": 16, "head_size": 16, "ffn_multiple": 16, "reference_batch": 30},
        "settings": {"model.depth_attention.stride": None},
        "methods": {"vanilla": {}, "depth_attention": {}},
        "seeds": [1],
        "tokens_per_parameter": [0.1],
        "schedule": "wsd",
        "eval_sequences": 8,
        "timing_rounds": 0,
    }
    file = folder / "array.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return file


@FULL
def test_the_unfinished_points_of_a_study_are_an_array(config: Path, tmp_path: Path):
    study, output = study_of(config, tmp_path), tmp_path / "out"
    command = (".venv/bin/python", "tools/scale_study.py", "run", study, "--output", output)
    first = run(*command, "--only", "vanilla", seconds=240)
    assert first.returncode == 0, first.stderr
    sent = run(*command, "--slurm", "--nodes", "1", "--processes-per-node", "1", "--time", "10", seconds=240)
    assert sent.returncode == 0, sent.stderr
    tasks = [(output / f"jobs/{number}.tasks").read_text().split() for number in (1, 2)]
    assert [[Path(task).relative_to(output).as_posix() for task in array] for array in tasks] == [
        [f"configs/d2/depth_attention/{name}/seed1.yaml"] for name in ("trunk", "x0.1")
    ]
    for number, job in enumerate(re.findall(r"^submitted (\d+)", sent.stdout, re.MULTILINE), 1):
        assert must_end(job, next(iter((output / f"jobs/{number}/job").glob("slurm-*.out")), study)) == ["COMPLETED"]
    again = run(*command, "--no-timing", seconds=120)
    assert again.returncode == 0 and again.stdout.count("finished already") == 4, again.stdout
    results = json.loads((output / "results.json").read_text())
    assert [result["finished"] for result in results["results"]] == [True, True]
    assert results["timing"]["d2"]["depth_attention"]["ratio"] > 0, "from the runs' own steps"
