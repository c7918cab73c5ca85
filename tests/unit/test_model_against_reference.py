"""The Megatron model in fp32 against the independent fp64 decoder: logits and every gradient.

Shapes: b batch, s positions, H query heads, G key/value heads, d head size, E hidden size, V vocabulary.
"""

import itertools
from collections.abc import Mapping

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_depthattn.model.gpt import build_gpt_model
from tests.megatron_weights import concatenated_qkv, load, to_megatron, unpadded_logits
from tests.reference_decoder import decoder_logits, mean_cross_entropy, random_weights
from tests.small_models import small_config

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 6, 4, 8
HIDDEN, FFN, VOCAB, SEQUENCE = 32, 48, 97, 17
LOGIT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4
ABLATION_KEYS = [f"depth_attention_{key}" for key in ("loop_sources", "weights", "mixes")]


def build(
    num_kv_heads: int, *, stride: int | None, window: int, tied: bool = False, num_loops: int = 1, **overrides
) -> GPTModel:
    config = small_config(
        NUM_LAYERS * num_loops,
        num_loops=num_loops,
        num_query_groups=num_kv_heads,
        layernorm_epsilon=1e-6,
        depth_attention_stride=stride,
        depth_attention_recent_window=window,
        **overrides,
    )
    return build_gpt_model(config, vocab_size=VOCAB, max_sequence_length=SEQUENCE, tie_embeddings=tied)


def megatron_logits(model: GPTModel, tokens: Tensor) -> Tensor:
    return unpadded_logits(model, tokens, VOCAB)


def weights_of(num_kv_heads: int, *, tied: bool = False) -> dict[str, Tensor]:
    return random_weights(
        0,
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        vocab_size=VOCAB,
        num_heads=NUM_HEADS,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        tied=tied,
    )


def reference_logits(weights: Mapping[str, Tensor], tokens: Tensor, num_kv_heads: int, **options) -> Tensor:
    shape = {"num_layers": NUM_LAYERS, "num_heads": NUM_HEADS, "num_kv_heads": num_kv_heads, "head_dim": HEAD_DIM}
    return decoder_logits(weights, tokens, **shape, rope_theta=10000.0, eps=1e-6, **options)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=lambda g: f"gqa{NUM_HEADS // g}")
