"""Check the ranks of a run (versions, code, config, devices, disks), train nothing.

    depthattn preflight CONFIG [OVERLAY ...] [a.b=c ...] [--nproc-per-node N] [torchrun's options]

Exit code 0: these ranks can train this config; 1: they cannot, with a line that says why.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_depthattn.cli import train
from megatron_depthattn.cli.common import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Replace this process by the check; returns only where there is an error."""
    given = train.parse("preflight", __doc__, arguments)
    return run(lambda given: train.start("megatron_depthattn.preflight", given), given)
