"""The extension's stand-in against numbers computed by hand, in fp64 or by other means; runs in inside.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

from tests.te.extension import attention, casts, device, missing, norms, optimizer, products

E4M3, E5M2 = casts.DType.kFloat8E4M3, casts.DType.kFloat8E5M2
nan, inf = math.nan, math.inf
ROWS = torch.randn(256, 384, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 384)


def delayed(scale: float = 1.0, dtype: int = E4M3, **usage: bool) -> Float8Quantizer:
    return Float8Quantizer(torch.tensor([scale]), torch.zeros(1), dtype, **usage)


def current(**usage: bool) -> Float8CurrentScalingQuantizer:
    return Float8CurrentScalingQuantizer(E4M3, "cpu", **usage)


def blocks(dim: int, **usage: bool) -> Float8BlockQuantizer:
    return Float8BlockQuantizer(
        E4M3, rowwise=usage.get("rowwise", True), columnwise=usage.get("columnwise", True), block_scaling_dim=dim
    )


def numbers(dtype: torch.dtype) -> Tensor:
    """All finite numbers of an FP8 format, sorted, from their bits alone: sign, exponent, mantissa."""
    bits, bias, top = (3, 7, 448.0) if dtype is torch.float8_e4m3fn else (2, 15, 57344.0)
    exponents, mantissas = range(2 ** (7 - bits)), range(2**bits)
    found = {
        (m / 2**bits) * 2.0 ** (1 - bias) if e == 0 else (1 + m / 2**bits) * 2.0 ** (e - bias)
        for e, m in itertools.product(exponents, mantissas)
    }
    finite = sorted(x for x in found if x <= top)
    return torch.tensor(sorted({-x for x in finite} | set(finite)), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_cast_takes_the_nearest_number_and_saturates(dtype):
    known = numbers(casts.FORMATS[int(dtype)])
    x = torch.cat([known, (known[1:] + known[:-1]) / 2 * (1 + 1e-4), torch.tensor([1e6, -1e6], dtype=torch.float64)])
    found = casts.value(casts.cast(x.float(), dtype), dtype).double()
    nearest = known[(x.float().double()[:, None] - known).abs().argmin(1)]
    assert torch.equal(found, nearest)
    ties = casts.value(casts.cast(torch.tensor([17.0, 19.0, inf, -inf, nan]), E4M3), E4M3)
    assert ties[:4].tolist() == [16, 20, 448, -448] and ties[4].isnan()  # 17 and 19 lie half-way: to the even mantissa


@pytest.mark.parametrize(
    ("amax", "epsilon", "power_of_two", "expected"),
    [
        *((1.0, 0.0, False, 448.0), (1.0, 0.0, True, 256.0), (7.0, 0.0, True, 64.0), (0.0, 0.0, False, 1.0)),
        *((inf, 0.0, True, 1.0), (nan, 0.0, False, 1.0), (0.0, 2.0, False, 224.0)),
        *((1e-40, 0.0, False, casts.LARGEST_FP32), (1e-40, 0.0, True, 2.0**127)),
    ],
)
def test_scale_of_an_amax(amax, epsilon, power_of_two, expected):
    found = casts.scale_of(torch.tensor(amax), E4M3, epsilon=epsilon, power_of_two=power_of_two)
    assert float(found) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("entries", "expected"), [((1, -3), 3), ((nan, -3), 3), ((inf, 1), inf), ((nan, nan), 0)])
def test_amax_passes_nan_over_and_keeps_inf(entries, expected):
    quantizer = delayed()
    casts.quantize(torch.tensor([entries] * 16, dtype=torch.float32).reshape(16, 2), quantizer)
    assert float(quantizer.amax) == expected


def test_a_history_rolls_by_one_and_forgets_after_its_length():
    """Of three lines; line 0 is what the pass has seen. The second tensor sees nothing at first, then inf."""
    history, scale, seen = torch.zeros(3, 2), torch.ones(2), []
    for given in ([4.0, 0.0], [2.0, inf], [1.0, 1.0], [0.5, 2.0]):
        history[0] = torch.tensor(given)
        casts.fused_amax_and_scale_update_after_reduction(history[0].clone(), [history], [scale], "max", E4M3, 0)
        assert not history[0].any()
        seen.append((448 / scale).tolist())
    # 4 counts for three passes; an inf keeps the old scale for as long
    assert seen == [[4.0, 448.0], [4.0, 448.0], [4.0, 448.0], [2.0, 448.0]]
    assert history[:, 0].tolist() == [0, 1.0, 0.5]
    casts.fused_amax_and_scale_update_after_reduction(torch.zeros(2), [history], [scale], "max", E4M3, 0)
    assert history[:, 0].tolist() == [0, 1.0, 0.5], "a tensor that has seen nothing is not rolled"
    casts.fused_amax_and_scale_update_after_reduction(torch.full((2,), 8.0), [history], [scale], "most_recent", E5M2, 1)
    assert scale.tolist() == [57344 / 8 / 2] * 2


def test_delayed_scaling_casts_with_the_scale_it_was_given():
    quantizer = delayed(scale=2.0)
    x = torch.tensor([[1.0, 100.0, 300.0, -0.1]] * 16)
    found = casts.quantize(x, quantizer)
    assert found.dequantize()[0].tolist() == [1.0, 96.0, 224.0, -0.1015625]  # 200 -> 192, 600 -> 448, 0.2 -> 0.203125
    assert float(found._scale_inv) == 0.5 and float(quantizer.amax) == 300


@pytest.mark.parametrize("quantizer", [blocks(1), blocks(2), current()], ids=["1 x 128", "square", "tensor"])
def test_every_block_has_a_scale_of_its_own_and_rounds_by_at_most_a_16th(quantizer):
    """Both copies against fp64; per tensor small columns vanish instead."""
    tensor, exact = casts.quantize(ROWS, quantizer), ROWS.double()
    for by_column in (False, True):
        error = (casts.values_of(tensor, by_column=by_column).double() - exact).abs()
        largest = exact.abs()
        if casts.kind(tensor) == "block":
            size = (128, 128) if tensor._is_2D_scaled else (128, 1) if by_column else (1, 128)
            tiles = exact.abs().unfold(0, size[0], size[0]).unfold(1, size[1], size[1])
            largest = tiles.amax((2, 3)).repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
        else:
            largest = exact.abs().max()
        assert bool((error <= exact.abs() / 16 + largest * 2.0**-16).all())
        assert float((error / exact.abs()).max()) > 2.0**-5, "control: it was rounded"


@pytest.mark.parametrize("dim", [1, 2])
def test_scales_of_blocks_are_powers_of_two_in_padded_buffers(dim):
    x = torch.zeros(130, 260)
    x[129, 259], x[0, 0] = 7.0, 3.5
    found = casts.quantize(x, blocks(dim))
    row, column = found._rowwise_scale_inv, found._columnwise_scale_inv
    assert row.shape == ((3, 132) if dim == 1 else (2, 4)) and column.shape == ((2, 260) if dim == 1 else (3, 4))
    first, last = ((0, 0), (2, 129)) if dim == 1 else ((0, 0), (1, 2))
    assert (float(row[first]), float(row[last])) == (1 / 128, 1 / 64)
    assert float(column[(1, 259) if dim == 1 else (2, 1)]) == 1 / 64
    written = row[:, :130] if dim == 1 else row[:, :3]
    assert written.isfinite().all() and row[:, written.shape[1] :].isnan().all()


def test_mxfp8_blocks_of_32_have_the_power_of_two_above():
    quantizer = MXFP8Quantizer(E4M3)
    x = torch.zeros(64, 64)
    x[0, :4] = torch.tensor([448.0, 449.0, 1.0, 0.25])
    x[1, 32], x[2, 32], x[3, 0] = 1.75, nan, inf
    found = casts.quantize(x, quantizer)
    scales = found._rowwise_scale_inv
    assert (int(scales[0, 0]), int(scales[0, 1]), int(scales[1, 1])) == (128, 0, 119)  # 2, 2**-127, 1.75 / 448 = 2**-8
    assert found._columnwise_data.shape == x.shape, "the second copy is not transposed"
    assert int(found._columnwise_scale_inv[0, 3]) == 127 - 10  # 0.25 / 448 < 2**-10
    by_row = casts.values_of(found)
    assert by_row[0, :4].tolist() == [448, 448, 1, 0.25] and by_row[1, 32] == 1.75
    assert int(scales[3, 0]) == 0xFE and by_row[2, 32].isnan()


@pytest.mark.parametrize("x", [1.0, 1.0001, 2.0**-126, 2.0**-127, 2.0**-130, 3e38, 0.0])
def test_exponents_are_those_of_frexp(x):
    stored = int(casts.exponent_of(torch.tensor(x)))
    mantissa, exponent = math.frexp(x)
    assert stored == (0 if x == 0 else min(max(exponent - (mantissa == 0.5), -127), 127) + 127)


def test_copies_are_made_kept_and_dropped_as_the_quantizer_says():
    x, y = ROWS, ROWS.flip(0)
    quantizer = current()
    found = casts.quantize(x, quantizer)
    old = found._transpose.clone()
    casts.quantize(y, quantizer, found)
    assert not torch.equal(found._transpose, old), "written anew with the first copy"
    quantizer.set_usage(columnwise=False)
    casts.quantize(x, quantizer, found)
    assert found._transpose is None and found._transpose_invalid, "a stale copy is dropped"
    with pytest.raises(RuntimeError, match="missing column-wise usage"):
        casts.values_of(found, by_column=True)
    quantizer.set_usage(columnwise=True)
    casts.quantize(y, quantizer, found)
    assert torch.equal(casts.values_of(found, by_column=True), casts.values_of(found))
    empty = casts.create(quantizer, (16, 16), torch.bfloat16)
    assert casts.values_of(empty).isnan().all(), "what nobody wrote is NaN"
    with pytest.raises(NotImplementedError, match="by column alone"):
        casts.quantize(x, current(rowwise=False))


def test_other_ways_to_a_cast():
    """An empty output that is written later, a transpose of bytes, a bias's gradient beside the cast."""
    x = ROWS.bfloat16()
    expected = casts.quantize(x, current())
    empty = casts.create_empty_quantized_tensor(current(), x.shape, x.dtype, torch.device("cpu"))
    assert (empty._data == casts.NOT_WRITTEN).all() and empty.dtype is x.dtype
    assert torch.equal(casts.quantize(x, current(), empty)._data, expected._data)
    bytes_of_rows = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    turned = casts.fp8_transpose(bytes_of_rows, E4M3)
    assert turned.tolist() == [[[j * 12 + i * 4 + k for i in range(3)] for j in range(2)] for k in range(4)]
    out = torch.zeros(4, 2, 3, dtype=torch.uint8)
    assert casts.fp8_transpose(bytes_of_rows, E4M3, out) is out and torch.equal(out, turned)
    bias, data = casts.bgrad_quantize(x.view(2, 128, 384), current())
    torch.testing.assert_close(bias.double(), x.double().sum(0), rtol=2**-8, atol=2**-8)
    assert bias.dtype is x.dtype and torch.equal(data._data.view(x.shape), expected._data)


