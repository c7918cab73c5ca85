"""The local core attention against attention written out in fp64, against Megatron's own, and what it keeps."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention.bias import CausalVariant, causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_depthattn.model.core_attention import SDPAttention, _LastRows, context_parallel_positions
from megatron_depthattn.model.documents import Documents, documents_of
from megatron_depthattn.model.gpt import qwen3_style_config

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

HEADS, GROUPS, SIZE = 4, 2, 8


def attention(kind: type[DotProductAttention] = SDPAttention, **overrides) -> DotProductAttention:
    config = qwen3_style_config(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=HEADS,
        num_query_groups=overrides.pop("groups", GROUPS),
        kv_channels=SIZE,
        ffn_hidden_size=48,
        **overrides,
    )
    return kind(config, 2, AttnMaskType.causal, "self")


def inputs(rows: int, keys: int, *, groups: int = GROUPS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Query, key and value ``[S, B, heads, D]``."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, 2, HEADS, SIZE), (keys, 2, groups, SIZE), (keys, 2, groups, SIZE)
    return tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)


def written_out(query: Tensor, key: Tensor, value: Tensor, masked: Tensor) -> Tensor:
    """``[S, B, H * D]`` in fp64; ``masked`` is True where a row must not see a key."""
    query, key, value = (t.double() for t in (query, key, value))
    key, value = (t.repeat_interleave(query.size(2) // t.size(2), dim=2) for t in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) / math.sqrt(SIZE)
    weights = scores.masked_fill(masked, -math.inf).softmax(dim=-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


def causal(rows: int, keys: int) -> Tensor:
    return torch.arange(keys)[None, :] > torch.arange(keys - rows, keys)[:, None]


def results(output: Tensor, given: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and the gradients of a loss that weighs every number of it differently."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, given, weights)]


def worst(given: list[Tensor], expected: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize("groups", [1, GROUPS, HEADS])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (200, 200), (1, 70), (5, 70), (128, 300), (300, 437)])
def test_causal_attention_in_fp64(rows, keys, groups):
    """Also of queries that are the last positions of the keys: with a cache, and under context parallel."""
    given = inputs(rows, keys, groups=groups)
    ours = results(attention(groups=groups)(*given, None), given)
    assert worst(ours, results(written_out(*given, causal(rows, keys)), given)) < 2e-6


DOCUMENTS = [5, 1, 1, 1, 150, 7, 7, 7, 30, 1, 130, 260]
"""Lengths; some are alike, one goes over whole blocks of rows, and cuts of a row of 600 fall into several."""


def documents(lengths: list[int]) -> Documents:
    return documents_of(torch.tensor([0, *lengths]).cumsum(0), thd=False, device="cpu")


def a_row(**settings: Any) -> tuple[Tensor, ...]:
    return tuple(t[:, :1].detach().requires_grad_() for t in inputs(sum(DOCUMENTS), sum(DOCUMENTS), **settings))


def within(lengths: list[int]) -> Tensor:
    """True where a token must not see another: a later one, or one of another document."""
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return causal(len(number), len(number)) | (number[:, None] != number[None, :])


def of_all_ranks(attend: Callable[..., Tensor], given: tuple[Tensor, ...], size: int, lengths: list[int]) -> Tensor:
    """``[S, 1, H * D]`` of a row that ``size`` context-parallel ranks attend with, each its queries."""
    query, key, value = given
    row, rows = documents(lengths), len(query)
    held = [context_parallel_positions(rows, rank, size) if size > 1 else torch.arange(rows) for rank in range(size)]
    cuts = [row.cut(rank, size, query.device) for rank in range(size)]
    parts = [attend(query[own], key, value, cut) for own, cut in zip(held, cuts, strict=True)]
    return torch.cat(parts)[torch.cat(held).argsort()]


@pytest.mark.parametrize("groups", [1, HEADS])
@pytest.mark.parametrize("size", [1, 2, 4, 25])
def test_documents_in_fp64(size, groups):
    """Of every context-parallel rank in turn; gradients of keys are sums over the ranks."""
    given, module = a_row(groups=groups), attention(groups=groups)
    expected = results(written_out(*given, within(DOCUMENTS)), given)
    found = results(of_all_ranks(module._attend_to_documents, given, size, DOCUMENTS), given)
    assert worst(found, expected) < 2e-6
    moved = [4, 2, *DOCUMENTS[2:]]
    leaking = results(of_all_ranks(module._attend_to_documents, given, size, moved), given)
    assert worst(leaking, expected) > 1e-3, "control"
    if size == 1:
        assert torch.equal(module(*given, None, packed_seq_params=documents(DOCUMENTS)), found[0])


class Kernels(TorchDispatchMode):
    """The variable-length kernels of a GPU, written out: the last query of each piece sees all of its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::_")
        if name not in ("flash_attention_forward", "efficient_attention_forward"):
            return func(*args, **(kwargs or {}))
        self.asked.append(name)
        if name == "flash_attention_forward":
            query, key, value, query_borders, key_borders, most_queries, most_keys, dropout, is_causal, *_ = args
            assert query.dtype is torch.bfloat16 and is_causal
        else:
            query, key, value, bias, query_borders, key_borders, most_queries, most_keys, dropout, mask, *_ = args
            assert query.size(2) == key.size(2) and bias is None and mask == 2  # CausalFromBottomRight
            query, key, value = (t.squeeze(0) for t in (query, key, value))
        lengths = [b.diff().tolist() for b in (query_borders, key_borders)]
        assert (most_queries, most_keys, dropout) == (*map(max, lengths), 0.0) and math.isclose(
            kwargs["scale"], SIZE**-0.5
        )
        assert query_borders.dtype is torch.int32 and query_borders[-1] == len(query) and key_borders[-1] == len(key)
        given = zip(query.split(lengths[0]), *(t.split(lengths[1]) for t in (key, value)), strict=True)
        pieces = [tuple(t.unsqueeze(1) for t in piece) for piece in given]
        context = torch.cat([written_out(*piece, causal(len(piece[0]), len(piece[1]))) for piece in pieces])
        context = context.view(len(query), HEADS, SIZE).to(query.dtype)
        if name == "flash_attention_forward":
            return context, *[context.new_empty(0)] * 4
        return context.unsqueeze(0), *[context.new_empty(0)] * 3, most_queries, most_keys


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "capability", "kernel"),
    [
        (torch.bfloat16, (9, 0), "flash_attention_forward"),
        (torch.bfloat16, (7, 5), "efficient_attention_forward"),
        (torch.float32, (9, 0), "efficient_attention_forward"),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_gpus_kernel_is_asked_once_for_all_documents(size, dtype, capability, kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    given, module = a_row(dtype=dtype), attention()

    def attend(query: Tensor, key: Tensor, value: Tensor, cut: Any) -> Tensor:
        key, value = (torch.cat([t[start:end] for start, end in cut.spans]) for t in (key, value))
        return module._varlen(*(t.squeeze(1) for t in (query, key, value)), cut).flatten(1).unsqueeze(1)

    with Kernels() as kernels:
        found = of_all_ranks(attend, given, size, DOCUMENTS)
    assert kernels.asked == [kernel] * size
    bound = 1e-6 if dtype is torch.float32 else 4e-3
    assert worst([found], [written_out(*given, within(DOCUMENTS))]) < bound


def test_dropout_of_documents():
    """Of a token that sees itself alone: nothing, or twice its value."""
    given = tuple(t[:, :1] for t in inputs(64, 64, groups=HEADS))
    module = attention(attention_dropout=0.5, groups=HEADS)
    context = module(*given, None, packed_seq_params=documents([1] * 64))
    kept = context.view_as(given[2]) / (2 * given[2])
    assert set(kept.round(decimals=5).unique().tolist()) == {0.0, 1.0}
    assert torch.equal(module.eval()(*given, None, packed_seq_params=documents([1] * 64)), given[2].flatten(2))


BOTH = torch.tensor([0, 4, 600], dtype=torch.int32)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"attention_mask": torch.zeros(1, 1, 600, 600, dtype=torch.bool)},
            "an attention mask was given beside packed",
        ),
        ({"packed_seq_params": documents([5, 594])}, "cu_seqlens end at 599, and the row has 600 tokens"),
        ({"rows": 2}, r"a micro-batch of 2 rows: documents lie in one. .* tokens.view\(1, -1\)"),
        (
            {"packed_seq_params": Documents("sbhd", BOTH, torch.tensor([0, 5, 600], dtype=torch.int32))},
            r"cu_seqlens_q=\[0, 4, 600\] and cu_seqlens_kv=\[0, 5, 600\]",
        ),
    ],
    ids=str,
)
def test_documents_that_do_not_fit(given, words):
    rows = [t.expand(-1, given.get("rows", 1), -1, -1) for t in a_row()]
    packed = given.get("packed_seq_params", documents(DOCUMENTS))
    with pytest.raises(ValueError, match=words):
        attention()(*rows, given.get("attention_mask"), packed_seq_params=packed)


