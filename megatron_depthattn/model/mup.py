"""muP, Maximal Update Parameterization: initial sizes and learning rates with which a step changes what layers compute
by as much at every width, so that what was tuned at a base width holds at others.

With m, the width over the base width, Adam and Megatron-Core's rules (``use_mup``, as of 0.19): hidden matrices begin
with a standard deviation of ``init_std / sqrt(m)`` and have learning rate and eps over m; embedding, output layer and
norms are as they were; logits are taken over m. Here that last factor is in the final norm's weights, which begin at
1/m and have a learning rate over m: the same function and the same steps under Adam, in a model that holds no
multiplier, so every checkpoint and every export of it is a plain one, and megatron-core 0.16 can train it.

Scores of attention, over positions and over depth, keep 1/sqrt(head size): a wider model has more heads of one size.
"""

from torch import Tensor

OUTPUT_FACTOR = "decoder.final_layernorm.weight"
_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")
_WIDE_QUERY = "_aggregator.query"
"""Of Attention Residuals: multiplied with a hidden state, as a row of a hidden matrix is."""


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter's products sum over the width, and it is no table of the vocabulary."""
    return parameter.dim() > 1 and not name.endswith(_VOCABULARY)


def has_scaled_rate(name: str, parameter: Tensor) -> bool:
    """Whether a parameter's learning rate is over m."""
    return is_hidden_matrix(name, parameter) or name.endswith((OUTPUT_FACTOR, _WIDE_QUERY))


def initial_factor(name: str, parameter: Tensor, multiplier: float) -> float:
    """What a parameter's initial values are multiplied with."""
    if name.endswith(OUTPUT_FACTOR):
        return 1.0 / multiplier
    return multiplier**-0.5 if is_hidden_matrix(name, parameter) else 1.0
