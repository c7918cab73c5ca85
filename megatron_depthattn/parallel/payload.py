"""What a pipeline stage hands to the next: one fresh tensor with named parts.

Megatron's schedules send one tensor per transfer, free its memory after the send, and run backward from it alone.
Sources that travelled beside the hidden state would lose their gradient without a word, and a view would keep its
memory. So the parts are concatenated along the last dimension into a tensor of their own, and the names, widths and
offsets live here, in one place, from which packing, unpacking, the message's size and the memory estimate follow.

Shape suffixes: S rows (sequence, or its share under sequence parallel), B micro-batch, W width.

Under sequence parallel the hidden state holds 1/t of the positions while a key or value holds all positions of 1/t of
the heads. The element counts match, so it travels as ``[S, B, t * w]``: a reshape, no communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HIDDEN = "hidden"


def source_parts(layer: int, kinds: Iterable[str]) -> tuple[str, ...]:
    """Names of the parts that ``layer`` leaves to later ones, one of each kind, such as its key and its mixed value."""
    return tuple(f"{kind}.{layer}" for kind in kinds)


@dataclass(frozen=True)
class Payload:
    """Named parts of one message and their widths in elements, in sending order."""

    widths: Mapping[str, int]

    @property
    def width(self) -> int:
        """Width W of the whole message: elements per row."""
        return sum(self.widths.values())

    def pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Concatenate ``parts`` to one new tensor ``[S, B, W]``.

        The first part fixes S and B; every other part may have any shape with ``S * B * width`` elements.
        """
        if parts.keys() != self.widths.keys():
            raise ValueError(f"payload holds the parts {list(self.widths)}, was given {list(parts)}")
        rows, batch = next(iter(parts.values())).shape[:2]
        return torch.cat([parts[name].reshape(rows, batch, width) for name, width in self.widths.items()], dim=-1)

    def unpack(self, message_SBW: Tensor) -> dict[str, Tensor]:
        """The parts of a message as ``[S, B, width]`` views, by name."""
        if message_SBW.size(-1) != self.width:
            raise ValueError(
                f"a message of width {message_SBW.size(-1)} arrived where {dict(self.widths)} (together "
                f"{self.width}) was expected: sender and receiver hold different source plans."
            )
        return dict(zip(self.widths, message_SBW.split(list(self.widths.values()), dim=-1), strict=True))


def cross_layer_payload(sources: Iterable[int], kinds: Sequence[str], *, hidden_width: int, part_width: int) -> Payload:
    """The message of a pipeline edge: the hidden state, then the parts of every live source.

    Args:
        sources: layers whose parts cross the edge.
        kinds: what each of them leaves, see `source_parts`.
        hidden_width: elements per row of the hidden state, of all streams where there are several.
        part_width: elements per row of one part.
    """
    widths = {HIDDEN: hidden_width}
    for layer in sources:
        widths |= dict.fromkeys(source_parts(layer, kinds), part_width)
    return Payload(widths)
