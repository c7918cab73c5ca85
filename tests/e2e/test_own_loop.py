"""The example of a training loop of one's own: it runs under torchrun, and learns."""

import re

from tests.e2e.commands import must_succeed, torchrun


def test_the_loss_falls_on_two_ranks_that_share_each_layer():
    output = must_succeed(torchrun(2, "examples/own_megatron_loop.py", "--tensor", "2", "--steps", "21")).stdout
    losses = {rank: [float(loss) for loss in re.findall(rf"rank {rank} .* loss ([\d.]+)", output)] for rank in (0, 1)}
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert losses[0][0] > 6 and losses[0][-1] < losses[0][0] - 3