@pytest.mark.usefixtures("megatron_world_of_one")
def test_current_scaling_takes_the_largest_entry_of_a_group(monkeypatch):
    """Another rank's is 8, in E4M3 56 of it; nobody is asked without a group."""
    asked = []

    def all_reduce(amax: Tensor, op: Any, group: Any) -> None:
        asked.append((float(amax), op, group))
        amax.clamp_(min=8.0)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    x, amax, group = torch.tensor([[1.0, -3.5] * 8] * 16), torch.zeros(1), dist.group.WORLD
    casts.compute_amax(x, amax)
    assert float(amax) == 3.5
    assert float(casts.quantize(x, current())._scale_inv) == pytest.approx(3.5 / 448, rel=1e-6) and not asked
    quantizer = Float8CurrentScalingQuantizer(E4M3, "cpu", with_amax_reduction=True, amax_reduction_group=group)
    assert float(casts.quantize(x, quantizer)._scale_inv) == pytest.approx(8 / 448, rel=1e-6)
    assert asked == [(3.5, dist.ReduceOp.MAX, group)]


def gemm(a: Any, b: Any, layout: str, **more: Any) -> Tensor:
    out, accumulate = more.get("out"), more.get("accumulate", False)
    given = (
        a,
        layout[0] == "T",
        b,
        layout[1] == "T",
        out,
        more.get("quantizer"),
        casts.DType.kFloat32,
        more.get("bias"),
    )
    return products.generic_gemm(*given, 6, False, None, False, torch.empty(0), 0, accumulate, True)[0]


