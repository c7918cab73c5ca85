"""What the CPU runtime leaves as it was."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FACTORIES = """
import torch
from megatron_depthattn.parallel.cpu_runtime import enter_cpu_runtime
enter_cpu_runtime()
with torch.device("meta"):
    made = [torch.tensor([1.0]), torch.zeros(1), torch.ones(1), torch.empty(1), torch.full((1,), 2.0), torch.arange(2)]
print({tensor.device.type for tensor in made}, torch.zeros(1, device="cuda").device.type)
"""


def test_a_device_context_still_holds_for_what_is_made_inside():
    """Transformers 5 builds models in one; in a fresh process, as torch fills its table of factories once."""
    command = [sys.executable, "-W", "ignore", "-c", FACTORIES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["{'meta'}", "cpu"]
