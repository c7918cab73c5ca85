"""README and docs: paths, keys and make targets exist, programs accept the commands, the example runs."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_depthattn.cli import VERBS
from megatron_depthattn.cli.common import find_config
from megatron_depthattn.config import config_keys, load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOOLS = {
    "prepare_data": "prepare",
    "convert_checkpoint": "convert",
    "generate": "generate",
    "evaluate": "evaluate",
    "estimate": "estimate",
    "benchmark": "benchmark",
    "scale_study": "study",
    "doctor": "doctor",
}
"""The verb of each file in tools/."""
ROOTS = ("megatron_depthattn/", "configs/", "tools/", "tests/", "launch/", "docs/", "examples/")


def commands(text: str) -> Iterator[list[str]]:
    """Every command of this project in fenced blocks, indented blocks and between backquotes, as words."""
    fenced = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    rest = re.sub(r"```.*?```", "", text, flags=re.S)
    indented = re.findall(r"^    (\S.*(?:\\\n.*)*)", rest, flags=re.M)
    quoted = [" ".join(each.split()) for each in re.findall(r"`([^`]+)`", rest)]
    for block in (*fenced, *indented, *quoted):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else []
            for end in ("&", "&&", ">", "|"):
                words = words[: words.index(end)] if end in words else words
            while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0].endswith(("python", "torchrun"))):
                words = words[1:]
            if words and not set("[{") & set(" ".join(words)) and "VERB" not in words:
                yield words


def parsed(words: list[str]) -> tuple[str, list[str]] | None:
    """Verb and arguments of a command line of the console script or of a tool."""
    program = Path(words[0]).name
    if program == "depthattn" and len(words) > 1 and words[1] in VERBS:
        return words[1], words[2:]
    if words[0].startswith("tools/") and words[0].endswith(".py") and Path(words[0]).stem in TOOLS and len(words) > 1:
        return TOOLS[Path(words[0]).stem], words[1:]
    return ("submit", words[1:]) if words[0] == "launch/submit" and len(words) > 1 else None


OF_VERBS = sorted(
    {
        (page.relative_to(ROOT).as_posix(), verb, shlex.join(arguments))
        for page in PAGES
        for words in commands(page.read_text())
        for verb, arguments in filter(None, [parsed(words)])
    }
)
TRAINING = sorted(
    {
        shlex.join(words[words.index(program) + 1 :])
        for page in PAGES
        for words in commands(page.read_text())
        for program in ("megatron_depthattn.train", "launch/local.sh", "launch/node.sh")
        if program in words and len(words) > words.index(program) + 1
    }
)


class _ParsedError(Exception):
    """The arguments were accepted."""


@pytest.mark.parametrize(("page", "verb", "arguments"), OF_VERBS)
def test_the_program_accepts_the_command(page, verb, arguments, monkeypatch, capsys):
    arguments = arguments.replace("...", "x")
    for name in ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args"):
        accept = getattr(argparse.ArgumentParser, name)

        def wrapped(self, *args, _accept=accept, **kwargs):
            if sys._getframe(1).f_globals["__name__"] == "argparse":  # one of these calls another
                return _accept(self, *args, **kwargs)
            _accept(self, *args, **kwargs)
            raise _ParsedError

        monkeypatch.setattr(argparse.ArgumentParser, name, wrapped)
    main = importlib.import_module(f"megatron_depthattn.{VERBS[verb][0]}").main
    try:
        main(shlex.split(arguments))
    except _ParsedError:
        return
    except SystemExit:
        message = capsys.readouterr().err
        if "arguments are required" not in message:  # a sentence may name a verb and an option
            pytest.fail(f"{page}: depthattn {verb} {arguments}\n{message}")
        return
    pytest.fail(f"{page}: depthattn {verb} {arguments} parsed nothing")


@pytest.mark.parametrize("arguments", TRAINING)
def test_training_commands_load(arguments):
    words = [word for word in shlex.split(arguments.replace("=...", "=elsewhere")) if word != "..."]
    files = [word if "=" in word else find_config(word) for word in words if not word.startswith(("runs/", "-"))]
    if files and "=" not in files[0] and "CONFIG.yaml" not in files:
        load_config(files[0], files[1:])


def test_the_checks_see_what_they_look_for(monkeypatch, capsys):
    assert len(OF_VERBS) >= 40 and len(TRAINING) >= 6
    assert {"train", "prepare", "convert", "estimate", "benchmark", "study", "compare"} <= {
        verb for _, verb, _ in OF_VERBS
    }
    with pytest.raises(pytest.fail.Exception, match="no-such-option"):  # the control
        test_the_program_accepts_the_command("a page", "config", "--no-such-option", monkeypatch, capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    words = re.findall(r"[\w./-]+", page.read_text())
    named = {word.rstrip(".").partition("::")[0] for word in words if word.startswith(ROOTS)}
    named = {word for word in named if "skip_back" not in word}  # of docs/extending.md, made by its test
    linked = {word for word in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in word}
    missing = [word for word in named if not (ROOT / word).exists() and not list(ROOT.glob(f"{word}*"))]
    assert not missing + [word for word in linked if not (page.parent / word).exists()]


def placeholders(text):
    """Cells of a table's rows, beside their first, that are one word in capitals: what a figure was to replace."""
    rows = re.findall(r"^\|[^|\n]*\|(.*)\|$", re.sub(r"^\|.*\n(?=\|[ :|-]+\n)", "", text, flags=re.M), flags=re.M)
    return [cell.strip() for row in rows for cell in row.split("|") if re.fullmatch(r"[A-Z_]{5,}", cell.strip())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_table_holds_a_placeholder(page):
    assert not placeholders(page.read_text())
    assert placeholders("| a | LAMBADA |\n| --- | --- |\n| PIQA_X | 1 |\n| b | GENERATE |\n") == ["GENERATE"]


def test_make_targets_exist():
    targets = {target for page in PAGES for target in re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), flags=re.M)}
    assert {"quickstart", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, timeout=30)


def test_config_keys_exist():
    sections = {key.partition(".")[0] for key in config_keys()}
    names = {
        (page.name, name)
        for page in PAGES
        for name in re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_0-9.]*[a-z0-9])[=:`]", page.read_text())
    }
    assert len(names) >= 60
    known = set(config_keys()) | {key.rpartition(".")[0] for key in config_keys()}
    ours = {(page, name) for page, name in names if not name.endswith((".yaml", ".jsonl", ".json", ".py", ".txt"))}
    assert not {(page, name) for page, name in ours if name not in known}


def test_readme_is_short_and_its_example_runs(megatron_world_of_one):
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len([line for line in example.splitlines() if line.strip()]) < 15
    names: dict = {}
    exec(example, names)
    tokens = torch.arange(12).reshape(1, 12)
    loss = names["model"](tokens, None, None, labels=tokens).mean()
    loss.backward()
    assert names["config"].source_plan.sources(7) == (0, 4)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in names["model"].parameters())
