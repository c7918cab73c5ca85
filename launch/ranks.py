"""torchrun, with what its command line has no word for: log files named by rank, and how each rank ended, as JSON.

    python -m launch.ranks LOG_FOLDER REPORT.json <torchrun's arguments>

A rank writes to LOG_FOLDER/rank_<N>.out and .err, itself and from its first line on; an error record goes to
error_rank_<N>.json (torchrun's TORCHELASTIC_ERROR_FILE). torchrun exits with 1 whatever its ranks return; the report
holds the exit codes of those that failed first, {"rank", "local_rank", "pid", "exit_code", "time"} each.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import LogsDest, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from megatron_depthattn.train.stop_signals import STOP_SIGNALS

PR_SET_PDEATHSIG = 1


class RankLogs(DefaultLogsSpecs):
    """Files of one folder, named by global rank; nothing goes to the console from here."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Where the output and the error record of each local rank go."""
        names = {local: f"{self.root_log_dir}/{{}}rank_{int(env['RANK']):05d}." for local, env in envs.items()}
        errors = {local: name.format("error_") + "json" for local, name in names.items()}
        for local, env in envs.items():
            env["TORCHELASTIC_ERROR_FILE"] = errors[local]
        return LogsDest(
            stdouts={local: name.format("") + "out" for local, name in names.items()},
            stderrs={local: name.format("") + "err" for local, name in names.items()},
            error_files=errors,
            filtered_stdout=os.devnull,
            filtered_stderr=os.devnull,
        )


def main() -> int:
    """Exit code 0, or 1 with a report."""
    folder, report, *arguments = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # should the launcher be killed, the ranks save and end
    config, command, command_arguments = config_from_args(parse_args(arguments))
    config.logs_specs = RankLogs(log_dir=folder)
    config.signals_to_handle = "SIGQUIT"  # all others are ours, see _pass_on
    for number in STOP_SIGNALS:
        signal.signal(number, _pass_on)
    try:
        elastic_launch(config=config, entrypoint=command)(*command_arguments)
    except ChildFailedError as error:
        failures = [
            {"rank": rank, "local_rank": failed.local_rank, "pid": failed.pid, "exit_code": failed.exitcode}
            for rank, failed in error.failures.items()
        ]
        Path(report).write_text(json.dumps([failure | {"time": time.time()} for failure in failures]), encoding="utf-8")
        return 1
    except SignalException:  # the ranks were told, and have ended or were killed
        return 1
    return 0


def _pass_on(number: int, _: FrameType | None) -> None:
    """Tell the ranks, and wait for their end as without a signal.

    torchrun itself would tell them, begin to count the seconds until it kills them, and no longer wait when it is told
    again. A scheduler tells all processes of a job at once, and this one hears the same from its launcher.
    """
    ranks = psutil.Process().children()
    for rank in ranks:
        with contextlib.suppress(psutil.Error):
            rank.send_signal(number)
    if not ranks:  # none was started yet
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
