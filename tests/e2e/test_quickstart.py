"""``make quickstart``, its own commands and its own config, with data and run directory elsewhere."""

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import REPOSITORY, must_succeed, run


def commands_of_quickstart() -> list[list[str]]:
    """What the Makefile would run after the installation, as words."""
    shown = subprocess.run(
        ["make", "--always-make", "--dry-run", "quickstart"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    ).stdout.replace("\\\n", " ")
    return [shlex.split(line) for line in shown.splitlines() if "tools/" in line or "megatron_depthattn.train" in line]


def with_this_interpreter(command: list[str]) -> list[str]:
    program, *arguments = command
    launcher = ["-m", "torch.distributed.run"] if program.endswith("torchrun") else []
    return [sys.executable, *launcher, *arguments]


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("megatron_world_of_one")
def test_quickstart_learns_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prepare, train, *on_its_folder = commands_of_quickstart()
    data, run_dir = tmp_path / "data", tmp_path / "run"
    prepare[prepare.index("data/quickstart")] = str(data)
    must_succeed(run(with_this_interpreter(prepare), seconds=240))
    assert "--nproc_per_node" in train
    assert "2" in train
    # Fewer and smaller steps than the user's: enough to learn, and a shorter suite.
    settings = [f"data.path={data}", f"run.dir={run_dir}", "train.steps=40", "train.eval_interval=20"]
    settings += ["train.global_batch_size=8", "train.micro_batch_size=2"]
    output = must_succeed(run([*with_this_interpreter(train), *settings], seconds=900)).stdout
    assert "hop 0 -> 1:" in output
    assert "what to try next" in output
    losses = [json.loads(line)["eval_loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    first = float(output.split("held-out loss in nats per token: ")[1].split()[0])
    assert first - losses[-1] >= 1.2

    def on_run(command: list[str]) -> str:
        """A tool's output, run in this process."""
        _, tool, *arguments = (word.replace("runs/quickstart", str(run_dir)) for word in command)
        capsys.readouterr()
        assert importlib.import_module(tool.replace("/", ".").removesuffix(".py")).main(arguments) == 0
        return capsys.readouterr().out

    export, verify, generate = on_its_folder
    on_run(export)
    assert on_run(verify).count(" ok ") == 6
    prompt = generate[generate.index("--prompt") + 1]
    text = on_run(generate)
    assert text.startswith(prompt)
    assert len(text.strip()) > len(prompt)
    data_and_model = ["--model", run_dir / "hf", "--data", data, "--max-samples", "32", "--json", tmp_path / "e.json"]
    on_run(["", "tools/evaluate.py", *map(str, data_and_model)])
    # the same samples as the run's own held-out loss: 4 global batches of 8
    assert abs(json.loads((tmp_path / "e.json").read_text())["loss"] - losses[-1]) <= 1e-4
