"""What a job will run, kept in the run's folder: resolved configs and code, whatever happens to the checkout.

The folder is closed to other users, whatever the umask, and holds code alone: what else lies in the checkout's folders
(settings with passwords, keys, notebooks) stays there. The record of uncommitted changes is the owner's alone.
"""

from __future__ import annotations

import hashlib
import operator
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_depthattn.config import RunConfig, config_keys, load_config, save_config

CODE_FOLDERS = ("megatron_depthattn", "launch")
"""In a checkout; an installed package has its scripts inside."""
CODE_SUFFIXES = (".py", ".sh", ".sbatch", ".j2", ".yaml")
"""Of the files that a job runs, beside commands without a suffix."""


def freeze(job: Path, configs: dict[str, RunConfig], repository: Path, *, replace: bool) -> str:
    """Make ``job`` hold these configs, under these file names, and the repository's code; returns what was done.

    A folder that holds the same already stays as it is. ``replace``: another one is renamed, not removed.

    Raises:
        ValueError: the folder holds another config or code, and ``replace`` is false.
    """
    if job.exists():
        differences = _differences(job, configs, repository)
        if not differences:
            return f"{job} holds this config and code already: the run resumes with them"
        if not replace:
            raise ValueError(
                f"{job} holds a job frozen with another {'; another '.join(differences[:4])}. Set another run.dir, or "
                "give --refreeze to resume with this config and code (the old folder is kept beside it)."
            )
        job.rename(job.with_name(f"{job.name}.{time.strftime('%Y%m%dT%H%M%S')}"))
    part = job.with_name(f".{job.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    part.mkdir(mode=0o770)
    for name, config in configs.items():
        save_config(config, part / name)
    files = list(_files(repository))
    code = [name for name, is_code in files if is_code]
    left_out = [name for name, is_code in files if not is_code]
    for name in code:
        (part / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / name, part / "code" / name)
    commit = _git(repository, "rev-parse", "HEAD").strip()
    changes = _git(repository, "diff", "HEAD", "--", *code, *_deleted_code(repository)) if commit else ""
    with_changes = ", with uncommitted.diff" if changes else ""
    (part / "code/commit.txt").write_text(f"{commit or 'no git repository'}{with_changes}\n", encoding="utf-8")
    if changes:
        record = os.open(part / "code/uncommitted.diff", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(record, "w", encoding="utf-8") as file:
            file.write(changes)
    part.rename(job)
    not_code = f"; left out, as no code: {', '.join(left_out)}" if left_out else ""
    many = "s" if len(configs) > 1 else ""
    return f"frozen in {job}: {len(configs)} config{many}, code {code_digest(job / 'code')}{not_code}"


def code_digest(root: Path) -> str:
    """SHA-256 of the code below ``root``, shortened."""
    digest = hashlib.sha256()
    for name, is_code in _files(root):
        if is_code:
            digest.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _files(root: Path) -> Iterator[tuple[str, bool]]:
    """Name and whether it is code, of every file in the folders that are frozen."""
    for folder in CODE_FOLDERS if (root / "launch/submit").is_file() else CODE_FOLDERS[:1]:
        for path in sorted((root / folder).rglob("*")):
            name = path.relative_to(root)
            if path.is_file() and "__pycache__" not in name.parts:
                yield name.as_posix(), _is_code(name, lambda name: _is_command(root / name))


def _deleted_code(repository: Path) -> list[str]:
    """Names of the commit's code files that are there no more: part of the changes, as the others are."""
    options = ("--name-only", "--no-renames", "--diff-filter=D", "--relative", "-z")
    names = [Path(name) for name in _git(repository, "diff", "HEAD", *options, "--", *CODE_FOLDERS).split("\0") if name]

    def was_command(name: Path) -> bool:
        return _git(repository, "show", f"HEAD:./{name}").startswith("#!")

    return [str(name) for name in names if _is_code(name, was_command)]


def _is_code(name: Path, is_command: Callable[[Path], bool]) -> bool:
    is_hidden = any(part.startswith(".") for part in name.parts)
    return not is_hidden and (name.suffix in CODE_SUFFIXES or (not name.suffix and is_command(name)))


def _is_command(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def _differences(job: Path, configs: dict[str, RunConfig], repository: Path) -> list[str]:
    """What a frozen job has otherwise, for people."""
    found = []
    frozen = {path.name for path in job.glob("*.yaml")}
    if frozen != configs.keys():
        found.append(f"set of configs ({len(frozen)}, now {len(configs)})")
    for name in sorted(frozen & configs.keys()):
        before = load_config(job / name)
        for key in config_keys():
            was, now = operator.attrgetter(key)(before), operator.attrgetter(key)(configs[name])
            if was != now:
                found.append(f"{key} ({name}: {was}, now {now})")
    codes = code_digest(job / "code"), code_digest(repository)
    return found + ([f"code (digest {codes[0]}, now {codes[1]})"] if codes[0] != codes[1] else [])


def _git(repository: Path, *arguments: str) -> str:
    """Output of a git command; empty where that is no git repository, or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments],
            capture_output=True, text=True, errors="replace", timeout=60, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
