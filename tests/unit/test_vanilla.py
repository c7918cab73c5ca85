"""Depth-Attention switched off, or without a source, is Megatron's own model: to the bit, forward and backward.

Given the same core attention, which is torch's and not Megatron's own; test_core_attention.py compares the two.
"""

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch import Tensor

from megatron_depthattn.model.core_attention import SDPAttention
from megatron_depthattn.model.gpt import build_gpt_model
from megatron_depthattn.model.initialization import initialize_weights
from megatron_depthattn.model.layer import DepthAttentionLayer
from megatron_depthattn.model.transformer_config import DepthAttentionConfig
from tests.small_models import small_config

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

VOCAB, SEQUENCE = 128, 24


def config_of(**overrides) -> DepthAttentionConfig:
    return small_config(**({"num_layers": 4} | overrides))


def ours(**overrides) -> GPTModel:
    tied = overrides.pop("tied", False)
    model = build_gpt_model(config_of(**overrides), vocab_size=VOCAB, max_sequence_length=SEQUENCE, tie_embeddings=tied)
    initialize_weights(model, seed=3, init_std=0.2)
    return model


def stock(weights_of: GPTModel, **overrides) -> GPTModel:
    """Megatron's model with Megatron's spec, built as its own script does; core attention and values are ours."""
    tied = overrides.pop("tied", False)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True)
    spec.submodules.self_attention.submodules.core_attention = SDPAttention
    model = GPTModel(
        config=config_of(depth_attention=False, **overrides),
        transformer_layer_spec=spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
        rotary_base=10000,
    )
    with torch.no_grad():
        for (name, own), (other_name, other) in zip(
            model.named_parameters(), weights_of.named_parameters(), strict=True
        ):
            assert name == other_name
            own.copy_(other)
    return model


def loss_and_gradients(model: GPTModel) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.randint(VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(SEQUENCE).expand_as(tokens)
    loss = model(tokens, positions, None, labels=tokens.roll(-1, dims=1)).mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_bit_equal(one: GPTModel, other: GPTModel) -> None:
    (loss, gradients), (other_loss, other_gradients) = loss_and_gradients(one), loss_and_gradients(other)
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert torch.equal(gradient, other_gradients[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switched_off_is_megatrons_own_model(tied, dtype):
    precision = {"params_dtype": dtype, "bf16": dtype is torch.bfloat16, "tied": tied}
    model = ours(depth_attention=False, **precision)
    assert_bit_equal(model, stock(weights_of=model, **precision))


def test_control_switched_on_is_another_model():
    model = ours()
    loss, gradients = loss_and_gradients(model)
    vanilla_loss, vanilla_gradients = loss_and_gradients(stock(weights_of=model))
    assert abs(loss - vanilla_loss) > 1e-4
    assert all(not torch.equal(gradients[name], vanilla_gradients[name]) for name in gradients)


def test_a_model_of_one_layer_has_no_source_and_is_vanilla():
    model = ours(num_layers=1)
    assert isinstance(model.decoder.layers[0], DepthAttentionLayer)
    assert_bit_equal(model, stock(weights_of=model, num_layers=1))