@pytest.mark.parametrize("stride", [1, 2, NUM_LAYERS // 2, NUM_LAYERS])
@pytest.mark.parametrize("window", [0, 1, 2])
@torch.no_grad()
def test_logits(num_kv_heads, stride, window, tokens, record_property):
    weights = weights_of(num_kv_heads)
    expected = reference_logits(weights, tokens, num_kv_heads, stride=stride, window=window)
    model = build(num_kv_heads, stride=stride, window=window)
    load(model, to_megatron(weights, NUM_LAYERS, HEAD_DIM), VOCAB)
    for op in ("lean", "reference"):
        model.config.depth_attention_op = op
        error = (megatron_logits(model, tokens) - expected).abs().max().item()
        record_property(f"logit_error_{op}", error)
        assert error < LOGIT_TOLERANCE, op
    # Without Depth-Attention the function is another one, so the comparison above can fail.
    vanilla = reference_logits(weights, tokens, num_kv_heads, depth_attention=False)
    assert (megatron_logits(model, tokens) - vanilla).abs().max() > 1e-2


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@torch.no_grad()
def test_control_another_order_of_the_qkv_rows_fails(num_kv_heads, tokens):
    weights = weights_of(num_kv_heads)
    expected = reference_logits(weights, tokens, num_kv_heads, stride=2)
    model = build(num_kv_heads, stride=2, window=0)
    load(model, to_megatron(weights, NUM_LAYERS, HEAD_DIM, qkv=concatenated_qkv), VOCAB)
    assert (megatron_logits(model, tokens) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_control_another_plan_fails(tokens):
    """Neighbouring strides and windows are distinguished: the grid above does not pass by accident."""
    weights = weights_of(2)
    plans = list(itertools.product((1, 2, 3), (0, 1, 2)))
    logits = [reference_logits(weights, tokens, 2, stride=stride, window=window) for stride, window in plans]
    for (one, a), (other, b) in itertools.combinations(zip(plans, logits, strict=True), 2):
        same = one[0] == other[0] == 1  # a window adds nothing to every earlier layer
        assert same or (a - b).abs().max() > 1e-2, (one, other)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=lambda g: f"gqa{NUM_HEADS // g}")
@pytest.mark.parametrize(("stride", "window"), [(1, 0), (2, 1), (NUM_LAYERS // 2, 0)])
@pytest.mark.parametrize("op", ["lean", "reference"])
def test_gradients(num_kv_heads, stride, window, op, tokens, record_property):
    """Every parameter: d loss / d weight, relative to the norm of the gradient."""
    check_gradients(tokens, record_property, num_kv_heads, stride=stride, window=window, op=op, tied=False)


def test_gradients_with_tied_embeddings(tokens, record_property):
    check_gradients(tokens, record_property, 2, stride=2, window=1, op="lean", tied=True)


UNROLLED = {"num_loops": 3, "depth_attention_loop_sources": "unrolled"}
VARIANTS = [
    ({"num_loops": 3}, {}, {"num_loops": 1}),
    ({"num_loops": 3, "stride": 4, "window": 1}, {}, {"unrolled": True}),
    (UNROLLED, {"unrolled": True}, {"unrolled": False}),
    (UNROLLED | {"stride": 4, "window": 1}, {"unrolled": True}, {"num_loops": 1}),
    ({"num_loops": 2, "depth_attention": False}, {}, {"num_loops": 1}),
    ({"depth_attention_weights": "uniform", "window": 1}, {"uniform": True}, {"uniform": False}),
    ({"depth_attention_mixes": "key", "stride": 2}, {"mixes": "key"}, {"mixes": "value"}),
    ({"depth_attention_mixes": "key_value", "num_loops": 2}, {"mixes": "key_value"}, {"mixes": "key"}),
    (
        {"depth_attention_mixes": "key_value", "depth_attention_weights": "uniform", "stride": 1},
        {"mixes": "key_value", "uniform": True},
        {"mixes": "value"},
    ),
    ({"depth_attention_mixes": "key", "depth_attention_weights": "uniform"}, {"mixes": "key", "uniform": True}, {}),
]
"""Loops and ablations: what the model is given, what the oracle is given beside it, and what another function is."""


@pytest.mark.parametrize(("given", "oracle", "other"), VARIANTS, ids=str)
def test_loops_and_ablations(given, oracle, other, tokens, record_property):
    """Logits, and gradients (of a looped model summed over the loops); a stride of None is half the layers."""
    given = {"stride": None, "window": 0} | given
    oracle = {key: value for key, value in given.items() if key not in ABLATION_KEYS} | oracle
    weights = weights_of(2)
    with torch.no_grad():
        expected = reference_logits(weights, tokens, 2, **oracle)
        another = reference_logits(weights, tokens, 2, **(oracle | (other or {"depth_attention": False})))
        model = build(2, **given)
        load(model, to_megatron(weights, NUM_LAYERS, HEAD_DIM), VOCAB)
        error = (megatron_logits(model, tokens) - expected).abs().max().item()
    record_property("logit_error", error)
    assert error < LOGIT_TOLERANCE
    assert (another - expected).abs().max() > 1e-2  # control
    check_gradients(tokens, record_property, 2, op="lean", tied=False, given=given, **oracle)


def check_gradients(tokens, record_property, num_kv_heads, *, op, tied, given=None, **mixing):
    labels = tokens.roll(-1, dims=1)
    weights = {name: weight.requires_grad_() for name, weight in weights_of(num_kv_heads, tied=tied).items()}
    options = {"tied": tied} | mixing
    mean_cross_entropy(reference_logits(weights, tokens, num_kv_heads, **options), labels).backward()
    expected = to_megatron({n: w.grad for n, w in weights.items()}, NUM_LAYERS, HEAD_DIM)

    model = build(num_kv_heads, depth_attention_op=op, **(options if given is None else {"tied": tied} | given))
    load(model, to_megatron({n: w.detach() for n, w in weights.items()}, NUM_LAYERS, HEAD_DIM), VOCAB)
    mean_cross_entropy(megatron_logits(model, tokens), labels).backward()

    errors = {}
    for name, parameter in model.named_parameters():
        reference = expected[name]
        gradient = parameter.grad[: len(reference)].double()
        assert not parameter.grad[len(reference) :].any(), f"{name}: gradient in rows of the padding"
        assert reference.norm() > 1e-6, f"{name}: nothing to compare"
        errors[name] = ((gradient - reference).norm() / reference.norm()).item()
    worst = max(errors, key=errors.__getitem__)
    record_property("gradient_error", errors[worst])
    assert errors[worst] < GRADIENT_TOLERANCE, (worst, errors[worst])
