"""Rows of the embedding for a number of tokens, and how many of the loss's logits are in fp32 at once."""

VOCAB_MULTIPLE = 128
"""The embedding is padded to a multiple of this, whatever the layout, so that a checkpoint has one shape everywhere."""
LOSS_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Logits whose exponentials the loss takes at once, by device: about what a core's cache holds, or what fills a GPU."""


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding for ``vocab_size`` tokens."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
