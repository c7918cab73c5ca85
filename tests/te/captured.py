"""Steps of TransformerEngine's layers as replays of a graph (tests/cuda_graph.py); runs in inside.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from megatron_depthattn.train.build import Fp8State
from megatron_depthattn.train.step import train_step
from tests.cuda_graph import train
from tests.te.small import start

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")
SHAPE = (1, 32)


def microbatch(seed: int) -> dict[str, Tensor]:
    tokens = torch.randint(384, SHAPE, generator=torch.Generator().manual_seed(seed))
    return {"tokens": tokens, "labels": tokens.roll(-1, dims=1)}


@pytest.mark.parametrize("options", [{}, {"fp8": "delayed"}, {"fp8": "tensorwise"}, {"num_loops": 2}], ids=str)
def test_an_iteration_is_a_graph(options: dict[str, Any]) -> None:
    """Scales and histories move inside the graph as well."""
    batches = [[microbatch(2 * number), microbatch(2 * number + 1)] for number in range(3)]
    found = []
    for is_replayed in (False, True):
        FP8GlobalStateManager.reset()  # it knows the layers of every model of the process
        run = start("te", length=SHAPE[1], **options)
        run.scheduler.step(1)
        fp8 = Fp8State(run.chunks)
        if is_replayed:
            steps, captured = train(run.chunks, run.optimizer, batches, SHAPE, fp8)
            assert not captured.graph.stops
        else:
            steps = [train_step(run.chunks, run.optimizer, batch, SHAPE, fp8) for batch in batches]
        found.append([[step.loss, step.grad_norm] for step in steps])
    assert found[0] == found[1]
    assert len({loss for loss, _ in found[0]}) == 3
