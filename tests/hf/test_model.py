"""The Hugging Face model without a cache: against the independent fp64 decoder and transformers' own Qwen3."""

import sys

import pytest
import torch

from tests.hf.method_models import MODELS, make_method_model
from tests.hf.models import (
    DENSE,
    LOOPED,
    MIXES_BOTH,
    NUM_LAYERS,
    UNIFORM_KEYS,
    largest,
    make_config,
    make_model,
    make_tokens,
    make_vanilla,
    reference_logits,
)

LOGIT_TOLERANCE = 1e-4
BF16_TOLERANCE = 0.05  # of the logits' root mean square


SPACINGS = [(1, 0), (2, 2), (None, 0), (None, 2)]  # stride and window
CASES = [(heads, *spacing, released, {}) for heads in (4, 2, 1) for spacing in SPACINGS for released in (False, True)]
CASES += [(2, 2, 2, released, ablation) for released in (False, True) for ablation in (MIXES_BOTH, UNIFORM_KEYS)]


@pytest.mark.parametrize(("num_kv_heads", "stride", "window", "released", "ablation"), CASES, ids=str)
@pytest.mark.parametrize(("num_loops", "rule"), [(1, None), (2, "unrolled"), (3, "same_layer")])
@torch.no_grad()
def test_logits(num_kv_heads, stride, window, released, ablation, num_loops, rule, record_property):
    """``released``: keys are normalised late, as by the released checkpoints; embeddings are tied, too."""
    # Six layers: half of them is a stride of its own.
    model = make_model(
        num_hidden_layers=6,
        num_key_value_heads=num_kv_heads,
        depth_attention_stride=stride,
        depth_attention_recent_window=window,
        depth_attention_k_norm_after_rope=released,
        num_loops=num_loops,
        depth_attention_loop_sources=rule,
        tie_word_embeddings=released,
        **ablation,
    )
    tokens = make_tokens()
    error = largest(model(tokens).logits - reference_logits(model.config, tokens, stride=stride))
    record_property("logit_error", error)
    assert error < LOGIT_TOLERANCE


@pytest.mark.parametrize(
    "other",
    [
        {"stride": 1},
        {"stride": 3},
        {"window": 0},
        {"window": 2},
        {"k_norm_after_rope": True},
        {"num_loops": 1},
        {"unrolled": True},
        {"depth_attention": False},
        {"uniform": True},
        {"mixes": "key"},
        {"mixes": "key_value"},
    ],
    ids=str,
)
@torch.no_grad()
def test_control_another_function_fails(other):
    """The comparison above sees each single setting."""
    model, tokens = make_model(num_hidden_layers=6, **LOOPED), make_tokens()
    logits = model(tokens).logits
    assert largest(logits - reference_logits(model.config, tokens)) < LOGIT_TOLERANCE
    assert largest(logits - reference_logits(model.config, tokens, **other)) > 1e-2


@torch.no_grad()
def test_control_swapped_sources_fail(monkeypatch):
    model, tokens = make_model(**DENSE), make_tokens()
    plan = type(model.config).depth_sources
    monkeypatch.setattr(type(model.config), "depth_sources", lambda config, layer: plan(config, layer)[::-1])
    expected = reference_logits(model.config, tokens)
    assert largest(model(tokens).logits - expected) < LOGIT_TOLERANCE  # a set: the order is of no account
    layer_forward = type(model.model.layers[0]).forward

    def swap_values(layer, hidden_states, *sources, **kwargs):
        swapped = [*sources]
        swapped[1::2] = swapped[1::2][::-1]
        return layer_forward(layer, hidden_states, *swapped, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", swap_values)
    assert largest(model(tokens).logits - expected) > 1e-2


@pytest.mark.parametrize("num_loops", [1, 2])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16_weights", "autocast"])
@torch.no_grad()
def test_bf16(weights, num_loops, record_property):
    tokens = make_tokens()
    model = make_model(dtype=weights, **DENSE, num_loops=num_loops)
    expected = reference_logits(model.config, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        logits = model(tokens).logits
    assert logits.dtype == torch.bfloat16
    error = ((logits - expected).square().mean() / expected.square().mean()).sqrt().item()
    record_property("bf16_error", error)
    assert error < BF16_TOLERANCE
    other = reference_logits(model.config, tokens, window=0)
    assert ((logits - other).square().mean() / other.square().mean()).sqrt() > 3 * BF16_TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_switched_off_is_transformers_qwen3_bit_for_bit(attention, tied):
    settings = {"attention": attention, "tie_word_embeddings": tied}
    tokens = make_tokens()
    vanilla = make_vanilla(**settings)(tokens).logits
    assert torch.equal(make_model(**settings, use_depth_attention=False)(tokens).logits, vanilla)
    assert largest(make_model(**settings)(tokens).logits - vanilla) > 1e-2


@torch.no_grad()
def test_embeddings_in_place_of_token_ids():
    model, tokens = make_model(**DENSE), make_tokens()
    embeddings = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(tokens).logits)
    for inputs in ({}, {"input_ids": tokens, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="give exactly one of input_ids and inputs_embeds"):
            model(**inputs)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 5])], ids=["last", "last_three", "chosen"])
@torch.no_grad()
def test_logits_to_keep(kept):
    model, tokens = make_model(**DENSE), make_tokens()
    positions = slice(-kept, None) if isinstance(kept, int) else kept
    assert largest(model(tokens, logits_to_keep=kept).logits - model(tokens).logits[:, positions]) < 1e-6


