"""The preflight of a run: ranks join the world and compare, on the way, whether they fit together and lack nothing.

Every rank reports over the store, before the backend is set up. Rank 0 compares and prints the findings; all ranks stop
alike.
"""

from __future__ import annotations

import json
import operator
import resource
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_depthattn
from megatron_depthattn.config import RunConfig, config_digest, config_keys, validate
from megatron_depthattn.config.resolve import Resolved
from megatron_depthattn.durable import write_durably
from megatron_depthattn.estimate.counts import checkpoint_bytes
from megatron_depthattn.parallel.groups import (
    connect_groups,
    initialize_distributed,
    initialize_model_parallel,
    join_store,
)
from megatron_depthattn.parallel.launch_env import LaunchEnvironment, attempt, communication_variables
from megatron_depthattn.preflight import machine
from megatron_depthattn.preflight.compare import Finding, compare_reports, describe
from megatron_depthattn.preflight.gather import gather
from megatron_depthattn.preflight.report import RankReport, Requirements, from_json
from megatron_depthattn.terminal import printable
from megatron_depthattn.train.history import package_digest
from megatron_depthattn.train.step_folders import complete_folders
from megatron_depthattn.train.watchdog import Watchdog

RECORD = "preflight.json"
SHARED_FOLDERS = ("run.dir", "checkpoint.dir")
NCCL_SHARED_MEMORY = 32 * 2**20
"""Room in /dev/shm that we want NCCL to have for each rank."""
SECONDS_A_RANK = 0.1
"""Of the world, that one stage of joining may take longer than ``preflight.timeout``."""


def enter_world(
    resolved: Resolved, environment: LaunchEnvironment, timeout: timedelta
) -> tuple[torch.device, list[str]]:
    """Join the world and build the layout's groups, with the preflight before them.

    Args:
        resolved: the run's config, and what this process took for `auto`.
        environment: this process's place in the world.
        timeout: of collectives.

    Returns:
        This process's device, and what preflight and ``resolved`` have to say, for the log.

    Raises:
        ValueError: on all ranks, if they do not fit together or lack something that the run needs.
        TimeoutError: on all ranks that answer, if one does not.
        ConnectionError: names the group that does not connect.
    """
    config, parallel = resolved.config, resolved.config.parallel
    patience = timedelta(seconds=config.preflight.timeout) if config.preflight.enabled else timeout
    store = dist.PrefixStore(attempt(), join_store(environment, timeout, patience=patience))
    lines = check_ranks(config, environment, store, resolved.reasons) if config.preflight.enabled else []
    is_watched = config.preflight.enabled and environment.world_size > 1
    with _joining(config, environment, store) if is_watched else nullcontext() as watchdog:

        def on_stage(stage: str) -> None:
            if watchdog:
                watchdog.heartbeat(0, stage)

        on_stage("joining the world")
        device = initialize_distributed(environment, timeout, store)
        on_stage("building groups")
        initialize_model_parallel(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual_pipeline=parallel.virtual_pipeline,
            context=parallel.context,
            seed=config.run.seed,
            timeout=timeout,
            create_gloo_process_groups=False,
        )
        connect_groups(device, on_stage, sums_fp8_scales=config.precision.fp8 == "delayed")
    return device, [*lines, *resolved.lines]


def _joining(config: RunConfig, environment: LaunchEnvironment, store: dist.Store) -> Watchdog:
    """Finds a rank that hangs while groups connect: an address that others cannot reach, a link that is down."""
    return Watchdog(
        config.preflight.timeout + environment.world_size * SECONDS_A_RANK,
        Path(config.run.dir) / "stacks",
        rank=environment.rank,
        world_size=environment.world_size,
        store=dist.PrefixStore("joining", store),
    )