@pytest.mark.parametrize("layout", ["TN", "NN", "NT"])
def test_products_are_those_of_what_a_copy_holds(layout):
    """On Hopper FP8 is read along the summed dimension; on Blackwell per-tensor FP8 needs its rows alone."""
    m, n, k = 32, 48, 64
    generator = torch.Generator().manual_seed(2)
    a = torch.randn((m, k) if layout[0] == "T" else (k, m), generator=generator)
    b = torch.randn((k, n) if layout[1] == "T" else (n, k), generator=generator)
    a8, b8 = casts.quantize(a, current()), casts.quantize(b, current())
    x, y = a8.dequantize().double(), b8.dequantize().double()
    exact = (y.t() if layout[1] == "T" else y) @ (x.t() if layout[0] == "T" else x)
    torch.testing.assert_close(gemm(a8, b8, layout).double(), exact, rtol=1e-5, atol=1e-4)
    out = torch.ones(n, m)
    gemm(a8, b8, layout, out=out, accumulate=True)
    torch.testing.assert_close(out.double(), exact + 1, rtol=1e-5, atol=1e-4)
    needs = {"TN": (), "NN": ("a",), "NT": ("a", "b")}[layout]
    for name, tensor in (("a", a8), ("b", b8)):
        tensor._transpose_invalid = True
        if name in needs:
            with pytest.raises(RuntimeError, match="missing column-wise usage"):
                gemm(a8, b8, layout)
        else:
            gemm(a8, b8, layout)
        tensor._transpose_invalid = False


