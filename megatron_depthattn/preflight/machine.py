"""What this process finds on its machine. Importing this file needs the standard library only: the doctor uses it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from megatron_depthattn.preflight.report import Device, Folder

PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "triton", "transformers", "mosaicml-streaming", "deepspeed"),
    "emerging-optimizers",
)
"""Distributions whose version matters to the numbers or to the wire."""
_MODULES = {"megatron-core": "megatron.core", "mosaicml-streaming": "streaming"}
"""Those whose module has another name."""
PROBE_BYTES = 64 * 1024


def versions() -> dict[str, str | None]:
    """Versions by distribution: of the module where it is imported already, else of what is installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        module = sys.modules.get(_MODULES.get(name, name.replace("-", "_")))
        found[name] = getattr(module, "__version__", None) or installed_version(name)
    return found


def installed_version(distribution: str) -> str | None:
    """The version that pip installed; None if it is not there."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


def driver_version() -> str | None:
    """The NVIDIA driver's version, from the kernel; None where there is none."""
    with suppress(OSError):
        found = re.search(r"Kernel Module\D*\s(\d+(?:\.\d+)+)", Path("/proc/driver/nvidia/version").read_text())
        return found[1] if found else None
    return None


def gpu_versions() -> dict[str, str | None]:
    """Driver, CUDA and NCCL under torch; empty on a machine without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    return {"driver": driver_version(), "cuda": torch.version.cuda, "nccl": nccl}


def find_device(local_rank: int) -> Device:
    """The GPU of this local rank, or the CPU on a machine without one."""
    import torch

    if not torch.cuda.is_available():
        return Device(name="cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        return Device(name="none", problem=f"its local rank is {local_rank} and the process sees {count} GPUs")
    try:
        properties = torch.cuda.get_device_properties(local_rank)
        free, total = torch.cuda.mem_get_info(local_rank)
    except RuntimeError as error:  # another process has it alone, or it has fallen off the bus
        return Device(name="none", problem=f"GPU {local_rank} does not answer: {str(error).splitlines()[0]}")
    return Device(
        name=properties.name,
        uuid=str(getattr(properties, "uuid", "")) or None,
        total_bytes=total,
        free_bytes=free,
        generation=properties.major,
    )


def machine_id() -> str:
    """Boot id and network namespace: what distinguishes hosts of the same name."""
    boot = network = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        network = os.readlink("/proc/self/ns/net")
    return f"{boot} {network}".strip()


def own_address() -> str | None:
    """The IPv4 address that the host's name resolves to."""
    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return None


def shared_memory_bytes() -> int | None:
    """Free in /dev/shm."""
    with suppress(OSError):
        return shutil.disk_usage("/dev/shm").free
    return None


def memory_bytes() -> int:
    """Host memory that a process can still get; 0 if the kernel does not say."""
    with suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def probe_path(folder: str | Path, rank: int) -> Path:
    """The file that a rank writes to see whether it can."""
    return Path(folder) / f".preflight_{rank}"


def _open_no_link(path: str, flags: int) -> int:
    """In a folder that others can write to, the name may be a link of theirs to a file of ours."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def probe_folder(key: str, path: str | Path, rank: int, token: str) -> Folder:
    """Make the folder if need be, write a small file that begins with ``token``, force it to disk.

    The file stays until `remove_probe`: rank 0 looks for it, to learn whether the folder is the same one.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with open(probe_path(path, rank), "w", opener=_open_no_link) as file:
            file.write(token.ljust(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        return Folder(key=key, path=str(path), free_bytes=shutil.disk_usage(path).free)
    except OSError as error:
        return Folder(key=key, path=str(path), problem=error.strerror or str(error))


def probe_temporary() -> Folder:
    """The same for the place of temporary files, which has no key."""
    key = "temporary files (TMPDIR)"
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(b" " * PROBE_BYTES)
            file.flush()
            return Folder(key=key, path=tempfile.gettempdir(), free_bytes=shutil.disk_usage(file.name).free)
    except OSError as error:
        return Folder(key=key, path=tempfile.tempdir or "", problem=error.strerror or str(error))


def sees_probe(folder: str | Path, rank: int, token: str) -> bool:
    """Whether this process finds what ``rank`` wrote there."""
    with suppress(OSError), open(probe_path(folder, rank), opener=_open_no_link) as file:
        return file.read(len(token)) == token
    return False


def remove_probe(folder: str | Path, rank: int) -> None:
    """Remove this rank's file."""
    with suppress(OSError):
        probe_path(folder, rank).unlink(missing_ok=True)
