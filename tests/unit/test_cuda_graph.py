"""Which parts of a step one CUDA graph could hold: recorded on the CPU and replayed with other batches and weights."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.transformer import cuda_graphs
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_depthattn.model.cross_layer import CrossLayerLayer
from megatron_depthattn.ops import DEPTH_MIX_IMPLEMENTATIONS, triton_mix
from megatron_depthattn.parallel.microbatch_state import MicrobatchState
from megatron_depthattn.train import step
from megatron_depthattn.train.build import build_model, build_optimizer
from tests.cuda_graph import GENERATORS, PERSISTENT, CapturedStep, Graph, train
from tests.unit.test_trained_methods import METHODS, SHAPE, config_of

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

FULL = ("recompute.granularity=full", "recompute.method=uniform", "recompute.num_layers=1")
SELECTIVE = ("recompute.granularity=selective",)


class Run:
    def __init__(self, method: str, *settings: str) -> None:
        self.config = config_of(method, "optimizer.warmup_ratio=0", *settings)
        self.chunks = build_model(self.config, torch.device("cpu"))
        self.optimizer, schedule = build_optimizer(self.config, self.chunks)
        schedule.step(1)

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for chunk in self.chunks for parameter in chunk.parameters()]


def batches(number: int) -> list[list[dict[str, Tensor]]]:
    rows = torch.randint(200, (number, 2, 2, 17), generator=torch.Generator().manual_seed(0))
    return [[{"tokens": one[:, :-1], "labels": one[:, 1:]} for one in batch] for batch in rows]


def eager_and_replayed(method: str, *settings: str) -> tuple[bool, CapturedStep]:
    """Whether three steps end in the same bits, the last two of them replays; and what was captured."""
    eager, replayed = Run(method, *settings), Run(method, *settings)
    results = [step.train_step(eager.chunks, eager.optimizer, batch, SHAPE) for batch in batches(3)]
    with_graph, captured = train(replayed.chunks, replayed.optimizer, batches(3), SHAPE)
    assert len({result.loss for result in results}) == 3
    weights = zip(eager.weights(), replayed.weights(), strict=True)
    return results == with_graph and all(torch.equal(a, b) for a, b in weights), captured


@pytest.mark.parametrize(
    ("method", "settings", "stops"),
    [
        *((method, (), set()) for method in METHODS),
        ("depth_attention", ("precision.dtype=bf16",), set()),
        ("depth_attention", ("model.num_loops=2",), set()),
        ("depth_attention", FULL, GENERATORS),
        ("depth_attention", SELECTIVE, GENERATORS),
    ],
)
def test_an_iteration_is_a_graph(method, settings, stops):
    """Sources are handed over by Python, once: a replay finds them where the layer before it wrote them."""
    is_equal, captured = eager_and_replayed(method, *settings)
    assert is_equal
    assert set(captured.graph.stops) == stops
    assert captured.reads() <= PERSISTENT


def test_controls():
    """A number that goes through Python is named and wrong in a replay; so is a source of an earlier micro-batch."""
    own = CrossLayerLayer._source

    def through_python(layer: CrossLayerLayer, index: int, state: MicrobatchState) -> Any:
        source = own(layer, index, state)
        scale = float(source[0].detach().std())
        return tuple(part * scale for part in source)

    earlier: dict[Any, Any] = {}

    def of_an_earlier_microbatch(layer: CrossLayerLayer, index: int, state: MicrobatchState) -> Any:
        source = own(layer, index, state)
        (kept,) = earlier.setdefault((id(layer), index), [source[0].detach().clone()])
        return (source[0] + kept, *source[1:])

    with patch.object(CrossLayerLayer, "_source", through_python):
        is_equal, captured = eager_and_replayed("depth_attention")
    assert not is_equal
    (stop,) = set(captured.graph.stops)
    assert stop.startswith("local_scalar_dense in ") and stop.endswith("test_cuda_graph.py:through_python")
    with patch.object(CrossLayerLayer, "_source", of_an_earlier_microbatch):
        _, captured = eager_and_replayed("depth_attention")
    (read,) = captured.reads() - PERSISTENT
    assert read.endswith("test_cuda_graph.py:of_an_earlier_microbatch")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "vanilla"])
def test_a_layer_is_a_graph_of_tensors(method):
    """What a layer reads arrives as tensors of `run_layer`, and what it leaves is returned: the place for a graph."""
    (model,) = unwrap_model(Run(method).chunks)
    layer = model.decoder.layers[3]
    own, calls = layer.run_layer, []
    with patch.object(layer, "run_layer", lambda *args, **kwargs: calls.append((args, kwargs)) or own(*args, **kwargs)):
        model(*(batches(1)[0][0]["tokens"], None, None), labels=batches(1)[0][0]["labels"])
    ((hidden, sources, bias), kwargs) = calls[0]
    assert bias is None and bool(sources) == (method != "mhc")  # whose streams are in the hidden state
    assert all(isinstance(x, Tensor) for source in sources.values() for x in source)
    static = [x.detach().clone().requires_grad_() for x in (hidden, *(x for s in sources.values() for x in s))]
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def forward_and_backward() -> list[Tensor]:
        parts = iter(static[1:])
        read = {index: tuple(next(parts) for _ in source) for index, source in sources.items()}
        output, left = own(static[0], read, None, **kwargs)
        made = [output, *(part for part in left if part.requires_grad)]
        gradients = torch.autograd.grad(
            made, [*static, *parameters], list(map(torch.ones_like, made)), allow_unused=True
        )
        return [*(x.detach() for x in made), *(gradient for gradient in gradients if gradient is not None)]

    graph = Graph()
    with graph.capture():
        results = forward_and_backward()
    before = [result.clone() for result in results]
    with torch.no_grad():
        for tensor in (*static, *parameters):
            tensor.mul_(1.5)
    expected = forward_and_backward()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(results, before, strict=True))
    assert not graph.stops
    given = {tensor.untyped_storage().data_ptr() for tensor in (*static, *layer.parameters())}
    assert {line for address, (_, line) in graph.reads.items() if address not in given} <= PERSISTENT


class _AsOne(torch.autograd.Function):
    """A mix of one operation each way, as the Triton kernels are; what it computes is nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, *candidates: Tensor) -> Tensor:
        ctx.save_for_backward(q, *candidates)
        return torch.zeros_like(candidates[-1])

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return (*torch._foreach_neg(ctx.saved_tensors),)


