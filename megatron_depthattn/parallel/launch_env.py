"""The only place that touches environment variables: what torchrun (or nobody) says about this process, what steers
communication, and what a library takes in no other way."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple


class LaunchEnvironment(NamedTuple):
    """This process's place among all processes."""

    rank: int
    world_size: int
    local_rank: int
    launched: bool
    """Whether a launcher set the variables; without one this is a world of one."""
    error_file: str | None = None
    """Where the launcher looks for what ended this process."""


QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
"""The variable that says how many hardware queues a GPU has. Megatron's tensor and context parallelism overlap a
collective with the matrix product that was launched after it, which before Blackwell is in order with a single queue
only; from then on one costs overlap, as it does in a world of one."""
BLACKWELL = 10


def gpu_generation() -> int:
    """The lowest major compute capability of this host's GPUs, asked of the driver without starting CUDA; 0: none."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count, gpu, major, minor = ctypes.c_uint(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    found = []
    if nvml.nvmlInit_v2() == 0:
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for number in range(count.value):
            nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(gpu))
            if nvml.nvmlDeviceGetCudaComputeCapability(gpu, ctypes.byref(major), ctypes.byref(minor)) == 0:
                found.append(major.value)
        nvml.nvmlShutdown()
    return min(found, default=0)


def launch_environment() -> LaunchEnvironment:
    """Read torchrun's variables, and set with what CUDA is to start: call it before anything asks for a GPU.

    Raises:
        ValueError: some of them are set and others are not, as guessing would start worlds that never meet; or one is
            not a number that it can be.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if len(missing) == len(names):
        return LaunchEnvironment(rank=0, world_size=1, local_rank=0, launched=False)
    if missing:
        raise ValueError(
            f"the environment sets some of torchrun's variables but not {', '.join(missing)}: start the program "
            "with torchrun, or unset RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for a world of one."
        )
    world_size = _whole("WORLD_SIZE", "how many ranks there are", 1, 10**9)
    rank = _whole("RANK", "which of the WORLD_SIZE ranks this is", 0, world_size - 1)
    local_rank = _whole("LOCAL_RANK", "which rank of its host this is", 0, world_size - 1)
    _whole("MASTER_PORT", "the port at which ranks find each other on MASTER_ADDR", 1, 65535)
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE") or None
    if world_size > 1 and QUEUES not in os.environ and 0 < gpu_generation() < BLACKWELL:
        os.environ[QUEUES] = "1"
    return LaunchEnvironment(rank, world_size, local_rank, launched=True, error_file=error_file)


def _whole(name: str, meaning: str, least: int, most: int) -> int:
    value = os.environ[name].strip()
    if not re.fullmatch(r"[0-9]{1,10}", value) or not least <= int(value) <= most:
        raise ValueError(
            f"{name}={value[:40]} is not a whole number from {least} to {most}; it says {meaning}: start the program "
            f"with torchrun, which sets it, or set {name} to such a number."
        )
    return int(value)


def store_address() -> str:
    """Where torchrun's variables say that ranks find each other."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def attempt() -> str:
    """A name for this start of the ranks, in a store that torchrun keeps over restarts; with a new store always one.

    Nodes may count restarts differently where each start has a new store.
    """
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    return f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if is_kept else ''}"


def variable(name: str, default: str = "") -> str:
    """A variable of the launcher."""
    return os.environ.get(name, default)


def set_variables(**values: str) -> None:
    """For this process and those that it starts."""
    os.environ.update(values)


def unset_variable(name: str) -> None:
    """For this process and those that it starts."""
    os.environ.pop(name, None)


def set_defaults(**values: str) -> None:
    """The same, where the user has set nothing."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


@contextmanager
def _default_within(name: str, value: str) -> Iterator[None]:
    """A variable for what is within; what the user has set wins."""
    is_set = name in os.environ
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if not is_set:
            del os.environ[name]


def quiet_torch() -> AbstractContextManager[None]:
    """No warnings of torch's C++, for imports within: torch reads the level once."""
    return _default_within("TORCH_CPP_LOG_LEVEL", "FATAL")


_COMMUNICATION = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_", "NVTE_", QUEUES)


def communication_variables() -> dict[str, str]:
    """What is set of the variables that steer communication or Megatron's overlap, by name: to be compared."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_COMMUNICATION)}


def finds_compiler(variable: str, *names: str) -> bool:
    """Whether torch or Triton finds a compiler: what the variable (CC or CXX) names, or one of ``names`` on PATH."""
    named = os.environ.get(variable)
    return any(map(shutil.which, [named] if named else names))


def pickled_fp8_scales_allowed() -> AbstractContextManager[None]:
    """Let TransformerEngine load the state of delayed FP8 scaling, which it saves as a pickle.

    Without the variable TransformerEngine 2.20 does not, and a run could not resume from its own checkpoint. Only for
    state that `check_fp8_state` has let through.
    """
    return _default_within("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")


def end_with_launcher() -> None:
    """Let the kernel send SIGTERM to this process when torchrun, which started it, has been killed."""
    if os.environ.get("TORCHELASTIC_RUN_ID") is not None:
        end_with_parent()


def end_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when the one that started it has ended."""
    with contextlib.suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def job_environment(jobs: int) -> dict[str, str]:
    """This process's environment; of several jobs each gets its share of the cores, unless OMP_NUM_THREADS is set."""
    share = max(1, len(os.sched_getaffinity(0)) // jobs)
    return {**({"OMP_NUM_THREADS": str(share)} if jobs > 1 else {}), **os.environ}
