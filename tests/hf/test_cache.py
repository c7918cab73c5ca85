"""Decoding with a cache computes what one pass over the whole sequence computes, in a vanilla cache's size."""

import pytest
import torch
from torch import Tensor
from transformers import Cache, CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from megatron_depthattn.hf import modeling_depthattn
from tests.hf.models import (
    DENSE,
    LOOPED,
    MIXES_BOTH,
    NUM_LAYERS,
    SEQUENCE,
    UNIFORM_KEYS,
    UNROLLED,
    largest,
    make_model,
    make_tokens,
    make_vanilla,
)

TOLERANCE = 1e-5
CACHES = {
    "none_given": lambda config: None,
    "dynamic": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=SEQUENCE + 3),
}
VARIANTS = {
    "one_loop": DENSE,
    "two_loops": LOOPED,
    "unrolled": UNROLLED,
    "late_k_norm_mixes_both": DENSE | MIXES_BOTH | {"depth_attention_k_norm_after_rope": True},
    "uniform_keys": DENSE | UNIFORM_KEYS,
}
NEW_TOKENS = 12

each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
each_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def cached_logits(model, tokens: Tensor, cache, chunk: int) -> Tensor:
    """Logits of all positions, from passes over ``chunk`` tokens at a time."""
    logits = []
    for part in tokens.split(chunk, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@each_variant
@each_attention
@pytest.mark.parametrize("chunk", [1, 5, SEQUENCE])
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_cached_equals_full(make_cache, chunk, attention, variant, record_property):
    model, tokens = make_model(attention=attention, **variant), make_tokens()
    full = model(tokens, use_cache=False)
    assert full.past_key_values is None
    error = largest(cached_logits(model, tokens, make_cache(model.config), chunk) - full.logits)
    record_property("cache_error", error)
    assert error < TOLERANCE


class UnmixedCache(DynamicCache):
    """Returns the right values of the new tokens, and stores for later passes what ``depth_mix`` was given."""

    def __init__(self, unmixed: list[Tensor]) -> None:
        super().__init__()
        self.unmixed = unmixed

    def update(self, key_states, value_states, layer_idx, *arguments, **kwargs):
        stored = self.unmixed.pop() if self.unmixed else value_states  # a layer without sources mixes nothing
        keys, values = super().update(key_states, stored, layer_idx, *arguments, **kwargs)
        old = values.shape[2] - value_states.shape[2]
        return keys, torch.cat([values[:, :, :old], value_states], dim=2)


@torch.no_grad()
def test_control_a_cache_of_unmixed_values_fails(monkeypatch):
    model, tokens = make_model(**DENSE), make_tokens()
    full = model(tokens, use_cache=False).logits
    assert largest(cached_logits(model, tokens, UnmixedCache([]), 5) - full) < TOLERANCE  # never given unmixed ones
    unmixed, depth_mix = [], modeling_depthattn.depth_mix

    def remember_value(weights, value, sources):
        unmixed.append(value)
        return depth_mix(weights, value, sources)

    monkeypatch.setattr(modeling_depthattn, "depth_mix", remember_value)
    assert (
        largest(cached_logits(model, tokens, UnmixedCache(unmixed), SEQUENCE) - full) < TOLERANCE
    )  # reads nothing old
    assert largest(cached_logits(model, tokens, UnmixedCache(unmixed), 5) - full) > 1000 * TOLERANCE


def left_padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    """The prompts [1, t_i] in one batch [b, max t_i], as a tokenizer pads for `generate`."""
    length = max(prompt.shape[1] for prompt in prompts)
    pad = [length - prompt.shape[1] for prompt in prompts]
    tokens = torch.cat([torch.nn.functional.pad(p, (n, 0), value=0) for p, n in zip(prompts, pad, strict=True)])
    return {"input_ids": tokens, "attention_mask": (torch.arange(length) >= torch.tensor(pad)[:, None]).long()}


PROMPTS = [make_tokens(1, t) for t in (4, 11, 7)]


@each_variant
@each_attention
@pytest.mark.parametrize("chunk", [1, 3, 11])
@torch.no_grad()
def test_left_padded_batch_equals_each_prompt_alone(chunk, attention, variant):
    model = make_model(attention=attention, **variant)
    batch = left_padded(PROMPTS)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits, cache = [], DynamicCache(config=model.config)
    for start in range(0, mask.shape[1], chunk):
        part = slice(start, start + chunk)
        output = model(
            batch["input_ids"][:, part],
            attention_mask=mask[:, : part.stop],
            position_ids=positions[:, part],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits)
    logits = torch.cat(logits, dim=1)
    for row, prompt in zip(logits, PROMPTS, strict=True):
        assert largest(row[-prompt.shape[1] :] - model(prompt).logits[0]) < TOLERANCE
    # Control: the padding would be read if the mask did not hide it.
    without_mask = model(batch["input_ids"]).logits
    assert largest(without_mask[0, -4:] - model(PROMPTS[0]).logits[0]) > 1e-2


def generate(model, inputs: dict[str, Tensor], **options) -> Tensor:
    """The new tokens [b, NEW_TOKENS]."""
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    output = model.generate(**inputs, **lengths, **({"do_sample": False, "pad_token_id": 0} | options))
    return output[:, inputs["input_ids"].shape[1] :]


@each_variant
@each_attention
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_from_a_left_padded_batch_equals_each_prompt_alone(cache, attention, variant):
    model = make_model(attention=attention, **variant)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    together = generate(model, left_padded(PROMPTS), **options)
    for row, prompt in zip(together, PROMPTS, strict=True):
        alone = generate(model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, use_cache=False)
        assert row.tolist() == alone[0].tolist()


SEARCHES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "sampled_beams": {"num_beams": 3, "do_sample": True},
}


