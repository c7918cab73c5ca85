"""Several documents packed into one sequence (Megatron's PackedSeqParams, qkv_format thd): the mix is per token, so a
packed batch is each document alone. With a core attention for tests; TransformerEngine's is checked in tests/gpu."""

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_depthattn.model.gpt import build_gpt_model, qwen3_style_config
from megatron_depthattn.model.initialization import initialize_weights
from tests.document_attention import build_with_document_attention, packed
from tests.megatron_weights import leave_initial_values
from tests.parallel.compare import relative_errors

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

LENGTHS, VOCAB, NUM_LAYERS = [5, 11, 3], 128, 6
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8, "ffn_hidden_size": 48}
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}


def config_of(**overrides):
    return qwen3_style_config(**(SHAPE | {"num_layers": NUM_LAYERS} | overrides))


def build(**overrides) -> GPTModel:
    model = build_with_document_attention(config_of(**overrides), vocab_size=VOCAB, length=sum(LENGTHS))
    initialize_weights(model, seed=3, init_std=0.2)
    return model.train()


def run(model: GPTModel, documents: list[Tensor], **given) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits ``[t, V]`` of the documents in turn, and gradients; packed into one call, or a call for each."""
    model.zero_grad()
    calls = [torch.cat(documents)] if given else documents
    logits = torch.cat([model(tokens[None], None, None, **given)[0] for tokens in calls])
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight).sum().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def documents() -> list[Tensor]:
    return list(torch.randint(VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)).split(LENGTHS))


def difference(found, expected) -> float:
    (logits, gradients), (other, others) = found, expected
    pairs = [(logits, other), *((gradients[name], x) for name, x in others.items())]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


@pytest.mark.parametrize("recompute", [{}, FULL_RECOMPUTE, {"recompute_granularity": "selective"}], ids=str)
@pytest.mark.parametrize("mixing", [{}, {"depth_attention_stride": 3, "depth_attention_mixes": "key_value"}], ids=str)
def test_packed_documents_are_each_document_alone(mixing, recompute, record_property):
    """RoPE begins anew with each document, and nothing crosses a border, in logits and in every gradient."""
    model = build(**({"depth_attention_stride": 1} | mixing), **recompute)
    alone = run(model, documents())
    found = difference(run(model, documents(), packed_seq_params=packed(LENGTHS)), alone)
    record_property("difference", found)
    assert found < 1e-5
    one = difference(run(model, documents(), packed_seq_params=packed([sum(LENGTHS)])), alone)
    assert one > 0.1, "control: without borders it is another function"


METHODS = {
    "denseformer": {"method": "denseformer"},
    "attnres": {"method": "attnres", "method_settings": {"block_size": 4}},
    "mhc": {"method": "mhc", "method_settings": {"num_streams": 3}},
}
NO_GRADIENT = "decoder.layers.0.attention_aggregator."
"""Its two candidates are equal."""


@pytest.mark.parametrize("recompute", [{}, FULL_RECOMPUTE], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_packed_documents_under_the_other_methods(method, recompute, record_property):
    model = build(**METHODS[method], **recompute)
    leave_initial_values(model)

    def errors(lengths: list[int]) -> float:
        sides = [run(model, documents(), **given) for given in ({"packed_seq_params": packed(lengths)}, {})]
        (found, expected), gradients = zip(*sides, strict=True)
        kept = [{name: one[name] for name in one if not name.startswith(NO_GRADIENT)} for one in gradients]
        return max(difference((found, {}), (expected, {})), *relative_errors(*kept).values())

    record_property("difference", found := errors(LENGTHS))
    assert found < 1e-4  # mHC's three scales are one number each, sums over all tokens: 1.4e-5
    assert errors([sum(LENGTHS)]) > 0.1, "control: without borders it is another function"


@pytest.mark.parametrize("mixes", ["value", "key", "key_value"])
def test_one_document_is_an_ordinary_sequence(mixes):
    """Against Megatron's own core attention, and so with RoPE on the other side of the mix."""
    tokens, mixing = documents()[1], {"depth_attention_stride": 1, "depth_attention_mixes": mixes}
    own = build(**mixing)
    plain = build_gpt_model(config_of(**mixing), vocab_size=VOCAB, max_sequence_length=sum(LENGTHS))
    plain.load_state_dict(own.state_dict())
    given = {"packed_seq_params": packed([len(tokens)])}
    assert difference(run(own, [tokens], **given), run(plain.train(), [tokens])) < 1e-5


@pytest.mark.parametrize(
    "mixing",
    [{}, {"depth_attention": False}, {"recompute_granularity": "selective"}, *METHODS.values()],
    ids=str,
)
def test_local_layers_take_no_packed_sequences(mixing):
    model = build_gpt_model(config_of(**mixing), vocab_size=VOCAB, max_sequence_length=sum(LENGTHS))
    with pytest.raises(ValueError, match=r"packed_seq_params was given: .* would attend across them. .*backend='te'"):
        model(torch.cat(documents())[None], None, None, packed_seq_params=packed(LENGTHS))
