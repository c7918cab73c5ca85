"""Tests that need TransformerEngine, in a process that sees it: ``python -m tests.te.inside [--capability 10.0] ...``

Everything else goes to pytest. TransformerEngine's own code finds a GPU of that compute capability, whose kernels are
tests/te/extension; its fused Adam takes the steps. tests/gpu/test_te.py runs here as it does on a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from unittest.mock import patch

from tests.te import stand_in

CUDA = "13.0"
"""Has every recipe."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--capability", default="9.0")
    known, rest = parser.parse_known_args(arguments)
    major, minor = map(int, known.capability.split("."))
    os.environ |= {"NVTE_UnfusedDPA_Emulate_FP8": "1"}  # unfused attention then rounds as FP8 attention does
    if stand_in.is_compiled():
        raise SystemExit(f"{stand_in.FOLDER} has a compiled extension: run tests/gpu/test_te.py itself, on a GPU")
    versions = stand_in.use_transformer_engine()

    import pytest

    from megatron_depthattn.config.hardware_checks import Accelerator
    from megatron_depthattn.parallel import cpu_runtime
    from megatron_depthattn.train import hardware
    from tests.te.kernels import computing

    machine = Accelerator("stand-in", (major, minor), CUDA, versions["transformer_engine"])
    with patch.object(cpu_runtime, "_replace_fused_optimizer", lambda: None):
        cpu_runtime.enter_cpu_runtime()
    with computing((major, minor)), patch.object(hardware, "this_machine", lambda: machine):
        stand_in.is_computing = True
        print(versions, known.capability)
        return int(pytest.main(rest))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
