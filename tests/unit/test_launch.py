"""The launchers' pure parts: what exit codes and records of ranks mean, and what a job script says."""

import argparse
import json
import mmap
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousConnectionError
from torch.distributed.run import get_args_parser

from megatron_depthattn import launch
from megatron_depthattn.config import RunConfig
from megatron_depthattn.launch.failures import first_failure, record_death
from megatron_depthattn.launch.freeze import CODE_FOLDERS, freeze
from megatron_depthattn.launch.logs import main as show_logs
from megatron_depthattn.launch.submit import (
    _configs,
    _followers,
    _parser,
    check_options,
    queue,
    render,
    seconds_of,
    submit,
    sweep,
)
from megatron_depthattn.launch.torchrun import _defaults, only_the_head_has_gone
from megatron_depthattn.parallel.launch_env import QUEUES, LaunchEnvironment
from megatron_depthattn.terminal import printable
from megatron_depthattn.train.errors import OtherRankError, RunError, write_error_record
from tests.e2e.commands import REPOSITORY, must_succeed
from tests.forked import forked


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ({0}, 0),
        ({75}, 75),
        ({75, 0}, 75),
        ({75, -signal.SIGTERM}, 75),  # torchrun ends the ranks that end last
        ({-signal.SIGINT}, 75),  # before they could take note of it
        ({1, 75}, 1),  # a rank that torchrun ended after another's failure
        ({1, -signal.SIGTERM}, 1),
        ({-signal.SIGKILL, 75}, 1),
        ({70, 1}, 70),
    ],
)
def test_what_the_ranks_exit_codes_mean_together(codes: set[int], code: int):
    assert launch.exit_code(codes) == code


@pytest.mark.parametrize(
    ("error", "codes", "is_so"),
    [
        (RendezvousConnectionError(), {0, 75}, True),
        (RendezvousConnectionError(), {1}, False),
        (RendezvousConnectionError(), set(), False),
        (RendezvousClosedError(), {75}, False),  # stopped before the first step, as another node failed
    ],
)
def test_a_rendezvous_that_has_gone_is_no_failure_of_ranks_that_ended_well(error: Exception, codes: set, is_so: bool):
    assert only_the_head_has_gone(error, codes) is is_so


