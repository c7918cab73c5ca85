"""Documents in one row are each document alone: logits and every gradient, against the fp64 decoders."""

from functools import cache

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_depthattn.model.documents import documents_of
from megatron_depthattn.model.gpt import build_gpt_model, qwen3_style_config
from tests.megatron_weights import load, to_megatron
from tests.parallel.compare import CANCELLING
from tests.reference_decoder import decoder_logits, random_weights
from tests.reference_methods import method_logits, random_method_weights

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

LENGTHS, VOCAB = [5, 1, 1, 11, 3, 3], 128
SIZES = {"num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
WIDTHS = {"hidden_size": 32, "ffn_hidden_size": 48}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
SELECTIVE = {"recompute_granularity": "selective"}
CASES = {
    "vanilla": ({"depth_attention": False}, {"depth_attention": False}),
    "stride-1": ({"depth_attention_stride": 1}, {"stride": 1}),
    "window": ({"depth_attention_stride": 3, "depth_attention_recent_window": 1}, {"stride": 3, "window": 1}),
    "key_value": ({"depth_attention_mixes": "key_value"}, {"mixes": "key_value"}),
    "uniform": ({"depth_attention_weights": "uniform"}, {"uniform": True}),
    "loops": ({"num_loops": 2}, {"num_loops": 2}),
    "unrolled": (
        {"num_loops": 2, "depth_attention_loop_sources": "unrolled"}, {"num_loops": 2, "unrolled": True}
    ),
    "denseformer": ({"method": "denseformer", "method_settings": {"period": 2}}, {"period": 2}),
    "attnres": ({"method": "attnres", "method_settings": {"block_size": 4}}, {"block_size": 4}),
    "mhc": ({"method": "mhc", "method_settings": {"num_streams": 3}}, {"num_streams": 3}),
}  # fmt: skip
"""What the model is given, and what the oracle is."""
TOLERANCE = 1e-4
NO_GRADIENT = "decoder.layers.0.attention_aggregator."
"""Its two candidates are equal."""


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def plain(lengths: list[int]) -> PackedSeqParams:
    """As of a loop that knows nothing of this package."""
    given = borders(lengths)
    return PackedSeqParams("thd", given, given, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))


FORMS = {
    "row": lambda lengths: documents_of(borders(lengths), thd=False, device="cpu"),
    "thd": lambda lengths: documents_of(borders(lengths), thd=True, device="cpu"),
    "megatron": plain,
}


def build(given: dict, **overrides) -> GPTModel:
    loops = given.get("num_loops", 1)
    config = qwen3_style_config(
        **WIDTHS,
        num_layers=SIZES["num_layers"] * loops,
        num_attention_heads=SIZES["num_heads"],
        num_query_groups=SIZES["num_kv_heads"],
        kv_channels=SIZES["head_dim"],
        layernorm_epsilon=1e-6,
        **given,
        **overrides,
    )
    return build_gpt_model(config, vocab_size=VOCAB, max_sequence_length=max(LENGTHS)).train()


def tokens() -> Tensor:
    return torch.randint(VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def backward(logits: Tensor) -> Tensor:
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight).sum().backward()
    return logits.detach()


def weights_of(given: dict) -> dict[str, Tensor]:
    weights = random_weights(0, vocab_size=VOCAB, **WIDTHS, **SIZES)
    if method := given.get("method"):
        sizes = {"num_layers": SIZES["num_layers"], "hidden_size": WIDTHS["hidden_size"]}
        weights |= random_method_weights(1, method, **sizes, **given["method_settings"])
    return weights


@cache
def expected(case: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients in fp64, of a call for each document."""
    given, oracle = CASES[case]
    weights = {name: weight.requires_grad_() for name, weight in weights_of(given).items()}
    shape = SIZES | {"rope_theta": 10000.0, "eps": 1e-6}
    if method := given.get("method"):
        alone = [method_logits(method, weights, one, oracle, **shape) for one in tokens().split(LENGTHS, dim=1)]
    else:
        alone = [decoder_logits(weights, one, **shape, **oracle) for one in tokens().split(LENGTHS, dim=1)]
    logits = backward(torch.cat(alone, dim=1))
    gradients = {name: weight.grad for name, weight in weights.items()}
    return logits, to_megatron(gradients, SIZES["num_layers"], SIZES["head_dim"])


def loaded(case: str, **overrides) -> GPTModel:
    model = build(CASES[case][0], **overrides)
    load(model, to_megatron(weights_of(CASES[case][0]), SIZES["num_layers"], SIZES["head_dim"]), VOCAB)
    return model


def errors(case: str, model: GPTModel, documents: PackedSeqParams) -> dict[str, float]:
    """Of the logits, and of every gradient, beside their norms."""
    logits, gradients = expected(case)
    given = backward(model(tokens(), None, None, packed_seq_params=documents))
    found = {"logits": ((given - logits).norm() / logits.norm()).item()}
    whole = sum(gradient.square().sum() for gradient in gradients.values()).sqrt().item()
    for name, parameter in model.named_parameters():
        if not name.startswith(NO_GRADIENT):
            floor = 1e-3 * whole if name.endswith(CANCELLING) else 0.0
            found[name] = (parameter.grad - gradients[name]).norm().item() / max(gradients[name].norm().item(), floor)
    return found


@pytest.mark.parametrize(
    ("form", "recompute"),
    [("row", {}), ("row", FULL), ("row", SELECTIVE), ("thd", {}), ("thd", FULL), ("megatron", SELECTIVE)],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_documents_are_each_document_alone(case, form, recompute, record_property):
    found = errors(case, loaded(case, **recompute), FORMS[form](LENGTHS))
    worst = max(found, key=found.__getitem__)
    record_property("difference", found[worst])
    assert found[worst] < TOLERANCE, (worst, found[worst])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["vanilla", "window", "mhc"])
def test_control_a_border_one_token_later_is_another_function(case, form):
    found = errors(case, loaded(case), FORMS[form]([6, 1, 1, 10, 3, 3]))
    for name in ("logits", "embedding.word_embeddings.weight", "decoder.layers.0.self_attention.linear_qkv.weight"):
        assert found[name] > 100 * TOLERANCE, name
