"""The README tells the truth: its paths and commands exist, its example runs."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_depthattn.config import config_keys, load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MADE_BY_COMMANDS = ("data/", "runs/", ".venv/", "checkpoints/", "tensorboard/")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def mentioned_paths() -> set[str]:
    words = re.findall(r"[\w./-]+", README)
    roots = ("megatron_depthattn/", "configs/", "tools/", "tests/", "launch/", "docs/")
    return {word.rstrip(".") for word in words if word.startswith(roots)}


@pytest.mark.parametrize("path", sorted(mentioned_paths()))
def test_path_exists(path):
    assert (ROOT / path).exists()


def test_the_check_sees_a_missing_path():
    assert "docs/depth-attention.svg" in mentioned_paths()
    assert not (ROOT / "docs/no-such-file.svg").exists()


def test_make_targets_exist():
    targets = set(re.findall(r"^make ([\w-]+)", README, flags=re.M))
    assert {"quickstart", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, timeout=30)


def test_config_keys_exist():
    keys = set(re.findall(r"\b((?:run|model|parallel|train|data|checkpoint|precision)\.[a-z_.]*[a-z])=", README))
    assert len(keys) >= 6
    assert keys <= set(config_keys())


def test_training_commands_load():
    shell = " ".join(code_blocks("bash")).replace("\\\n", " ")
    commands = re.findall(r"(?:-m megatron_depthattn\.train|launch/(?:local\.sh|node\.sh|submit)) (.*)", shell)
    assert len(commands) >= 8
    for command in commands:
        words = command.partition(" --")[0].removesuffix("&").replace("=...", "=elsewhere")
        path, *overrides = words.split()
        load_config(ROOT / path, [str(ROOT / o) if o.endswith(".yaml") else o for o in overrides])


def test_library_example_runs(megatron_world_of_one):
    (example,) = code_blocks("python")
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) < 15
    names: dict = {}
    exec(example, names)
    tokens = torch.arange(12).reshape(1, 12)
    loss = names["model"](tokens, None, None, labels=tokens).mean()
    loss.backward()
    assert names["config"].source_plan.sources(7) == (0, 4)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in names["model"].parameters())
