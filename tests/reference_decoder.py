"""A plain fp64 decoder with Depth-Attention, written from the method's definition alone (arXiv:2606.05014).

It is the oracle for whole models: it shares no code with the package, and nothing in it is fast or clever.
With Depth-Attention off it is the Qwen3 architecture; weights have Hugging Face's names and orientation
(`model.layers.0.self_attn.q_proj.weight` is [out, in]).

Shapes: b batch, s positions, H query heads, G key/value heads, d head size, E hidden size, V vocabulary.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def depth_sources(layer: int, stride: int, window: int) -> list[int]:
    """Source layers of `layer`: the earlier multiples of `stride`, and the last `window` earlier layers."""
    return [i for i in range(layer) if i % stride == 0 or i >= layer - window]


def loop_sources(effective: int, num_layers: int, stride: int, window: int) -> list[int]:
    """Sources of effective layer `effective` = r * L + l: layer l in the r loops before, then l's sources in loop r."""
    loop, layer = divmod(effective, num_layers)
    earlier_selves = [earlier * num_layers + layer for earlier in range(loop)]
    return earlier_selves + [loop * num_layers + i for i in depth_sources(layer, stride, window)]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x divided by its root mean square over the last dimension, times `weight`."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def rope(x: Tensor, theta: float) -> Tensor:
    """Rotate x [b, s, heads, d]: at position p, elements (i, i + d/2) turn by the angle p * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    positions = torch.arange(x.shape[1], dtype=x.dtype)
    frequencies = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=x.dtype)
    angles = torch.outer(positions, frequencies)[:, None, :]  # [s, 1, d / 2]
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def depth_weights_of(q: Tensor, keys: list[Tensor]) -> Tensor:
    """Weights [b, s, G, n + 1] of q [b, s, H, d] over the keys [b, s, G, d] of n sources and, last, of the layer."""
    num_kv_heads, head_dim = keys[-1].shape[2:]
    group = q.shape[2] // num_kv_heads
    weights_of_heads = []
    for j in range(num_kv_heads):
        qbar = q[:, :, j * group : (j + 1) * group].mean(dim=2)  # [b, s, d]
        scores = [(qbar * key[:, :, j]).sum(dim=-1) / math.sqrt(head_dim) for key in keys]
        weights_of_heads.append(torch.softmax(torch.stack(scores, dim=-1), dim=-1))
    return torch.stack(weights_of_heads, dim=2)


def depth_mix(weights: Tensor, states: list[Tensor]) -> Tensor:
    """Sum [b, s, G, d] of n + 1 states [b, s, G, d] with weights [b, s, G, n + 1]."""
    return sum((weights[..., i : i + 1] * state for i, state in enumerate(states)), start=torch.zeros_like(states[-1]))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [b, s, H, d] over k and v [b, s, G, d], each position on itself and the earlier ones."""
    num_heads, head_dim = q.shape[2:]
    group = num_heads // k.shape[2]
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(diagonal=1)
    outputs = []
    for h in range(num_heads):
        scores = q[:, :, h] @ k[:, :, h // group].transpose(1, 2) / math.sqrt(head_dim)  # [b, s, s]
        outputs.append(scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v[:, :, h // group])
    return torch.stack(outputs, dim=2)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gated = x @ gate.T
    return (gated * torch.sigmoid(gated) * (x @ up.T)) @ down.T


def below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def queries_keys_values(
    own: Mapping[str, Tensor],
    x: Tensor,
    heads: tuple[int, int],
    head_dim: int,
    rope_theta: float,
    eps: float,
    k_norm_after_rope: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [b, s, H, d], k and v [b, s, G, d] of a layer that reads x [b, s, E]; `own`: its weights, `heads`: (H, G)."""
    normed = rms_norm(x, own["input_layernorm.weight"], eps)
    q, k, v = ((normed @ own[f"self_attn.{part}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for part in "qkv")
    assert (q.shape[2], k.shape[2]) == heads
    q = rope(rms_norm(q, own["self_attn.q_norm.weight"], eps), rope_theta)
    k_norm = own["self_attn.k_norm.weight"]
    if k_norm_after_rope:
        return q, rms_norm(rope(k, rope_theta), k_norm, eps), v
    return q, rope(rms_norm(k, k_norm, eps), rope_theta), v


def self_attention(
    own: Mapping[str, Tensor], x: Tensor, heads: tuple[int, int], head_dim: int, rope_theta: float, eps: float
) -> Tensor:
    """What a vanilla layer's attention adds to the residual stream when it reads x [b, s, E], its norm included."""
    q, k, v = queries_keys_values(own, x, heads, head_dim, rope_theta, eps)
    return causal_attention(q, k, v).flatten(2) @ own["self_attn.o_proj.weight"].T


def feed_forward(own: Mapping[str, Tensor], x: Tensor, eps: float) -> Tensor:
    """What a layer's MLP adds to the residual stream when it reads x [b, s, E], its norm included."""
    normed = rms_norm(x, own["post_attention_layernorm.weight"], eps)
    return swiglu(normed, own["mlp.gate_proj.weight"], own["mlp.up_proj.weight"], own["mlp.down_proj.weight"])


def decoder_logits(
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope_theta: float,
    eps: float,
    stride: int | None = None,
    window: int = 0,
    depth_attention: bool = True,
    tied: bool = False,
    num_loops: int = 1,
    unrolled: bool = False,
    uniform: bool = False,
    mixes: str = "value",
    k_norm_after_rope: bool = False,
    depth_weights: list[Tensor] | None = None,
) -> Tensor:
    """Logits [b, s, V] in fp64 for tokens [b, s], differentiable with respect to `weights`.

    Args:
        weights: parameters under Hugging Face Qwen3 names, in any float dtype; computed with in fp64.
        tokens: token ids [b, s], positions counted from 0, no padding.
        num_layers: decoder layers with weights of their own.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; query head h reads key/value head h // (H / G).
        head_dim: size of a head, d.
        rope_theta: base of the rotary frequencies.
        eps: added to the mean square in every norm.
        stride: multiples of it are sources of every later layer; None: half of the layers that it counts.
        window: this many layers just before a layer are its sources as well.
        depth_attention: False for the vanilla decoder.
        tied: use the embedding in place of `lm_head.weight`.
        num_loops: runs of the stack with the same weights.
        unrolled: stride and window count through all loops; False: within one, and earlier selves are sources as well.
        uniform: weigh the candidates alike.
        mixes: what is mixed, "value", "key" or "key_value"; the scores are of unmixed keys, whatever is mixed.
        k_norm_after_rope: normalise keys after the rotary embedding, as the released checkpoints do.
        depth_weights: an empty list to fill with each (effective) layer's weights [b, s, G, n + 1] over depth.
    """
    weights = {name: weight.double() for name, weight in weights.items()}
    heads = num_heads, num_kv_heads
    num_effective_layers = num_loops * num_layers
    if stride is None:
        stride = max(1, (num_effective_layers if unrolled else num_layers) // 2)

    memory: list[tuple[Tensor, Tensor, Tensor]] = []  # of every effective layer so far: raw key, its key, its value
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(num_effective_layers):
        own = below(f"model.layers.{layer % num_layers}.", weights)
        q, raw_key, v = queries_keys_values(own, x, heads, head_dim, rope_theta, eps, k_norm_after_rope)
        k = raw_key
        if depth_attention:
            read = depth_sources(layer, stride, window) if unrolled else loop_sources(layer, num_layers, stride, window)
            mix = depth_weights_of(q, [*(memory[i][0] for i in read), raw_key])
            if uniform:
                mix = torch.full_like(mix, 1 / (len(read) + 1))
            if mixes != "value":
                k = depth_mix(mix, [*(memory[i][1] for i in read), k])
            if mixes != "key":
                v = depth_mix(mix, [*(memory[i][2] for i in read), v])
            if depth_weights is not None:
                depth_weights.append(mix)
        memory.append((raw_key, k, v))
        x = x + causal_attention(q, k, v).flatten(2) @ own["self_attn.o_proj.weight"].T
        x = x + feed_forward(own, x, eps)
    x = rms_norm(x, weights["model.norm.weight"], eps)
    return x @ weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log p(label) in nats; logits [b, s, V]; labels [b, s], at t the token that follows token t."""
    label_logits = logits.gather(-1, labels[..., None]).squeeze(-1)
    return (logits.logsumexp(dim=-1) - label_logits).mean()


def random_weights(
    seed: int,
    *,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    vocab_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    tied: bool = False,
) -> dict[str, Tensor]:
    """fp64 weights for `decoder_logits`: projections that keep the size of their input, norms in [0.5, 1.5).

    Norm weights away from one make a norm that is missing, doubled, shared or in the wrong place show.
    """
    generator = torch.Generator().manual_seed(seed)

    def projection(out_features: int, in_features: int) -> Tensor:
        weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
        return weight / math.sqrt(in_features)

    def norm(size: int) -> Tensor:
        return 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)

    weights = {"model.embed_tokens.weight": projection(vocab_size, hidden_size)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": norm(hidden_size),
            prefix + "self_attn.q_proj.weight": projection(num_heads * head_dim, hidden_size),
            prefix + "self_attn.k_proj.weight": projection(num_kv_heads * head_dim, hidden_size),
            prefix + "self_attn.v_proj.weight": projection(num_kv_heads * head_dim, hidden_size),
            prefix + "self_attn.o_proj.weight": projection(hidden_size, num_heads * head_dim),
            prefix + "self_attn.q_norm.weight": norm(head_dim),
            prefix + "self_attn.k_norm.weight": norm(head_dim),
            prefix + "post_attention_layernorm.weight": norm(hidden_size),
            prefix + "mlp.gate_proj.weight": projection(ffn_hidden_size, hidden_size),
            prefix + "mlp.up_proj.weight": projection(ffn_hidden_size, hidden_size),
            prefix + "mlp.down_proj.weight": projection(hidden_size, ffn_hidden_size),
        }
    weights["model.norm.weight"] = norm(hidden_size)
    if not tied:
        weights["lm_head.weight"] = projection(vocab_size, hidden_size)
    return weights
