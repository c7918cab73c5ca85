"""Megatron's pipeline schedules for cross-layer methods: message shapes from the source plan, a state per micro-batch.

Messages differ in width from edge to edge. Megatron asks the neighbour for the shape of every message; but the source
plan and the order of the schedule say all of them beforehand, so nothing has to be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from packaging.version import Version
from torch import Tensor

from megatron_depthattn.model.transformer_config import DepthAttentionConfig
from megatron_depthattn.parallel.microbatch_state import MicrobatchState

INTERLEAVED_WAITS_FOR_SENDS = Version(megatron.core.__version__) >= Version("0.19")
"""Whether Megatron's interleaved schedules wait for a message to be sent before they free it: enough for NCCL, not for
gloo."""

GROUPS = ["tp", "pp", "cp", "embd", "pos_embd", "dp", "dp_cp", "tp_dp_cp"]
"""What the schedules and ``finalize_model_grads`` ask of the process groups they are given."""


class Work(NamedTuple):
    """What a forward step takes from its iterator."""

    microbatch: Any
    """As the caller gave it."""
    call_arguments: dict[str, Any]
    """Keyword arguments for the model's call."""


def run_schedule(
    forward_step: Callable[[Iterator[Work], torch.nn.Module], tuple[Tensor, Any]],
    microbatches: Sequence[Any],
    chunks: Sequence[torch.nn.Module],
    *,
    micro_batch_size: int,
    sequence_length: int,
    forward_only: bool,
) -> list[Any]:
    """Megatron's schedule for this layout over one global batch.

    Args:
        forward_step: as for Megatron's schedules, but its iterator yields `Work`: call the model with
            ``**work.call_arguments``.
        microbatches: this rank's microbatches.
        chunks: this rank's pipeline chunks.
        micro_batch_size, sequence_length: of every microbatch, on the whole context-parallel group. For packed
            sequences 1 and the tokens of all documents of a microbatch; with pipelining all have as many, padded.
        forward_only: without gradients.

    Returns:
        What the schedule returns: on the last stage what ``forward_step``'s loss function reported, elsewhere nothing.

    Raises:
        ValueError: the layout would send freed memory, or a microbatch has another length.
        RuntimeError: a source was left over when its micro-batch was done.
    """
    config = get_model_config(chunks[0])
    interleaved = len(chunks) > 1
    if interleaved and config.deallocate_pipeline_outputs:
        on_gloo = dist.get_backend() == "gloo"
        if on_gloo or not INTERLEAVED_WAITS_FOR_SENDS:
            where = "on gloo" if on_gloo else f"under megatron-core {megatron.core.__version__}"
            raise ValueError(
                f"deallocate_pipeline_outputs=True with interleaved pipelining {where}: messages would be freed while "
                "they are being sent, and wrong numbers arrive. Set deallocate_pipeline_outputs=False."
            )
    states = [MicrobatchState() for _ in microbatches]
    work = [
        Work(microbatch, {"extra_block_kwargs": {"attention_bias": state}} if config.shares_over_layers else {})
        for microbatch, state in zip(microbatches, states, strict=True)
    ]
    planned = {}
    if config.shares_over_layers and config.pipeline_model_parallel_size > 1:
        groups = ProcessGroupCollection.use_mpu_process_groups(GROUPS)
        rows = sequence_length // config.context_parallel_size
        rows //= config.tensor_model_parallel_size if config.sequence_parallel else 1
        communicator = PlannedCommunicator(groups.pp, config, rows, micro_batch_size, len(microbatches), forward_only)
        planned = {"p2p_communicator": communicator, "pg_collection": groups}
    reported = get_forward_backward_func()(
        forward_step_func=forward_step,
        # Every chunk goes through the same list: it meets each micro-batch's state in turn.
        data_iterator=[iter(work) for _ in chunks] if interleaved else iter(work),
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        **planned,
    )
    for state in states:
        state.assert_empty()
    return reported  # type: ignore[no-any-return]


class PlannedCommunicator(P2PCommunicator):  # type: ignore[misc]
    """Megatron's communicator, given the shape of every message of one global batch.

    Args:
        pp_group, config: as Megatron's.
        rows, micro_batch_size: the first two dimensions of every message on this rank.
        num_microbatches: of the global batch on this rank.
        forward_only: without gradients.
    """

    def __init__(
        self,
        pp_group: dist.ProcessGroup,
        config: DepthAttentionConfig,
        rows: int,
        micro_batch_size: int,
        num_microbatches: int,
        forward_only: bool,
    ) -> None:
        super().__init__(pp_group, config)
        self._leading = rows, micro_batch_size
        chunks, group_size = config.virtual_pipeline_model_parallel_size or 1, config.microbatch_group_size_per_vp_stage
        # The chunk that runs each forward, in Megatron's order; backward mirrors it.
        order = [chunk for _, chunk in get_schedule_table(num_microbatches, chunks, group_size)]
        forward, backward = received_messages(order, pp_group.rank(), pp_group.size())
        widths = {chunk: config.message_into(chunk).width for chunk in {*forward, *backward}}
        self._from_previous = iter([widths[chunk] for chunk in forward])
        self._from_next = iter([] if forward_only else [widths[chunk] for chunk in backward])

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Shapes of what the next receives bring; Megatron's exchanges them with the neighbours.

        Raises:
            ValueError: what is to be sent has not the length that the receiver expects.
        """
        for tensor in (tensor_send_next, tensor_send_prev):
            if tensor is not None and tuple(tensor.shape[:2]) != self._leading:
                rows, size = self._leading
                raise ValueError(
                    f"a message of {tensor.size(0)} rows and micro-batch {tensor.size(1)} is to be sent, but the "
                    f"schedule was given {rows} rows and micro-batch {size} a rank: every microbatch must have "
                    "run_schedule's sequence_length and micro_batch_size. Pad packed sequences to one length."
                )
        return (
            (*self._leading, next(self._from_previous)) if recv_prev else None,
            (*self._leading, next(self._from_next)) if recv_next else None,
        )


def received_messages(order: Sequence[int], rank: int, num_ranks: int) -> tuple[list[int], list[int]]:
    """What ``rank`` receives in one global batch, each message named by the chunk (in model order) whose input it is.

    In order of arrival: from the previous rank inputs of its chunks, from the next rank gradients of their inputs.

    All ranks run their chunks in the same order, forward as in ``order`` and backward with the chunks mirrored. The
    input of the model's first chunk is not a message, nor is the output of its last.
    """
    num_chunks = max(order) + 1
    before = (rank - 1) % num_ranks
    forward = [chunk * num_ranks + before + 1 for chunk in order]
    after = (rank + 1) % num_ranks
    backward = [(num_chunks - 1 - chunk) * num_ranks + after for chunk in order]
    last = num_chunks * num_ranks
    return [c for c in forward if c < last], [c for c in backward if c > 0]
