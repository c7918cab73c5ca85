"""Which messages a rank receives, against a simulation of ranks that do nothing but send what the schedule makes."""

import itertools

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_depthattn.model.gpt import build_gpt_model, qwen3_style_config
from megatron_depthattn.parallel.schedule import PlannedCommunicator, received_messages, run_schedule


def chunk_order(num_microbatches: int, num_chunks: int, group_size: int) -> list[int]:
    return [chunk for _, chunk in get_schedule_table(num_microbatches, num_chunks, group_size)]


def sent_by(rank: int, order: list[int], num_chunks: int, ranks: int, forward: bool) -> list[tuple[int, int]]:
    """(receiving rank, chunk in model order that the message belongs to), in the order of sending."""
    messages = []
    for virtual in order:
        mine = (virtual if forward else num_chunks - 1 - virtual) * ranks + rank
        if forward and mine + 1 < num_chunks * ranks:
            messages.append(((rank + 1) % ranks, mine + 1))
        if not forward and mine > 0:
            messages.append(((rank - 1) % ranks, mine))
    return messages


@pytest.mark.parametrize(("ranks", "num_chunks"), itertools.product([2, 3, 4], [1, 2, 3]))
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_received_messages_are_those_that_the_neighbours_send(ranks, num_chunks, rounds):
    order = chunk_order(rounds * ranks, num_chunks, ranks)
    assert len(order) == rounds * ranks * num_chunks
    for rank in range(ranks):
        forward, backward = received_messages(order, rank, ranks)
        before, after = (rank - 1) % ranks, (rank + 1) % ranks
        assert forward == [c for to, c in sent_by(before, order, num_chunks, ranks, True) if to == rank]
        assert backward == [c for to, c in sent_by(after, order, num_chunks, ranks, False) if to == rank]


def test_by_hand():
    """Two ranks with two chunks each, two micro-batches: rank 0 has chunks 0 and 2, rank 1 has 1 and 3."""
    order = chunk_order(2, 2, 2)
    assert order == [0, 0, 1, 1]
    assert received_messages(order, 0, 2) == ([2, 2], [3, 3, 1, 1])
    assert received_messages(order, 1, 2) == ([1, 1, 3, 3], [2, 2])


def test_freed_messages_are_rejected(megatron_world_of_one):
    """Megatron's interleaved schedule frees a message while gloo may still be sending it."""
    small = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    model = build_gpt_model(
        qwen3_style_config(**small, deallocate_pipeline_outputs=True), vocab_size=128, max_sequence_length=8
    )
    with pytest.raises(ValueError, match="deallocate_pipeline_outputs=True with interleaved pipelining on gloo"):
        run_schedule(None, [], [model, model], micro_batch_size=1, sequence_length=8, forward_only=False)


def test_a_microbatch_of_another_length_is_rejected_before_it_is_sent():
    """As packed sequences of unequal lengths would be: the neighbour waits for a message of the planned shape."""
    communicator = PlannedCommunicator.__new__(PlannedCommunicator)
    communicator._leading, communicator._from_previous, communicator._from_next = (16, 1), iter([40]), iter([40, 40])
    right, longer = torch.zeros(16, 1, 40), torch.zeros(24, 1, 40)
    assert communicator._communicate_shapes(right, None, False, True) == (None, (16, 1, 40))
    assert communicator._communicate_shapes(None, right, True, True) == ((16, 1, 40), (16, 1, 40))
    for send in ((longer, None), (None, longer)):
        with pytest.raises(ValueError, match=r"24 rows .* given 16 rows .*sequence_length.* Pad packed sequences"):
            communicator._communicate_shapes(*send, False, False)
