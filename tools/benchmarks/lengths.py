"""Measurements at several lengths of the sequence."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tools.benchmarks.shapes import run_config

if TYPE_CHECKING:
    from megatron_depthattn.config import RunConfig


def config_of_length(given: argparse.Namespace, device: str, length: int, **more: Any) -> RunConfig:
    """`run_config` of sequences of ``length`` positions; as many are prepared.

    Raises:
        ValueError: as `run_config`, or ``--set`` gives another length.
    """
    config = run_config(given, device, data__sequence_length=length, model__max_position_embeddings=length, **more)
    if config.data.sequence_length != length:
        raise ValueError(
            f"--set data.sequence_length={config.data.sequence_length} where --sequence-length says {length}: give "
            "the latter alone"
        )
    return config
