"""The parts of `make gpu`: what each asks for, and what is made of what its process leaves. The driver: tests/e2e."""

import json
import sys
from dataclasses import asdict
from itertools import pairwise
from operator import ne
from pathlib import Path

import pytest

from megatron_depthattn.benchmarks import command as benchmark
from megatron_depthattn.benchmarks import precision
from megatron_depthattn.benchmarks.models import mixing_configs, run_config, single_config
from megatron_depthattn.benchmarks.result import Result, machine_facts, write_json
from megatron_depthattn.config.hardware_checks import Accelerator
from megatron_depthattn.switches import Kernels
from megatron_depthattn.train import hardware
from tools import gpu

ROOT = Path(__file__).parents[2]
BY_NAME = {part.name: part for part in gpu.PARTS}


def test_reasons_to_skip():
    part = gpu.Part("step", ("torch", "megatron.core"), ("step",), 60)
    here = {"gpu": "NVIDIA H100", "seconds_left": 21.0, "is_installed": lambda module: True}
    assert gpu.reason_to_skip(part, **here) is None
    assert gpu.reason_to_skip(part, **here | {"gpu": None}) == "torch sees no NVIDIA GPU"
    missing = here | {"is_installed": lambda module: module != "megatron.core"}
    assert gpu.reason_to_skip(part, **missing) == "not installed: megatron.core"
    assert gpu.reason_to_skip(part, **missing | {"gpu": None}).count(";") == 1
    assert gpu.reason_to_skip(part, **here | {"seconds_left": 3.2}) == "3 s left, and it may take 60"
    installed = ["torch.nn", "no_such_package", "no_such_package.core"]
    assert [*map(gpu.is_installed, installed)] == [True, False, False]
    assert gpu.MINUTES <= 9 and max(part.seconds for part in gpu.PARTS) < 60 * gpu.MINUTES / 2, "each fits into a call"


