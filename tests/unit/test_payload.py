"""The pipeline message: its parts come back as they were put in, their gradients too, and it is a tensor of its own.

Shapes: S positions, B micro-batch, E hidden size, G key/value heads of a rank, D head size, T tensor ranks.
"""

import re

import pytest
import torch

from megatron_depthattn.parallel.payload import HIDDEN, Payload, cross_layer_payload

S, B, E, G, D, T = 12, 3, 20, 2, 4, 2
KINDS = ("key", "value")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def parts_of(sources: tuple[int, ...], *, rows: int) -> dict[str, torch.Tensor]:
    """A hidden state with ``rows`` rows, and sources of all S positions."""
    parts = {HIDDEN: normal(rows, B, E, seed=1)}
    for layer in sources:
        parts[f"key.{layer}"] = normal(S, B, G, D, seed=2 * layer + 2)
        parts[f"value.{layer}"] = normal(S, B, G, D, seed=2 * layer + 3)
    return parts


def test_widths_order_and_offsets():
    payload = cross_layer_payload((0, 4), KINDS, hidden_width=E, part_width=G * D)
    assert dict(payload.widths) == {HIDDEN: E, "key.0": 8, "value.0": 8, "key.4": 8, "value.4": 8}
    assert list(payload.widths) == [HIDDEN, "key.0", "value.0", "key.4", "value.4"]
    assert payload.width == E + 4 * 8
    message = torch.arange(payload.width).expand(2, 1, -1)
    assert [int(part[0, 0, 0]) for part in payload.unpack(message).values()] == [0, 20, 28, 36, 44]


@pytest.mark.parametrize("sources", [(), (0, 3)])
def test_message_is_fresh_memory(sources):
    """The schedules free the message after sending it, which must not touch what it was made of; nor keep it alive."""
    parts = parts_of(sources, rows=S)
    message = cross_layer_payload(sources, KINDS, hidden_width=E, part_width=G * D).pack(parts)
    assert message._base is None and message.is_contiguous()
    assert message.untyped_storage().nbytes() == message.numel() * message.element_size()
    own = message.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() != own for part in parts.values())


def test_wrong_width_is_rejected():
    payload = Payload({HIDDEN: 4, "key.0": 2})
    with pytest.raises(ValueError, match=re.escape("a message of width 7 arrived")) as error:
        payload.unpack(torch.zeros(1, 1, 7))
    assert "{'hidden': 4, 'key.0': 2} (together 6)" in str(error.value)
    assert "different source plans" in str(error.value)


@pytest.mark.parametrize("names", [[HIDDEN], [HIDDEN, "key.0", "key.1"], [HIDDEN, "key.1"]])
def test_wrong_parts_are_rejected(names):
    with pytest.raises(ValueError, match=re.escape("payload holds the parts ['hidden', 'key.0']")) as error:
        Payload({HIDDEN: 4, "key.0": 2}).pack({name: torch.zeros(1, 1, 4) for name in names})
    assert str(names) in str(error.value)
