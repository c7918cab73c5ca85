"""The Hugging Face models of the compared methods: the fp64 decoders' logits and gradients, caches, files."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_depthattn.hf import modeling_cross_layer
from tests.hf.method_models import (
    MODELS,
    NUM_LAYERS,
    VARIANTS,
    make_method_model,
    method_reference,
    method_settings,
    method_weights,
)
from tests.hf.models import largest, make_model, make_tokens, make_vanilla
from tests.reference_decoder import mean_cross_entropy
from tests.reference_methods import initial_method_weights

LOGIT_TOLERANCE, CACHE_TOLERANCE = 1e-4, 1e-5
# Of a gradient's norm, in fp64 but for transformers' norms and angles, which are fp32 always: a score's gradient is a
# difference of nearly equal numbers. With checkpointing at most the order of a sum changes.
GRADIENT_TOLERANCE, CHECKPOINT_TOLERANCE = 1e-4, 1e-9
BF16_TOLERANCE = 0.05  # of the logits' root mean square

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_method = pytest.mark.parametrize("method", MODELS)


@each_variant
@pytest.mark.parametrize(("attention", "tied"), [("sdpa", False), ("eager", True)])
@torch.no_grad()
def test_logits(variant, attention, tied, record_property):
    model, tokens = make_method_model(variant, attention, tie_word_embeddings=tied), make_tokens(2, 9)
    error = largest(model(tokens).logits - method_reference(model.config, tokens))
    record_property("logit_error", error)
    assert error < LOGIT_TOLERANCE


@each_method
def test_the_layer_that_is_not_split_is_one_of_the_model(method):
    """FSDP wraps these classes, and raises for one that the model lacks."""
    for model in (make_method_model(method), make_model()):
        assert {*model._no_split_modules} == {type(model.model.layers[0]).__name__}


@each_method
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16_weights", "autocast"])
@torch.no_grad()
def test_bf16(method, weights, record_property):
    tokens, model = make_tokens(2, 9), make_method_model(method, dtype=weights)
    expected = method_reference(model.config, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        logits = model(tokens).logits
    assert logits.dtype == torch.bfloat16
    error = ((logits - expected).square().mean() / expected.square().mean()).sqrt().item()
    record_property("bf16_error", error)
    assert error < BF16_TOLERANCE


def one_average_misses_a_state(patch: Callable) -> None:
    forward = modeling_cross_layer.DepthAverage.forward
    patch(modeling_cross_layer.DepthAverage, "forward", lambda self, *s: forward(self, torch.zeros_like(s[0]), *s[1:]))


def the_stream_is_not_favoured(patch: Callable) -> None:
    forward = modeling_cross_layer.ResidualAggregator.forward

    def without_bias(self: Any, *candidates: Tensor) -> Tensor:
        bias, self.recency_bias.data = self.recency_bias.data, torch.zeros(1)
        try:
            return forward(self, *candidates)
        finally:
            self.recency_bias.data = bias

    patch(modeling_cross_layer.ResidualAggregator, "forward", without_bias)


def one_stream_is_lost(patch: Callable) -> None:
    weights = modeling_cross_layer.StreamConnector.weights

    def without_the_last(self: Any, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, residual = weights(self, streams)
        return pre * (torch.arange(pre.shape[-1]) < pre.shape[-1] - 1), post, residual

    patch(modeling_cross_layer.StreamConnector, "weights", without_the_last)


def mixing_is_transposed(patch: Callable) -> None:
    weights = modeling_cross_layer.StreamConnector.weights

    def transposed(self: Any, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, residual = weights(self, streams)
        return pre, post, residual.transpose(-1, -2)

    patch(modeling_cross_layer.StreamConnector, "weights", transposed)


@pytest.mark.parametrize(
    ("variant", "break_it"),
    [
        ("denseformer", one_average_misses_a_state),
        ("denseformer-period2-dilation3", one_average_misses_a_state),
        ("attnres", the_stream_is_not_favoured),
        ("mhc", one_stream_is_lost),
        ("mhc", mixing_is_transposed),
    ],
)
@torch.no_grad()
def test_control_another_function_fails(variant, break_it, monkeypatch):
    model, tokens = make_method_model(variant), make_tokens(2, 9)
    expected = method_reference(model.config, tokens)
    assert largest(model(tokens).logits - expected) < LOGIT_TOLERANCE
    break_it(monkeypatch.setattr)
    assert largest(model(tokens).logits - expected) > 100 * LOGIT_TOLERANCE


@torch.no_grad()
def test_control_another_block_size_fails():
    """It changes neither names nor shapes: the same weights read the stream at other places."""
    model, tokens = make_method_model("attnres"), make_tokens(2, 9)
    expected = method_reference(model.config, tokens)
    model.config.attnres_block_size += 2
    assert largest(model(tokens).logits - expected) > 100 * LOGIT_TOLERANCE


# ------------------------------------------------------------------------------------------------------- gradients


def gradients(model: Any, tokens: Tensor, reentrant: bool | None) -> dict[str, Tensor]:
    """Of the next-token loss with respect to every parameter."""
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert all(layer.gradient_checkpointing for layer in model.model.layers)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_difference(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest over all parameters, relative to the expected gradient's norm, but to no less than 1e-3.

    In the first layer all candidates and streams are the same tensor: some gradients are zero but for rounding.
    """
    assert ours.keys() == expected.keys()
    return max(((ours[n] - g).norm() / g.norm().clamp(min=1e-3)).item() for n, g in expected.items())