def test_products_that_a_gpu_rejects_are_errors(monkeypatch):
    def fp8(*shape: int) -> Any:
        return casts.quantize(torch.ones(shape), current())

    with pytest.raises(RuntimeError, match="24 is no multiple of 16"):
        gemm(fp8(32, 24), fp8(32, 24), "TN")
    with pytest.raises(RuntimeError, match="12 is no multiple of 8"):
        gemm(fp8(12, 32), fp8(32, 32), "TN")
    with pytest.raises(RuntimeError, match="compatible scaling modes"):
        gemm(fp8(32, 32), torch.ones(32, 32), "TN")
    with pytest.raises(NotImplementedError, match="a bias"):
        gemm(torch.ones(32, 32), torch.ones(32, 32), "TN", bias=torch.ones(32))
    monkeypatch.setattr(device, "capability", device.HOPPER)
    mx = casts.quantize(torch.ones(32, 32), MXFP8Quantizer(E4M3))
    with pytest.raises(RuntimeError, match="no MXFP8 product"):
        gemm(mx, mx, "TN")
    monkeypatch.setattr(device, "capability", device.BLACKWELL)
    assert fp8(32, 32)._transpose is None
    assert float(gemm(fp8(32, 32), fp8(32, 32), "NT")[0, 0]) == 32
    assert float(gemm(mx, mx, "NT")[0, 0]) == 32


def test_a_name_that_is_not_stood_in_for_says_so():
    with pytest.raises(NotImplementedError, match=r"transformer_engine_torch\.layernorm_fwd is not stood in for"):
        missing("layernorm_fwd")(1)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rmsnorm_is_autograds(zero_centered):
    generator = torch.Generator().manual_seed(3)
    x, weight, grad, add = (torch.randn(8, 32, generator=generator).double() for _ in range(4))
    x.requires_grad_(), (weight := weight[0].clone().requires_grad_())
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight + zero_centered)
    exact.backward(grad)
    half = (x.detach().float(), weight.detach().float())
    found, _, scale = norms.rmsnorm_fwd(*half, 1e-5, None, None, casts.DType.kFloat32, 0, zero_centered)
    dx, dw = norms.rmsnorm_bwd(grad.float(), half[0], scale, half[1], 0, zero_centered)
    summed, _ = norms.rmsnorm_bwd_add(grad.float(), half[0], add.float(), scale, half[1], 0, zero_centered)
    for ours, theirs in ((found, exact), (dx, x.grad), (dw, weight.grad), (summed, x.grad + add)):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-5, atol=1e-5)


def test_only_delayed_scaling_casts_a_norm_before_it_is_rounded_to_bf16():
    x, weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(4)), torch.ones(64)
    args = (casts.DType.kBFloat16, 0, False)
    plain, _, _ = norms.rmsnorm_fwd(x, weight, 0.0, None, None, casts.DType.kFloat32, 0, False)
    from_fp32, _, _ = norms.rmsnorm_fwd(x, weight, 0.0, None, delayed(scale=100.0), *args)
    rounded, _, _ = norms.rmsnorm_fwd(x, weight, 0.0, None, current(), *args)
    assert torch.equal(from_fp32._data, casts.quantize(plain, delayed(scale=100.0))._data)
    assert torch.equal(rounded._data, casts.quantize(plain.bfloat16(), current())._data)


def test_rope_turns_pairs_by_their_angle_and_back():
    """As complex numbers; documents begin anew; dimensions behind the angles' stay."""
    generator = torch.Generator().manual_seed(5)
    x, half = torch.randn(9, 2, 3, 12, generator=generator), torch.rand(9, 1, 1, 4, generator=generator)
    angles, rest = torch.cat((half, half), -1), (None, None, False, None, 1, 0)
    found = norms.fused_rope_forward(x, angles, *rest)
    exact = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(torch.ones_like(half), half)
    torch.testing.assert_close(found, torch.cat((exact.real, exact.imag, x[..., 8:]), -1))
    torch.testing.assert_close(norms.fused_rope_backward(found, angles, *rest), x)
    documents = norms.fused_rope_forward(x[:, 0], angles, None, None, False, torch.tensor([0, 4, 9]), 1, 0)
    alone = [norms.fused_rope_forward(part[:, None], angles, *rest)[:, 0] for part in x[:, 0].split([4, 5])]
    assert torch.equal(documents, torch.cat(alone))


