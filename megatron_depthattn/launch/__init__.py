"""Start runs: torchrun with this package's exit codes, Slurm jobs, logs of all ranks."""

from __future__ import annotations

from pathlib import Path

import megatron_depthattn


def scripts() -> Path:
    """The folder of shell scripts: ``launch/`` of the checkout, or its copy inside an installed package."""
    package = Path(megatron_depthattn.__file__).parent
    beside = package.parent / "launch"
    return beside if (beside / "slurm.sbatch").is_file() else package / "launch" / "scripts"
