"""The Triton mix on a machine without a GPU: its numbers under Triton's interpreter, its machine code, and where it is
rejected. tests/gpu runs the same cases on a GPU."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_depthattn.config import load_config, to_dict
from megatron_depthattn.convert import verify
from megatron_depthattn.ops import depth_mix
from megatron_depthattn.ops.triton_mix import triton_unsupported
from megatron_depthattn.parallel.launch_env import LaunchEnvironment
from megatron_depthattn.train import loop as engines
from tests.gpu.compile_kernels import CASES as COMPILED
from tests.gpu.interpret import MODEL
from tests.gpu.mix_cases import CASES, Case, make_inputs
from tests.gpu.mix_checks import CHECKS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def run_module(module: str, **variables: str) -> dict:
    """The JSON object in the last line that a module prints, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-W", "ignore", "-m", module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return run_module("tests.gpu.interpret", TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_agree_with_fp64(interpreted, name):
    case = interpreted[name]
    assert case["failure"] is None, case["failure"]
    assert max(case["result"].values()) <= 1, case["result"]


@pytest.mark.parametrize("name", [*CHECKS, MODEL])
def test_interpreted_kernels(interpreted, name, record_property):
    check = interpreted[name]
    assert check["failure"] is None, check["failure"]
    record_property("found", check["result"])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    return run_module("tests.gpu.compile_kernels", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("name", COMPILED)
def test_machine_code_reads_and_writes_everything_once(compiled, name):
    """Counted in the code for an H100: of 2048 bf16 numbers of a tile a thread of 128 has 16, two loads of 16 bytes.

    Candidates in a table are in a loop, whose body is there once (and once more for the stores); its addresses and
    strides are loads of 8 bytes.
    """
    case = COMPILED[name]
    in_arguments = name == "arguments"
    candidates = case.num_sources + 1 if in_arguments else 1
    expected = {
        "forward_kernel": {"reads": case.gqa_ratio + 2 * candidates, "writes": 1, "fields": 8},
        "backward_kernel": {
            "reads": case.gqa_ratio + 1 + 2 * candidates,
            "writes": case.gqa_ratio + 2 * candidates,
            "fields": 10,
        },
    }
    for kernel, wanted in expected.items():
        found = compiled[name][kernel]
        assert found["wide loads"] == 2 * wanted["reads"], (kernel, found)
        assert found["wide stores"] == found["stores"] == 2 * wanted["writes"], (kernel, found)
        assert found["loads"] - found["wide loads"] == (0 if in_arguments else wanted["fields"]), (kernel, found)
        assert found["local memory"] == 0, f"{kernel} spills registers"


# --- Where it cannot run ---


def test_on_cpu_it_is_rejected():
    inputs = make_inputs(Case(1), "cpu")
    message = "op 'triton' needs a GPU, and was given device 'cpu': set the op to 'lean'"
    with pytest.raises(ValueError, match=message):
        inputs.mix()
    with pytest.raises(ValueError, match=message):  # a layer without sources as well: not only from the second on
        depth_mix(inputs.q, [], [], inputs.k, inputs.v, 1.0, implementation="triton")


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_a_run_on_cpu_is_rejected_before_a_model_is_built(engine, monkeypatch):
    def config(*settings: str):
        overrides = [f"engine.name={engine}", "model.depth_attention.op=triton", *settings]
        return load_config(ROOT / "configs" / "quickstart.yaml", overrides)

    alone = LaunchEnvironment(rank=0, world_size=1, local_rank=0, launched=False)
    with pytest.raises(ValueError, match=r"^model\.depth_attention\.op=triton needs a GPU, .* set the op to 'lean'"):
        engines.build_engine(config(), CPU, alone)
    if engine == "megatron":  # control: a vanilla model has no mix
        monkeypatch.setattr(engines, "MegatronEngine", lambda config, device: "built")
        assert engines.build_engine(config("model.depth_attention.enabled=false"), CPU, alone) == "built"


def test_a_checkpoint_that_was_trained_with_it_is_verified_on_cpu(monkeypatch):
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["model.depth_attention.op=triton"])
    built = []
    monkeypatch.setattr(verify, "_world_of_one", nullcontext)
    monkeypatch.setattr(verify, "transformer_config", built.append)
    monkeypatch.setattr(verify, "build_chunk", lambda *_: Nothing())
    checkpoint = SimpleNamespace(common={"config": to_dict(config)}, folder=ROOT)
    with pytest.raises(AttributeError, match="Nothing"):
        verify.megatron_logits(checkpoint, torch.zeros(1, 1, dtype=torch.int64))
    assert built[0].model.depth_attention == dataclasses.replace(config.model.depth_attention, op="lean")


class Nothing:
    """In place of a model that the test above does not need."""


def test_without_triton_or_with_an_old_one_it_is_rejected(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton_unsupported.cache_clear()
    try:
        with pytest.raises(ValueError, match="needs Triton, which is not installed: pip install triton, or set the op"):
            make_inputs(Case(1), "cpu").mix()
        monkeypatch.undo()
        monkeypatch.setattr("triton.__version__", "3.2.0")
        triton_unsupported.cache_clear()
        with pytest.raises(ValueError, match=r"Triton 3\.2\.0 does not take: install Triton 3\.3 or later .* 'lean'"):
            make_inputs(Case(1), "cpu").mix()
    finally:
        triton_unsupported.cache_clear()


def test_the_package_does_not_need_triton():
    """A module that is None in sys.modules cannot be imported."""
    code = "import sys; sys.modules['triton'] = None; from megatron_depthattn.ops import depth_mix_triton"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True, timeout=200)
