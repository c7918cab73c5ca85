"""What layers publish to each other: what is not in order, and that nothing stays. Gradients: tests/parallel."""

import re
import weakref

import pytest
import torch
from torch import Tensor

from megatron_depthattn.parallel.microbatch_state import MicrobatchState


def leaf(seed: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def maker(x: Tensor, state: MicrobatchState) -> Tensor:
    """A piece of a model that leaves a part, uses it itself, and returns a hidden state."""
    part = x.sin()
    return state.detach_for_reuse({"part": part}, part * x)


def reader(hidden: Tensor, state: MicrobatchState) -> Tensor:
    return (hidden * state["part"]).exp() + state["part"]


def test_a_shared_part_is_the_same_memory_and_cut_off():
    state, x = MicrobatchState(), leaf(2)
    part = x.sin()
    state.detach_for_reuse({"part": part}, x * 1)
    assert state["part"].data_ptr() == part.data_ptr()
    assert state["part"].is_leaf and state["part"].requires_grad


def test_backward_in_the_wrong_order_is_an_error():
    state = MicrobatchState()
    hidden = maker(leaf(3), state)
    reader(hidden.detach().requires_grad_(), state)
    with pytest.raises(RuntimeError, match="the backward pass that made part ran before that of any layer"):
        hidden.sum().backward()


def test_what_is_left_over_is_an_error():
    state = MicrobatchState()
    state.assert_empty()
    maker(leaf(4), state)
    state.publish({"other": leaf(5)})
    with pytest.raises(RuntimeError, match=re.escape("other, part were left over when their micro-batch was done")):
        state.assert_empty()


def test_a_part_that_nobody_left_is_named():
    state = MicrobatchState()
    state.publish({"key.0": leaf(6)})
    with pytest.raises(LookupError, match=re.escape("value.3 is read, but this micro-batch's state holds ['key.0']")):
        _ = state["value.3"]


def test_dropped_parts_are_gone_and_shared_ones_stay_until_they_are_collected():
    state = MicrobatchState()
    hidden = maker(leaf(7), state)
    state.publish({"a": leaf(8), "b": leaf(9)})
    state.keep_only(["b"])
    with pytest.raises(LookupError, match="a is read"):
        _ = state["a"]
    state.keep_only([])
    gone = weakref.ref(state["part"])
    reader(hidden.detach().requires_grad_(), state).sum().backward()
    hidden.sum().backward()
    assert gone() is None
    state.assert_empty()
