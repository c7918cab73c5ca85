"""What a recorder hears of the weights over depth, against the independent fp64 decoder; and that it disturbs nothing.

Shapes: b batch, s positions, G key/value heads, n sources.
"""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_depthattn.config import RunConfig, TrainConfig
from megatron_depthattn.model.depth_weights import DepthRecorder, recorder
from megatron_depthattn.model.gpt import build_gpt_model
from megatron_depthattn.train.curves import depth_curves
from megatron_depthattn.train.metrics import DepthRecord
from tests.megatron_weights import load, to_megatron
from tests.reference_decoder import decoder_logits, random_weights
from tests.small_models import small_config

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

SHAPE = {"num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
HIDDEN, FFN, VOCAB, BATCH, SEQUENCE = 32, 48, 97, 2, 17
WEIGHTS = random_weights(0, hidden_size=HIDDEN, ffn_hidden_size=FFN, vocab_size=VOCAB, **SHAPE)
TOKENS = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(1))
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
TOLERANCE = 1e-5


def build(*, stride: int = 2, window: int = 1, num_loops: int = 1, **overrides):
    config = small_config(
        SHAPE["num_layers"] * num_loops,
        num_loops=num_loops,
        layernorm_epsilon=1e-6,
        depth_attention_stride=stride,
        depth_attention_recent_window=window,
        **overrides,
    )
    model = build_gpt_model(config, vocab_size=VOCAB, max_sequence_length=SEQUENCE)
    load(model, to_megatron(WEIGHTS, SHAPE["num_layers"], SHAPE["head_dim"]), VOCAB)
    return model.train()


def expected_weights(*, stride: int = 2, window: int = 1, num_loops: int = 1, **ablation: Any) -> list[Tensor]:
    """Of every effective layer the weights [b, s, G, n + 1] in fp64."""
    found: list[Tensor] = []
    depth = {"stride": stride, "window": window, "num_loops": num_loops, "depth_weights": found} | ablation
    decoder_logits(WEIGHTS, TOKENS, **SHAPE, rope_theta=10000.0, eps=1e-6, **depth)
    return found


def step(model) -> Tensor:
    """Forward and backward; the loss."""
    positions = torch.arange(SEQUENCE).expand_as(TOKENS)
    loss = model(TOKENS, positions, None, labels=TOKENS.roll(-1, dims=1)).mean()
    loss.backward()
    return loss.detach()


def heard_of(model, position_stride: int = 1) -> dict[int, Tensor]:
    made = DepthRecorder(position_stride)
    with made.recording():
        step(model)
    return made.sums


def worst_difference(sums: dict[int, Tensor], expected: list[Tensor], position_stride: int = 1) -> float:
    """Largest difference of any mean from what the weights [b, s, G, n + 1] say."""
    differences = []
    for layer, found in sums.items():
        weights = expected[layer][:, ::position_stride]
        assert (found[:, 0] == weights.shape[0] * weights.shape[1]).all()
        entropy = -(weights * weights.log()).sum(dim=-1, keepdim=True)
        columns = torch.cat([entropy, weights.max(dim=-1, keepdim=True).values, weights], dim=-1)
        differences.append((found[:, 1:] / found[:, :1] - columns.mean(dim=(0, 1))).abs().max())
    return float(torch.stack(differences).max())


@pytest.mark.parametrize(
    ("plan", "overrides", "ablation"),
    [
        ({}, {}, {}),
        ({"stride": 1, "window": 0}, {"depth_attention_op": "reference"}, {}),
        ({"num_loops": 2}, {}, {}),
        ({}, FULL_RECOMPUTE, {}),
        ({"num_loops": 2}, FULL_RECOMPUTE, {}),
        ({}, {"depth_attention_mixes": "key_value"}, {"mixes": "key_value"}),
        ({"stride": 1}, {"depth_attention_weights": "uniform"}, {"uniform": True}),
    ],
    ids=str,
)
def test_means_are_those_of_the_fp64_decoder(plan, overrides, ablation, record_property):
    sums = heard_of(build(**plan, **overrides))
    assert sorted(sums) == list(range(1, SHAPE["num_layers"] * plan.get("num_loops", 1)))  # layer 0 reads nobody
    error = worst_difference(sums, expected_weights(**plan, **ablation))
    record_property("error", error)
    assert error < TOLERANCE


def test_control_other_weights_are_distinguished():
    sums, expected = heard_of(build()), expected_weights()
    assert worst_difference(sums, [weights.flip(-1) for weights in expected]) > 1e-2  # itself first
    assert worst_difference(sums, [weights.flip(2) for weights in expected]) > 1e-2  # the other head
    assert worst_difference(sums, [*expected[:2], expected[3], expected[2]]) > 1e-3  # another layer


