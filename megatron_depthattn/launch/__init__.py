"""Start runs: torchrun with this package's exit codes, Slurm jobs, logs of all ranks."""

from __future__ import annotations

import signal
from pathlib import Path

import megatron_depthattn

EXIT_DONE, EXIT_ERROR, EXIT_HANG, EXIT_REQUEUE = 0, 1, 70, 75
"""What launchers return; the last two are those of a training process."""
SHUTDOWN_SECONDS = 600
"""How long ranks that were asked to stop may take to save (``--shutdown-timeout``)."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""Which a launcher passes on to its ranks."""


def heeded_signals() -> list[signal.Signals]:
    """Those of `SIGNALS` that are not ignored: after nohup a lost terminal is nothing to stop for."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def scripts() -> Path:
    """The folder of shell scripts: ``launch/`` of the checkout, or its copy inside an installed package."""
    package = Path(megatron_depthattn.__file__).parent
    beside = package.parent / "launch"
    return beside if (beside / "slurm.sbatch").is_file() else package / "launch" / "scripts"
