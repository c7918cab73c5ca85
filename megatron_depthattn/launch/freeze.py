"""What a job will run, kept in the run's folder: resolved configs and code, whatever happens to the checkout.

The folder is closed to other users, whatever the umask, and holds code alone: what else lies in the checkout's folders
(settings with passwords, keys, notebooks) stays there. The record of uncommitted changes is the owner's alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import shutil
import subprocess
import time
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
    code, others = _files(repository)
    for path in code:
        (part / "code" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / path, part / "code" / path)
    names = _git(repository, "diff", "HEAD", "--name-only", "--no-renames", "--relative", "-z", "--", *CODE_FOLDERS)
    changed = [name for name in names.split("\0") if name and _is_code(Path(name))]  # deleted files as well
    changes = _git(repository, "diff", "HEAD", "--no-renames", "--", *changed) if changed else ""
    commit = _git(repository, "rev-parse", "HEAD").strip() or "no git repository"
    (part / "code/commit.txt").write_text(commit + ", with uncommitted.diff" * bool(changes) + "\n", encoding="utf-8")
    if changes:
        record = part / "code/uncommitted.diff"
        record.touch(mode=0o600)
        record.write_text(changes, encoding="utf-8")
    part.rename(job)
    left_out = f"; left out, as no code: {', '.join(map(str, others))}" if others else ""
    return f"frozen in {job}: {len(configs)} config(s), code {code_digest(job / 'code')}{left_out}"


def code_digest(root: Path) -> str:
    """SHA-256 of the code below ``root``, shortened."""
    digest = hashlib.sha256()
    for name in _files(root)[0]:
        digest.update(str(name).encode() + b"\0" + (root / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _files(root: Path) -> tuple[list[Path], list[Path]]:
    """The files in the folders that are frozen, relative to ``root``: code, and all others."""
    folders = CODE_FOLDERS if (root / "launch/submit").is_file() else CODE_FOLDERS[:1]
    paths = [path for folder in folders for path in sorted((root / folder).rglob("*")) if path.is_file()]
    names = [path.relative_to(root) for path in paths if "__pycache__" not in path.parts]
    return [name for name in names if _is_code(name)], [name for name in names if not _is_code(name)]


def _is_code(name: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in name.parts)
    return not is_hidden and (name.suffix in CODE_SUFFIXES or name.name in COMMANDS)


def _differences(job: Path, configs: dict[str, RunConfig], repository: Path) -> list[str]:
    """What a frozen job has otherwise, for people."""
    frozen = {path.name: load_config(path) for path in job.glob("*.yaml")}
    found = [f"set of configs ({len(frozen)}, now {len(configs)})"] if frozen.keys() != configs.keys() else []
    for name in sorted(frozen.keys() & configs.keys()):
        for get, key in ((operator.attrgetter(key), key) for key in config_keys()):
            if (was := get(frozen[name])) != (now := get(configs[name])):
                found.append(f"{key} ({name}: {was}, now {now})")
    was, now = code_digest(job / "code"), code_digest(repository)
    return found + ([f"code (digest {was}, now {now})"] if was != now else [])


def _git(repository: Path, *arguments: str) -> str:
    """Output of a git command; empty where that is no git repository, or there is no git."""
    command = ["git", "-C", str(repository), *arguments]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
        return "" if done.returncode else done.stdout
    return ""
