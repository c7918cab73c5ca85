"""The local core attention against attention written out in fp64, against Megatron's own, and what it keeps."""

import math

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention.bias import CausalVariant, causal_lower_right

from megatron_depthattn.model.core_attention import SDPAttention, _LastRows
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


def kept_bytes(kind: type[DotProductAttention], rows: int, keys: int) -> int:
    """Of the distinct storages that autograd saves."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    given = inputs(rows, keys)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attention(kind)(*given, None)
    return sum(storages.values())


def test_what_is_kept_grows_with_the_sequence_and_not_with_its_square():
    for rows in (1, 0.5):  # a half: as under context parallel
        short, long = (kept_bytes(SDPAttention, int(rows * keys), keys) for keys in (512, 1024))
        assert long < 2.01 * short
    control, longer = (kept_bytes(DotProductAttention, keys, keys) for keys in (512, 1024))
    assert longer > 3.5 * control and control > 5 * kept_bytes(SDPAttention, 512, 512)


@pytest.mark.parametrize("setting", [{"window_size": (4, 0)}, {"softmax_type": "off-by-one"}], ids=str)
def test_what_torchs_kernels_do_not_have(setting):
    with pytest.raises(ValueError, match="torch's attention kernels, which the local layers use, do not have it"):
        attention(**setting)
