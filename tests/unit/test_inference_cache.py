"""Cached decoding with Megatron's static inference context equals a full forward, and the cache is a vanilla one."""

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_depthattn.model.gpt import build_gpt_model
from megatron_depthattn.model.initialization import initialize_weights
from tests.small_models import small_config

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

VOCAB, SEQUENCE, BATCH, PROMPT = 128, 20, 2, 7
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 8


def build(*, num_loops: int = 1, **overrides) -> GPTModel:
    """``NUM_LAYERS`` effective layers, whatever the number of loops."""
    config = small_config(NUM_LAYERS, num_loops=num_loops, **overrides)
    model = build_gpt_model(config, vocab_size=VOCAB, max_sequence_length=SEQUENCE)
    initialize_weights(model, seed=3, init_std=0.1)
    return model.eval()


def make_tokens() -> Tensor:
    return torch.randint(VOCAB, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(1))


def positions(start: int, end: int) -> Tensor:
    return torch.arange(start, end).expand(BATCH, -1)


def cached_logits(model: GPTModel, tokens: Tensor, prompt: int) -> tuple[Tensor, StaticInferenceContext]:
    """Logits [b, s - prompt + 1, V] of the prompt's last token and every later one, and the context with its cache."""
    context = StaticInferenceContext(max_batch_size=BATCH, max_sequence_length=SEQUENCE)
    steps = [(0, prompt), *((t, t + 1) for t in range(prompt, tokens.size(1)))]
    logits = []
    for start, end in steps:
        context.enable_decode_mode() if start else context.enable_prefill_mode()
        step = model(
            tokens[:, start:end], positions(start, end), None, inference_context=context, runtime_gather_output=True
        )
        logits.append(step[:, -1:])
        context.increment_sequence_len_offset(end - start)
    return torch.cat(logits, dim=1), context


@pytest.mark.parametrize("prompt", [1, PROMPT])
@pytest.mark.parametrize(
    "plan",
    [
        {"depth_attention_stride": 1},
        {"depth_attention_stride": 3},
        {"depth_attention_stride": 2, "depth_attention_recent_window": 2},
        # Layers without RoPE among others: with a cache the mix runs before RoPE, so without one it must, too.
        {"depth_attention_stride": 1, "no_rope_freq": 2},
        {"depth_attention": False},
        # Every loop has slots of its own.
        {"depth_attention_stride": 2, "num_loops": 2},
        {"depth_attention_stride": 2, "num_loops": 2, "depth_attention_loop_sources": "unrolled"},
        {"depth_attention": False, "num_loops": 3},
        # Scores are of unmixed keys, which are in no cache: they are read within one pass.
        {"depth_attention_stride": 1, "depth_attention_mixes": "key_value"},
        {"depth_attention_stride": 1, "depth_attention_mixes": "key", "depth_attention_weights": "uniform"},
    ],
    ids=str,
)
@torch.no_grad()
def test_prefill_and_token_by_token_equal_a_full_forward(plan, prompt, record_property):
    model, tokens = build(**plan), make_tokens()
    full = model(tokens, positions(0, SEQUENCE), None)
    cached, context = cached_logits(model, tokens, prompt)
    error = (cached - full[:, prompt - 1 :]).abs().max().item()
    record_property("cache_error", error)
    assert error < 1e-5
    # The slots and bytes of a vanilla decoder: one key and one value per layer, nothing else.
    assert sorted(context.key_value_memory_dict) == list(range(1, NUM_LAYERS + 1))
    for key, value in context.key_value_memory_dict.values():
        assert key.shape == value.shape == (SEQUENCE, BATCH, NUM_KV_HEADS, HEAD_DIM)


@torch.no_grad()
def test_control_a_cache_of_unmixed_values_fails():
    """What the released code keeps: decoding from it is another function than a full forward."""
    model, tokens = build(depth_attention_stride=2), make_tokens()
    full = model(tokens, positions(0, SEQUENCE), None)
    _, context = cached_logits(model, tokens[:, :-1], PROMPT)
    _, unmixed = cached_logits(build(depth_attention=False), tokens[:, :-1], PROMPT)
    for layer, (key, _) in context.key_value_memory_dict.items():
        context.key_value_memory_dict[layer] = (key, unmixed.key_value_memory_dict[layer][1])
    last = model(
        tokens[:, -1:], positions(SEQUENCE - 1, SEQUENCE), None, inference_context=context, runtime_gather_output=True
    )
    assert (last[:, -1] - full[:, -1]).abs().max() > 1e-2
