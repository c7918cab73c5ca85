"""The command: every verb's help, shipped configs by name, listing of keys, comparison of runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_depthattn.cli import VERBS, common, compare, main, train

ROOT = Path(__file__).parents[2]
HELP = """
import sys
from megatron_depthattn.cli import VERBS, main
for verb in VERBS:
    try:
        main([verb, "--help"])
    except SystemExit as end:
        assert not end.code, verb
    heavy = {"torch", "numpy", "transformers", "streaming", "matplotlib", "megatron"} & sys.modules.keys()
    assert not heavy, (verb, heavy)
"""


def test_help_of_every_verb_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [verb for verb in VERBS if f"usage: depthattn {verb} " not in done.stdout] == []


def test_without_a_verb(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)
    assert main(["trian"]) == 2 and "'trian' is none of train, " in capsys.readouterr().err


def test_tools_are_the_verbs_under_their_old_names():
    shown = subprocess.run(
        [sys.executable, "tools/generate.py", "--help"],
        cwd=ROOT,
        env={"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert shown.stdout.startswith("usage: generate.py ") and "--show-depth" in shown.stdout


def test_a_shipped_config_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert common.find_config("quickstart") == str(ROOT / "configs/quickstart.yaml")
    assert common.find_config("methods/vanilla") == str(ROOT / "configs/methods/vanilla.yaml")
    assert common.find_config("configs/3b.yaml") == str(ROOT / "configs/3b.yaml")
    assert common.find_config("train.steps=3") == "train.steps=3"
    Path("quickstart").write_text("")  # what lies here comes first
    assert common.find_config("quickstart") == "quickstart"


def test_what_train_starts(capsys):
    given = train.parse("train", None, ["quickstart", "train.steps=3"])
    alone = train.command("megatron_depthattn.train", given)
    assert alone[1:] == ["-m", "megatron_depthattn.train", str(ROOT / "configs/quickstart.yaml"), "train.steps=3"]
    given = train.parse("train", None, ["quickstart", "--nproc-per-node", "2", "--max-restarts=3", "train.steps=3"])
    launched = train.command("megatron_depthattn.train", given)
    launcher = ["-m", "megatron_depthattn.launch.torchrun", "--nproc-per-node=2", "--max-restarts=3"]
    assert launched[1:] == [*launcher, *alone[1:]]
    with pytest.raises(SystemExit):
        train.parse("train", None, ["quickstart", "--max-restarts", "3"])
    assert "options of torchrun are written --name=value" in capsys.readouterr().err


def test_every_key_is_listed_with_its_meaning(capsys):
    assert main(["config", "optimizer.lr"]) == 0
    name, meaning = capsys.readouterr().out.splitlines()
    assert name.split() == ["optimizer.lr=0.001", "a", "number"] and "learning rate" in meaning
    assert main(["config", "optimizer.lrr"]) == 1 and "did you mean optimizer.lr?" in capsys.readouterr().err


def test_the_resolved_config_names_origins(capsys):
    assert main(["config", "500m", "methods/vanilla", "train.steps=9"]) == 0
    origins = dict(line.split("  # ") for line in capsys.readouterr().out.splitlines())
    found = {line.split("=")[0]: (line.split("=")[1].strip(), Path(origin).name) for line, origin in origins.items()}
    assert found["train.steps"] == ("9", "train.steps=9")
    assert found["model.hidden_size"] == ("1152", "500m.yaml")
    assert found["model.vocab_size"] == ("50304", "paper.yaml"), "the file under its `base:`"
    assert found["model.depth_attention.enabled"] == ("false", "vanilla.yaml")
    assert found["optimizer.beta1"][1] == "default"
    assert main(["config", "500m", "gone.yaml"]) == 1 and "gone.yaml does not exist" in capsys.readouterr().err


def write_run(folder: Path, seconds: float, gain: float, steps: int = 8) -> Path:
    """A run whose held-out loss is 9 - gain x step, evaluated every second step."""
    folder.mkdir()
    rows = [
        {
            "step": step,
            "loss": 9.5 - gain * step,
            "step_seconds": seconds,
            "eval_loss": None if step % 2 else 9 - gain * step,
            "held_out": None if step % 2 else {"code": 5 - gain * step, str(gain): 1.0},
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    older = f"run:\n  dir: {folder}\noptimizer:\n  lr: {gain}\nmodel:\n  num_loops: 2\n"  # than the rule of loops
    (folder / "config.yaml").write_text(older)
    return folder


def test_runs_are_compared_at_equal_steps_and_at_equal_time(tmp_path, capsys):
    """The second run learns twice as much a step and takes twice as long for it: at equal time they are equal."""
    one, two = write_run(tmp_path / "one", 1.0, 0.1), write_run(tmp_path / "two", 2.0, 0.2)
    assert main(["compare", str(one), str(two), "--figure", str(tmp_path / "f.svg")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert ["optimizer.lr", "0.1", "0.2"] in rows
    assert ["8", "8.2000", "7.4000", "-0.8000", "8.7500", "8.0000", "-0.7500"] in rows
    assert ["6.0", "8.4000", "8.4000", "+0.0000"] in rows and ["8.0", "8.2000", "8.2000", "+0.0000"] in rows
    assert ["code", "4.2000", "3.4000", "-0.8000"] in rows and not any(row[0] == "0.1" for row in rows)
    assert main(["compare", str(one), str(two), "--held-out", "code"]) == 0
    assert "│ 6.0     │ 4.4000       │ 4.4000       │ +0.0000    │" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "f.svg").read_text()
    curves = compare.read_curves(one)
    assert curves.held_out_at(3.0) == pytest.approx(8.7)
    assert curves.settings["model.depth_attention.loop_sources"] == "unrolled"


def test_what_cannot_be_compared(tmp_path, capsys):
    run = write_run(tmp_path / "run", 1.0, 0.1)
    assert main(["compare", str(run)]) == 1 and "name two runs or more" in capsys.readouterr().err
    assert main(["compare", str(run), str(tmp_path)]) == 1 and "has no metrics.jsonl" in capsys.readouterr().err
    short = write_run(tmp_path / "short", 1.0, 0.1, steps=3)
    assert main(["compare", str(run), str(short)]) == 1 and "has 1 held-out losses" in capsys.readouterr().err
    assert main(["compare", str(run), str(run), "--held-out", "web"]) == 1
    assert "has 0 held-out losses of web: " in (error := capsys.readouterr().err) and "one of 0.1, code" in error
