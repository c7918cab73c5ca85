"""A record of which samples every rank read, to compare runs with one another."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_depthattn.train.line_files import AppendFile, drop_steps_after
from megatron_depthattn.train.step import SAMPLE_IDS, Microbatch


class SampleLog:
    """Which samples this rank read in every step: ``<run.dir>/samples/rank_<NNNNN>.jsonl``, one object a step.

    An object holds the step, the data-parallel rank, and the sample ids of every microbatch; the ids count through the
    streams. The ranks of one replica write equal lines. Without ``data.log_samples`` nothing is written. Construct it
    on all ranks.

    Args:
        run_dir: the run's folder.
        is_on: ``data.log_samples``.
        first_step: steps already done; what the files of any rank say about later ones is dropped.
    """

    def __init__(self, run_dir: Path, *, is_on: bool, first_step: int) -> None:
        self._file: AppendFile | None = None
        self._is_on = is_on
        folder = run_dir / "samples"
        self._path = folder / f"rank_{dist.get_rank():05d}.jsonl"
        if not self._is_on:
            return
        if dist.get_rank() == 0:  # for all ranks: the run may have had more of them before
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.glob("rank_*.jsonl"):
                drop_steps_after(file, first_step)
        dist.barrier()

    def write(self, step: int, batches: list[Microbatch]) -> None:
        """Add a step; a rank that read nothing writes nothing."""
        if not self._is_on or SAMPLE_IDS not in batches[0]:
            return
        if self._file is None:
            self._file = AppendFile(self._path)
        line = {
            "step": step,
            "data_parallel_rank": parallel_state.get_data_parallel_rank(),
            SAMPLE_IDS: [batch[SAMPLE_IDS].tolist() for batch in batches],
        }
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
