"""How many sequences each optimizer step of a run has: the same number, or a ramp by Megatron's rule."""

import math
from collections.abc import Iterator
from typing import NamedTuple


class BatchSizes(NamedTuple):
    """The size of a step's global batch as a function of the samples that were consumed before it."""

    sizes: range
    """Every size, rising; one without a ramp."""
    samples: int
    """Over which it rises, in equal parts: Megatron's ``--rampup-batch-size``."""

    @classmethod
    def of(cls, full: int, ramp: list[int] | None = None) -> "BatchSizes":
        """Of ``train.global_batch_size`` and ``train.batch_ramp``."""
        start, increment, samples = ramp or (full, 1, 1)
        return cls(range(start, full + 1, increment), samples)

    @property
    def divisor(self) -> int:
        """What divides every size."""
        return math.gcd(*self.sizes[:2])

    def at(self, consumed: int) -> int:
        """The size of the step that begins after so many samples."""
        last = len(self.sizes) - 1  # Megatron's rounding: at a bound it can rise a step later than exact numbers would
        return self.sizes[min(int(consumed / (self.samples / last)), last) if last else 0]

    def each(self, consumed: int) -> Iterator[int]:
        """The sizes of the steps from there on, without end."""
        while True:
            yield (size := self.at(consumed))
            consumed += size

    def stretches(self, steps: int, consumed: int = 0) -> Iterator[tuple[int, int]]:
        """Sizes with the number of steps that have them, of so many steps."""
        last = len(self.sizes) - 1
        while steps and (size := self.at(consumed)) < self.sizes[-1]:
            until = -(-(self.sizes.index(size) + 1) * self.samples // last)
            until += self.at(until) == size  # now the first sample of a larger one
            alike = min(steps, -(-(until - consumed) // size))
            yield size, alike
            steps, consumed = steps - alike, consumed + alike * size
        if steps:
            yield self.sizes[-1], steps

    def consumed_after(self, steps: int, consumed: int = 0) -> int:
        """Samples consumed after so many steps more."""
        return consumed + sum(size * count for size, count in self.stretches(steps, consumed))

    def steps_to(self, tokens: float, sequence_length: int) -> int:
        """Steps after which at least so many tokens are consumed."""
        steps = consumed = 0
        while consumed * sequence_length < tokens:
            size = self.at(consumed)
            alike = math.ceil((tokens - consumed * sequence_length) / (size * sequence_length))
            _, alike = next(self.stretches(alike, consumed))
            steps, consumed = steps + alike, consumed + alike * size
        return steps
