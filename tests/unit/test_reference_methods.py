"""The fp64 decoders of the compared methods, against the vanilla decoder and cases computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from tests.reference_decoder import below, decoder_logits, feed_forward, random_weights, rms_norm, self_attention
from tests.reference_methods import (
    aggregate,
    averaged_entries,
    initial_method_weights,
    method_logits,
    random_method_weights,
    sinkhorn,
)

HIDDEN, NUM_LAYERS = 24, 5
SHAPE = {"num_layers": NUM_LAYERS, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope_theta": 1e3, "eps": 1e-5}
SETTINGS = [
    ("denseformer", {}),
    ("denseformer", {"period": 2, "dilation": 3}),
    ("attnres", {"block_size": 2}),
    ("attnres", {"block_size": 3}),
    ("attnres", {}),
    ("mhc", {}),
    ("mhc", {"num_streams": 2}),
]
TOKENS = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1))

each_method = pytest.mark.parametrize(("method", "settings"), SETTINGS, ids=lambda v: "" if v == {} else str(v))


def block_weights() -> dict[str, Tensor]:
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    return random_weights(0, num_layers=NUM_LAYERS, hidden_size=HIDDEN, ffn_hidden_size=40, vocab_size=50, **heads)


def initial(method: str, **settings: int) -> dict[str, Tensor]:
    return initial_method_weights(method, num_layers=NUM_LAYERS, hidden_size=HIDDEN, **settings)


def logits(method: str, added: dict[str, Tensor], **settings: int) -> Tensor:
    return method_logits(method, block_weights() | added, TOKENS, settings, **SHAPE)


def vanilla_logits() -> Tensor:
    return decoder_logits(block_weights(), TOKENS, depth_attention=False, **SHAPE)


@pytest.mark.parametrize("settings", [{}, {"period": 2}, {"dilation": 2}, {"period": 3, "dilation": 2}], ids=str)
def test_denseformer_starts_as_the_vanilla_decoder_exactly(settings: dict):
    assert torch.equal(logits("denseformer", initial("denseformer", **settings), **settings), vanilla_logits())
    added = random_method_weights(0, "denseformer", num_layers=NUM_LAYERS, hidden_size=HIDDEN, **settings)
    assert (logits("denseformer", added, **settings) - vanilla_logits()).abs().max() > 0.1


def test_denseformers_entries():
    """By hand: after block t entries t mod dilation, then every dilation-th, up to t."""
    assert [averaged_entries(t, 1, 1) for t in range(4)] == [[], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert [averaged_entries(t, 2, 3) for t in range(1, 7)] == [[], [2], [], [1, 4], [], [0, 3, 6]]


@pytest.mark.parametrize("num_streams", [2, 4])
def test_mhc_without_its_dynamic_part_is_the_vanilla_decoder(num_streams: int):
    """Streams that stay equal are one stream; the bound is rounding and Sinkhorn's clamp."""
    added = initial("mhc", num_streams=num_streams)
    still = {name: torch.zeros_like(w) if name.endswith("_scale") else w for name, w in added.items()}
    assert (logits("mhc", still, num_streams=num_streams) - vanilla_logits()).abs().max() < 1e-10
    moved = (logits("mhc", added, num_streams=num_streams) - vanilla_logits()).abs().max()
    assert 1e-5 < moved < 1, "control: the dynamic part, which starts small, does something"


def test_attention_residuals_start_with_the_stream_ahead_of_each_snapshot():
    """Zero queries score every snapshot 0 and the stream 3, whatever the tensors are."""
    own = {"query": torch.zeros(2), "norm_weight": torch.ones(2), "recency_bias": torch.tensor([3.0])}
    own = {name: weight.double() for name, weight in own.items()}
    snapshots, stream = [torch.tensor([[[5.0, -1.0]]]), torch.tensor([[[0.0, 2.0]]])], torch.tensor([[[1.0, 7.0]]])
    ahead = math.exp(3) / (math.exp(3) + 2)
    expected = ahead * stream + (1 - ahead) / 2 * (snapshots[0] + snapshots[1])
    found = aggregate([snapshot.double() for snapshot in snapshots], stream.double(), own, 1e-5)
    assert torch.allclose(found, expected.double())


def test_attention_residuals_of_one_layer_by_hand():
    """While all candidates are the embedding, attention reads it as it is; the MLP reads e^3 : 1 parts of both."""
    weights, eps = block_weights(), SHAPE["eps"]
    own = below("model.layers.0.", weights)
    x = weights["model.embed_tokens.weight"][TOKENS]
    ahead = math.exp(3) / (math.exp(3) + 1)
    after = x + self_attention(own, x, heads=(4, 2), head_dim=8, rope_theta=SHAPE["rope_theta"], eps=eps)
    out = after + feed_forward(own, ahead * after + (1 - ahead) * x, eps)
    out = rms_norm(ahead * out + (1 - ahead) * x, weights["model.norm.weight"], eps)
    added = initial_method_weights("attnres", num_layers=1, hidden_size=HIDDEN)
    found = method_logits("attnres", weights | added, TOKENS, {}, **SHAPE | {"num_layers": 1})
    assert (found - out @ weights["lm_head.weight"].T).abs().max() < 1e-12


def test_sinkhorn_gives_rows_and_columns_that_sum_to_one():
    matrix = sinkhorn(torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert (matrix.sum(dim=-1) - 1).abs().max() < 1e-6
    assert (matrix.sum(dim=-2) - 1).abs().max() < 1e-12
