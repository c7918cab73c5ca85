"""DenseFormer, Attention Residuals and mHC on Megatron against fp64 decoders written from their definitions."""

import dataclasses
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_depthattn.config import load_config
from megatron_depthattn.estimate.counts import decoder_shape, forward_flops
from megatron_depthattn.methods.definitions import DEFINITIONS
from megatron_depthattn.model.gpt import DepthGPTModel, build_gpt_model
from megatron_depthattn.model.initialization import initialize_weights
from megatron_depthattn.train.build import build_model, build_optimizer
from tests.megatron_weights import load, to_megatron, unpadded_logits
from tests.parallel.compare import CANCELLING
from tests.reference_decoder import decoder_logits, mean_cross_entropy, random_weights
from tests.reference_methods import averaged_entries, initial_method_weights, method_logits, random_method_weights
from tests.small_models import small_config
from tests.unit.test_inference_cache import cached_logits

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {"num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
HIDDEN, FFN, VOCAB, SEQUENCE = 32, 48, 97, 17
TOLERANCE = 1e-4
CASES = {
    "denseformer": ("denseformer", {}),
    "denseformer-2-1": ("denseformer", {"period": 2}),
    "denseformer-1-3": ("denseformer", {"dilation": 3}),
    "denseformer-4-2": ("denseformer", {"period": 4, "dilation": 2}),
    "attnres": ("attnres", {}),
    "attnres-4": ("attnres", {"block_size": 4}),
    "attnres-3": ("attnres", {"block_size": 3}),
    "attnres-1": ("attnres", {"block_size": 1}),
    "mhc": ("mhc", {}),
    "mhc-2": ("mhc", {"num_streams": 2}),
}
METHODS = ("denseformer", "attnres", "mhc")
every_case = pytest.mark.parametrize(("method", "settings"), CASES.values(), ids=CASES.keys())
every_method = pytest.mark.parametrize("method", METHODS)


def build(method: str, settings: dict[str, int], **overrides) -> GPTModel:
    config = small_config(
        SIZES["num_layers"], layernorm_epsilon=1e-6, method=method, method_settings=settings, **overrides
    )
    return build_gpt_model(config, vocab_size=VOCAB, max_sequence_length=SEQUENCE + 3)


@cache
def vanilla_weights() -> dict[str, Tensor]:
    return random_weights(0, hidden_size=HIDDEN, ffn_hidden_size=FFN, vocab_size=VOCAB, **SIZES)


def weights_of(method: str, settings: dict[str, int], *, initial: bool = False) -> dict[str, Tensor]:
    sizes = {"num_layers": SIZES["num_layers"], "hidden_size": HIDDEN}
    make = initial_method_weights if initial else lambda *args, **kwargs: random_method_weights(1, *args, **kwargs)
    return vanilla_weights() | make(method, **sizes, **settings)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(1))


def logits_of(model: GPTModel, tokens: Tensor) -> Tensor:
    return unpadded_logits(model, tokens, VOCAB)


def oracle(method: str, weights: dict[str, Tensor], tokens: Tensor, settings: dict[str, int]) -> Tensor:
    return method_logits(method, weights, tokens, settings, **SIZES, rope_theta=10000.0, eps=1e-6)


# ------------------------------------------------------------------------------------------------- against fp64


@every_case
@torch.no_grad()
def test_logits(method, settings, tokens, record_property):
    weights = weights_of(method, settings)
    model = build(method, settings)
    load(model, to_megatron(weights, SIZES["num_layers"], SIZES["head_dim"]), VOCAB)
    logits = logits_of(model, tokens)
    error = (logits - oracle(method, weights, tokens, settings)).abs().max().item()
    record_property("logit_error", error)
    assert error < TOLERANCE
    # The method's parameters matter, or the comparison could not fail.
    assert (logits - decoder_logits_of_vanilla(tokens)).abs().max() > 1e-2


def decoder_logits_of_vanilla(tokens: Tensor) -> Tensor:
    return decoder_logits(vanilla_weights(), tokens, **SIZES, rope_theta=10000.0, eps=1e-6, depth_attention=False)