def test_documents_are_in_no_cuda_graph(monkeypatch):
    for question in ("is_available", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, question, lambda: True)
    with pytest.raises(ValueError, match="a CUDA graph is captured: it would replay these borders"):
        attention()(*a_row(), None, packed_seq_params=documents(DOCUMENTS))


@pytest.mark.parametrize("borders", [[1, 4], [0, 4, 3], [0], [0, 0], [[0, 4]], [0.0, 4.0]], ids=str)
def test_borders_that_are_none(borders):
    with pytest.raises(ValueError, match="borders of documents are a row of integers that begins with 0 and rises"):
        documents_of(torch.tensor(borders), thd=True, device="cpu")


def test_rows_that_context_ranks_cannot_share():
    with pytest.raises(ValueError, match=r"cu_seqlens end at 7 .*context_parallel_size=2: .* a multiple of 4 tokens"):
        documents([3, 4]).cut(0, 2, torch.device("cpu"))


def test_empty_documents_are_none_and_padding_between_them_is_theirs():
    """Megatron's own params: tails of equal borders, and room behind each document."""
    assert documents([3, 0, 4, 0, 0]).borders == [0, 3, 7]
    real, room = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 7], [0, 4, 8]))
    given = {"cu_seqlens_q_padded": room, "cu_seqlens_kv_padded": room}
    assert Documents("thd", real, real, **given).borders == [0, 4, 8]


