"""``engine.name=deepspeed`` as a user runs it: one run under both engines in turn, its export, launches by hostfile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.commands import REPOSITORY, must_succeed, python, run, torchrun
from tests.forked import forked
from tests.launch.jobs import FULL, free_port

BOUND = 1e-5
NORM_BOUND = 1e-4
TRAIN = ("-m", "megatron_depthattn.train")
DEEPSPEED = "engine.name=deepspeed"
# As in tests/parallel/cases.py: otherwise Adam steps by the sign of gradients that are nothing but rounding.
STEADY = ("optimizer.eps=1e-5", "optimizer.warmup_ratio=0.5")
pytestmark = pytest.mark.timeout(900)


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run_dir: Path, undisturbed: Path) -> None:
    steps, expected = records(run_dir), records(undisturbed)
    assert [set(step) for step in steps] == [set(step) for step in expected]
    for key in ("step", "samples", "tokens", "lr", "skipped_steps"):
        assert [step[key] for step in steps] == [step[key] for step in expected], key
    for key, bound in (("loss", BOUND), ("grad_norm", NORM_BOUND), ("eval_loss", BOUND)):
        for step, other in zip(steps, expected, strict=True):
            if other[key] is not None:  # most steps have no evaluation; the last step of each part has one more
                assert step[key] == pytest.approx(other[key], rel=bound), (key, step["step"])


@pytest.fixture(scope="module")
def undisturbed(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Megatron engine in one process."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    must_succeed(python(*TRAIN, config_file, f"run.dir={run_dir}", *STEADY))
    return run_dir


@pytest.fixture(scope="module")
def mixed(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run: ZeRO 3 to step 4, the Megatron engine to step 8, ZeRO 2 with tensor and sequence parallel to 12."""
    run_dir = tmp_path_factory.mktemp("mixed") / "run"
    command = (*TRAIN, config_file, f"run.dir={run_dir}", *STEADY)
    command += ("checkpoint.load=latest", "checkpoint.async_save=true")
    must_succeed(torchrun(2, *command, DEEPSPEED, "engine.zero_stage=3", "train.stop_after=4", seconds=400))
    must_succeed(torchrun(2, *command, "parallel.pipeline=2", "train.stop_after=4"))
    tensor = ("parallel.tensor=2", "parallel.sequence=true")
    must_succeed(torchrun(2, *command, DEEPSPEED, "engine.zero_stage=2", *tensor))
    return run_dir


@FULL
def test_a_run_continues_under_the_other_engine(mixed, undisturbed):
    assert_same_run(mixed, undisturbed)
    log = (mixed / "log.txt").read_text()
    assert "ZeRO stage 3" in log and "ZeRO stage 2" in log


@FULL
def test_a_checkpoint_of_deepspeed_exports_to_hugging_face(mixed, tmp_path):
    tool = ("tools/convert_checkpoint.py",)
    step = mixed / "checkpoints/step_00000012"
    must_succeed(python(*tool, "to-hf", "--checkpoint", step, "--output", tmp_path / "hf"))
    must_succeed(python(*tool, "verify", "--checkpoint", step, "--model", tmp_path / "hf"))


def test_a_world_without_a_launcher_is_rejected(config_file, tmp_path):
    result = forked(0, "megatron_depthattn.train", config_file, f"run.dir={tmp_path / 'run'}", DEEPSPEED)
    assert result.returncode == 1
    assert "error (rank 0): engine.name=deepspeed in a process that no launcher started" in result.stderr


# ---- launch/deepspeed.sh


def hostfile(folder: Path, *lines: str) -> Path:
    path = folder / "hosts"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def launch(*arguments: str | Path, seconds: float = 300, **variables: str | int | Path):
    setting = [f"{name}={value}" for name, value in variables.items()]
    return run(["env", *setting, "launch/deepspeed.sh", *arguments], seconds=seconds)


def python_at(path: Path) -> Path:
    """This interpreter, by another name."""
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


UNSUPPORTED = [
    ({}, "error: HOSTFILE, MASTER_ADDR, MASTER_PORT not set, and a launcher must not guess."),
    ({"MASTER_ADDR": "a", "MASTER_PORT": "1", "HOSTFILE": "/no/hosts"}, "error: HOSTFILE=/no/hosts: no such file"),
    ({"lines": ("node0",)}, "hosts, line 1: 'node0' is not `host slots=N`"),
    ({"lines": ("node0 slots=1", "node0 slots=1")}, "hosts, line 2: node0 is there already"),
    ({"lines": ("# none",)}, "hosts names no host"),
    ({"lines": ("node0 slots=1",), "MASTER_PORT": "ssh"}, "error: MASTER_PORT=ssh is no port"),
    ({"lines": ("node0 slots=1",), "MASTER_ADDR": "-x"}, "error: MASTER_ADDR=-x is no host name"),
    ({"lines": ("-oProxyCommand=touch${IFS}x slots=1",)}, "hosts, line 1: '-oProxyCommand=touch${IFS}x' is no"),
    ({"lines": ("\x1b[2Jnode0",)}, "hosts, line 1: '?[2Jnode0' is no host name"),
    ({"lines": ("a@-oProxyCommand=x slots=1",)}, "hosts, line 1: 'a@-oProxyCommand=x' is no host name"),
    ({"lines": ("node[0-9],$(touch${IFS}x) slots=1",)}, "hosts, line 1: 'node[0-9],$(touch${IFS}x)' is no"),
    ({"lines": ("node0 slots=1",), "NODE_RANK": "1"}, "error: NODE_RANK=1 with 1 hosts in "),
    ({"lines": ("node0 slots=1",), "PYTHON": "a {b/python"}, "a {b/python reaches the hosts through a shell, unquoted"),
    ({"lines": ("node0 slots=3",)}, "error: with 3 processes (the hostfile's slots): train.global_batch_size is 8"),
]


