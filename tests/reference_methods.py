"""Plain fp64 decoders with DenseFormer, Attention Residuals and mHC, written from the methods' definitions alone.

They are the oracle for whole models of these methods, as `reference_decoder.py` is for Depth-Attention: they share no
code with the package, and nothing in them is fast or clever. The blocks are those of the vanilla decoder there. Weights
have Hugging Face's names; `initial_method_weights` lists what a method adds below `model.layers.{l}.` and `model.`.

Shapes: b batch, s positions, E hidden size, n streams, V vocabulary. Layers count from 0.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from tests.reference_decoder import below, feed_forward, rms_norm, self_attention

METHODS = ("denseformer", "attnres", "mhc")
SINKHORN_ITERATIONS, CLAMP = 20, 1e-12


def method_logits(
    method: str,
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    settings: Mapping[str, int],
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope_theta: float,
    eps: float,
    tied: bool = False,
) -> Tensor:
    """Logits [b, s, V] in fp64 for tokens [b, s], differentiable with respect to `weights`.

    Args:
        method: one of METHODS.
        weights: parameters under Hugging Face names, in any float dtype; computed with in fp64.
        settings: the method's: period and dilation; block_size; num_streams. What is left out has its default.
        num_layers: decoder layers; the other sizes are those of `decoder_logits`.
        eps: added to the mean square in every norm, those of the method included.
    """
    weights = {name: weight.double() for name, weight in weights.items()}
    blocks = []
    for layer in range(num_layers):
        own = below(f"model.layers.{layer}.", weights)
        attention = partial(
            self_attention, own, heads=(num_heads, num_kv_heads), head_dim=head_dim, rope_theta=rope_theta, eps=eps
        )
        blocks.append((own, attention, partial(feed_forward, own, eps=eps)))
    embedding = weights["model.embed_tokens.weight"][tokens]
    run = {"denseformer": _denseformer, "attnres": _attention_residuals, "mhc": _hyper_connections}[method]
    x = run(embedding, blocks, weights, eps, **settings)
    x = rms_norm(x, weights["model.norm.weight"], eps)
    return x @ weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T


# ---------------------------------------------------------------------------------------------------- DenseFormer


def averaged_entries(t: int, period: int, dilation: int) -> list[int]:
    """The entries of the history [X_0, Y_1, ..., Y_t] that Z_t is made of; none where Z_t = Y_t."""
    if t == 0 or t % period != 0:
        return []
    return [k for k in range(t + 1) if k % dilation == t % dilation]


def _denseformer(
    embedding: Tensor, blocks: list, weights: Mapping[str, Tensor], eps: float, period: int = 1, dilation: int = 1
) -> Tensor:
    history, z = [embedding], embedding
    for t, (_, attention, mlp) in enumerate(blocks, start=1):
        y = z + attention(z)
        y = y + mlp(y)
        history.append(y)
        entries = averaged_entries(t, period, dilation)
        if not entries:
            z = y
            continue
        # The average after the t-th block stands before layer t, or behind the last layer.
        is_last = t == len(blocks)
        alpha = weights["model.final_depth_average.weight" if is_last else f"model.layers.{t}.depth_average.weight"]
        assert alpha.shape == (len(entries),)
        z = torch.zeros_like(y)
        for position, entry in enumerate(entries):
            z = z + alpha[position] * history[entry]
    return z


# -------------------------------------------------------------------------------------------- Attention Residuals


def aggregate(completed: list[Tensor], running: Tensor, own: Mapping[str, Tensor], eps: float) -> Tensor:
    """Weighted sum of snapshots and running stream, each [b, s, E]; `own`: query, norm_weight, recency_bias."""
    scores = []
    for x in [*completed, running]:
        normed = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        scores.append((normed * own["norm_weight"]) @ own["query"])  # [b, s]
    scores[-1] = scores[-1] + own["recency_bias"]
    shares = torch.stack(scores).softmax(dim=0)
    return sum(share[..., None] * x for share, x in zip(shares, [*completed, running], strict=True))


def _attention_residuals(
    embedding: Tensor, blocks: list, weights: Mapping[str, Tensor], eps: float, block_size: int = 12
) -> Tensor:
    completed, p, count = [embedding], embedding, 0
    for own, attention, mlp in blocks:
        p = p + attention(aggregate(completed, p, below("attention_aggregator.", own), eps))
        count += 1
        p = p + mlp(aggregate(completed, p, below("mlp_aggregator.", own), eps))
        count += 1
        if count >= block_size:
            completed.append(p)
            count = 0
    return aggregate(completed, p, below("model.final_aggregator.", weights), eps)


# ------------------------------------------------------------------------------------------------------------ mHC


def sinkhorn(logits: Tensor) -> Tensor:
    """A matrix [..., n, n] whose rows and columns sum to nearly one, from logits of the same shape."""
    matrix = (logits - logits.amax(dim=(-2, -1), keepdim=True)).exp().clamp(min=CLAMP)
    for _ in range(SINKHORN_ITERATIONS):
        matrix = matrix / matrix.sum(dim=-1, keepdim=True).clamp(min=CLAMP)
        matrix = matrix / matrix.sum(dim=-2, keepdim=True).clamp(min=CLAMP)
    return matrix


def connect(streams: list[Tensor], own: Mapping[str, Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre [b, s, n], H_post [b, s, n], H_res [b, s, n, n] of one sublayer, from its n streams [b, s, E]."""
    n = len(streams)
    dynamic = rms_norm(torch.cat(streams, dim=-1), own["norm_weight"], eps) @ own["projection"].T
    pre, post, residual = dynamic[..., :n], dynamic[..., n : 2 * n], dynamic[..., 2 * n :]
    h_pre = torch.sigmoid(own["pre_scale"] * pre + own["pre_bias"])
    h_post = 2 * torch.sigmoid(own["post_scale"] * post + own["post_bias"])
    h_res = sinkhorn((own["residual_scale"] * residual + own["residual_bias"]).unflatten(-1, (n, n)))
    return h_pre, h_post, h_res