@pytest.mark.parametrize("recompute", [None, 1, 2], ids=["kept", "recomputed", "recomputed-in-pairs"])
@every_case
def test_gradients(method, settings, recompute, tokens, record_property):
    labels = tokens.roll(-1, dims=1)
    weights = {name: weight.clone().requires_grad_() for name, weight in weights_of(method, settings).items()}
    mean_cross_entropy(oracle(method, weights, tokens, settings), labels).backward()
    expected = to_megatron({n: w.grad for n, w in weights.items()}, SIZES["num_layers"], SIZES["head_dim"])
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": recompute}
    model = build(method, settings, **(full if recompute else {}))
    loaded = {name: weight.detach() for name, weight in weights.items()}
    load(model, to_megatron(loaded, SIZES["num_layers"], SIZES["head_dim"]), VOCAB)
    mean_cross_entropy(logits_of(model, tokens), labels).backward()
    errors, dead = {}, []
    whole = math.hypot(*(gradient.norm().item() for gradient in expected.values()))
    for name, parameter in model.named_parameters():
        reference = expected[name]
        error = (parameter.grad[: len(reference)].double() - reference).norm().item()
        if reference.norm() < 1e-12 * whole:  # the first aggregator's two candidates are equal
            dead.append(name)
            assert error < 1e-7 * whole
        else:
            floor = 1e-3 * whole if name.endswith(CANCELLING) else 0.0  # a sum over all tokens that may cancel
            errors[name] = error / max(reference.norm().item(), floor)
    assert dead == [f"decoder.layers.0.attention_aggregator.{p}" for p in ("query", "norm_weight", "recency_bias")] * (
        method == "attnres"
    )
    worst = max(errors, key=errors.__getitem__)
    record_property("gradient_error", errors[worst])
    assert errors[worst] < TOLERANCE, (worst, errors[worst])


# --------------------------------------------------------------------------------------------- at initialisation


@torch.no_grad()
def initialised(method: str, **overrides) -> GPTModel:
    model = build(method, {}, **overrides)
    initialize_weights(model, seed=5, init_std=0.1)
    return model.eval()


@torch.no_grad()
def test_denseformer_begins_as_vanilla_exactly(tokens):
    vanilla = logits_of(initialised("vanilla"), tokens)
    assert torch.equal(logits_of(initialised("denseformer"), tokens), vanilla)
    assert not torch.equal(logits_of(initialised("attnres"), tokens), vanilla)  # the comparison can fail


@pytest.mark.parametrize("method", ["attnres", "mhc"])
@torch.no_grad()
def test_distance_from_vanilla_at_initialisation_is_the_definitions(method, tokens):
    """The same base weights, and the method's own as both sides define their initial values."""
    weights = weights_of(method, {}, initial=True)
    model, vanilla = build(method, {}), build("vanilla", {})
    initialize_weights(model, seed=0, init_std=0.02)
    mine = dict(model.named_parameters())
    base = to_megatron(vanilla_weights(), SIZES["num_layers"], SIZES["head_dim"])
    load(vanilla, base, VOCAB)
    own = {name: parameter.clone() for name, parameter in mine.items() if name not in dict(vanilla.named_parameters())}
    drawn = {f"model{name.removeprefix('decoder')}": value for name, value in own.items() if "projection" in name}
    load(model, base | own, VOCAB)
    predicted = oracle(method, weights | drawn, tokens, {}) - decoder_logits_of_vanilla(tokens)
    measured = logits_of(model, tokens) - logits_of(vanilla, tokens)
    assert predicted.abs().max() > 1e-3
    assert (measured - predicted).abs().max() < TOLERANCE


# ------------------------------------------------------------------------------------------------ sizes and counts


