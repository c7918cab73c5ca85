"""What `auto` becomes on a machine: for a run, the planner, a job, a study; and ranks that do not have the same."""

from pathlib import Path

import pytest
import torch

from megatron_depthattn.config import RunConfig, config_digest, load_config
from megatron_depthattn.config import resolve as backends
from megatron_depthattn.config.resolve import CPU, GPU, Available, resolve
from megatron_depthattn.estimate.hardware import GPUS, resolve_for
from megatron_depthattn.estimate.report import estimate_config
from megatron_depthattn.launch.submit import main as submit
from megatron_depthattn.ops.triton_mix import MAX_HEAD_DIM
from megatron_depthattn.preflight.compare import compare_reports
from megatron_depthattn.preflight.report import RankReport, Requirements
from megatron_depthattn.train.hardware import resolve_here

ROOT = Path(__file__).parents[2]
BARE_GPU = Available(True, "ImportError: no transformer_engine", "needs Triton, which is not installed")
FP8 = "precision.fp8=delayed"


def config_of(*settings: str) -> RunConfig:
    return load_config(ROOT / "configs/410m.yaml", ["data.path=shards", *settings])


def backends_of(config: RunConfig) -> tuple[str, str]:
    return config.model.spec, config.model.depth_attention.op


@pytest.mark.parametrize(
    ("machine", "settings", "expected", "reason"),
    [
        (GPU, (), ("te", "triton"), "model.spec=te (auto: on GPUs with TransformerEngine)"),
        (GPU, (FP8,), ("te", "triton"), "model.depth_attention.op=triton (auto: on GPUs with Triton)"),
        (GPU, ("model.method=mhc",), ("te", "triton"), "te"),
        (CPU, (), ("local", "lean"), "model.spec=local (auto: no GPU)"),
        (BARE_GPU, (), ("local", "lean"), "local (auto: no TransformerEngine: ImportError: no transformer_engine)"),
        (BARE_GPU, (), ("local", "lean"), "lean (auto: triton needs Triton, which is not installed)"),
        (BARE_GPU._replace(no_triton=""), (), ("local", "triton"), "local"),
        (GPU, ("model.num_loops=2", FP8), ("te", "triton"), "te"),
        (GPU, ("engine.name=deepspeed", "engine.zero_stage=1"), ("local", "triton"), "engine.name=deepspeed"),
        (GPU, ("precision.dtype=fp32",), ("local", "triton"), "matrix products TransformerEngine computes in TF32"),
        (GPU, ("model.kv_channels=512",), ("te", "lean"), "triton takes heads of 256 at most"),
        (GPU, ("model.spec=local",), ("local", "triton"), "triton"),
        (CPU, ("model.depth_attention.op=reference",), ("local", "reference"), "no GPU"),
    ],
)
def test_auto_is_what_the_machine_has(machine, settings, expected, reason):
    given = config_of(*settings)
    resolved = resolve(given, machine)
    assert backends_of(resolved.config) == expected
    assert reason in "\n".join(resolved.lines)
    named = [f"model.spec={expected[0]}", f"model.depth_attention.op={expected[1]}"]
    assert resolved.config == config_of(*settings, *named), "nothing else is touched"


def test_what_is_named_is_never_replaced():
    given = config_of("model.spec=te", "model.depth_attention.op=triton")
    for machine in (CPU, GPU, BARE_GPU):
        assert resolve(given, machine) == (given, {})


@pytest.mark.parametrize(("machine", "reason"), [(CPU, "no GPU"), (BARE_GPU, "ImportError: no transformer_engine")])
def test_fp8_is_rejected_where_auto_would_be_local(machine, reason):
    with pytest.raises(ValueError) as rejected:
        resolve(config_of(FP8), machine)
    assert str(rejected.value).startswith("precision.fp8=delayed with model.spec=auto: only TransformerEngine's layers")
    assert reason in str(rejected.value) and str(rejected.value).endswith("or set precision.fp8=null")


def test_the_kernels_take_heads_of_that_size():
    assert backends.LARGEST_TRITON_HEAD == MAX_HEAD_DIM


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_here_it_is_what_a_machine_without_a_gpu_has():
    assert resolve_here(config_of()) == resolve(config_of(), CPU)


def test_the_planner_resolves_for_the_machine_it_is_given():
    named = {
        spec: estimate_config(config_of(f"model.spec={spec}", f"model.depth_attention.op={op}"), 8, GPUS["H100"])
        for spec, op in (("te", "triton"), ("local", "lean"))
    }
    assert estimate_config(config_of(), 8, GPUS["H100"]) == named["te"] != named["local"]
    assert backends_of(resolve_for(GPUS["H100"], config_of()).config) == ("te", "triton")


def test_a_job_is_checked_for_its_nodes_and_keeps_auto(tmp_path, capsys):
    command = [str(ROOT / "configs/410m.yaml"), "data.path=shards", f"run.dir={tmp_path}/run", "--nodes", "1"]
    assert submit([*command, FP8, "--processes-per-node", "8", "--dry-run"]) == 1
    assert "auto cannot take them here: no GPU" in capsys.readouterr().err
    assert submit([*command, FP8, "--gpus-per-node", "8", "--dry-run"]) == 0
    assert "expected on the nodes: model.spec=te (auto: on GPUs with TransformerEngine)\n" in capsys.readouterr().out
    assert backends_of(load_config(tmp_path / "run/job/config.yaml")) == ("auto", "auto")


def test_a_job_that_cannot_fit_is_not_queued(tmp_path, capsys):
    """Memory by the planner, the sequence length of the data; the control shows ranks, GB and hours against --time."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"sequence_length": 2048, "vocab_size": 100}')
    command = [str(ROOT / "configs/3b.yaml"), f"data.path={folder}", f"run.dir={tmp_path}/run", "--nodes", "4"]
    command += ["--gpus-per-node", "8", "--time", "8:00:00", "--dry-run"]
    assert submit([*command, "data.sequence_length=1024"]) == 1
    assert f"{folder} has samples of 2048: set 2048" in capsys.readouterr().err
    assert submit([*command, "train.micro_batch_size=16"]) == 1
    assert "GB and H100 has 80 GB less 8%: set" in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert submit(command) == 0
    assert "32 x H100: " in (out := capsys.readouterr().out) and "--time 8:00:00: " in out


def test_ranks_that_resolve_it_differently_do_not_start():
    """One machine of three has no TransformerEngine: named with the reason, whatever preflight.on_problem says."""
    reports = []
    for rank, machine in enumerate((GPU, GPU, BARE_GPU._replace(no_triton=""))):
        resolved = resolve(config_of(), machine)
        settings = dict(zip(("model.spec", "model.depth_attention.op"), backends_of(resolved.config), strict=True))
        settings |= resolved.reasons
        digest = config_digest(resolved.config)
        reports.append(RankReport(rank=rank, host=f"node{rank}", config=digest, settings=settings, open_files=65536,
                                  address=f"10.0.0.{rank}", shared_memory_bytes=1))  # fmt: skip
    (finding,) = compare_reports(reports, Requirements())
    assert finding.severity == "always"
    assert finding.text == (
        "different run configs: rank 2 (node2) has model.spec=local (auto: no TransformerEngine: ImportError: no "
        "transformer_engine); ranks 0-1 (node0, node1) have model.spec=te (auto: on GPUs with TransformerEngine). They "
        "would train different models, or wait for each other forever: give all hosts the same software, or set in "
        "place of auto or null what all of them have."
    )