def test_options_that_this_torch_lacks_are_left_out():
    """torch before 2.14 has not all of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rdzv-backend")
    assert _defaults(parser) == ["--rdzv-backend=c10d"]
    given = {option.partition("=")[0] for option in _defaults(get_args_parser())}
    assert {"--tee", "--local-ranks-filter", "--rdzv-backend"} <= given


def leave_record(folder: Path, rank: int, moment: float, message: str, *, secondary: bool = False) -> None:
    folder.mkdir(parents=True)
    extra = {"extraInfo": {"py_callstack": message, "timestamp": str(int(moment))}}
    record = {"message": extra, "time": moment, "host": "a", "rank": rank, "consequence": secondary}
    (folder / "error.json").write_text(json.dumps(record))


def test_the_first_failure_is_the_earliest_that_speaks_of_itself(tmp_path: Path):
    leave_record(tmp_path / "old/0", 7, 1.0, "of an earlier start")
    leave_record(tmp_path / "a/0", 0, 9.0, "closed by peer", secondary=True)
    leave_record(tmp_path / "b/1", 2, 11.0, "later")
    leave_record(tmp_path / "b/0", 3, 10.0, "a line\nValueError: no")
    (tmp_path / "b/2").mkdir()
    (tmp_path / "b/2/error.json").write_text('{"time": 9.5, "ra')  # cut off
    failure = first_failure(tmp_path, since=5.0)
    assert failure is not None and failure.rank == 3
    assert failure.text.endswith(": rank 3 on a\na line\nValueError: no")
    assert first_failure(tmp_path, since=50.0) is None


def test_a_rank_that_left_no_record_gets_one_that_torchrun_reads(tmp_path: Path):
    (tmp_path / "stderr.log").write_text("last words\n")
    record_death(tmp_path / "error.json", 4, 123, -signal.SIGKILL)
    failure = first_failure(tmp_path)
    assert failure is not None and failure.rank == 4 and not failure.secondary
    assert "last words\nrank 4 (pid 123) ended: killed by SIGKILL; if nobody did that" in failure.text
    assert ProcessFailure(0, 123, -9, str(tmp_path / "error.json")).timestamp > 0


def test_scripts_are_beside_the_package_or_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert launch.scripts() == REPOSITORY / "launch"
    monkeypatch.setattr("megatron_depthattn.__file__", str(tmp_path / "megatron_depthattn/__init__.py"))
    assert launch.scripts() == tmp_path / "megatron_depthattn/launch/scripts"


def test_scripts_inside_a_package_find_it(tmp_path: Path):
    inside = tmp_path / "site/megatron_depthattn/launch/scripts"
    shutil.copytree(REPOSITORY / "launch", inside)
    show = f"here={inside}; . {inside}/interpreter.sh; echo $PYTHONPATH"
    said = subprocess.check_output(["bash", "-euc", show], env={"PATH": "/usr/bin:/bin"}, text=True)
    assert said.strip() == str(tmp_path / "site")


@pytest.mark.parametrize(
    ("error", "retry", "consequence"),
    [
        (ValueError("no"), False, False),
        (OSError("disk"), True, False),
        (ImportError("gone"), False, False),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:4321"), True, True),
        (OtherRankError("rank 0 failed"), False, True),
        (RunError("over"), True, False),
    ],
)
def test_error_records(error: Exception, retry: bool, consequence: bool, tmp_path: Path):
    """They say what a launcher needs, and torchrun itself reads them."""
    file = tmp_path / "error.json"
    environment = LaunchEnvironment(rank=5, world_size=8, local_rank=1, launched=True, error_file=str(file))
    write_error_record(environment, error, "the traceback")
    record = json.loads(file.read_text())
    assert (record["rank"], record["retry"], record["consequence"]) == (5, retry, consequence)
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(file))
    assert failure.message["extraInfo"]["py_callstack"] == "the traceback"
    assert failure.timestamp == int(record["time"])
    write_error_record(environment._replace(error_file=None), error, "")  # without a launcher: nothing, no error


SUBMIT = ("config.yaml", "--nodes", "4", "--gpus-per-node", "8")


def script(*options: str, num_configs: int = 1, run_dir: str = "/runs/my run", **more: bool) -> str:
    """A rendered job script, after bash has read it."""
    parsed = _parser().parse_intermixed_args([*SUBMIT, *options])
    template = (REPOSITORY / "launch/slurm.sbatch").read_text()
    text = render(template, parsed, Path(run_dir), num_configs, 8, **more)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=30)
    return text


def flags(text: str) -> list[str]:
    """The options as Slurm reads them: words as of a shell, up to a `#`."""
    lines = re.findall(r"^#SBATCH (\S.*)$", text, flags=re.M)
    words = [shlex.split(line, comments=True) for line in lines]
    assert [len(each) for each in words] == [1] * len(lines)
    return [word for (word,) in words]


def settings(text: str, *names: str) -> list[str]:
    """What bash makes of the settings' arrays and words, one a line."""
    shown = "; ".join(f'printf "%s\\n" "${{{name}[@]}}"' for name in names)
    begin = text.index("# ---- settings")
    part = text[text.index("CODE=") : text.index("\nset -uo", begin)]
    return subprocess.check_output(["bash", "-c", f"{part}\n{shown}"], text=True).splitlines()


