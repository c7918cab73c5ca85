"""Initial weights depend on the seed and on a parameter's name in the whole model, and on nothing else."""

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_depthattn.model.gpt import build_gpt_model, qwen3_style_config
from megatron_depthattn.model.initialization import globally_named_parameters, initialize_weights

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

STD = 0.02
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def build(num_layers: int = 4, *, depth_attention: bool = True, **options) -> GPTModel:
    config = qwen3_style_config(
        num_layers=num_layers,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        ffn_hidden_size=96,
        depth_attention=depth_attention,
    )
    return build_gpt_model(config, vocab_size=100, max_sequence_length=8, **options)


def values(model: GPTModel, seed: int = 1, init_std: float = STD) -> dict[str, Tensor]:
    initialize_weights(model, seed=seed, init_std=init_std)
    return {name: parameter.detach().clone() for name, parameter in globally_named_parameters(model)}


def assert_equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    for name, value in some.items():
        assert torch.equal(value, others[name]), name


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before():
    torch.manual_seed(0)
    first = values(build())
    torch.manual_seed(123)
    torch.randn(7)
    second = values(build())
    assert first.keys() == second.keys()
    assert_equal(first, second)


def test_megatrons_own_draws_and_the_global_generator_are_left_alone():
    model = build()
    state = torch.get_rng_state()
    initialize_weights(model, seed=1, init_std=STD)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_gives_other_weights():
    first, second = values(build(), seed=1), values(build(), seed=2)
    for name, value in first.items():
        assert torch.equal(value, second[name]) == (value.dim() == 1), name


def test_every_matrix_is_another_draw():
    matrices = [value.flatten()[:256] for value in values(build()).values() if value.dim() == 2]
    stacked = torch.stack(matrices) / STD
    correlations = stacked @ stacked.T / 256
    assert correlations.fill_diagonal_(0).abs().max() < 0.35  # 5.6 standard deviations of independent draws


def test_a_parameter_depends_on_its_name_only():
    """The same names in another model have the same values: more layers, no Depth-Attention, tied embeddings."""
    small = values(build(4))
    assert_equal(small, values(build(8)))
    assert_equal(small, values(build(4, depth_attention=False)))
    assert_equal(values(build(4, tie_embeddings=True)), small)


def test_standard_deviation_and_norms():
    for init_std in (0.02, 0.01):
        for name, value in values(build(), init_std=init_std).items():
            if value.dim() == 1:
                assert torch.equal(value, torch.ones_like(value)), name
            else:
                assert value.numel() >= 4096, name
                assert value.std() == pytest.approx(init_std, rel=0.06), name
                assert abs(value.mean()) < 5 * init_std / value.numel() ** 0.5, name
                assert value.abs().max() > 3 * init_std, f"{name}: cut off"
