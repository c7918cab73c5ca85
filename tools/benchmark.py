"""`depthattn benchmark` from a checkout; see megatron_depthattn/benchmarks/command.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_depthattn.benchmarks.command import main

if __name__ == "__main__":
    sys.exit(main())