@each_variant
def test_gradients_are_those_of_the_reference(variant, record_property):
    model, tokens = make_method_model(variant, dtype=torch.float64), make_tokens(2, 9)
    weights = {name: weight.requires_grad_() for name, weight in method_weights(model.config).items()}
    logits = method_reference(model.config, tokens, weights)
    mean_cross_entropy(logits[:, :-1], tokens[:, 1:]).backward()
    expected = {name: weight.grad for name, weight in weights.items()}
    error = worst_difference(gradients(model, tokens, None), expected)
    record_property("gradient_error", error)
    assert error < GRADIENT_TOLERANCE


@each_method
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(method, reentrant, record_property):
    tokens = make_tokens(2, 9)
    plain = gradients(make_method_model(method, dtype=torch.float64), tokens, None)
    checkpointed = gradients(make_method_model(method, dtype=torch.float64), tokens, reentrant)
    error = worst_difference(checkpointed, plain)
    record_property("checkpoint_error", error)
    assert error < CHECKPOINT_TOLERANCE


@pytest.mark.parametrize("method", ["denseformer", "attnres"])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["no_checkpointing", "not_reentrant", "reentrant"])
def test_control_a_lost_gradient_through_earlier_states_fails(method, reentrant, monkeypatch):
    """Detached, they leave the logits as they are: only the gradients can tell."""
    tokens, model = make_tokens(2, 9), make_method_model(method)
    expected, layer_class = gradients(model, tokens, reentrant), type(model.model.layers[0])
    forward = layer_class.forward

    def detached(layer: Any, hidden_states: Tensor, *earlier: Tensor, **kwargs: Any) -> Tensor:
        return forward(layer, hidden_states, *(state.detach() for state in earlier), **kwargs)

    monkeypatch.setattr(layer_class, "forward", detached)
    assert worst_difference(gradients(make_method_model(method), tokens, reentrant), expected) > 0.01


# ------------------------------------------------------------------------------------------------ cache, generation


