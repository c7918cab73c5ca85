"""Rows of the embedding for a number of tokens."""

VOCAB_MULTIPLE = 128
"""The embedding is padded to a multiple of this, whatever the layout, so that a checkpoint has one shape everywhere."""


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding for ``vocab_size`` tokens."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
