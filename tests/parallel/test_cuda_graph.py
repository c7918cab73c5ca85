"""Steps of a world of two as replays: what crosses the pipeline's edges and the groups does so inside the graph."""

import json
from typing import Any

import pytest

from tests.cuda_graph import GENERATORS, PERSISTENT
from tests.e2e.commands import must_succeed
from tests.forked import forked
from tests.parallel.cuda_graph_worker import BATCHES, LAYOUTS

SENDS = {"c10d.send.default", "c10d.recv_.default"}
FORKS = {f"_{way}_cuda_rng_state in megatron/core/tensor_parallel/random.py:fork" for way in ("get", "set")}
"""For the embedding's dropout, which is none."""
BUFFERS = {"megatron/core/tensor_parallel/layers.py:forward", "megatron/core/utils.py:get_tensor"}
"""Megatron's own for gathered activations, which it keeps."""
EXPECTED: dict[str, tuple[set[str], set[str], set[str]]] = {
    "pp2": (SENDS, set(), set()),
    "pp2xvpp2+recompute": (SENDS, GENERATORS, set()),
    "tp2+sp": ({"c10d._allgather_base_.default"}, FORKS, BUFFERS),
    "cp2": ({"c10d._allgather_base_.default"}, set(), set()),
    "dp2+overlap": ({"c10d.reduce_scatter_tensor_coalesced_.default"}, set(), set()),
}
"""Communication that is in the graph, what stops a GPU, and what must stay where it is."""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    file = tmp_path_factory.mktemp("cuda_graph") / "results.json"
    must_succeed(forked(2, "tests.parallel.cuda_graph_worker", file))
    return json.loads(file.read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replays_are_the_steps(worlds, layout):
    communication, stops, reads = EXPECTED[layout]
    for seen in worlds[layout]:
        assert seen["replayed"] == seen["eager"] and seen["same weights"]
        assert len({loss for loss, _ in seen["eager"]}) == BATCHES
        assert communication <= {*seen["communication"]}
        assert {*seen["stops"]} == stops
        assert {*seen["reads"]} - PERSISTENT == reads
