"""What holds of the Triton mix beside its numbers, for a GPU and for Triton's interpreter on CPU: functions of a device
that fail by assertion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_depthattn.ops import depth_mix_reference
from megatron_depthattn.ops import triton_mix as own
from tests.gpu.mix_cases import (
    BF16,
    FP32,
    Case,
    Inputs,
    error_over_tolerance,
    make_inputs,
    output_gradient,
    results,
    truth,
)


def check_what_is_left_out_shows(device: str) -> dict[str, float]:
    """Controls: wrong variants exceed the tolerance by far. Returns by how much."""
    inputs = make_inputs(Case(2, dtype=FP32), device)
    expected = truth(inputs)
    found = {}
    dropped = Inputs(inputs.q, inputs.keys[1:], inputs.values[1:], inputs.k, inputs.v)
    found["a source dropped, mix"] = error_over_tolerance(dropped.mix(), expected["mixed"])
    swapped = Inputs(inputs.q, inputs.keys[::-1], inputs.values, inputs.k, inputs.v)
    found["keys of two sources swapped, mix"] = error_over_tolerance(swapped.mix(), expected["mixed"])
    mixed = inputs.map(lambda x: x)
    mixed.v.requires_grad_(False)
    no_mean = depth_mix_reference_without_mean(mixed)
    for name in ("q", "keys[0]"):
        found[f"the softmax's mean left out, gradient of {name}"] = error_over_tolerance(no_mean[name], expected[name])
    first_head = inputs.map(lambda x: x)
    first_head.q = inputs.q.detach()[..., ::4, :].requires_grad_()  # heads 0, 4, 8: no mean over the group
    found["one query head of each group, mix"] = error_over_tolerance(first_head.mix(), expected["mixed"])
    assert min(found.values()) > 1000, found
    return found


def depth_mix_reference_without_mean(inputs: Inputs) -> dict[str, Tensor]:
    """Gradients of q and keys with da_i in place of da_i - D."""
    exact = inputs.map(lambda x: x.cpu().double())
    d, groups = exact.q.shape[-1], exact.k.shape[-2]
    _, weights = depth_mix_reference(exact.q, exact.keys, exact.values, exact.k, exact.v, d**-0.5, return_weights=True)
    grad = output_gradient(exact.v)
    qbar = exact.q.unflatten(-2, (groups, -1)).mean(dim=-2)
    pulls = [weights[..., i] * (grad * value).sum(-1) * d**-0.5 for i, value in enumerate([*exact.values, exact.v])]
    grad_qbar = sum(pull[..., None] * key for pull, key in zip(pulls, [*exact.keys, exact.k], strict=True))
    per_head = exact.q.shape[-2] // groups
    return {"q": (grad_qbar / per_head).repeat_interleave(per_head, dim=-2), "keys[0]": pulls[0][..., None] * qbar}


def check_nothing_is_copied(device: str) -> None:
    """The kernels are given the very addresses of views; only a tensor with gaps inside its heads is copied."""
    for layout, is_copied in (("views", False), ("unaligned views", False), ("batch first", False), ("gaps", True)):
        inputs = make_inputs(Case(2, layout=layout), device)
        with launches() as seen:
            inputs.mix().backward(output_gradient(inputs.v))
        assert len(seen) == 2
        for strided, candidates, is_aligned in seen:
            assert is_aligned == (layout != "unaligned views"), layout
            for x, given in zip((strided[0], candidates[0]), (inputs.q, inputs.keys[0]), strict=True):
                assert (x.data_ptr() != given.data_ptr()) == is_copied, layout


@contextmanager
def launches() -> Iterator[list[tuple[list[Tensor], list[Tensor], bool]]]:
    """Tensors that the kernels are given, (strided, candidates, are their rows aligned) for each launch."""
    seen: list[tuple[list[Tensor], list[Tensor], bool]] = []
    four_dimensional, describe = own._four_dimensional, own._describe
    made: list[Tensor] = []

    def noted(x: Tensor) -> Tensor:
        made.append(four_dimensional(x))
        return made[-1]

    def described(candidates, grads):
        entries, num_fields, is_aligned = describe(candidates, grads)
        seen.append((made[: len(made) - len(candidates)], list(candidates), is_aligned))
        made.clear()
        return entries, num_fields, is_aligned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "_four_dimensional", noted)
        patch.setattr(own, "_describe", described)
        yield seen


def check_saves_only_its_inputs(device: str) -> None:
    inputs = make_inputs(Case(2, layout="views"), device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        inputs.mix()
    assert sorted(x.data_ptr() for x in saved) == sorted(x.data_ptr() for x in inputs.named.values())


def check_gradients_only_where_required(device: str) -> None:
    """Of each input alone, and of none: what the function itself returns, and that it is right."""
    for case in (Case(2, dtype=FP32, head_dim=16), Case(4, dtype=FP32, head_dim=16)):
        whole = make_inputs(case, device)
        expected = truth(whole)
        n = case.num_sources
        order = ["q", *(f"keys[{i}]" for i in range(n)), "k", *(f"values[{i}]" for i in range(n)), "v"]
        for wanted in ("q", "k", "keys[1]", "values[0]", "v"):
            inputs = whole.map(lambda x: x)
            for name, x in inputs.named.items():
                x.requires_grad_(name == wanted)
            mixed = inputs.mix()
            grads = dict(zip(order, mixed.grad_fn.apply(output_gradient(mixed))[1:], strict=True))
            assert [name for name, grad in grads.items() if grad is not None] == [wanted]
            assert error_over_tolerance(grads[wanted], expected[wanted]) <= 1
        with torch.no_grad():
            assert error_over_tolerance(whole.mix(), expected["mixed"]) <= 1
            assert whole.mix().grad_fn is None


def check_recompute_and_autocast_change_nothing(device: str) -> None:
    inputs = make_inputs(Case(2), device)
    names, tensors = list(inputs.named), list(inputs.named.values())
    expected = results(inputs, "triton")

    def mix(q: Tensor, k: Tensor, v: Tensor, *sources: Tensor) -> Tensor:
        return Inputs(q, list(sources[:2]), list(sources[2:]), k, v).mix()

    for use_reentrant in (False, True):
        mixed = checkpoint(mix, *tensors, use_reentrant=use_reentrant)
        grads = torch.autograd.grad(mixed, tensors, output_gradient(mixed)) if not use_reentrant else None
        if grads is None:  # reentrant recompute knows .backward() alone
            mixed.backward(output_gradient(mixed))
            grads = [x.grad for x in tensors]
        assert torch.equal(mixed, expected["mixed"])
        assert all(torch.equal(grad, expected[name]) for name, grad in zip(names, grads, strict=True))
    with torch.autocast(device, dtype=BF16):
        full = make_inputs(Case(2, dtype=FP32), device)
        assert full.mix().dtype == FP32
        assert error_over_tolerance(full.mix(), truth(full)["mixed"]) <= 1


def check_an_expanded_gradient(device: str) -> None:
    """As .sum() gives: every stride of it is 0."""
    inputs = make_inputs(Case(2, dtype=FP32), device)
    inputs.mix().sum().backward()
    exact = inputs.map(lambda x: x.cpu().double())
    exact.mix("reference").sum().backward()
    for name, x in inputs.named.items():
        assert error_over_tolerance(x.grad, exact.named[name].grad) <= 1, name


def check_views_of_one_projection(device: str) -> None:
    """q, k and v as Megatron splits them from one [s, b, G, (H/G + 2) * d]; v is read inside it."""
    inputs = make_inputs(Case(2, dtype=FP32), device)
    s, b, num_groups, d = inputs.k.shape
    q = inputs.q.detach().reshape(s, b, num_groups, 4 * d)
    fused = torch.cat([q, inputs.k.detach(), inputs.v.detach()], dim=-1).requires_grad_()
    q, k, v = fused.split([4 * d, d, d], dim=-1)
    mixed = Inputs(q.reshape(s, b, 4 * num_groups, d), inputs.keys, inputs.values, k, v).mix()
    (grad,) = torch.autograd.grad(mixed, fused, output_gradient(mixed))
    expected = truth(inputs)
    grad_q = expected["q"].reshape(s, b, num_groups, 4 * d)
    assert error_over_tolerance(mixed, expected["mixed"]) <= 1
    assert error_over_tolerance(grad, torch.cat([grad_q, expected["k"], expected["v"]], dim=-1)) <= 1


def check_extreme_scores(device: str) -> None:
    """Scores of thousands: one weight is 1 and the others 0, to the bit; and what is not finite stays so."""
    inputs = make_inputs(Case(2, dtype=FP32), device)
    sharp = inputs.map(lambda x: x)
    sharp.keys[1] = (1e4 * inputs.q.detach().unflatten(-2, (3, 4)).mean(-2)).requires_grad_()
    found = results(sharp, "triton")
    assert torch.equal(found["mixed"], sharp.values[1])
    assert torch.equal(found["values[1]"], output_gradient(found["mixed"]))
    assert not found["values[0]"].any() and all(x.isfinite().all() for x in found.values())
    for bad in (torch.nan, torch.inf):
        spoilt = inputs.map(torch.clone)
        spoilt.keys[0].data[0, 0, 0, 0] = bad
        mixed = results(spoilt, "triton")["mixed"]
        assert not mixed[0, 0, 0].isfinite().any() and mixed[1:].isfinite().all()


def check_offsets_beyond_two_to_the_31_elements(device: str) -> None:
    """A source whose second token lies 4.3 GB (bf16) behind its first; on CPU what lies between takes no memory."""
    inputs = make_inputs(Case(1, leading=(2, 1), num_groups=1, gqa_ratio=1), device)
    far = torch.empty_strided((2, 1, 1, 64), (2**31 + 64, 64, 64, 1), dtype=BF16, device=device)
    far.copy_(inputs.keys[0].detach())
    mixed = Inputs(inputs.q, [far], inputs.values, inputs.k, inputs.v).mix()
    assert error_over_tolerance(mixed, truth(inputs)["mixed"]) <= 1


def check_refusals(device: str) -> None:
    def rejected(message: str, inputs: Inputs) -> None:
        with pytest.raises(ValueError, match=message):
            inputs.mix()

    assert own.triton_unsupported(torch.device("cuda" if device == "cpu" else "cpu")) is not None
    good = make_inputs(Case(1), device)
    rejected(r"q is torch.float64: .* or set the op to 'lean', which computes fp64", good.map(Tensor.double))
    rejected("at most 256 numbers, but got heads of 257", make_inputs(Case(1, head_dim=257), device))
    other = make_inputs(Case(1, dtype=FP32), device)
    mixed_keys = Inputs(good.q, other.keys, good.values, good.k, good.v)
    rejected("keys are torch.float32 for a source and torch.bfloat16 for the layer; pass one dtype", mixed_keys)
    (grad,) = torch.autograd.grad(good.mix().square().sum(), good.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    mixed = good.mix()
    good.values[0].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mixed.sum().backward()


CHECKS: dict[str, Callable[[str], object]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
