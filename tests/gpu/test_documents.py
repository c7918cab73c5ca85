"""Core attention of documents on a GPU: one variable-length kernel against a call of torch's attention for each."""

from itertools import pairwise

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_depthattn.model.core_attention import SDPAttention, context_parallel_positions
from megatron_depthattn.model.documents import documents_of
from megatron_depthattn.model.gpt import qwen3_style_config

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; tests/cuda rehearses it on a CPU"),
    pytest.mark.usefixtures("megatron_world_of_one"),
]
HEADS, SIZE = 4, 64
LENGTHS = [1, 300, 2, 1, 128, 64, 65, 207]
"""768 tokens: 1, 2 or 4 context-parallel ranks cut documents anywhere."""
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of a norm; torch's own attention in bf16 is at 3e-3."""


def attention(groups: int) -> SDPAttention:
    heads = {"num_attention_heads": HEADS, "num_query_groups": groups, "kv_channels": SIZE}
    config = qwen3_style_config(num_layers=2, hidden_size=HEADS * SIZE, ffn_hidden_size=64, **heads)
    return SDPAttention(config, 2, AttnMaskType.causal, "self")


def a_row(tokens: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, 1, heads, SIZE) for heads in (HEADS, groups, groups)]
    return [torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_() for shape in shapes]


def each_alone(query: Tensor, key: Tensor, value: Tensor, borders: list[int]) -> Tensor:
    """``[S, 1, H * D]`` in fp64."""
    q, k, v = (t.double().permute(1, 2, 0, 3) for t in (query, key, value))
    k, v = (t.repeat_interleave(HEADS // t.size(1), dim=1) for t in (k, v))
    spans = [slice(*span) for span in pairwise(borders)]
    found = [scaled_dot_product_attention(q[:, :, s], k[:, :, s], v[:, :, s], is_causal=True) for s in spans]
    return torch.cat(found, dim=2).permute(2, 0, 1, 3).flatten(2)


def results(output: Tensor, given: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), given)]


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_documents_are_each_alone(size, groups, dtype, record_property):
    """The queries of every context-parallel rank in turn, whose pieces end with their last keys; nothing waits."""
    module, given = attention(groups), a_row(sum(LENGTHS), groups, dtype)
    borders = torch.tensor([0, *LENGTHS]).cumsum(0)

    def of_all_ranks(ends: Tensor) -> list[Tensor]:
        query, key, value = given
        row, parts, held = documents_of(ends, thd=False, device="cuda"), [], []
        for rank in range(size):
            own = context_parallel_positions(len(query), rank, size) if size > 1 else torch.arange(len(query))
            mine, cut, held = query[own.cuda()], row.cut(rank, size, query.device), [*held, own]
            torch.cuda.set_sync_debug_mode("error")
            try:
                parts.append(module._attend_to_documents(mine, key, value, cut))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return results(torch.cat(parts)[torch.cat(held).argsort().cuda()], given)

    expected = results(each_alone(*given, borders.tolist()), given)
    found = worst(of_all_ranks(borders), expected)
    record_property("difference", found)
    assert found < BOUNDS[dtype]
    moved = borders.clone()
    moved[1] += 1
    assert worst(of_all_ranks(moved), expected) > 3 * BOUNDS[dtype], "control"


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_memory_grows_with_the_row_and_not_with_its_square(dtype, record_property):
    """A mask of all pairs would be 256 MB at least."""
    tokens = 16384
    module, given = attention(1), a_row(tokens, 1, dtype)
    documents = documents_of(torch.arange(0, tokens + 1, 512), thd=False, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(module(*given, None, packed_seq_params=documents), given)
    peak = torch.cuda.max_memory_allocated() - before
    record_property("bytes", peak)
    assert peak < tokens**2
