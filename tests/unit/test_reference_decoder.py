"""The oracle for whole models, itself checked: against transformers' Qwen3, by hand, and by invariances."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.reference_decoder import (
    decoder_logits,
    depth_sources,
    loop_sources,
    mean_cross_entropy,
    random_weights,
    rms_norm,
)

VOCAB_SIZE = 97
SHAPE = {"num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
NUMERIC = {"rope_theta": 10000.0, "eps": 1e-5}


def make_weights(seed: int = 0, *, tied: bool = False, **shape: int) -> dict[str, Tensor]:
    return random_weights(seed, **(SHAPE | shape), hidden_size=48, ffn_hidden_size=80, vocab_size=VOCAB_SIZE, tied=tied)


def make_tokens(b: int = 2, s: int = 33) -> Tensor:
    return torch.randint(VOCAB_SIZE, (b, s), generator=torch.Generator().manual_seed(1))


def logits_of(weights: dict[str, Tensor], tokens: Tensor, **options: Any) -> Tensor:
    return decoder_logits(weights, tokens, **(SHAPE | NUMERIC | options))


class NoFloat32(TorchFunctionMode):
    """Qwen3 in transformers computes norms, RoPE and softmax in fp32 by name; here that name means fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(widen, args), **{name: widen(x) for name, x in (kwargs or {}).items()})


def transformers_logits(
    weights: dict[str, Tensor],
    tokens: Tensor,
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope_theta: float,
    eps: float,
    tied: bool,
) -> Tensor:
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rope_theta=rope_theta,
        rms_norm_eps=eps,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    with NoFloat32(), torch.no_grad():
        model = Qwen3ForCausalLM(config).double().eval()
        loaded = model.load_state_dict(weights, strict=False)
        assert loaded.missing_keys == (["lm_head.weight"] if tied else [])
        assert loaded.unexpected_keys == []
        logits = model(tokens, use_cache=False).logits
    assert logits.dtype == torch.float64
    return logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_vanilla_decoder_is_qwen3(num_kv_heads: int, tied: bool) -> None:
    shape = SHAPE | {"num_kv_heads": num_kv_heads}
    weights, tokens = make_weights(tied=tied, num_kv_heads=num_kv_heads), make_tokens()
    expected = transformers_logits(weights, tokens, **shape, **NUMERIC, tied=tied)
    vanilla = logits_of(weights, tokens, num_kv_heads=num_kv_heads, depth_attention=False, tied=tied)
    assert (vanilla - expected).abs().max() < 1e-10
    # Control: the comparison sees Depth-Attention.
    mixed = logits_of(weights, tokens, num_kv_heads=num_kv_heads, tied=tied)
    assert (mixed - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("num_layers", "stride", "window", "expected"),
    [
        (4, 2, 0, [[], [0], [0], [0, 2]]),
        (4, 1, 0, [[], [0], [0, 1], [0, 1, 2]]),
        (4, 4, 0, [[], [0], [0], [0]]),
        (4, 99, 0, [[], [0], [0], [0]]),
        (4, 4, 1, [[], [0], [0, 1], [0, 2]]),
        (5, 3, 2, [[], [0], [0, 1], [0, 1, 2], [0, 2, 3]]),
        (6, 2, 1, [[], [0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 4]]),
        (3, 9, 9, [[], [0], [0, 1]]),
    ],
)
def test_sources_by_hand(num_layers: int, stride: int, window: int, expected: list[list[int]]) -> None:
    assert [depth_sources(layer, stride, window) for layer in range(num_layers)] == expected


@pytest.mark.parametrize(
    ("stride", "window", "third_loop"),
    [
        (2, 0, [[0, 4], [1, 5, 8], [2, 6, 8], [3, 7, 8, 10]]),
        (9, 1, [[0, 4], [1, 5, 8], [2, 6, 8, 9], [3, 7, 8, 10]]),  # the window ends where the loop begins
    ],
)
def test_sources_of_the_third_loop_by_hand(stride: int, window: int, third_loop: list[list[int]]) -> None:
    assert [loop_sources(8 + layer, 4, stride, window) for layer in range(4)] == third_loop


def turned(x: Tensor, position: int) -> Tensor:
    """RoPE by complex numbers, whose angles are position * theta^(-2i/d)."""
    half = len(x) // 2
    angles = position * torch.tensor([NUMERIC["rope_theta"] ** (-i / half) for i in range(half)], dtype=x.dtype)
    product = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([product.real, product.imag])


