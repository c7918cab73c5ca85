"""The loss against Megatron's own to the bit, against fp64 and over ranks that share the vocabulary; its memory."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch.nn import functional

from megatron_depthattn.model.cross_entropy import chunked_cross_entropy
from megatron_depthattn.vocabulary import LOSS_CHUNK
from tests.live import LiveBytes

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

VOCAB, SEQUENCE, BATCH = 50304, 24, 2
NUMBERS = SEQUENCE * BATCH * VOCAB
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Of the gradient, as a share of a token's largest; the loss is fp32 in both."""


def a_batch(dtype):
    """Logits as a product makes them, targets, and a gradient that differs from token to token."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(SEQUENCE, BATCH, VOCAB, generator=generator).mul(4).to(dtype)
    target = torch.randint(VOCAB, (SEQUENCE, BATCH), generator=generator)
    return logits, target, torch.rand(SEQUENCE, BATCH, generator=generator)


def run(loss_of, logits, target, weights):
    leaf = logits.clone().requires_grad_()
    loss = loss_of(leaf * 1, target)  # the memory of a leaf may not be used
    loss.backward(weights)
    return loss.detach(), leaf.grad


def ours(logits, target):
    return chunked_cross_entropy(logits, target, parallel_state.get_tensor_model_parallel_group())


def reference(logits, target):
    return functional.cross_entropy(logits.double().flatten(0, 1), target.flatten(), reduction="none").view_as(target)


def error(gradient, expected):
    return ((gradient.double() - expected).abs().amax(-1) / expected.abs().amax(-1)).max()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_is_megatrons_to_the_bit_and_right(dtype):
    assert 2 * LOSS_CHUNK["cpu"] < NUMBERS
    logits, target, weights = a_batch(dtype)
    loss, gradient = run(ours, logits, target, weights)
    theirs, their_gradient = run(vocab_parallel_cross_entropy, logits, target, weights)
    assert gradient.dtype == dtype and loss.dtype == torch.float32
    assert torch.equal(loss, theirs) and torch.equal(gradient, their_gradient)
    exact, exact_gradient = run(reference, logits.double(), target, weights.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    assert error(gradient, exact_gradient) < BOUND[dtype]
    _, control = run(ours, logits, target, weights.mean().expand_as(weights))
    assert error(control, exact_gradient) > 10 * BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_the_vocabulary(dtype, size):
    """Threads as ranks, over gloo; the control gives every rank its neighbour's share."""
    logits, target, weights = a_batch(dtype)
    whole, gradient = run(ours, logits, target, weights)
    shares = logits.chunk(size, -1)

    def rank(index, store, shift):
        group = dist.ProcessGroupGloo(store, index, size)
        mine = shares[(index + shift) % size]
        return run(lambda *given: chunked_cross_entropy(*given, group), mine, target, weights)

    def ranks(shift):
        store = dist.HashStore()
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(lambda index: rank(index, store, shift), range(size)))

    results = ranks(0)
    for loss, _ in results:
        torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    joined = torch.cat([own for _, own in results], -1)
    assert error(joined, gradient.double()) < BOUND[dtype]
    assert (ranks(1)[0][0] - whole).abs().max() > 1


def test_no_copy_of_the_logits_is_made():
    _, target, weights = a_batch(torch.bfloat16)
    logits = 2 * NUMBERS  # bytes
    hidden, head = torch.randn(SEQUENCE, BATCH, 1).bfloat16(), torch.randn(1, VOCAB).bfloat16().requires_grad_()
    peaks = {}
    for name, loss_of in (("ours", ours), ("megatron", vocab_parallel_cross_entropy)):
        with LiveBytes() as live:
            loss_of(hidden @ head, target).backward(weights)
        peaks[name] = live.peak
    assert peaks["ours"] < 1.05 * logits + 4 * LOSS_CHUNK["cpu"]
    assert peaks["megatron"] > 2.9 * logits


def test_a_second_backward_is_an_error():
    logits, target, weights = a_batch(torch.bfloat16)
    loss = ours(logits.requires_grad_() * 1, target)
    loss.backward(weights, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(weights)