@each_variant
@pytest.mark.parametrize("chunk", [1, 3])
@torch.no_grad()
def test_cached_equals_full(variant, chunk, record_property):
    model, tokens = make_method_model(variant), make_tokens(2, 9)
    full, cache, logits = model(tokens, use_cache=False), None, []
    assert full.past_key_values is None
    for part in tokens.split(chunk, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert len(cache.layers) == NUM_LAYERS
    error = largest(torch.cat(logits, dim=1) - full.logits)
    record_property("cache_error", error)
    assert error < CACHE_TOLERANCE


@each_method
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@torch.no_grad()
def test_generation_from_a_left_padded_batch_is_that_of_each_prompt(method, options):
    model, prompts = make_method_model(method), [make_tokens(1, t) for t in (4, 11, 7)]
    options = options | {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    pads = [11 - prompt.shape[1] for prompt in prompts]
    batch = torch.cat([torch.nn.functional.pad(p, (n, 0)) for p, n in zip(prompts, pads, strict=True)])
    mask = (torch.arange(11) >= torch.tensor(pads)[:, None]).long()
    generated = model.generate(batch, attention_mask=mask, **options)[:, 11:]
    for row, prompt in zip(generated, prompts, strict=True):
        sequence = prompt
        for _ in range(5):  # by hand, without a cache
            sequence = torch.cat([sequence, model(sequence, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
        assert row.tolist() == sequence[0, prompt.shape[1] :].tolist()


# ---------------------------------------------------------------------------------------------- initial state, files


@each_variant
@torch.no_grad()
def test_initial_values(variant):
    model = make_method_model(variant, initial=True)
    settings = method_settings(model.config)
    sizes = {"num_layers": NUM_LAYERS, "hidden_size": model.config.hidden_size}
    expected = initial_method_weights(model.config.model_type, **sizes, **settings)
    found = model.state_dict()
    assert found.keys() == expected.keys() | dict(make_vanilla(num_hidden_layers=NUM_LAYERS).named_parameters()).keys()
    for name, value in expected.items():
        if name.endswith(".projection"):
            assert found[name].shape == value.shape
            assert found[name].std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
        else:
            assert largest(found[name] - value) < 1e-6, name


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("denseformer")])
@torch.no_grad()
def test_denseformer_starts_as_qwen3_bit_for_bit(variant):
    tokens, vanilla = make_tokens(2, 9), make_vanilla(num_hidden_layers=NUM_LAYERS)
    assert torch.equal(make_method_model(variant, initial=True)(tokens).logits, vanilla(tokens).logits)
    assert largest(make_method_model(variant)(tokens).logits - vanilla(tokens).logits) > 1e-2


@torch.no_grad()
def test_mhc_without_its_dynamic_part_starts_as_qwen3():
    tokens, model = make_tokens(2, 9), make_method_model("mhc", initial=True)
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            parameter.zero_()
    assert largest(model(tokens).logits - make_vanilla(num_hidden_layers=NUM_LAYERS)(tokens).logits) < LOGIT_TOLERANCE


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_tensor_and_setting_survives(method, dtype, tmp_path):
    model, tokens = make_method_model(method, dtype=dtype), make_tokens(2, 9)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == dict(model.named_parameters()).keys()
    loaded, report = type(model).from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert all(w.dtype == dtype and torch.equal(w, stored[name]) for name, w in loaded.named_parameters())
    assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)
    written = json.loads((tmp_path / "config.json").read_text())
    settings = {f"{written['model_type']}_{key}": value for key, value in method_settings(model.config).items()}
    assert settings and settings.items() <= written.items()


@each_method
def test_config_file_of_all_defaults_holds_every_setting(method, tmp_path):
    config = MODELS[method].config_class()
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {f"{method}_{key}": value for key, value in method_settings(config).items()}.items() <= written.items()


@each_method
@torch.no_grad()
def test_hidden_states_and_inputs(method):
    model, tokens = make_method_model(method), make_tokens(2, 9)
    output = model(tokens, output_hidden_states=True, use_cache=False)
    embeddings = model.get_input_embeddings()(tokens)
    assert len(output.hidden_states) == NUM_LAYERS + 1
    first = output.hidden_states[0]
    assert torch.equal(first if method != "mhc" else first[..., 1, :], embeddings)
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert model(tokens).hidden_states is None
    assert torch.equal(model(inputs_embeds=embeddings).logits, output.logits)
    assert largest(model(tokens, logits_to_keep=2).logits - output.logits[:, -2:]) < 1e-6
    with pytest.raises(ValueError, match="give exactly one of input_ids and inputs_embeds"):
        model(tokens, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match=r"output_attentions=True: a .* gives no weights"):
        model(tokens, output_attentions=True)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("denseformer", {"denseformer_period": 0}, "denseformer_period=0 must be at least 1"),
        ("denseformer", {"denseformer_dilation": 0}, "denseformer_dilation=0 must be at least 1"),
        ("attnres", {"attnres_block_size": 0}, "attnres_block_size=0 must be at least 1"),
        ("mhc", {"mhc_num_streams": 1}, "mhc_num_streams=1 must be at least 2"),
        *(
            (method, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, "sliding-window layers")
            for method in MODELS
        ),
    ],
)
def test_config_errors(method, settings, message):
    with pytest.raises(ValueError, match=message):
        MODELS[method].config_class(**settings)
