"""What one rank reports of itself, and what a run requires of a host; plain values that travel as JSON.

Every field has a default, and a field that a reader does not know is dropped: two versions of this file must be able
to find out that they are two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder that the run writes to, as one rank finds it."""

    key: str = ""
    """The config's key that names it."""
    path: str = ""
    free_bytes: int | None = None
    problem: str | None = None
    """Why nothing can be written there; None: a file was written there and forced to disk."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the rank computes on."""

    name: str = "cpu"
    uuid: str | None = None
    """CUDA's name for this one device of all; None on CPU."""
    total_bytes: int = 0
    """Of the GPU's memory; 0 on CPU."""
    free_bytes: int = 0
    generation: int = 0
    """Major compute capability; 0 on CPU."""
    problem: str | None = None
    """Why there is no such device for this rank."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """One rank's machine, software and settings."""

    rank: int = 0
    host: str = ""
    machine: str = ""
    """Boot id and network namespace: distinguishes machines that share a name."""
    address: str | None = None
    """What the host's name resolves to; None: nothing."""
    device: Device = field(default_factory=Device)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """Of python, torch, megatron-core and the others; None: not installed."""
    code: str = ""
    """Digest of the package's source that this rank imported."""
    code_path: str = ""
    config: str = ""
    """Digest of the resolved config."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The resolved config, by dotted key; where `auto` was given, why it became that as well."""
    folders: tuple[Folder, ...] = ()
    shared_memory_bytes: int | None = None
    """Free in /dev/shm; None: there is none."""
    memory_bytes: int = 0
    """Of the host, available."""
    open_files: int = 0
    """The soft limit (ulimit -n)."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that steer communication."""
    token: str = ""
    """What its files in ``folders`` begin with."""


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What the config takes of every host; see `requirements_of`."""

    checkpoint_bytes: int = 0
    """Of one checkpoint."""
    checkpoints: int = 1
    """How many more of them the folder must take before old ones are removed."""
    shared_memory_bytes: int = 0
    """Of one rank, at most."""
    single_queue: bool = False
    """Whether collectives overlap with matrix products; see `launch_env.QUEUES`."""


def from_json(values: Mapping[str, Any]) -> RankReport:
    """The report of nested plain values; what this version does not know is left out."""
    folders = tuple(_known(Folder, folder) for folder in values.get("folders", ()))
    device = _known(Device, values.get("device", {}))
    return dataclasses.replace(_known(RankReport, values), device=device, folders=folders)


def _known(cls: type[T], values: Mapping[str, Any]) -> T:
    names = {each.name for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in values.items() if name in names})