@pytest.mark.parametrize(
    ("size", "method", "added"),
    [
        ("3b", "denseformer", 1224),
        ("3b", "mhc", 19_663_396),
        ("3b", "attnres", 97 * (2 * 2048 + 1)),
        ("3b", "depth_attention", 0),
        ("1.5b", "attnres", 97 * (2 * 1536 + 1)),
        ("410m", "denseformer", 32 * 35 // 2),
    ],
)
def test_parameters_of_the_released_shapes(size, method, added):
    """By the formula, which the next test holds against models that are really built."""
    overlays = [str(CONFIGS / f"methods/{name}.yaml") for name in (method, "vanilla")]
    counts = [decoder_shape(load_config(CONFIGS / f"{size}.yaml", [overlay])).parameters for overlay in overlays]
    assert counts[0] - counts[1] == added


@every_case
def test_parameters_of_a_model(method, settings):
    """Names and shapes are the definition's and, under their names in Hugging Face, the oracle's."""
    model = build(method, settings)
    added = DEFINITIONS[method](num_layers=SIZES["num_layers"], hidden_size=HIDDEN, **settings)
    vanilla = sum(parameter.numel() for parameter in build("vanilla", {}).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == vanilla + added.num_parameters
    expected = to_megatron(weights_of(method, settings), SIZES["num_layers"], SIZES["head_dim"])
    shapes = {name: tuple(weight.shape) for name, weight in expected.items() if "embedding" not in name}
    mine = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if "embedding" not in name}
    assert {name: shape for name, shape in mine.items() if name != "output_layer.weight"} == {
        name: shape for name, shape in shapes.items() if name != "output_layer.weight"
    }


@every_case
def test_operations(method, settings):
    """What follows from the oracle's lists."""
    config = load_config(
        CONFIGS / "quickstart.yaml", [f"model.method={method}", "model.num_layers=6", "parallel.pipeline=1"]
    )
    model = dataclasses.replace(
        config.model, **{method: dataclasses.replace(getattr(config.model, method), **settings)}
    )
    config = dataclasses.replace(config, model=model)
    assert forward_flops(config).mix == _operations(method, settings, 6, model.hidden_size)


def _operations(method: str, settings: dict[str, int], num_layers: int, hidden: int) -> int:
    if method == "denseformer":
        period, dilation = settings.get("period", 1), settings.get("dilation", 1)
        return sum(2 * hidden * len(averaged_entries(t, period, dilation)) for t in range(1, num_layers + 1))
    if method == "attnres":
        candidates, completed, count = 0, 1, 0
        for _ in range(num_layers):
            candidates, count = candidates + 2 * (completed + 1), count + 2
            if count >= settings.get("block_size", 12):
                completed, count = completed + 1, 0
        return 4 * hidden * (candidates + completed + 1)
    n = settings.get("num_streams", 4)
    of_sublayer = 2 * n * hidden * (n * n + 2 * n) + 2 * n * hidden * (n + 2) + 20 * 4 * n * n
    return 2 * num_layers * of_sublayer + 2 * n * hidden


# --------------------------------------------------------------------------------------------------------- training


@every_method
def test_only_matrices_are_decayed(method):
    config = load_config(
        CONFIGS / "quickstart.yaml", [f"model.method={method}", "model.num_layers=2", "parallel.pipeline=1"]
    )
    chunks = build_model(config, torch.device("cpu"))
    optimizer, _ = build_optimizer(config, chunks)
    definition = DEFINITIONS[method](num_layers=2, hidden_size=config.model.hidden_size)
    added = {**definition.layer_parameters(1), **definition.final_parameters()}
    own = {n: p for n, p in chunks[0].module.named_parameters() if n.startswith("decoder.layers.1.")}
    matrices = {name for name, shape in added.items() if len(shape) > 1}
    assert matrices == ({f"{c}_connector.projection" for c in ("attention", "mlp")} if method == "mhc" else set())
    for name in added:
        assert own[f"decoder.layers.1.{name}"].dim() == (2 if name in matrices else 1)
    undecayed = [p for group in optimizer.param_groups if group["wd_mult"] == 0 for p in group["params"]]
    expected = [p for p in chunks[0].parameters() if p.dim() == 1]
    sizes, of_group = (sorted(p.numel() for p in parameters) for parameters in (expected, undecayed))
    assert of_group == sizes


@every_method
@torch.no_grad()
def test_cached_decoding(method):
    """With Megatron's own cache: prompt, then token by token."""
    tokens = torch.randint(VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(3))
    model = initialised(method)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    assert isinstance(model, DepthGPTModel)
    full = model(tokens, torch.arange(SEQUENCE).expand_as(tokens), None)
    cached, _ = cached_logits(model, tokens, 5)
    assert (cached - full[:, 4:]).abs().max() < TOLERANCE
