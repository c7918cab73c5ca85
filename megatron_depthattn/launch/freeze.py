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
from collections.abc import Iterator
from pathlib import Path

from megatron_depthattn.config import RunConfig, config_keys, load_config, save_config

CODE_FOLDERS = ("megatron_depthattn", "launch")
"""In a checkout; an installed package has its scripts inside."""
CODE_SUFFIXES = (".py", ".sh", ".sbatch", ".j2", ".yaml")
COMMANDS = ("logs", "submit")
"""Of the files that a job runs, those without a suffix."""


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
    code = [name for name in _files(repository) if _is_code(name)]
    left_out = [str(name) for name in _files(repository) if not _is_code(name)]
    for path in code:
        (part / "code" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / path, part / "code" / path)
    commit = _git(repository, "rev-parse", "HEAD").strip()
    names = _git(repository, "diff", "HEAD", "--name-only", "--no-renames", "--relative", "-z", "--", *CODE_FOLDERS)
    changed = [name for name in names.split("\0") if name and _is_code(Path(name))]  # deleted files as well
    changes = _git(repository, "diff", "HEAD", "--no-renames", "--", *changed) if changed else ""
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
    for name in filter(_is_code, _files(root)):
        digest.update(str(name).encode() + b"\0" + (root / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _files(root: Path) -> Iterator[Path]:
    """Every file in the folders that are frozen, relative to ``root``."""
    for folder in CODE_FOLDERS if (root / "launch/submit").is_file() else CODE_FOLDERS[:1]:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(root)


def _is_code(name: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in name.parts)
    return not is_hidden and (name.suffix in CODE_SUFFIXES or name.name in COMMANDS)


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
