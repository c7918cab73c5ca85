"""The counters against the model that is really built and against torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_depthattn.model.flops import DecoderShape, mix_flops
from megatron_depthattn.model.gpt import build_gpt_model, qwen3_style_config
from megatron_depthattn.model.source_plan import SourcePlan

SHAPE = {
    "num_layers": 4,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 16,
    "ffn_hidden_size": 80,
}


def looped(num_loops: int, **overrides):
    """A config whose model runs ``SHAPE``'s layers so many times."""
    return qwen3_style_config(
        **(SHAPE | {"num_layers": SHAPE["num_layers"] * num_loops}), num_loops=num_loops, **overrides
    )


@pytest.mark.parametrize("num_loops", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(megatron_world_of_one, tied, num_loops):
    model = build_gpt_model(looped(num_loops), vocab_size=200, max_sequence_length=32, tie_embeddings=tied)
    counted = DecoderShape(**SHAPE, vocab_size=256, tie_embeddings=tied, num_loops=num_loops).parameters
    assert counted == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("num_loops", [1, 3])
def test_matrix_operations_are_those_that_torch_counts(megatron_world_of_one, num_loops):
    """Torch counts the matrix products, of attention those of its plain formula: the square, twice the causal half."""
    sequence = 32
    model = build_gpt_model(looped(num_loops), vocab_size=256, max_sequence_length=sequence)
    tokens = torch.zeros(2, sequence, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, None, None)
    ours = DecoderShape(**SHAPE, vocab_size=256, num_loops=num_loops).forward_flops(sequence, None)
    square = ours.attention * 2 * sequence // (sequence + 1)
    assert counter.get_total_flops() == tokens.numel() * (ours.projections + ours.logits + square)


def test_the_mix_as_matrix_products_is_what_torch_counts():
    """Scores of n + 1 candidates and the sum of their values, for one token; the group means are additions."""
    heads, groups, size, sources = 6, 2, 16, 3
    qbar, keys = torch.ones(groups, 1, size), torch.ones(groups, size, sources + 1)
    for kinds in (("key", "value"), ("key", "mixed_key", "value")):
        with FlopCounterMode(display=False) as counter:
            weights = (qbar @ keys).softmax(-1)
            for _ in kinds[1:]:
                weights @ keys.mT
        assert mix_flops(heads * size, groups * size, sources, kinds) == heads * size + counter.get_total_flops()
    assert mix_flops(heads * size, groups * size, sources, ("value",)) == groups * size * (sources + 1)  # a mean
    assert mix_flops(heads * size, groups * size, 0) == 0


def test_mix_is_counted_by_hand():
    """Layer 1 reads layer 0, layers 2 and 3 read 0 and, for 3, also 2: group means, then scores and sums over depth."""
    plan = SourcePlan(num_layers=4, stride=2)
    flops = DecoderShape(**SHAPE, vocab_size=256).forward_flops(32, plan)
    candidates = [2, 2, 3]
    assert flops.mix == sum(6 * 16 + 4 * 2 * 16 * n for n in candidates)
    assert DecoderShape(**SHAPE, vocab_size=256).forward_flops(32, None).mix == 0
