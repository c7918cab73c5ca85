"""Gradients: the fp64 decoder's, and under both kinds of checkpointing those without it."""

import pytest
from torch import Tensor

from tests.hf.models import (
    DENSE,
    LOOPED,
    MIXES_BOTH,
    UNIFORM_KEYS,
    UNROLLED,
    largest,
    make_model,
    make_tokens,
    reference_logits,
    weights_for,
)
from tests.reference_decoder import mean_cross_entropy

REFERENCE_TOLERANCE = 1e-4  # of a gradient's norm, fp32 against fp64
CHECKPOINT_TOLERANCE = 1e-6  # the same operations twice

each_checkpointing = pytest.mark.parametrize(
    "reentrant", [None, False, True], ids=["no_checkpointing", "not_reentrant", "reentrant"]
)


def gradients(model, tokens: Tensor, reentrant: bool | None, **inputs) -> dict[str, Tensor]:
    """Of the next-token loss with respect to every parameter."""
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert all(layer.gradient_checkpointing for layer in model.model.layers)
    model(tokens, labels=tokens, **inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def worst_difference(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest over all parameters, relative to the norm of the expected gradient."""
    assert ours.keys() == expected.keys()
    return max(((ours[n] - g).norm() / g.norm()).item() for n, g in expected.items())


@each_checkpointing
@pytest.mark.parametrize("depth", [DENSE, LOOPED, UNROLLED], ids=["one_loop", "two_loops", "unrolled"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True, "depth_attention_k_norm_after_rope": True},
        MIXES_BOTH,
        UNIFORM_KEYS | {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_gradients_are_those_of_the_reference(reentrant, depth, settings, record_property):
    model = make_model(**depth, **settings)
    tokens = make_tokens()
    weights = {name: weight.requires_grad_() for name, weight in weights_for(model.config).items()}
    logits = reference_logits(model.config, tokens, weights)
    mean_cross_entropy(logits[:, :-1], tokens[:, 1:]).backward()
    expected = {name: weight.grad for name, weight in weights.items()}
    error = worst_difference(gradients(model, tokens, reentrant), expected)
    record_property("gradient_error", error)
    assert error < REFERENCE_TOLERANCE


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("settings", [DENSE, LOOPED], ids=["one_loop", "two_loops"])
def test_checkpointing_changes_no_gradient(reentrant, use_cache, settings, record_property):
    tokens = make_tokens()
    plain = gradients(make_model(**settings), tokens, None, use_cache=use_cache)
    checkpointed = gradients(make_model(**settings), tokens, reentrant, use_cache=use_cache)
    error = worst_difference(checkpointed, plain)
    record_property("checkpoint_error", error)
    assert error < CHECKPOINT_TOLERANCE


@each_checkpointing
def test_control_a_lost_gradient_through_the_sources_fails(reentrant, monkeypatch):
    """Detached sources leave the logits as they are: only the gradients can tell."""
    tokens, model = make_tokens(), make_model(**DENSE)
    logits = model(tokens).logits
    expected = gradients(model, tokens, reentrant)
    layer_class = type(model.model.layers[0])
    forward = layer_class.forward

    def detached(layer, hidden_states, *sources, **kwargs):
        return forward(layer, hidden_states, *(source.detach() for source in sources), **kwargs)

    monkeypatch.setattr(layer_class, "forward", detached)
    model = make_model(**DENSE)
    assert largest(model(tokens).logits - logits) == 0
    lost = gradients(model, tokens, reentrant)
    assert worst_difference(lost, expected) > 0.1
    keys_and_values = [name for name in expected if "layers.0.self_attn.v_proj" in name]
    assert worst_difference(*({n: g[n] for n in keys_and_values} for g in (lost, expected))) > 0.1


@each_checkpointing
def test_frozen_embeddings_still_train_the_layers(reentrant):
    """Reentrant checkpointing computes no gradient where no input needs one: adapters on frozen weights."""
    tokens = make_tokens()
    expected = gradients(make_model(**DENSE), tokens, None)
    model = make_model(**DENSE)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.enable_input_require_grads()
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(tokens, labels=tokens).loss.backward()
    frozen = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(frozen) == len(expected) - 1
    assert worst_difference(frozen, {name: expected[name] for name in frozen}) < CHECKPOINT_TOLERANCE