def _hyper_connections(
    embedding: Tensor, blocks: list, weights: Mapping[str, Tensor], eps: float, num_streams: int = 4
) -> Tensor:
    streams = [embedding] * num_streams
    for own, attention, mlp in blocks:
        for name, sublayer in (("attention_connector.", attention), ("mlp_connector.", mlp)):
            h_pre, h_post, h_res = connect(streams, below(name, own), eps)
            u = sublayer(sum(h_pre[..., i, None] * stream for i, stream in enumerate(streams)))
            streams = [
                sum(h_res[..., i, j, None] * stream for j, stream in enumerate(streams)) + h_post[..., i, None] * u
                for i in range(num_streams)
            ]
    shares = weights["model.stream_readout.weight"].softmax(dim=0)
    return sum(share * stream for share, stream in zip(shares, streams, strict=True))


# -------------------------------------------------------------------------------------------------------- weights


def initial_method_weights(
    method: str, *, num_layers: int, hidden_size: int, init_std: float = 0.02, **settings: int
) -> dict[str, Tensor]:
    """fp64: what the method adds, under Hugging Face names, with the values that training starts from.

    `settings` are the method's, as in `method_logits`; mHC's projections are drawn with `init_std` from a fixed seed.
    """
    make = {"denseformer": _initial_averages, "attnres": _initial_aggregators, "mhc": _initial_connectors}[method]
    return {name: weight.double() for name, weight in make(num_layers, hidden_size, init_std, **settings).items()}


def random_method_weights(
    seed: int, method: str, *, num_layers: int, hidden_size: int, **settings: int
) -> dict[str, Tensor]:
    """fp64 weights of the same names and shapes, of which every one matters and none is as it was initialised."""
    generator = torch.Generator().manual_seed(seed)
    weights = initial_method_weights(method, num_layers=num_layers, hidden_size=hidden_size, **settings)
    for name, weight in weights.items():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        if name.endswith((".query", ".projection")):
            weights[name] = noise / math.sqrt(weight.shape[-1])  # scores of order one
        elif name.endswith("_scale"):
            weights[name] = 0.7 + 0.3 * noise.tanh()
        elif name.endswith("residual_bias"):
            weights[name] = noise  # far from the identity
        else:
            weights[name] = weight + 0.4 * noise
    return weights


def _initial_averages(
    num_layers: int, hidden_size: int, init_std: float, period: int = 1, dilation: int = 1
) -> dict[str, Tensor]:
    weights = {}
    for t in range(1, num_layers + 1):
        if entries := averaged_entries(t, period, dilation):
            name = "model.final_depth_average" if t == num_layers else f"model.layers.{t}.depth_average"
            weights[f"{name}.weight"] = torch.tensor([0.0] * (len(entries) - 1) + [1.0])
    return weights


def _initial_aggregators(num_layers: int, hidden_size: int, init_std: float, block_size: int = 12) -> dict[str, Tensor]:
    names = [f"model.layers.{layer}.{part}_aggregator" for layer in range(num_layers) for part in ("attention", "mlp")]
    weights = {}
    for name in [*names, "model.final_aggregator"]:
        weights[f"{name}.query"] = torch.zeros(hidden_size)
        weights[f"{name}.norm_weight"] = torch.ones(hidden_size)
        weights[f"{name}.recency_bias"] = torch.tensor([3.0])
    return weights


def _initial_connectors(num_layers: int, hidden_size: int, init_std: float, num_streams: int = 4) -> dict[str, Tensor]:
    n, wide = num_streams, num_streams * hidden_size
    generator = torch.Generator().manual_seed(0)
    mixing = torch.full((n, n), 0.01 / (n - 1), dtype=torch.float64).fill_diagonal_(0.99)
    weights = {}
    for name in (
        f"model.layers.{layer}.{part}_connector" for layer in range(num_layers) for part in ("attention", "mlp")
    ):
        weights[f"{name}.norm_weight"] = torch.ones(wide)
        weights[f"{name}.projection"] = init_std * torch.randn(n * n + 2 * n, wide, generator=generator)
        weights[f"{name}.pre_bias"] = torch.full((n,), 1 / n, dtype=torch.float64).logit()
        weights[f"{name}.post_bias"] = torch.zeros(n)
        weights[f"{name}.residual_bias"] = mixing.log().flatten()
        for part in ("pre", "post", "residual"):
            weights[f"{name}.{part}_scale"] = torch.tensor([0.01], dtype=torch.float64)
    return weights | {"model.stream_readout.weight": torch.zeros(n)}
