"""``python -m megatron_depthattn.train CONFIG.yaml [OVERLAY.yaml ...] [a.b=c ...]``, alone or under torchrun."""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback

from megatron_depthattn.config import load_config, validate
from megatron_depthattn.parallel.launch_env import LaunchEnvironment, end_with_launcher, launch_environment
from megatron_depthattn.quiet import silence_libraries
from megatron_depthattn.terminal import printable
from megatron_depthattn.train.errors import RunError, is_secondary_failure, leave_at_once, write_error_record
from megatron_depthattn.train.stop_signals import StopSignals

RANK_0_SECONDS = 10.0
"""How long a rank leaves it to rank 0 to report a mistake in the config, and to the launcher to end all ranks."""


def main() -> int:
    """Run the command; returns the exit code: 0 done, 75 stopped by a signal (start again), 1 an error."""
    signals = StopSignals()
    end_with_launcher()
    parser = argparse.ArgumentParser(prog="python -m megatron_depthattn.train", description="Train a decoder.")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="further YAML files and a.b=c settings, later ones win")
    arguments = parser.parse_args()
    silence_libraries()

    environment = LaunchEnvironment(rank=0, world_size=1, local_rank=0, launched=False)
    is_mistake_of_all = True
    try:
        environment = launch_environment()
        signals.rank = environment.rank
        # the config first: a mistake in it is reported before torch is imported
        config = load_config(arguments.config, arguments.overrides)
        validate(config, environment.world_size)
        is_mistake_of_all = False
        from megatron_depthattn.train.loop import train

        return train(config, environment, signals)
    except SystemExit:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        is_stopped = signals.received and signals.nothing_to_save
        if not (is_stopped and is_secondary_failure(error)):  # another rank got the signal too
            if is_mistake_of_all and isinstance(error, ValueError) and environment.rank > 0:
                # Rank 0 reports the same; to end before it does would let torchrun end it, before its line is out.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(RANK_0_SECONDS)
            text = f"error (rank {environment.rank}): {error}"
            if not isinstance(error, ValueError | OSError | RunError):  # those are the user's to fix
                text = "".join(traceback.format_exception(error))
            write_error_record(environment, error, text)
            print(printable(text), file=sys.stderr, flush=True)
        if is_stopped:
            signals.leave(signals.received)
    return 1


if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this module again
    # No shutdown of the interpreter: a thread that is in a torch operation then (data are read ahead) would abort the
    # process, and exit handlers may wait for ranks that wait for this one.
    leave_at_once(main())
