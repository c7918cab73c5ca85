"""What a job will run, kept in the run's folder: resolved configs and code, whatever happens to the checkout."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
from pathlib import Path

from megatron_depthattn.config import RunConfig, load_config, save_config, to_dict

CODE_FOLDERS = ("megatron_depthattn", "launch")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")


def freeze(job: Path, configs: dict[str, RunConfig], repository: Path, *, replace: bool) -> str:
    """Make ``job`` hold these configs, under these file names, and the repository's code; returns what was done.

    A folder that holds the same already stays as it is. ``replace``: another one is renamed, not removed.

    Raises:
        ValueError: the folder holds another config or code, and ``replace`` is false.
    """
    if job.exists():
        differences = _differences(job, configs, repository)
        if not differences:
            return f"{job} holds this config and code already: the run goes on with them"
        if not replace:
            raise ValueError(
                f"{job} holds a job frozen with another {'; another '.join(differences[:4])}. Set another run.dir, or "
                "give --refreeze to go on with this config and code (the old folder is kept beside it)."
            )
        job.rename(job.with_name(f"{job.name}.{time.strftime('%Y%m%dT%H%M%S')}"))
    part = job.with_name(f".{job.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name, config in configs.items():
        save_config(config, part / name)
    for folder in CODE_FOLDERS:
        shutil.copytree(repository / folder, part / "code" / folder, ignore=_LEFT_OUT)
    commit = _git(repository, "rev-parse", "HEAD").strip()
    changes = _git(repository, "diff", "HEAD") if commit else ""
    (part / "code/commit.txt").write_text(
        f"{commit or 'no git repository'}{', with uncommitted.diff' if changes else ''}\n", encoding="utf-8"
    )
    if changes:
        (part / "code/uncommitted.diff").write_text(changes, encoding="utf-8")
    part.rename(job)
    return f"frozen in {job}: {len(configs)} config{'s' if len(configs) > 1 else ''}, code {code_digest(job / 'code')}"


def code_digest(root: Path) -> str:
    """SHA-256 of the frozen folders' files below ``root``, shortened."""
    digest = hashlib.sha256()
    for folder in CODE_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _differences(job: Path, configs: dict[str, RunConfig], repository: Path) -> list[str]:
    """What a frozen job has otherwise, for people."""
    found = []
    frozen = {path.name for path in job.glob("*.yaml")}
    if frozen != configs.keys():
        found.append(f"set of configs ({len(frozen)}, now {len(configs)})")
    for name in sorted(frozen & configs.keys()):
        before, now = (_flat(to_dict(config)) for config in (load_config(job / name), configs[name]))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                found.append(f"{key} ({name}: {before.get(key)}, now {now.get(key)})")
    codes = code_digest(job / "code"), code_digest(repository)
    return found + ([f"code (digest {codes[0]}, now {codes[1]})"] if codes[0] != codes[1] else [])


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _git(repository: Path, *arguments: str) -> str:
    """Output of a git command; empty where that is no git repository, or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""