@pytest.mark.parametrize(("given", "reported"), UNSUPPORTED)
def test_a_bad_hostfile_launch_is_rejected_in_one_line(config_file, tmp_path, given, reported):
    variables = dict(given)
    if "lines" in variables:
        file = hostfile(tmp_path, *variables.pop("lines"))
        variables = {"HOSTFILE": file, "MASTER_ADDR": "node0", "MASTER_PORT": "29500", **variables}
    if "PYTHON" in variables:
        variables["PYTHON"] = python_at(tmp_path / variables["PYTHON"])
    result = launch(config_file, f"run.dir={tmp_path / 'run'}", **variables)
    assert result.returncode == 1
    assert reported in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


SHORT = (*STEADY, DEEPSPEED, "engine.zero_stage=1", "train.stop_after=3", "train.eval_interval=null")


def assert_same_beginning(run_dir: Path, undisturbed: Path) -> None:
    for step, other in zip(records(run_dir), records(undisturbed)[:3], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=BOUND)


@FULL
def test_two_hosts_started_by_hand(config_file, undisturbed, tmp_path):
    """Two launchers that meet at MASTER_ADDR; that they are on one machine is all that is pretended."""
    common = [
        f"HOSTFILE={hostfile(tmp_path, 'node0 slots=1', 'node1 slots=1')}",
        *("MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}", f"PYTHONPATH={REPOSITORY}"),
    ]
    command = ["launch/deepspeed.sh", str(config_file), f"run.dir={tmp_path / 'run'}", *SHORT]
    node1 = subprocess.Popen(["env", *common, "NODE_RANK=1", *command], cwd=REPOSITORY, start_new_session=True)
    try:
        must_succeed(run(["env", *common, "NODE_RANK=0", *command], seconds=300))
        assert node1.wait(timeout=60) == 0
    finally:
        if node1.poll() is None:
            os.killpg(node1.pid, signal.SIGKILL)
    assert_same_beginning(tmp_path / "run", undisturbed)


@pytest.fixture
def ssh_args(tmp_path: Path) -> Iterator[str]:
    """A real ssh server for this user on the loopback interface, with keys of its own."""
    programs = ("pdsh", "ssh", "ssh-keygen", "sshd")
    path = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [name for name in programs if shutil.which(name, path=path) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install pdsh openssh-server)")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    port = free_port()
    (tmp_path / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\n"
        f"PidFile {tmp_path}/sshd.pid\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    sshd = str(shutil.which("sshd", path=path))
    server = subprocess.Popen([sshd, "-D", "-e", "-f", tmp_path / "sshd_config"], stderr=subprocess.DEVNULL)
    yield f"-p {port} -i {tmp_path}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    server.terminate()
    server.wait(timeout=10)


@FULL
def test_hosts_reached_over_ssh(config_file, undisturbed, tmp_path, ssh_args):
    hostile = tmp_path / f"$(touch {tmp_path}/obeyed) `touch {tmp_path}/obeyed`'; touch {tmp_path}/obeyed; \"$HOME"
    run_dir, overlay = hostile / "run", hostile / "overlay.yaml"
    hostile.mkdir(parents=True)
    overlay.write_text(json.dumps({"run": {"dir": str(run_dir)}}))
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "SSH_ARGS": ssh_args}
    hosts = hostfile(tmp_path, "localhost slots=1", "127.0.0.1 slots=1")
    must_succeed(launch(config_file, overlay, *SHORT, HOSTFILE=hosts, **common))
    assert_same_beginning(run_dir, undisturbed)
    assert not (tmp_path / "obeyed").exists(), "a value of the config ran on a host"


def test_a_host_that_ssh_does_not_reach_is_named(config_file, tmp_path, ssh_args):
    file = hostfile(tmp_path, "localhost slots=1", "node1.invalid slots=1")
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "SSH_ARGS": ssh_args}
    common["PYTHON"] = python_at(tmp_path / "josé/python")  # letters of any language may be in a path
    result = launch(config_file, f"run.dir={tmp_path / 'run'}", HOSTFILE=file, seconds=60, **common)
    assert result.returncode == 1
    assert f"error: node1.invalid ({file}) cannot be reached" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