def check_ranks(
    config: RunConfig, environment: LaunchEnvironment, store: dist.Store, reasons: Mapping[str, str]
) -> list[str]:
    """Compare all ranks; returns what there is to say, the same lines on all of them.

    Args:
        reasons: what this process took for `auto`, by key.

    Raises:
        ValueError, TimeoutError: as `enter_world`.
    """
    started, rank = time.monotonic(), environment.rank
    own: list[RankReport] = []

    def take() -> dict[str, Any]:
        own.append(take_report(config, environment, reasons))
        return asdict(own[0])

    try:
        answer = gather(store, rank, environment.world_size, config.preflight.timeout, take, partial(_compare, config))
    except dist.DistNetworkError as error:
        raise TimeoutError(
            f"preflight: the store of the world is gone ({str(error).splitlines()[0]}): the process that keeps it has "
            "ended, and its own message says why."
        ) from error
    finally:
        for folder in own[0].folders if own else ():
            machine.remove_probe(folder.path, rank)
    findings = [Finding(*values) for values in answer["findings"]]
    is_warned = config.preflight.on_problem == "warn"
    stopping = [each for each in findings if each.severity == "always" or (each.severity == "stop" and not is_warned)]
    found = [f"preflight: {'STOP' if each in stopping else 'WARNING'}: {each.text}" for each in findings]
    if rank == 0:
        for line in found:
            print(printable(line), file=sys.stderr, flush=True)
    if stopping:
        more = f" (and {len(stopping) - 1} more, see rank 0's lines)" if len(stopping) > 1 else ""
        way_out = "" if stopping[0].severity == "always" else " To start all the same: preflight.on_problem=warn."
        raise ValueError(f"preflight: {stopping[0].text}{more}{way_out}")
    lines = [f"preflight: {line}" for line in answer["lines"]]
    lines[0] += f"; passed in {time.monotonic() - started:.1f} s"
    return lines + found


def _compare(config: RunConfig, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """On rank 0: findings and a description; leaves both in the run's folder, where it can be written."""
    reports = [from_json(message) for message in messages]
    unseen: dict[str, list[int]] = {}
    own_path = {folder.key: folder.path for folder in reports[0].folders if not folder.problem}
    for report in reports:
        for folder in report.folders:
            is_comparable = folder.key in SHARED_FOLDERS and folder.key in own_path and not folder.problem
            if is_comparable and not machine.sees_probe(own_path[folder.key], report.rank, report.token):
                unseen.setdefault(folder.key, []).append(report.rank)
    findings = compare_reports(reports, requirements_of(config, len(reports)), unseen=unseen)
    record: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "settings": reports[0].settings}
    record["findings"] = [each._asdict() for each in findings]
    record["reports"] = [asdict(replace(report, settings={})) for report in reports]
    with suppress(OSError):
        write_durably(Path(config.run.dir) / RECORD, json.dumps(record, indent=1) + "\n")
    return {"lines": describe(reports), "findings": findings}


def take_report(config: RunConfig, environment: LaunchEnvironment, reasons: Mapping[str, str]) -> RankReport:
    """What this rank says about itself; leaves a file in every folder that the run writes to."""
    rank, token = environment.rank, uuid.uuid4().hex
    folders = {"run.dir": config.run.dir, "checkpoint.dir": config.checkpoint_dir, "data.cache": config.data.cache}
    versions = machine.versions() | machine.gpu_versions()
    if config.engine.name != "deepspeed":
        versions.pop("deepspeed")
    return RankReport(
        rank=rank,
        host=socket.gethostname(),
        machine=machine.machine_id(),
        address=machine.own_address(),
        device=machine.find_device(environment.local_rank),
        versions=versions,
        code=package_digest(),
        code_path=str(Path(megatron_depthattn.__file__).parent),
        config=config_digest(config),
        settings={key: str(operator.attrgetter(key)(config)) for key in config_keys()} | dict(reasons),
        folders=(
            *(machine.probe_folder(key, path, rank, token) for key, path in folders.items() if path),
            machine.probe_temporary(),
        ),
        shared_memory_bytes=machine.shared_memory_bytes(),
        memory_bytes=machine.memory_bytes(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        variables=communication_variables(),
        token=token,
    )


def requirements_of(config: RunConfig, world_size: int) -> Requirements:
    """What the config takes of every machine.

    Of checkpoints ``checkpoint.keep`` and the one under way, less those that are there; at least one. Shared memory:
    32 MiB for NCCL on GPUs.

    Raises:
        ValueError: the config does not fit the world.
    """
    validate(config, world_size)
    there = len(complete_folders(Path(config.checkpoint_dir)))
    return Requirements(
        checkpoint_bytes=checkpoint_bytes(config),
        checkpoints=max(1, (config.checkpoint.keep or 1) + 1 - there),
        shared_memory_bytes=NCCL_SHARED_MEMORY if torch.cuda.is_available() else 0,
        single_queue=config.parallel.tensor > 1 or config.parallel.context > 1,
    )
