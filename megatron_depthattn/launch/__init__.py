"""Start runs: torchrun with this package's exit codes, Slurm jobs, logs of all ranks."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import megatron_depthattn
from megatron_depthattn.terminal import printable

EXIT_DONE, EXIT_ERROR, EXIT_HANG, EXIT_REQUEUE = 0, 1, 70, 75
"""What launchers return; the last two are those of a training process."""
SHUTDOWN_SECONDS = 600
"""How long ranks that were asked to stop may take to save (``--shutdown-timeout``)."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""Which a launcher passes on to its ranks."""


def heeded_signals() -> list[signal.Signals]:
    """Those of `SIGNALS` that are not ignored: after nohup a lost terminal is nothing to stop for."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def exit_code(codes: set[int]) -> int:
    """What the ranks' exit codes mean together. Ranks that torchrun ended after a failure have -SIGTERM, or 75."""
    failed = codes - {EXIT_DONE, EXIT_REQUEUE} - {-number for number in SIGNALS}
    if failed:
        return EXIT_HANG if EXIT_HANG in failed else EXIT_ERROR
    return EXIT_DONE if codes <= {EXIT_DONE} else EXIT_REQUEUE


def report(text: str) -> None:
    """Print to stderr what a terminal may show."""
    print(printable(text), file=sys.stderr, flush=True)


def scripts() -> Path:
    """The folder of shell scripts: ``launch/`` of the checkout, or its copy inside an installed package."""
    package = Path(megatron_depthattn.__file__).parent
    beside = package.parent / "launch"
    return beside if (beside / "slurm.sbatch").is_file() else package / "launch" / "scripts"