def last_logits_by_hand(
    weights: dict[str, Tensor],
    tokens: list[int],
    *,
    mixes: str,
    uniform: bool,
    scored: str = "raw",
    source: str = "mixed",
) -> Tensor:
    """Logits [V] of the last token, position by position: three layers with one head, each of which reads all before.

    Args:
        scored: the keys that are scored, "raw" or, a mistake, "mixed".
        source: the states of sources that are mixed, "mixed" or, a mistake, "raw".
    """
    eps, stream = NUMERIC["eps"], [weights["model.embed_tokens.weight"][token] for token in tokens]
    memory: list[list[dict[str, tuple[Tensor, Tensor]]]] = [[] for _ in tokens]  # by token and layer: keys and values
    for layer in range(3):
        own = {name.split(f"layers.{layer}.")[-1]: weight for name, weight in weights.items()}
        queries = []
        for position, x in enumerate(stream):
            normed = rms_norm(x, own["input_layernorm.weight"], eps)
            q, k, v = (own[f"self_attn.{part}_proj.weight"] @ normed for part in "qkv")
            q, k = (
                turned(rms_norm(x, own[f"self_attn.{part}_norm.weight"], eps), position)
                for part, x in (("q", q), ("k", k))
            )
            read = memory[position]
            keys = [*(states[scored][0] for states in read), k]
            share = torch.stack([q @ key / 4 for key in keys]).softmax(dim=0)  # the root of the head size, 16
            if uniform:
                share = torch.ones_like(share) / len(keys)
            mixed_key, mixed_value = (
                sum(
                    (a * states[source][i] for a, states in zip(share[:-1], read, strict=True)), start=share[-1] * state
                )
                for i, state in enumerate((k, v))
            )
            mixed = (mixed_key if mixes != "value" else k), (mixed_value if mixes != "key" else v)
            read.append({"raw": (k, v), "mixed": mixed})
            queries.append(q)
        for position, q in enumerate(queries):
            seen = [memory[earlier][layer]["mixed"] for earlier in range(position + 1)]
            attention = torch.stack([q @ key / 4 for key, _ in seen]).softmax(dim=0)
            attended = sum(a * value for a, (_, value) in zip(attention, seen, strict=True))
            x = stream[position] + own["self_attn.o_proj.weight"] @ attended
            normed = rms_norm(x, own["post_attention_layernorm.weight"], eps)
            gate, up = own["mlp.gate_proj.weight"] @ normed, own["mlp.up_proj.weight"] @ normed
            stream[position] = x + own["mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)
    return weights["lm_head.weight"] @ rms_norm(stream[-1], weights["model.norm.weight"], eps)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("mixes", ["value", "key", "key_value"])
def test_three_layers_by_hand(mixes: str, uniform: bool) -> None:
    """Weights from raw keys, whatever is mixed; of sources what they have mixed. Both are seen."""
    shape = {"num_layers": 3, "num_heads": 1, "num_kv_heads": 1}
    weights, tokens, rule = make_weights(**shape), [5, 9, 23], {"mixes": mixes, "uniform": uniform}
    logits = logits_of(weights, torch.tensor([tokens]), stride=1, **shape, **rule)[0, -1]

    def error(**mistake: str) -> float:
        return (logits - last_logits_by_hand(weights, tokens, **rule, **mistake)).abs().max().item()

    assert error() < 1e-12
    assert error(source="raw") > 1e-3
    assert (error(scored="mixed") > 1e-3) == (mixes != "value" and not uniform)


def test_order_of_key_norm_and_rope_is_seen_where_norm_weights_differ_in_a_rotated_pair() -> None:
    """A rotation keeps a key's length, so with all norm weights one both orders are the same function."""
    weights, tokens = make_weights(), make_tokens()
    before, after = (logits_of(weights, tokens, k_norm_after_rope=late) for late in (False, True))
    assert (before - after).abs().max() > 1e-2
    for name, weight in weights.items():
        if name.endswith("k_norm.weight"):
            weight.fill_(1.0)
    before, after = (logits_of(weights, tokens, k_norm_after_rope=late) for late in (False, True))
    torch.testing.assert_close(before, after)


def test_mean_cross_entropy_is_torchs() -> None:
    logits, labels = logits_of(make_weights(), make_tokens()), make_tokens().flip(0)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(mean_cross_entropy(logits, labels), expected)
