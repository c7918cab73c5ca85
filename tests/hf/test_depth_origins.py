"""Shares of layers' own values against values that were really mixed: what each layer adds is made visible."""

import torch

from megatron_depthattn.hf.depth_origins import depth_origins
from megatron_depthattn.hf.modeling_depthattn import depth_mix, depth_weights

SOURCES = [[i for i in range(layer) if i % 2 == 0 or i >= layer - 1] for layer in range(6)]
B, H, G, T = 2, 6, 3, 5


def mixed_unit_values() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights of every layer, and its mixed value where each layer's own is a unit vector of its own."""
    generator = torch.Generator().manual_seed(0)
    weights, memory = [], []
    for layer, sources in enumerate(SOURCES):
        query = 2 * torch.randn(B, H, T, len(SOURCES), generator=generator, dtype=torch.float64)
        key = torch.randn(B, G, T, len(SOURCES), generator=generator, dtype=torch.float64)
        value = torch.eye(len(SOURCES), dtype=torch.float64)[layer].expand_as(key)
        weights.append(depth_weights(query, [*(memory[i][0] for i in sources), key], 1.0))
        memory.append((key, depth_mix(weights[-1], value, [memory[i][1] for i in sources])))
    return weights, [mixed for _, mixed in memory]


def test_shares_are_what_unit_vectors_become():
    weights, mixed = mixed_unit_values()
    origins = depth_origins(weights, SOURCES)
    for layer, (found, expected) in enumerate(zip(origins, mixed, strict=True)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.sum(dim=-1), torch.ones(B, G, T, dtype=torch.float64))
        assert not found[..., layer + 1 :].any()


def test_control_direct_weights_and_mean_heads_are_something_else():
    weights, mixed = mixed_unit_values()
    last = len(SOURCES) - 1
    direct = torch.zeros_like(mixed[last])
    direct[..., [*SOURCES[last], last]] = weights[last]
    assert (direct - mixed[last]).abs().max() > 1e-2
    of_means = depth_origins([w.mean(dim=1) for w in weights], SOURCES)[last]
    assert (of_means - mixed[last].mean(dim=1)).abs().max() > 1e-2
