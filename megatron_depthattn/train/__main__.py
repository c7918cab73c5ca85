"""``python -m megatron_depthattn.train CONFIG.yaml [OVERLAY.yaml ...] [a.b=c ...]``, alone or under torchrun."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings

# What Megatron-Core says at import when optional packages are absent; none of them is used on the local backend.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m megatron_depthattn.train", description="Train a decoder.")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="further YAML files and a.b=c settings, later ones win")
    arguments = parser.parse_args()
    logging.getLogger("megatron.core").setLevel(logging.ERROR)

    from megatron_depthattn.config import load_config
    from megatron_depthattn.parallel.launch_env import launch_environment
    from megatron_depthattn.train.loop import train
    from megatron_depthattn.train.step import NonFiniteError

    rank = 0
    try:
        environment = launch_environment()
        rank = environment.rank
        train(load_config(arguments.config, arguments.overrides), environment)
    except (ValueError, NonFiniteError) as error:
        print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this module again
    sys.exit(main())