def test_every_third_position():
    sums, expected = heard_of(build(), position_stride=3), expected_weights()
    assert worst_difference(sums, expected, position_stride=3) < TOLERANCE
    for weights in expected:
        weights[:, 0] = weights[:, -1]  # position 0 is one of those that are looked at
    assert worst_difference(sums, expected, position_stride=3) > 1e-3


@pytest.mark.parametrize("overrides", [{}, FULL_RECOMPUTE], ids=["kept", "recomputed"])
def test_a_step_that_is_listened_to_is_the_same_to_the_bit(overrides):
    plain, recorded = build(**overrides), build(**overrides)
    loss, made = step(plain), DepthRecorder(1)
    with made.recording():
        assert torch.equal(step(recorded), loss)
    assert made.sums
    for (name, one), other in zip(plain.named_parameters(), recorded.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_the_first_of_two_micro_batches_is_heard_and_nothing_afterwards():
    model, made = build(), DepthRecorder(1)
    with made.recording():
        step(model)
        first = {layer: sums.clone() for layer, sums in made.sums.items()}
        with torch.no_grad():
            next(model.parameters()).mul_(-2)
        step(model)
    assert recorder() is None
    step(model)
    assert all(torch.equal(made.sums[layer], sums) for layer, sums in first.items())


# ---- the record


def train_config(**train) -> TrainConfig:
    return dataclasses.replace(RunConfig().train, **train)


def record_of(model, config: TrainConfig, step_number: int = 1) -> dict | None:
    record = DepthRecord(config, model.config, SEQUENCE)
    with record.recording(step_number):
        step(model)
    return record.collect()


def test_a_record_is_in_the_documented_form():
    record = record_of(build(), train_config())
    expected = expected_weights()
    assert json.loads(json.dumps(record)) == record
    assert (record.keys(), record["tokens"]) == ({"tokens", "layers"}, BATCH * SEQUENCE)
    assert {layer: entry["sources"] for layer, entry in record["layers"].items()} == {
        "1": [0],
        "2": [0, 1],
        "3": [0, 2],
    }
    for layer, entry in record["layers"].items():
        assert entry.keys() == {"sources", "weights", "entropy", "collapsed"}
        weights = expected[int(layer)]
        assert entry["weights"] == pytest.approx(weights.mean(dim=(0, 1, 2)).tolist(), abs=TOLERANCE)
        assert entry["entropy"] == pytest.approx(float(-(weights * weights.log()).sum(-1).mean()), abs=TOLERANCE)
        assert entry["collapsed"] == 0.0
    curves = depth_curves(record)
    assert len(curves) == 3 * 3 + 5
    assert curves["depth/layer_003/source_002"] == record["layers"]["3"]["weights"][1]
    assert curves["depth/layer_003/self"] == record["layers"]["3"]["weights"][-1]
    assert depth_curves(None) == {}


def test_a_head_that_puts_all_on_one_at_every_token_has_collapsed():
    """Whichever one that is. Head 0: a source at even positions, the layer itself at odd ones; head 1: all alike."""
    positions, head_dim = 6, 4
    direction = torch.zeros(positions, 1, 2, head_dim)
    direction[:, :, 0, 0] = 30.0
    query, towards_source = direction.repeat_interleave(2, dim=2), direction * 1.0
    towards_source[1::2] *= -1
    record = DepthRecord(train_config(), build(stride=1, window=0).config, SEQUENCE)
    with record.recording(1):
        for layer in (1, 2, 3):
            keys = [towards_source, *[torch.zeros_like(direction)] * (layer - 1)]
            recorder().record(layer, query, keys, -towards_source, 1.0)
    entry = record.collect()["layers"]["3"]
    assert entry["collapsed"] == 0.5
    assert entry["weights"] == pytest.approx([0.375, 0.125, 0.125, 0.375], abs=1e-6)
    assert entry["entropy"] == pytest.approx(math.log(4) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("interval", "due"), [(4, [1, 4, 8, 10]), (1, list(range(1, 11))), (100, [1, 10]), (None, [])], ids=str
)
def test_due_steps(interval, due):
    record = DepthRecord(train_config(steps=10, depth_interval=interval), build().config, SEQUENCE)
    found = []
    for number in range(1, 11):
        with record.recording(number):
            if recorder() is not None:
                found.append(number)
    assert found == due


def test_nothing_is_on_record_of_a_vanilla_model_nor_of_weights_that_are_not_finite():
    vanilla = build(depth_attention=False)
    assert record_of(vanilla, train_config(depth_interval=1)) is None
    broken = build()
    with torch.no_grad():
        broken.decoder.layers[2].self_attention.linear_qkv.weight.fill_(torch.nan)
    assert record_of(broken, train_config(depth_interval=1)) is None