def test_softmax_and_packing():
    scores = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(6)).double().requires_grad_()
    mask = torch.ones(4, 4).triu(1).bool()
    mask[3] = True
    exact = (scores * 0.5).masked_fill(mask, -inf)[..., :3, :].softmax(-1)
    found = attention.scaled_masked_softmax_forward(scores.float(), mask, 0.5)
    torch.testing.assert_close(found[..., :3, :].double(), exact.detach())
    assert not found[..., 3, :].any(), "a row with nothing to attend to"
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(7))
    exact.backward(grad[..., :3, :].double())
    torch.testing.assert_close(attention.scaled_softmax_backward(grad, found, 0.5).double(), scores.grad)
    tokens, borders = torch.randn(9, 3), torch.tensor([0, 4, 9])
    rows = attention.convert_thd_to_bshd(tokens, borders, 2, 6)
    assert torch.equal(rows[0, :4], tokens[:4]) and not rows[0, 4:].any() and torch.equal(rows[1, :5], tokens[4:])
    assert torch.equal(attention.convert_bshd_to_thd(rows, borders, 9), tokens)


@pytest.mark.parametrize(("mode", "torchs"), [(0, torch.optim.Adam), (1, torch.optim.AdamW)])
def test_adam_is_torchs(mode, torchs):
    mine, theirs = (torch.linspace(-1, 1, 8), torch.nn.Parameter(torch.linspace(-1, 1, 8)))
    half, moments = mine.bfloat16(), [torch.zeros(8), torch.zeros(8)]
    other = torchs([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in (1, 2, 3):
        theirs.grad = torch.linspace(1, -2, 8) * step
        other.step()
        lists = [[theirs.grad], [half], *([x] for x in moments), [mine]]
        optimizer.multi_tensor_adam(0, torch.zeros(1), lists, 0.1, 0.9, 0.95, 1e-8, step, mode, 1, 0.1)
    torch.testing.assert_close(mine, theirs.detach())
    assert torch.equal(half, mine.bfloat16())


def test_norm_and_scale_note_what_is_not_finite():
    noop = torch.zeros(1)
    norm, each = optimizer.multi_tensor_l2norm(0, noop, [[torch.full((4,), 3.0), torch.full((4,), 4.0)]], True)
    assert float(norm) == 10 and each.tolist() == [6, 8] and not noop
    for scale, by in ((optimizer.multi_tensor_scale, 2.0), (optimizer.multi_tensor_scale_tensor, torch.tensor([2.0]))):
        noop, target = torch.zeros(1), torch.zeros(2)
        scale(0, noop, [[torch.tensor([1.0, inf])], [target]], by)
        assert target.tolist() == [2, inf] and noop


@pytest.mark.parametrize("split", [1000, 128 * 384])
def test_parts_of_an_optimizer_cast_to_the_bytes_of_the_whole(split):
    """Square blocks whose entries two ranks hold, border inside a row or between blocks."""
    quantizer = blocks(2)
    whole, flat = casts.quantize(ROWS, quantizer), ROWS.flatten()
    amaxes = [torch.zeros(2, 3) for _ in range(2)]
    for amax, part, start in zip(amaxes, (flat[:split], flat[split:]), (0, split), strict=True):
        casts.fp8_block_scaling_compute_partial_amax(part, amax, *ROWS.shape, start, 128)
    amax, scale, inverse = torch.maximum(*amaxes), torch.zeros(2, 3), torch.zeros(2, 3)
    power = quantizer.force_pow_2_scales
    lists = [[amax], [scale], [inverse]]
    casts.multi_tensor_compute_scale_and_scale_inv(0, torch.zeros(1), lists, 448.0, power, quantizer.amax_epsilon)
    found = torch.zeros(ROWS.numel(), dtype=torch.uint8)
    for part, start in ((flat[:split], 0), (flat[split:], split)):
        out = found[start : start + part.numel()]
        casts.fp8_block_scaling_partial_cast(part, out, scale, *ROWS.shape, start, 128, E4M3)
    assert torch.equal(found.view(ROWS.shape), whole._rowwise_data)
    assert torch.equal(inverse, whole._rowwise_scale_inv[:2, :3])