def test_an_explicit_mask_replaces_the_causal_one():
    given, masked = inputs(40, 40), torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    masked[..., 0] = False  # a row that sees nothing has no meaning
    assert worst(results(attention()(*given, masked), given), results(written_out(*given, masked), given)) < 2e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_megatrons_own_core_attention_agrees(dtype, bound):
    given = inputs(200, 200, dtype=dtype)
    precision = {"params_dtype": dtype, "bf16": dtype is torch.bfloat16}
    ours, megatrons = (
        results(attention(kind, **precision)(*given, None), given) for kind in (SDPAttention, DotProductAttention)
    )
    assert worst(ours, megatrons) < bound


def test_the_mask_of_a_gpus_kernels_takes_no_memory():
    """Torch's own, otherwise the same, allocates twice the scores on the host."""
    given = [t.permute(1, 2, 0, 3) for t in inputs(5, 70, groups=HEADS)]
    attend = torch.nn.functional.scaled_dot_product_attention
    masks = _LastRows(CausalVariant.LOWER_RIGHT, 5, 70), causal_lower_right(5, 70)
    assert torch.equal(*(attend(*given, attn_mask=mask) for mask in masks))
    assert masks[1].untyped_storage().nbytes() == 2 * 5 * 70 * 4
    assert _LastRows(CausalVariant.LOWER_RIGHT, 2**16, 2**16).untyped_storage().nbytes() == 0


def test_control_causal_by_the_upper_left_corner_is_another_attention():
    given = inputs(128, 300)
    query, key, value = (t.permute(1, 2, 0, 3) for t in given)
    wrong = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert worst([wrong.permute(2, 0, 1, 3).flatten(2)], [written_out(*given, causal(128, 300))]) > 0.1


def kept_bytes(kind: type[DotProductAttention], rows: int, keys: int, row: Documents | None = None) -> int:
    """Of the distinct storages that autograd saves."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    given = [t[:, :1] if row else t for t in inputs(rows, keys)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attention(kind)(*given, None, packed_seq_params=row)
    return sum(storages.values())


def test_what_is_kept_grows_with_the_sequence_and_not_with_its_square():
    for rows in (1, 0.5):  # a half: as under context parallel
        short, long = (kept_bytes(SDPAttention, int(rows * keys), keys) for keys in (512, 1024))
        assert long < 2.01 * short
    short, long = (kept_bytes(SDPAttention, keys, keys, documents([100, keys - 100])) for keys in (512, 1024))
    assert long < 2.01 * short
    control, longer = (kept_bytes(DotProductAttention, keys, keys) for keys in (512, 1024))
    assert longer > 3.5 * control and control > 5 * kept_bytes(SDPAttention, 512, 512)


@pytest.mark.parametrize("setting", [{"window_size": (4, 0)}, {"softmax_type": "off-by-one"}], ids=str)
def test_what_torchs_kernels_do_not_have(setting):
    with pytest.raises(ValueError, match="torch's attention kernels, which the local layers use, do not have it"):
        attention(**setting)
