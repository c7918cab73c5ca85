"""``python -m megatron_depthattn.train CONFIG.yaml [OVERLAY.yaml ...] [a.b=c ...]``, alone or under torchrun."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import traceback
import warnings

# What Megatron-Core and torch say, on every rank, about optional packages and themselves; none of it is about the run.
_NOISE = (
    "Apex|Transformer Engine",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "`load_state_dict` is deprecated",
)


def main() -> int:
    """Run the command; returns the exit code: 0 done, 75 saved after a signal (start again), 1 an error."""
    parser = argparse.ArgumentParser(prog="python -m megatron_depthattn.train", description="Train a decoder.")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="further YAML files and a.b=c settings, later ones win")
    arguments = parser.parse_args()
    silence_noise()

    from megatron_depthattn.config import load_config, validate
    from megatron_depthattn.parallel.launch_env import launch_environment

    rank = 0
    try:  # the config first: a mistake in it is told before torch is imported
        environment = launch_environment()
        rank = environment.rank
        config = load_config(arguments.config, arguments.overrides)
        validate(config, environment.world_size)
    except ValueError as error:
        return _fail(error, rank)

    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_depthattn.train.loop import train
    from megatron_depthattn.train.run_checkpoints import CheckpointError
    from megatron_depthattn.train.step import NonFiniteError

    try:
        return train(config, environment)
    except (ValueError, OSError, NonFiniteError, CheckpointError) as error:
        _fail(error, rank)
    except (Exception, CheckpointException):  # the latter is none of the former
        traceback.print_exc()
    if environment.world_size > 1:
        _leave_at_once()
    return 1


def _fail(error: Exception, rank: int) -> int:
    print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
    return 1


def _leave_at_once() -> None:
    """Exit handlers would wait for ranks that may wait for this one; once it is gone, the launcher ends the others."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def silence_noise() -> None:
    """Before torch and Megatron-Core are imported, so that a user's first lines are about the run."""
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=f".*({pattern})")
    for name in ("megatron.core", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this module again
    sys.exit(main())