def test_a_job_script_says_what_was_asked_for():
    text = script("--time", "8:00:00", "--partition", "gpu", "--account", "me", "--sbatch=--nice=5", "--exclusive")
    wanted = {"--nodes=4", "--gpus-per-node=8", "--time=8:00:00", "--partition=gpu", "--account=me", "--nice=5"}
    assert wanted | {"--exclusive", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(flags(text))
    assert [flag for flag in flags(text) if flag.startswith("--job-name")][-1] == "--job-name=my run", "the last wins"
    assert "--output=/runs/my run/job/slurm-%j.out" in flags(text)
    job = "/runs/my run/job"
    assert settings(text, "CODE", "ARGUMENTS", "NPROC_PER_NODE") == [f"{job}/code", f"{job}/config.yaml", "8"]


@pytest.mark.parametrize("array", [(), ("--array", "run.seed=1,2")])
@pytest.mark.parametrize(
    "text", ["$(touch {})", '"; touch {}; "', "'; touch {}; '", "$(touch {})'\"`touch {}`", "a #b", "-x %j $HOME"]
)
def test_values_reach_the_job_as_they_are(text: str, array: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    sentinel = tmp_path / "obeyed"
    hostile = text.replace("{}", str(sentinel))
    run_dir = f"{tmp_path}/{hostile}"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    more = ("--partition", hostile, "--account", hostile, f"--sbatch=--comment={hostile}", "--python", hostile)
    box = ("--container", hostile, "--container-mounts", hostile.replace(":", ""))
    rendered = script(*more, *box, *array, num_configs=2, run_dir=run_dir)
    config, own_dir = ("/job/config_1.yaml", "/task_1") if array else ("/job/config.yaml", "")
    found = settings(rendered, "CODE", "ARGUMENTS", "RUN_DIR", "PYTHON")
    assert found == [f"{run_dir}/job/code", run_dir + config, run_dir + own_dir, hostile]
    assert f"--container-image={hostile}" in settings(rendered, "SRUN")
    asked = {f"--{name}={hostile}" for name in ("partition", "account", "comment")}
    assert asked | {f"--job-name={Path(run_dir).name}"} <= set(flags(rendered))
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("where", "text"),
    [
        *(("run.dir", text) for text in ("a\n#SBATCH --uid=0", "a\ntouch obeyed", "a\rb", "a\x1b[2Jb", "a\u2028b")),
        *((option, "--x=a\ntouch obeyed") for option in ("--partition", "--sbatch", "--python")),
    ],
)
def test_control_characters_are_rejected_before_anything_is_written(where: str, text: str, tmp_path: Path):
    config = tmp_path / "config.yaml"
    run_dir = str(tmp_path / (text if where == "run.dir" else "run"))
    settings = {"run": {"dir": run_dir}, "data": {"path": "corpus"}, "train": {"global_batch_size": 128}}
    config.write_text(yaml.safe_dump(settings))
    more = () if where == "run.dir" else (f"{where}={text}",)
    command = _parser().parse_intermixed_args([str(config), *SUBMIT[1:], "--dry-run", *more])
    with pytest.raises(ValueError, match="control character") as rejected:
        submit(command)
    assert str(rejected.value).isprintable()
    assert list(tmp_path.iterdir()) == [config]


def test_tasks_that_share_a_folder_of_checkpoints_get_their_own_in_it(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("data: {path: corpus}\n")
    lines = tmp_path / "tasks.txt"
    lines.write_text("run.seed=1\nrun.seed=2\nrun.seed=3 checkpoint.dir=own\n")

    def configs(*options: str) -> list[RunConfig]:
        given = [str(tmp_path / "config.yaml"), "run.dir=runs/sweep", *SUBMIT[1:], *options]
        return [*_configs(_parser().parse_intermixed_args(given)).values()]

    def folders(*options: str) -> list[str | None]:
        return [config.checkpoint.dir for config in configs(*options)]

    def names(*options: str) -> list[str | None]:
        return [config.log.wandb.name for config in configs("log.wandb.project=p", "--array", *options)]

    assert folders("checkpoint.dir=X", "--array", "optimizer.lr=0.1,0.2") == ["X/task_0", "X/task_1"]
    assert folders("checkpoint.dir=X", "--array", str(lines)) == ["X/task_0", "X/task_1", "own"]
    assert folders("--array", "checkpoint.dir=a,b") == ["a", "b"]
    assert folders("--array", "run.seed=1,2") == [None, None]
    assert folders("checkpoint.dir=X") == ["X"]
    assert names("run.seed=1,2") == ["sweep/task_0", "sweep/task_1"]
    assert names("log.wandb.name=a,b") == ["a", "b"]
    chain = [str(tmp_path / "config.yaml"), "run.dir=runs/chain", *SUBMIT[1:], "--chain", "2"]
    (config,) = _configs(_parser().parse_intermixed_args(chain)).values()
    assert config.checkpoint.load == "latest", "each job of a chain continues the one before it"


def test_the_jobs_of_a_chain_need_not_be_requeued():
    text = script("--max-requeues", "0", "--after", "17")
    assert flags(text).index("--no-requeue") > flags(text).index("--requeue"), "the last wins"
    assert "--dependency=afterok:17" in flags(text) and settings(text, "MAX_REQUEUES") == ["0"]


@pytest.mark.parametrize(
    ("options", "followers"),
    [
        ((), ["--dependency=after:1 follow 1,2"]),
        (("--max-requeues", "0"), ["--dependency=after:1 follow 1,2", "--dependency=afterany:3 follow 1,2"]),
    ],
)
def test_who_scores_a_chain_is_one_where_it_cannot_be_requeued(options: tuple, followers: list, tmp_path, monkeypatch):
    """By what sbatch is given."""
    given = tmp_path / "given"
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\nshift; echo "$*" >>{given}; grep -c "" {given}\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    chosen = _parser().parse_intermixed_args([*SUBMIT, "--chain", "2", "--evaluate", "--data d", *options])
    queue(chosen, Path("job"), Path("follow"), 1)
    assert given.read_text().splitlines() == ["job", "--dependency=afterany:1 job", *followers]


def test_the_job_that_scores_has_its_own_size(monkeypatch: pytest.MonkeyPatch):
    options = ("--evaluate", "piqa 'arc easy'", "--evaluate-every", "500", "--evaluate-cpus", "6", "--mem", "900G")
    options = (*options, "--evaluate-sbatch=--mem=32G", "--time", "8:00:00", "--after", "17", "--sbatch=--nice=5")
    text = script(*options, "--exclusive", "--partition", "gpu", follows=True)
    wanted = {"--nodes=1", "--gpus-per-node=1", "--cpus-per-task=6", "--mem=32G", "--partition=gpu", "--time=8:00:00"}
    assert wanted | {"--requeue", "--job-name=my run-evaluate"} <= set(flags(text))
    others = ("--mem=900G", "--exclusive", "--nice=5", "--dependency=afterok:17")
    assert not set(others) & set(flags(text)) and set(others) <= set(flags(script(*options, "--exclusive")))
    shown = settings(text, "SCRIPT", "ARGUMENTS")
    assert shown == ["evaluate.sh", "--follow", "/runs/my run", "--tasks", "piqa", "arc easy", "--every", "500"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    more = ("--array", "run.seed=1,2,3", "--evaluate", "--suite paper", "--evaluate-gpus", "0")
    text = script(*more, num_configs=3, follows=True)
    assert settings(text, "ARGUMENTS") == ["--follow", "/runs/my run/task_2", "--suite", "paper"]
    assert "--array=0-2" in flags(text) and flags(text).count("--gpus-per-node=8") == 0
    assert 'FOLLOWED="${1:+${1}_$SLURM_ARRAY_TASK_ID}"' in text
    of_tasks = _followers("17", _parser().parse_intermixed_args([*SUBMIT, *more]), 2)
    assert of_tasks == [["--array=0", "--dependency=after:17_0"], ["--array=1", "--dependency=after:17_1"]]


def test_arrays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    text = script("--array", "run.seed=1,2,3", "--array-limit", "2", num_configs=3)
    assert "--array=0-2%2" in flags(text)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert settings(text, "ARGUMENTS", "RUN_DIR") == ["/runs/my run/job/config_2.yaml", "/runs/my run/task_2"]
    assert sweep("run.seed=1,2,3") == [["run.seed=1"], ["run.seed=2"], ["run.seed=3"]]
    (tmp_path / "sweep.txt").write_text("optimizer.lr=1e-3 run.seed=1  # one\n\n# none\noptimizer.lr=1e-4\n")
    assert sweep(str(tmp_path / "sweep.txt")) == [["optimizer.lr=1e-3", "run.seed=1"], ["optimizer.lr=1e-4"]]
    for wrong in ("no-such-file", "run.seed="):
        with pytest.raises(ValueError, match="--array"):
            sweep(wrong)


def test_containers():
    """Flags only: neither pyxis nor apptainer runs here."""
    pyxis = script("--container", "image.sqsh", "--container-mounts", "/data,/a:/b")
    image, mounts, workdir, home = settings(pyxis, "SRUN")
    assert (image, workdir) == ("--container-image=image.sqsh", f"--container-workdir={Path.cwd()}")
    assert home == "--no-container-mount-home"
    assert mounts == f"--container-mounts=/runs/my run:/runs/my run,{Path.cwd()}:{Path.cwd()},/data:/data,/a:/b"
    apptainer = script("--container", "image.sif", "--container-runtime", "apptainer", "--container-mounts", "/data")
    assert settings(apptainer, "WRAP") == [
        *("apptainer", "exec", "--nv", "--bind=/runs/my run", f"--bind={Path.cwd()}", "--bind=/data"),
        *(f"--pwd={Path.cwd()}", "image.sif"),
    ]
    assert settings(apptainer, "SRUN") == [""], "srun itself stays as it is"


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        *(("30", 1800), ("1:30", 90), ("8:00:00", 28800), ("2-12", 216000), ("1-0:30", 88200), ("1-0:0:5", 86405)),
        *(("UNLIMITED", None), (None, None)),
    ],
)
def test_time_limits(limit: str | None, seconds: int | None):
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--time", "5"), "--signal-lead 300 with --time 5 (300 s)"),
        (("--signal-lead", "0"), "--signal-lead 0"),
        (("--evaluate", "--data d", "--evaluate-time", "5"), "--signal-lead 300 with --evaluate-time 5 (300 s)"),
        (("--evaluate", "--data d", "--evaluate-gpus", "-1"), "--evaluate-gpus -1: set 0 or more"),
        (("--evaluate", "--data d", "--evaluate-cpus", "0"), "--evaluate-cpus 0: set 1 or more"),
        (("--chain", "2", "--array", "run.seed=1"), "--chain and --array"),
        (("--after", "1", "--dependency", "singleton"), "--after and --dependency"),
        (("--container-mounts", "/data"), "--container-mounts without --container"),
        *(
            ((f"--sbatch={given}",), f"--sbatch={given!r} is not one option")
            for given in (
                "nice=100",
                "--qos high",
                "-p debug",
                "--nice=100 --qos=high",
                "--nice=1 -p a",
                '--comment="my job"',
            )
        ),
    ],
)
def test_options_that_do_not_fit_together(options: tuple, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_options(_parser().parse_intermixed_args([*SUBMIT, *options]), Path("/run"))


def test_what_is_frozen_is_code_and_closed_to_others(tmp_path: Path):
    """Secrets beside the code stay there; changes of the code are recorded for its owner alone."""
    checkout, job = tmp_path / "checkout", tmp_path / "shared/run/job"
    code = {"launch/submit": "#!/bin/sh\n", "launch/a.py": "a = 1\n", "megatron_depthattn/b.sh": "b\n"}
    deleted = {"launch/logs": "#!/bin/sh\n", "megatron_depthattn/ä old.py": "old = 1\n"}
    secrets = ("launch/.env", "launch/credentials", "megatron_depthattn/key.pem", ".env", "launch/.netrc.py")
    secrets_deleted = ("launch/token", "launch/old.pem", "launch/.old.py")
    committed = code | deleted | dict.fromkeys(secrets, "none\n") | dict.fromkeys(secrets_deleted, "password\n")
    for name, text in committed.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "-f", "."), (*identity, "commit", "-qm", "all")):
        subprocess.run(["git", "-C", checkout, *command], check=True, timeout=30)
    for name in ("launch/a.py", *secrets):
        (checkout / name).write_text(f"password of {name}\n")
    for name in (*deleted, *secrets_deleted):
        (checkout / name).unlink()
    umask = os.umask(0)
    try:
        said = freeze(job, {"config.yaml": RunConfig()}, checkout, replace=False)
    finally:
        os.umask(umask)
    frozen = {str(path.relative_to(job / "code")): path for path in (job / "code").rglob("*") if path.is_file()}
    assert set(frozen) == {*code, "commit.txt", "uncommitted.diff"}
    assert job.stat().st_mode & 0o007 == 0, "no other user gets in, whatever the umask"
    assert frozen["uncommitted.diff"].stat().st_mode & 0o777 == 0o600
    diff = frozen["uncommitted.diff"].read_text()
    assert "+password of launch/a.py" in diff and diff.count("password") == 1
    assert diff.count("deleted file") == 2 and "\n-#!/bin/sh\n" in diff and "\n-old = 1\n" in diff
    left_out = "megatron_depthattn/key.pem, launch/.env, launch/.netrc.py, launch/credentials"
    assert said.endswith(f"left out, as no code: {left_out}")
    assert "holds this config and code already" in freeze(job, {"config.yaml": RunConfig()}, checkout, replace=False)