@torch.no_grad()
def test_loss_is_cross_entropy_of_the_next_token():
    model, tokens = make_model(**DENSE), make_tokens()
    labels = tokens.clone()
    labels[0, :5] = -100
    output = model(tokens, labels=labels)
    shifted, following = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(shifted, following)  # leaves -100 out
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert model(tokens, labels=tokens).loss.item() != pytest.approx(expected.item(), rel=1e-3)
    assert output[0] is output.loss


@pytest.mark.parametrize("num_loops", [1, 2])
@torch.no_grad()
def test_hidden_states_of_every_effective_layer(num_loops):
    model, tokens = make_model(num_loops=num_loops), make_tokens()
    states = model(tokens, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_effective_layers + 1 == num_loops * NUM_LAYERS + 1
    assert torch.equal(states[0], model.get_input_embeddings()(tokens))
    assert torch.equal(model.lm_head(states[-1]), model(tokens).logits)
    assert model(tokens).hidden_states is None


@torch.no_grad()
def test_hidden_states_of_the_vanilla_decoder_are_qwen3s():
    tokens = make_tokens()
    ours, theirs = (
        model(tokens, output_hidden_states=True).hidden_states
        for model in (make_model(use_depth_attention=False), make_vanilla())
    )
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("settings", [DENSE, LOOPED, DENSE | MIXES_BOTH, DENSE | UNIFORM_KEYS], ids=str)
@pytest.mark.parametrize("num_kv_heads", [4, 1])
@torch.no_grad()
def test_depth_weights(settings, num_kv_heads):
    model, tokens = make_model(**settings, num_key_value_heads=num_kv_heads), make_tokens()
    expected = []
    reference_logits(model.config, tokens, depth_weights=expected)
    weights = model(tokens, output_depth_weights=True).depth_weights
    assert len(weights) == len(expected) == model.config.num_effective_layers
    for layer, (ours, reference) in enumerate(zip(weights, expected, strict=True)):
        num_candidates = len(model.config.depth_sources(layer)) + 1
        assert ours.shape == (len(tokens), num_kv_heads, tokens.shape[1], num_candidates)
        assert largest(ours.sum(dim=-1) - 1) < 1e-6
        assert largest(ours - reference.transpose(1, 2)) < 1e-5
    assert (weights[-1].std() > 0.05) == (settings != DENSE | UNIFORM_KEYS)  # not one flat row, which would show little
    assert model(tokens).depth_weights is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_loops": 0}, "num_loops=0 must be at least 1"),
        ({"depth_attention_stride": 0}, "depth_attention_stride=0 must be at least 1: null"),
        ({"depth_attention_recent_window": -1}, "depth_attention_recent_window=-1 must be at least 0"),
        (
            {"use_depth_attention": False, "depth_attention_k_norm_after_rope": True},
            "depth_attention_k_norm_after_rope=true needs use_depth_attention=true",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_attention_heads=4 must be a multiple of num_key_value_heads=3",
        ),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "sliding-window layers are not supported",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_config_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(**settings)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_model_rejects_rope_that_scales_queries_and_keys(key):
    """YaRN's factor would be a temperature of the depth weights that no score over positions has."""
    rope = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    settings = {"rope_theta": 1000.0, key: rope}
    with pytest.raises(ValueError, match="rope type 'yarn' scales queries and keys"):
        make_model(**settings)
    make_model(**settings, use_depth_attention=False)


@pytest.mark.parametrize(
    ("num_layers", "num_loops", "rule", "stride"),
    [
        (1, 1, None, 1),
        (2, 1, None, 1),
        (5, 1, None, 2),
        (4, 3, None, 6),
        (4, 3, "unrolled", 6),
        (4, 3, "same_layer", 2),
    ],
)
def test_stride_defaults_to_half_the_layers_that_it_counts(num_layers, num_loops, rule, stride):
    config = make_config(num_hidden_layers=num_layers, num_loops=num_loops, depth_attention_loop_sources=rule)
    assert config.depth_attention_stride == stride


@pytest.mark.parametrize("variant", ["one_loop", "two_loops", *MODELS])
def test_a_sequence_is_classified_by_its_last_token_that_is_not_padding(variant, tmp_path):
    """The weights of the causal model and a head of its own, as reward models start."""
    if variant in MODELS:
        model = make_method_model(variant, pad_token_id=0)
    else:
        model = make_model(**(LOOPED if variant == "two_loops" else DENSE), pad_token_id=0)
    model.save_pretrained(tmp_path)
    name = type(model).__name__.replace("CausalLM", "SequenceClassification")
    head_class = getattr(sys.modules[type(model).__module__], name)
    classifier, report = head_class.from_pretrained(tmp_path, num_labels=1, output_loading_info=True)
    assert {*report["missing_keys"]} == {"score.weight"} and {*report["unexpected_keys"]} == {"lm_head.weight"}
    short = make_tokens(1, 6).clamp(min=1)
    padded = torch.cat([torch.nn.functional.pad(short, sides) for sides in ((0, 3), (3, 0))])
    output = classifier.eval()(padded, attention_mask=(padded != 0).long(), labels=torch.tensor([0.5, 1.0]))
    expected = classifier.score(model.model(short).last_hidden_state[:, -1])
    assert largest(output.logits - expected) < 1e-5
    output.loss.backward()
    assert classifier.score.weight.grad.abs().sum() > 0
