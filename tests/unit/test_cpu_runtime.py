"""What the CPU runtime leaves as it was, and what it puts in the place of a kernel."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_depthattn.config import load_config

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


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ((), 1e-6),
        (("model.tie_embeddings=true",), 1e-6),
        (("precision.dtype=bf16",), 0.0),  # the same product, rounded, is added in both
    ],
    ids=str,
)
def test_gradients_added_by_the_matrix_product(megatron_world_of_one, settings, bound):
    """Of two microbatches, so that there is something to add to; one alone is the control."""
    from megatron_depthattn.train.build import build_model
    from megatron_depthattn.train.step import run_microbatches

    def gradient(fused: str, num_microbatches: int) -> torch.Tensor:
        keys = (*settings, f"model.fused_gradient_accumulation={fused}", "parallel.pipeline=1", "model.num_layers=2")
        chunks = build_model(load_config(ROOT / "configs/quickstart.yaml", keys), torch.device("cpu"))
        tokens = torch.randint(2048, (2, 1, 17), generator=torch.Generator().manual_seed(0))
        batches = [{"tokens": each[:, :-1], "labels": each[:, 1:]} for each in tokens][:num_microbatches]
        run_microbatches(chunks, batches, (1, 16), forward_only=False)
        return torch.cat([buffer.grad_data for buffer in chunks[0].buffers])

    fused, added, one = gradient("true", 2), gradient("false", 2), gradient("true", 1)
    assert (fused - added).norm() <= bound * added.norm()
    assert (fused - one).norm() > 0.1 * one.norm()
