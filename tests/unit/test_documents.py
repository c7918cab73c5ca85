"""Documents in one row are each document alone: logits and every gradient, against the fp64 decoders."""

from functools import cache, partial

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_depthattn.benchmarks.memory import saved_tensors
from megatron_depthattn.model import attention
from megatron_depthattn.model.compiled import compile_layers
from megatron_depthattn.model.documents import documents_of
from megatron_depthattn.model.gpt import build_gpt_model, qwen3_style_config
from megatron_depthattn.parallel.microbatch_state import MicrobatchState
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
    "own loop": plain,
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


def errors(case: str, model: GPTModel, documents: PackedSeqParams, *, is_ours: bool = True) -> dict[str, float]:
    """Of the logits, and of every gradient, beside their norms; ``is_ours``: or in a loop with Megatron's own class."""
    logits, gradients = expected(case)
    call = model if is_ours else partial(GPTModel.forward, model)
    given = backward(call(tokens(), None, None, packed_seq_params=documents))
    found = {"logits": ((given - logits).norm() / logits.norm()).item()}
    whole = sum(gradient.square().sum() for gradient in gradients.values()).sqrt().item()
    for name, parameter in model.named_parameters():
        if not name.startswith(NO_GRADIENT):
            floor = 1e-3 * whole if name.endswith(CANCELLING) else 0.0
            found[name] = (parameter.grad - gradients[name]).norm().item() / max(gradients[name].norm().item(), floor)
    return found


@pytest.mark.parametrize(
    ("form", "recompute"),
    [("row", {}), ("row", FULL), ("row", SELECTIVE), ("thd", {}), ("megatron", FULL), ("own loop", SELECTIVE)],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_documents_are_each_document_alone(case, form, recompute, record_property):
    found = errors(case, loaded(case, **recompute), FORMS[form](LENGTHS), is_ours=form != "own loop")
    worst = max(found, key=found.__getitem__)
    record_property("difference", found[worst])
    assert found[worst] < TOLERANCE, (worst, found[worst])


@pytest.mark.parametrize("form", ["row", "thd", "megatron"])
@pytest.mark.parametrize("case", ["vanilla", "window", "mhc"])
def test_control_a_border_one_token_later_is_another_function(case, form):
    found = errors(case, loaded(case), FORMS[form]([6, 1, 1, 10, 3, 3]))
    for name in ("logits", "embedding.word_embeddings.weight", "decoder.layers.0.self_attention.linear_qkv.weight"):
        assert found[name] > 100 * TOLERANCE, name


def test_compiled_layers_and_mup():
    """Norms and connectors are compiled for one length, documents or not; muP scales scores by 1/d, not 1/sqrt(d)."""
    case, seen = "stride-1", []
    compiled = loaded(case)
    compile_layers(compiled)
    assert max(errors(case, compiled, FORMS["row"](LENGTHS)).values()) < TOLERANCE
    for scale in (None, 1 / SIZES["head_dim"]):
        model = build({"depth_attention": False}, softmax_scale=scale)
        load(model, to_megatron(weights_of({}), SIZES["num_layers"], SIZES["head_dim"]), VOCAB)
        packed, alone = tokens(), torch.cat([model(one, None, None) for one in tokens().split(LENGTHS, dim=1)], dim=1)
        seen.append(model(packed, None, None, packed_seq_params=FORMS["row"](LENGTHS)))
        assert (seen[-1] - alone).norm() < 1e-5 * alone.norm()
    assert (seen[0] - seen[1]).norm() > 0.1 * seen[0].norm(), "control"


MIXING = {"stride-1": {"op": "lean"}, "key_value": {}, "uniform": {}, "loops": {"op": "reference"}}


@pytest.mark.parametrize("recompute", [{}, FULL], ids=str)
@pytest.mark.parametrize("case", MIXING)
def test_the_mix_over_depth_knows_nothing_of_documents(case, recompute, monkeypatch):
    """It is asked for the same, of tensors of the same shape, in the same order; and of a row that is one document for
    the same numbers, to the bit."""
    calls: list[list] = []
    for name in ("depth_mix", "uniform_mix"):
        own = getattr(attention, name)

        def spied(*given, own=own, name=name, **settings):
            flat = [t for part in given for t in (part if isinstance(part, list | tuple) else [part])]
            calls[-1].append((name, settings, [t.clone() if isinstance(t, Tensor) else t for t in flat]))
            return own(*given, **settings)

        monkeypatch.setattr(attention, name, spied)
    model = loaded(case, **{f"depth_attention_{key}": value for key, value in MIXING[case].items()}, **recompute)
    found = []
    for lengths in (None, [sum(LENGTHS)], LENGTHS):
        calls.append([])
        model.zero_grad()
        logits = model(tokens(), None, None, packed_seq_params=FORMS["row"](lengths) if lengths else None)
        found.append([backward(logits), *(parameter.grad.clone() for parameter in model.parameters())])
    without, one, several = calls
    assert len(without) > SIZES["num_layers"] - 2 and len(without) == len(one) == len(several)
    for (name, settings, mixed), same, other in zip(without, one, several, strict=True):
        assert (name, settings) == same[:2] == other[:2]
        for a, b, c in zip(mixed, same[2], other[2], strict=True):
            assert (torch.equal(a, b) and a.shape == c.shape) if isinstance(a, Tensor) else a == b == c
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0]), "control"


@pytest.mark.parametrize("recompute", [{}, SELECTIVE, FULL], ids=str)
@pytest.mark.parametrize("case", ["vanilla", "stride-1", "attnres"])
def test_a_row_of_documents_keeps_what_an_ordinary_sequence_keeps(case, recompute):
    """And no second q and k for the mix, as where RoPE comes after it; on a CPU the contexts of all documents once
    more, as one tensor."""
    kept = {}
    for name in ("none", "row", "thd"):
        model, state = loaded(case, **recompute), MicrobatchState()
        given = {} if name == "none" else {"packed_seq_params": FORMS[name](LENGTHS)}
        given |= {"extra_block_kwargs": {"attention_bias": state}} if model.config.shares_over_layers else {}
        with saved_tensors(model, state) as saved:
            loss = model(tokens(), None, None, labels=tokens(), **given).mean()
        kept[name] = saved.num_bytes
        del loss
    a_head = sum(LENGTHS) * SIZES["head_dim"] * 4
    contexts = 0 if recompute else SIZES["num_layers"] * SIZES["num_heads"] * a_head
    assert kept["row"] <= kept["none"] + a_head + contexts
    if case == "stride-1" and not recompute:
        assert kept["thd"] > kept["row"], "control"


def test_no_documents_beside_a_cache():
    with pytest.raises(ValueError, match="packed_seq_params and an inference context were given"):
        build({})(tokens(), None, None, packed_seq_params=plain(LENGTHS), inference_context=object())