def test_all_code_of_this_repository_is_frozen(tmp_path: Path):
    tracked = subprocess.check_output(["git", "-C", REPOSITORY, "ls-files", *CODE_FOLDERS], text=True).split()
    freeze(tmp_path / "job", {"config.yaml": RunConfig()}, REPOSITORY, replace=False)
    frozen = tmp_path / "job/code"
    assert [name for name in tracked if (REPOSITORY / name).exists() and not (frozen / name).exists()] == []
    assert os.access(tmp_path / "job/code/launch/node.sh", os.X_OK)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("äß 漢字\t👩\u200d🚀\n", "äß 漢字\t👩\u200d🚀\n"),
        ("\x1b]0;title\x07\x1b[2J\r", "\\x1b]0;title\\x07\\x1b[2J\\r"),
        ("\x9b31m \x7f\0", "\\x9b31m \\x7f\\x00"),
        ("a\u202egpj.exe \udc80", "a\\u202egpj.exe \\udc80"),
    ],
)
def test_a_terminal_obeys_nothing_in_printable_text(text: str, shown: str):
    assert printable(text) == shown


def test_logs_of_other_hosts_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The newest start of each host, the first failure last; the files hold what was written."""
    attack = "a\x1b]0;owned\x07\x1b[2J\r50% | \x9bm"
    for start, rank in (("20260101T000000_a", 0), ("20260102T000000_a", 0), ("20260102T000001_b", 1)):
        folder = tmp_path / "logs" / start / "run_x/attempt_0/0"
        leave_record(folder, rank, 10.0 + rank, f"failed {attack}")
        (tmp_path / "logs" / start / f"rank_{rank:05d}_attempt_0").symlink_to("run_x/attempt_0/0")
        for stream in ("stdout", "stderr"):
            (folder / f"{stream}.log").write_text(f"{attack}\n")
    assert show_logs([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable() and shown.count("\\x1b[2J") == 5
    assert re.search(r"==== first failure, at .*: rank 0 on a\nfailed .*\n$", shown)
    for more, lines in ((("--all",), 7), (("--rank", "1", "--errors"), 2), (("--first-failure",), 1)):
        assert show_logs([str(tmp_path), *more]) == 0
        assert capsys.readouterr().out.count("\\x1b[2J") == lines


def test_help_of_submit_has_an_example_with_data_and_text_for_every_option():
    parser = _parser()
    assert "data.path=" in parser.format_help()
    assert [action.dest for action in parser._actions if not action.help] == []


DRIVER = """
#include <stdlib.h>
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **gpu) { *gpu = (void *)(long)(index + 1); return 0; }
int nvmlDeviceGetCudaComputeCapability(void *gpu, int *major, int *minor) {
    *major = (long)gpu == 1 ? 12 : atoi(getenv("CAPABILITY"));
    *minor = 0;
    return 0;
}
"""
"""A driver's library that knows two GPUs, the second of the capability that a variable says."""
TWO_RANKS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"OMP_NUM_THREADS": "7", "NCCL_DEBUG": "", "LD_LIBRARY_PATH": ""} | TWO_RANKS,
            {"OMP_NUM_THREADS": "7", "NCCL_DEBUG": "", "PYTHONUNBUFFERED": "1", QUEUES: None},
        ),
        ({"CAPABILITY": "9"} | TWO_RANKS, {QUEUES: "1", "OMP_NUM_THREADS": "1", "NCCL_DEBUG": "WARN"}),
        ({"CAPABILITY": "9"}, {QUEUES: None}),
        ({"CAPABILITY": "10"} | TWO_RANKS, {QUEUES: None}),
        ({"CAPABILITY": "9", QUEUES: "8"} | TWO_RANKS, {QUEUES: "8"}),
    ],
)
def test_the_environment_of_the_ranks(given: dict, expected: dict, tmp_path: Path):
    """The defaults of launch/environment.sh, and what a rank sets for CUDA; what the user has set stays."""
    (tmp_path / "nvml.c").write_text(DRIVER)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    show = "import json, os; from megatron_depthattn.launch.torchrun import set_environment as set; set()"
    show += "; from megatron_depthattn.parallel.launch_env import launch_environment as read; read()"
    command = [sys.executable, "-c", f"{show}; print(json.dumps(dict(os.environ)))"]
    variables = {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": str(tmp_path)} | given
    shown = json.loads(subprocess.check_output(command, cwd=REPOSITORY, env=variables))
    assert {name: shown.get(name) for name in expected} == expected


def test_torch_reads_every_variable_of_its_own_that_is_set_for_it():
    """By the names in its libraries: one that it does not read does nothing, and says nothing."""
    sources = [REPOSITORY / "launch" / "environment.sh"]
    sources += [REPOSITORY / "megatron_depthattn" / name for name in ("parallel/groups.py", "launch/torchrun.py")]
    pattern = r"TORCH_FR_\w+" + (r"|TORCH_NCCL_\w+" if torch.distributed.is_nccl_available() else "")
    names = {name for path in sources for name in re.findall(pattern, path.read_text())}
    assert {"TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"} <= names
    names.add("TORCH_FR_OF_NO_VERSION")
    for library in (Path(torch.__file__).parent / "lib").glob("libtorch_*.so"):
        with library.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            names = {name for name in names if content.find(f"\0{name}\0".encode()) < 0}
    assert names == {"TORCH_FR_OF_NO_VERSION"}


def test_a_rank_joins_on_its_own_gpu_and_later_groups_connect_at_first_use():
    """As torch's own code has it, with a backend in NCCL's place. Its control: a world that stays bound to its GPU."""
    found = json.loads(must_succeed(forked(0, "tests.e2e.pretend_nccl")).stdout)
    error, device, joining, after, bound = found
    assert error.startswith("rank 1 is number 2 on its host, from 0, and sees 2 GPUs: start as many ranks")
    assert device == "cuda:1" and joining == ["set cuda:1", "connect cuda:1"]
    assert after == []
    assert bound == ["connect cuda:1", "split without me cuda:1"]