def test_what_depth_adds_to_the_launches_of_a_step():
    """Two sums of gradients for each source that a layer reads, four operations for each layer that mixes, and one."""
    counts = {}
    layers = 8
    for method in ("depth_attention", "denseformer", "attnres", "mhc", "vanilla"):
        run = Run(method, f"model.num_layers={layers}", "model.depth_attention.mixes=value")
        with patch.dict(DEPTH_MIX_IMPLEMENTATIONS, lean=lambda q, ks, vs, k, v, _: _AsOne.apply(q, *ks, k, *vs, v)):
            captured = CapturedStep(run.chunks, batches(1)[0][:1], SHAPE)
        counts[method] = len(captured.graph.operations)
        if method == "depth_attention":
            (model,) = unwrap_model(run.chunks)
            reads = [len(layer.reads) for layer in model.decoder.layers]
    mixing = sum(map(bool, reads))
    print(f"{layers} layers, {sum(reads)} sources read: {counts}")
    assert counts["depth_attention"] - counts["vanilla"] == 2 * sum(reads) + 4 * mixing + 1


def test_a_table_of_addresses_outlives_the_capture():
    """A replay copies it again; what is not kept is another tensor's memory by then."""
    kept, entries = triton_mix._TABLES_OF_GRAPHS, [1, 2, 3]
    triton_mix._table(entries, torch.device("cuda"))
    assert not kept
    with patch("torch.cuda.is_current_stream_capturing", lambda: True):
        triton_mix._table(entries, torch.device("cuda"))
    assert [table.tolist() for table in kept] == [entries]
    kept.clear()


def test_megatrons_graph_of_a_layer_takes_no_state():
    """Megatron captures a layer by what its call is given, and that is the micro-batch's state."""
    with pytest.raises(AssertionError, match=r"MicrobatchState.*not supported"):
        cuda_graphs._check_supported_type(cuda_graphs.ArgMetadata(MicrobatchState()))
