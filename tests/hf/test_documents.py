"""Documents packed in one row, distinguished by ``position_ids`` that begin anew, are each read as if it were alone."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

from tests.hf.method_models import make_method_model
from tests.hf.models import DENSE, LOOPED, MIXES_BOTH, UNROLLED, largest, make_model, make_tokens, make_vanilla

TOLERANCE = 1e-5
LENGTHS = [[5, 1, 8, 3], [17]], [[1, 1, 9, 6], [12, 5]]  # by batch and row
LATE = {"depth_attention_k_norm_after_rope": True}
MODELS = {
    "one_loop": partial(make_model, **DENSE),
    "two_loops": partial(make_model, **LOOPED),
    "unrolled_late_k_norm_mixes_both": partial(make_model, **UNROLLED, **MIXES_BOTH, **LATE),
    **{method: partial(make_method_model, method) for method in ("denseformer", "attnres", "mhc")},
    "qwen3": make_vanilla,
}
OURS = {name: make for name, make in MODELS.items() if name != "qwen3"}
CACHES = {
    "none": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=20),
}


def positions_of(batch: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in batch])


def alone(model, tokens: Tensor, batch: list[list[int]]) -> Tensor:
    """Logits [b, t, V] of the documents, each given to the model by itself."""
    rows = [row.split(lengths) for row, lengths in zip(tokens, batch, strict=True)]
    return torch.stack([torch.cat([model(each[None], use_cache=False).logits[0] for each in row]) for row in rows])


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    ("attention", "batch"), [("sdpa", LENGTHS[0]), ("eager", LENGTHS[1]), ("flex_attention", LENGTHS[1])]
)
@torch.no_grad()
def test_packed_documents_have_the_logits_of_each_alone(attention, batch, make, record_property):
    model, tokens, positions = make(attention=attention), make_tokens(), positions_of(batch)
    with torch.compiler.set_stance("force_eager"):
        expected = alone(model, tokens, batch)
        error = largest(model(tokens, position_ids=positions, use_cache=False).logits - expected)
        leaking = largest(model(tokens, use_cache=False).logits - expected)
    record_property("documents_error", error)
    assert error < TOLERANCE
    assert leaking > 1e3 * TOLERANCE


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_each_document_alone(checkpointing, make, record_property):
    model, tokens, batch = make(dtype=torch.float64).train(), make_tokens(), LENGTHS[1]
    weight = torch.randn(*tokens.shape, model.config.vocab_size, generator=torch.Generator().manual_seed(2))

    def gradients(logits: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (logits * weight).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients(alone(model, tokens, batch))
    if checkpointing:
        model.gradient_checkpointing_enable()
    found = gradients(model(tokens, position_ids=positions_of(batch), use_cache=False).logits)
    error = max(float((found[name] - g).norm() / g.norm()) for name, g in expected.items())
    record_property("documents_gradient_error", error)
    assert error < 1e-6


@pytest.mark.parametrize("make", OURS.values(), ids=OURS)
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_beside_a_cache_as_well(make_cache, make, record_property):
    """Where transformers looks for no documents: packed ones fill a cache, in parts that cut one or not, and the last
    one is continued."""
    model, tokens, batch = make(), make_tokens(), LENGTHS[1]
    expected, positions = alone(model, tokens, batch), positions_of(batch)
    for parts in ([16, 1], [13, 1, 3], [7, 10]):
        cache, logits = make_cache(model.config), []
        for part, at in zip(tokens.split(parts, dim=1), positions.split(parts, dim=1), strict=True):
            output = model(part, position_ids=at, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        error = largest(torch.cat(logits, dim=1) - expected)
        record_property("documents_error", error)
        assert error < TOLERANCE, parts


class Shapes(TorchDispatchMode):
    """Collects those of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.found |= {tuple(each.shape) for each in tree_leaves(output) if isinstance(each, Tensor)}
        return output


@torch.no_grad()
def test_a_mask_of_all_pairs_is_made_for_packed_documents_alone():
    """A row of one document is causal, whether positions are given or not; padding takes a mask as before."""
    model, tokens = make_model(**DENSE), make_tokens()
    whole = torch.arange(tokens.shape[1])[None]
    padded = functional.pad(torch.ones_like(tokens)[:, 3:], (3, 0))
    given = {"nothing": {}, "positions": {"position_ids": whole}, "far": {"position_ids": whole + 30}}
    given |= {"documents": {"position_ids": positions_of(LENGTHS[0])}, "padding": {"attention_mask": padded}}
    for name, inputs in given.items():
        for use_cache in (False, True):
            with Shapes() as shapes:
                model(tokens, use_cache=use_cache, **inputs)
            square = {shape for shape in shapes.found if shape[-2:] == (tokens.shape[1],) * 2}
            assert bool(square) == (name in ("documents", "padding")), (name, use_cache, square)


@torch.no_grad()
def test_documents_in_a_whole_compiled_graph():
    model, tokens, positions = make_model(**DENSE), make_tokens(), positions_of(LENGTHS[0])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(tokens, position_ids=positions, use_cache=False).logits
    assert largest(found - alone(model, tokens, LENGTHS[0])) < TOLERANCE
