"""``torchrun ... -m megatron_depthattn.preflight CONFIG.yaml [OVERLAY.yaml ...] [a.b=c ...]``: check, train nothing.

Exit code 0: fit to train this config; 1: not, with one line that says why.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta


def main() -> int:
    """Run the command; returns the exit code."""
    from megatron_depthattn.cli.common import add_config, new_parser
    from megatron_depthattn.config import load_config, validate
    from megatron_depthattn.parallel.launch_env import launch_environment
    from megatron_depthattn.quiet import silence_libraries
    from megatron_depthattn.terminal import printable

    parser = new_parser("preflight", __doc__)
    add_config(parser)
    arguments = parser.parse_args()
    silence_libraries()
    rank = 0
    try:
        environment = launch_environment()
        rank = environment.rank
        config = load_config(arguments.config, arguments.overrides)
        validate(config, environment.world_size)
        if not config.preflight.enabled:
            raise ValueError("preflight.enabled=false leaves nothing to check here; set it to true")

        from megatron_depthattn.parallel.groups import shut_down
        from megatron_depthattn.preflight.run import enter_world
        from megatron_depthattn.train.hardware import resolve_here

        _, lines = enter_world(resolve_here(config), environment, timedelta(minutes=5))
        if rank == 0:
            print(printable("\n".join(lines)), flush=True)
        shut_down()
    except (ValueError, OSError) as error:
        print(printable(f"error (rank {rank}): {error}"), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # exit handlers would wait for ranks that may wait for this one
    return 0


if __name__ == "__main__":
    sys.exit(main())
