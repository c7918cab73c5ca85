"""CUDA graphs on a GPU: of the mix, and of an iteration, which tests/unit records and replays on the CPU."""

import contextlib
import importlib.util

import pytest
import torch

from tests.gpu.mix_cases import BF16, Case, make_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; recorded operations in tests/unit")
needs_te = pytest.mark.skipif(not importlib.util.find_spec("transformer_engine"), reason="needs TransformerEngine")
TRITON = ("model.depth_attention.op=triton",)


class GpuGraph:
    """As tests/cuda_graph.py's; build, warm up and capture on one side stream, which autograd's nodes remember."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    @contextlib.contextmanager
    def capture(self):
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            yield

    def replay(self) -> None:
        self._graph.replay()


@pytest.mark.parametrize("num_sources", [2, 8])
def test_the_mix_in_a_graph(num_sources):
    """Eight sources are a table in host memory, which a replay copies again."""
    inputs, others = (make_inputs(Case(num_sources, dtype=BF16), "cuda") for _ in range(2))
    leaves = [*inputs.named.values()]

    def both(given) -> list[torch.Tensor]:
        mixed = given.mix()
        return [mixed, *torch.autograd.grad(mixed, [*given.named.values()], torch.ones_like(mixed))]

    with torch.cuda.stream(torch.cuda.Stream()):
        both(inputs)
        graph = GpuGraph()
        with graph.capture():
            results = both(inputs)
        with torch.no_grad():
            for mine, other in zip(leaves, others.named.values(), strict=True):
                other.mul_(1.5)
                mine.copy_(other)
        for size in (64, 96, 128, 256) * 16:  # other uses of host memory that was given back
            torch.full((size,), -1).pin_memory()
        graph.replay()
        expected = both(others)
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, expected))


@pytest.mark.usefixtures("megatron_world_of_one")
@pytest.mark.parametrize(
    ("method", "settings", "bound"),
    [
        *((method, (), 1e-3) for method in ("vanilla", "depth_attention", "denseformer", "attnres", "mhc")),
        ("depth_attention", TRITON, 1e-3),
        pytest.param("depth_attention", (*TRITON, "precision.dtype=bf16", "model.spec=te"), 1e-2, marks=needs_te),
    ],
)
def test_an_iteration_in_a_graph(method, settings, bound, monkeypatch):
    from megatron_depthattn.train import step
    from megatron_depthattn.train.build import build_model, build_optimizer
    from tests.cuda_graph import train
    from tests.unit.test_cuda_graph import batches
    from tests.unit.test_trained_methods import SHAPE, config_of

    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # read when a model is built
    given = [[{name: x.cuda() for name, x in one.items()} for one in batch] for batch in batches(4)]
    losses = []
    for graph in (None, GpuGraph()):
        with torch.cuda.stream(torch.cuda.Stream()):
            config = config_of(method, "optimizer.warmup_ratio=0", *settings)
            chunks = build_model(config, torch.device("cuda"))
            optimizer, schedule = build_optimizer(config, chunks)
            schedule.step(1)
            if graph:
                results, _ = train(chunks, optimizer, given, SHAPE, graph=graph)
            else:
                results = [step.train_step(chunks, optimizer, batch, SHAPE) for batch in given]
            losses.append([result.loss for result in results])
    assert len({*losses[0]}) == len(given)
    assert losses[1] == pytest.approx(losses[0], rel=bound)