@pytest.fixture
def h200(monkeypatch):
    """What a config is checked against: the GPU, TransformerEngine and compilers of the machine that will run."""
    machine = Accelerator("NVIDIA H200", (9, 0), "13.0", "2.20.2")
    monkeypatch.setattr(hardware, "this_machine", lambda: machine)
    monkeypatch.setattr(hardware, "these_kernels", lambda: Kernels(True, None, True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


def test_on_an_h200_every_benchmark_has_the_configs_that_its_name_says(h200):
    seen = set()
    for part in gpu.PARTS:
        if part.is_tests:
            continue
        given = benchmark.build_parser().parse_args(part.arguments)
        verb = given.measure.__module__.rpartition(".")[2]
        seen.add(verb)
        if (verb == "step" and not given.methods) or verb == "memory":
            configs = [*mixing_configs(given, "cuda", getattr(given, "ops", None) or ["auto"]).values()]
        elif verb == "step":
            configs = [run_config(given, "cuda", {"model.method": "mhc"})]
        elif verb == "generate":
            configs = [single_config("configs/3b.yaml", given.set)]
        elif verb == "precision":
            chosen, unsupported = precision.choose(given, "cuda")
            assert [*chosen] == ["bf16", "bf16+reference", "delayed", "tensorwise", "blockwise"]
            assert [*unsupported] == ["mxfp8"]
            configs = [*chosen.values()]
        else:
            continue
        assert all(config.model.spec == ("local" if "local" in str(part.arguments) else "te") for config in configs)
        if verb in ("step", "memory"):
            fp8 = {"fp8": "tensorwise", "delayed": "delayed"}.get(part.name.rpartition("-")[2])
            assert {config.precision.fp8 for config in configs} == {fp8}, part.name
            assert not any(key.startswith("recompute.") for key in given.set) or verb == "step"
        ops = {config.model.depth_attention.op for config in configs if config.model.depth_attention.enabled}
        assert verb == "generate" or "triton" in ops, part.name
        assert {config.model.fused_swiglu for config in configs} == {True}, part.name
    assert seen == {"op", "step", "generate", "memory", "precision", "checkpoint"}


# ---- what a part leaves

TESTS = """
import pytest
def test_passes(record_property):
    record_property("found", {"error": 0.01234})
def test_fails():
    assert 1 == 2, "not equal"
@pytest.mark.parametrize("n", [1, 2])
def test_skips(n):
    pytest.skip("no such recipe")
def test_hangs():
    import os; os._exit(9)
"""


def test_a_part_of_tests_that_dies_leaves_what_was_found_and_where_it_was(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    part = gpu.Part("some", (), (str(tmp_path / "test_some.py"),), 60, is_tests=True)
    kept = []
    outcome = gpu.run_part(part, 60, tmp_path, kept.append)
    assert (outcome.state, outcome.said.partition(":")[0]) == ("failed", "exit code 9")
    assert kept[0].state == "cut" and kept[-1].figures == outcome.figures
    assert outcome.figures["found"] == {"test_passes": {"error": 0.01234}}
    assert outcome.figures["skipped"] == {"no such recipe": 2}
    assert "### some: 1 passed, 1 failed, 2 skipped" in outcome.page
    assert "| test_passes |  error | 0.0123 |" in outcome.page
    assert "failed: test_fails\n\n```text\n" in outcome.page and "AssertionError: not equal" in outcome.page
    assert "- skipped (2): no such recipe" in outcome.page and "- running when it ended: test_hangs" in outcome.page
    assert str(tmp_path) not in outcome.page.replace(str(part.arguments[0]), "")


def test_a_benchmark_says_what_was_over_did_not_run_or_was_not_reached(tmp_path):
    part = gpu.Part("step", (), ("step",), 60)

    def outcome(exit_code=0, **fields):
        write_json(tmp_path / "step.json", Result("A step", ["model"], [["vanilla"]], **fields))
        return gpu.outcome_of(part, tmp_path / "step", exit_code, 9.0)

    assert (outcome().state, outcome().said) == ("ran", "see below")
    over = outcome(1, is_over=True)
    assert (over.state, over.said) == ("failed", "over a bound, see below") and "### A step" in over.page
    lines = [f'  File "{ROOT}/tools/x.py", line {i}' for i in range(40)]
    why = "\n".join([*lines, "in /opt/v/lib/python3.12/site-packages/torch/nn.py and /root/.triton/k.ptx"])
    failed = outcome(failures={"stride 1, triton": why, "stride 2, triton": why})
    assert (failed.state, failed.said) == ("failed", "see below; did not run: stride 1, triton, stride 2, triton")
    assert failed.page.count("```text") == 1 and failed.page.count('File "tools/x.py"') == gpu.TRACEBACK_LINES - 1
    assert "in torch/nn.py and k.ptx" in failed.page
    (tmp_path / "step.log").write_text("Traceback ...\nCUDA error: an illegal memory access\n")
    died = outcome(1, until="round 3 of 12")
    assert (died.state, died.said) == ("failed", "exit code 1: CUDA error: an illegal memory access")
    assert "A step (so far: round 3 of 12)" in died.page and "the end of its output" in died.page
    assert outcome(None, until="round 3 of 12").said == "not done after 9 s: round 3 of 12"


def test_what_is_kept_and_what_runs_next(tmp_path, monkeypatch):
    """On the same GPU with the same versions; the processor may be another."""
    parts = [BY_NAME[name] for name in ("smoke-mix", "step-360m", "memory", "op", "tests-te")]
    facts = machine_facts() | {"gpu": "NVIDIA H100"}
    pages = gpu.Pages(tmp_path, "h100", facts)

    def keep(pages, name, state, said, code=None):
        code = code or gpu.code_digest(BY_NAME[name])
        pages.keep(gpu.Outcome(name, state, said, 9.0, code=code))

    keep(pages, "op", "ran", "first", code="other")
    keep(pages, "smoke-mix", "ran", "first")
    pages = gpu.Pages(tmp_path, "h100", facts)
    keep(pages, "step-360m", "cut", "round 2")
    keep(pages, "memory", "failed", "out of memory", code="other")
    keep(pages, "op", "cut", "round 1")
    keep(pages, "smoke-mix", "skipped", "3 s left")
    keep(pages, "tests-te", "cut", "not done after 0 s")
    keep(pages, "tests-te", "skipped", "every test was skipped")
    again = gpu.Pages(tmp_path, "h100", facts | {"cpu": "another", "date": "tomorrow"})
    assert [(o.part, o.said) for o in again.outcomes.values()] == [
        *(("smoke-mix", "first"), ("step-360m", "round 2"), ("memory", "out of memory")),
        *(("tests-te", "every test was skipped"), ("op", "first")),
    ]
    ordered = [part.name for part in again.to_run(parts, again=False)]
    assert ordered == [
        "step-360m",
        "memory",
        "tests-te",
        "op",
    ]  # not run, failed under other code; ran under other code
    assert again.to_run(parts, again=True) == parts
    keep(again, "memory", "failed", "out of memory")
    assert BY_NAME["memory"] not in again.to_run(parts, again=False)  # it would fail again
    text = again.document.read_text()
    assert "2 ran, 1 failed, 1 cut, 1 skipped" in text and not list(tmp_path.glob(".*"))
    assert gpu.Pages(tmp_path, "h100", facts | {"torch": "2.0"}).outcomes == {}
    more = {name: asdict(outcome) for name, outcome in again.outcomes.items()}
    older = {"machine": {"gpu": "NVIDIA H100", "gone": "1"}, "parts": [*more.values()]}
    (tmp_path / "h100.json").write_text(json.dumps(older))
    assert len(gpu.Pages(tmp_path, "h100", facts).outcomes) == 5


def test_the_digest_is_of_code_and_arguments(tmp_path, monkeypatch):
    """A fix anywhere below tests/ renews the parts of tests, which import of each other; one of the package all."""
    part = BY_NAME["op"]
    assert gpu.code_digest(part) == gpu.code_digest(part) != gpu.code_digest(BY_NAME["memory"])
    assert gpu.code_digest(gpu.Part("op", (), (*part.arguments, "--runs", "3"), 9)) != gpu.code_digest(part)
    assert sys.executable in gpu.command_of(part, Path("x"))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    gpu.files_digest.cache_clear()
    parts = [part, BY_NAME["tests-te"]]
    digests = [[*map(gpu.code_digest, parts)]]
    for name in ("tests/te/small.py", "tools/benchmark.py", "megatron_depthattn/ops/mix.py", "configs/3b.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("fixed")
        gpu.files_digest.cache_clear()
        digests.append([*map(gpu.code_digest, parts)])
    gpu.files_digest.cache_clear()
    is_new = [[*map(ne, *pair)] for pair in pairwise(digests)]
    assert is_new == [[False, True], [True, False], [True, True], [True, True]]
