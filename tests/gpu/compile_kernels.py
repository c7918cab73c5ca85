"""Compiles the kernels of the Triton mix for an H100, on a machine that need not have a GPU, and looks at the machine
code: what the interpreter accepts need not compile, and how often memory is read can be counted there.

In a process of its own, as it stands in for Triton's driver. Prints one JSON object, kernel by kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from megatron_depthattn.ops import triton_mix
from tests.gpu.mix_cases import Case, make_inputs

CASES = {"arguments": Case(2, leading=(8, 2), num_groups=8), "table": Case(5, leading=(8, 2), num_groups=8)}
"""At the released models' shape (GQA 4, head size 64, bf16), and one whose candidates are in a table."""
NO_GPU = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda _: 0,
)


class Compiled:
    """Stands in for a kernel: a launch compiles it and notes what came out."""

    def __init__(self, kernel, notes: dict) -> None:
        self.kernel, self.notes = kernel, notes

    def __getitem__(self, grid):
        def launch(*arguments, **constants) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **constants)
            ptx = compiled.asm["ptx"]
            self.notes[self.kernel.__name__] = {
                "wide loads": len(re.findall(r"ld\.global(\.\w+)*\.v4\.b32", ptx)),
                "wide stores": len(re.findall(r"st\.global(\.\w+)*\.v4\.b32", ptx)),
                "loads": len(re.findall(r"ld\.global", ptx)),
                "stores": len(re.findall(r"st\.global", ptx)),
                "local memory": len(re.findall(r"(ld|st)\.local", ptx)) + stack_bytes(compiled.asm["cubin"]),
            }

        return launch


def stack_bytes(cubin: bytes) -> int:
    """Of a thread: where registers are spilled to."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([program, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return sum(int(stack) for stack in re.findall(r"STACK:(\d+)", said.stdout))


def main() -> None:
    driver.set_active(NO_GPU)
    kernels = triton_mix._kernels()
    found = {}
    triton_mix.triton_unsupported = lambda device: None  # tensors of the CPU describe those of a GPU well enough
    for name, case in CASES.items():
        notes = found[name] = {}
        both = {each: Compiled(getattr(kernels, each), notes) for each in ("forward_kernel", "backward_kernel")}
        stand_in = SimpleNamespace(**both, DTYPES=kernels.DTYPES)
        triton_mix._kernels = lambda stand_in=stand_in: stand_in
        mixed = make_inputs(case, "cpu").mix()
        mixed.backward(torch.ones_like(mixed))
    sys.stdout.write("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