@each_variant
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_generate_with_a_cache_equals_without(search, variant):
    model = make_model(**variant)
    inputs = left_padded(PROMPTS)
    outputs = []
    for cache in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        outputs.append(generate(model, inputs, **search, **cache))
    without, dynamic, static = outputs
    assert torch.equal(without, dynamic) and torch.equal(without, static)
    assert len(without.unique()) > 5  # not one token for ever, which any model could continue
    vanilla = make_model(use_depth_attention=False)
    torch.manual_seed(0)
    assert not torch.equal(generate(vanilla, inputs, **search), without)


@pytest.mark.parametrize("num_loops", [1, 2])
def test_generate_with_rejected_guesses(num_loops):
    """Prompt lookup cuts wrong guesses off the cache again."""
    model, prompt = make_model(**DENSE, num_loops=num_loops), make_tokens(1).repeat(1, 2)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    plain, guessed = (
        generate(model, inputs, eos_token_id=0, **guess) for guess in ({}, {"prompt_lookup_num_tokens": 4})
    )
    assert torch.equal(plain, guessed)


def cache_bytes(cache) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_cache_has_the_size_of_qwen3s(make_cache, dtype):
    """Also layer by layer; two passes through the stack need twice of it, and no more."""
    tokens, sizes = make_tokens(), []
    for model in (
        make_vanilla(dtype=dtype),
        make_model(dtype=dtype, **DENSE, **MIXES_BOTH),
        make_model(dtype=dtype, **LOOPED),
    ):
        cache = model(tokens, past_key_values=make_cache(model.config), use_cache=True).past_key_values
        assert {layer.values.dtype for layer in cache.layers} == {dtype}
        sizes.append((len(cache.layers), cache_bytes(cache)))
    (num_layers, vanilla), ours, looped = sizes
    assert num_layers == NUM_LAYERS and vanilla > 0
    assert ours == (num_layers, vanilla) and looped == (2 * num_layers, 2 * vanilla)


def test_compiled_decoding_equals_eager():
    """`generate` with a static cache compiles the step of one token, on this machine when asked to: one whole graph."""
    model = make_model(num_hidden_layers=2, **LOOPED)
    options = {"cache_implementation": "static", "output_logits": True, "return_dict_in_generate": True}
    compiling = CompileConfig(fullgraph=True, mode="default", backend="aot_eager")  # no C++ of Inductor's
    compiling._compile_all_devices = True
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    logits = []
    for compile_config in (None, compiling):
        assert counters["stats"]["unique_graphs"] == 0
        with torch._dynamo.config.patch(error_on_recompile=True):
            output = model.generate(
                **left_padded(PROMPTS),
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=0,
                compile_config=compile_config,
                **options,
            )
        logits.append(torch.stack(output.logits))
    assert counters["stats"]["unique_graphs"] == 1
    assert largest(logits[0] - logits[1]) < TOLERANCE


def test_continuous_batching_of_a_looped_model_is_rejected():
    """A paged cache belongs to a layer that holds weights: every pass would read and write the same."""
    model, message = make_model(**DENSE, num_loops=2), "num_loops=2: continuous batching .* use generate"
    with pytest.raises(ValueError, match=message):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(ValueError, match=message):
        model(make_tokens(1), cache=object(), use_cache=False)


class RoundingLayer(DynamicLayer):
    """A cache's layer with a setting of its own, as those that quantize have."""

    def __init__(self, step: float = 0.0) -> None:
        super().__init__()
        self.step = step


@torch.no_grad()
def test_every_pass_of_a_looped_model_has_the_settings_of_its_cache():
    cache = Cache(layers=[RoundingLayer(0.5) for _ in range(NUM_LAYERS)])
    make_model(**DENSE, num_loops=2)(make_tokens(1), past_key_values=cache, use_cache=True)
    assert [layer.step for layer in cache.layers] == [0.5] * (2 * NUM_LAYERS)
    assert len({layer.keys.data_ptr() for layer in cache.layers}) == 2 * NUM_LAYERS
