"""The preflight of a run: join the world and see on the way whether it is fit to train.

Before the backend is set up, over the store: every rank's report, compared. After the groups exist: links and
arithmetic, measured. What is found is told by rank 0, and refused by all ranks alike.
"""

from __future__ import annotations

import json
import operator
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

import megatron_depthattn
from megatron_depthattn.backends import Resolved
from megatron_depthattn.config import RunConfig, config_digest, config_keys, validate
from megatron_depthattn.durable import write_durably
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, join_store
from megatron_depthattn.parallel.launch_env import LaunchEnvironment, communication_variables
from megatron_depthattn.preflight import machine
from megatron_depthattn.preflight.compare import Finding, compare_reports
from megatron_depthattn.preflight.describe import describe_world
from megatron_depthattn.preflight.links import Sample, compare_samples, measure
from megatron_depthattn.preflight.meeting import Meeting
from megatron_depthattn.preflight.report import Needs, RankReport, from_json, to_json
from megatron_depthattn.terminal import printable
from megatron_depthattn.train.history import code_digest
from megatron_depthattn.train.metrics import decoder_shape
from megatron_depthattn.train.step_folders import complete_folders
from megatron_depthattn.train.watchdog import Watchdog

RECORD = "preflight.json"
SHARED_FOLDERS = ("run.dir", "checkpoint.dir")
OPTIMIZER_BYTES = 12
"""Of a parameter in a checkpoint, beside the weight itself: the fp32 copy and Adam's two averages."""
NCCL_SHARED_MEMORY = 32 * 2**20
"""Room in /dev/shm that we want NCCL to have for each rank."""


def enter_world(
    resolved: Resolved, environment: LaunchEnvironment, timeout: timedelta
) -> tuple[torch.device, list[str]]:
    """Join the world and build the layout's groups, with `Preflight` on the way.

    Args:
        resolved: the run's config, and what this process took for `auto`.
        environment: this process's place in the world.
        timeout: of collectives.

    Returns:
        This process's device, and what preflight and ``resolved`` have to say, for the log.

    Raises:
        ValueError: on all ranks, if they do not fit together or lack something that the run needs.
        TimeoutError: on all ranks that answer, if one does not.
    """
    config = resolved.config
    patience = timedelta(seconds=config.preflight.timeout) if config.preflight.enabled else timeout
    store, parallel = join_store(environment, timeout, patience=patience), config.parallel
    with Preflight(config, environment, store, resolved.reasons) as preflight:
        device = initialize_distributed(environment, timeout, preflight.store)
        initialize_model_parallel(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual_pipeline=parallel.virtual_pipeline,
            context=parallel.context,
            seed=config.run.seed,
            timeout=timeout,
        )
        preflight.measure_links(device)
    return device, [*preflight.lines, *resolved.lines]


class Preflight:
    """Enter it when the store is there, measure when the groups are, leave it: the world is fit.

    Between entering and leaving, a rank that hangs (an address that others cannot reach, a link that is down) is found
    by a `Watchdog` within ``preflight.timeout``.

    Args:
        config: the run's config; ``preflight.enabled=false`` makes all of this do nothing.
        environment: this process's place in the world.
        store: of the world.
        reasons: what this process took for `auto`, by key.
    """

    def __init__(
        self, config: RunConfig, environment: LaunchEnvironment, store: dist.Store, reasons: Mapping[str, str]
    ) -> None:
        self.config, self.environment, self._reasons = config, environment, reasons
        self.store = store
        """Of the world; once entered, the part of it that is this start's own."""
        self.lines: list[str] = []
        """What was found, for the log; the same on all ranks."""
        self._reports: list[RankReport] = []  # on rank 0
        self._findings: list[Finding] = []
        self._watch: Watchdog | None = None
        self._started = time.monotonic()

    def __enter__(self) -> Preflight:
        if self.config.preflight.enabled:
            try:
                self._meet()
            except dist.DistNetworkError as error:
                raise TimeoutError(
                    f"preflight: the store of the world is gone ({str(error).splitlines()[0]}): the process that keeps "
                    "it has ended, and its own message says why."
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch:
            self._watch.close()

    def _meet(self) -> None:
        config, rank, world_size = self.config, self.environment.rank, self.environment.world_size
        self._meeting = Meeting(self.store, rank, world_size, config.preflight.timeout)
        self.store = self._meeting.store
        report = take_report(config, self.environment, self._meeting, self._reasons)
        try:
            answer = self._meeting.exchange("report", to_json(report), self._judge_reports)
        finally:
            for folder in report.folders:
                machine.remove_probe(folder.path, rank)
        self.lines += answer["lines"]
        self._act(answer, "report")
        if world_size > 1:
            self._watch = Watchdog(
                config.preflight.timeout,
                Path(config.run.dir) / "stacks",
                rank=rank,
                world_size=world_size,
                store=self._meeting.store,
            )
            self._watch.beat(0, "joining")

    def measure_links(self, device: torch.device) -> None:
        """Measure, compare, and tell; nothing in a world of one.

        Raises:
            ValueError: on all ranks, if a result is wrong or a GPU or its links are slow.
        """
        if self._watch is None:
            return
        self._watch.beat(0, "measuring links")
        samples = {"samples": measure(device)}
        answer = self._meeting.exchange("links", samples, lambda every: self._judge_links(every, device))
        took = time.monotonic() - self._started
        self.lines += [f"preflight: {line}" for line in answer["lines"]]
        self._act(answer, "links")
        self.lines.append(f"preflight: passed in {took:.1f} s, joining the world included")

    def _judge_reports(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """On rank 0."""
        reports = self._reports = [from_json(message) for message in messages]
        unseen: dict[str, list[int]] = {}
        own_path = {folder.key: folder.path for folder in reports[0].folders if not folder.problem}
        for report in reports:
            for folder in report.folders:
                is_comparable = folder.key in SHARED_FOLDERS and folder.key in own_path and not folder.problem
                if is_comparable and not machine.sees_probe(own_path[folder.key], report.rank, self._meeting.name):
                    unseen.setdefault(folder.key, []).append(report.rank)
        findings = compare_reports(reports, needs_of(self.config, self.environment.world_size), unseen=unseen)
        self._record(findings)
        return {"lines": describe_world(reports), "findings": findings}  # not the reports: each rank reads this

    def _judge_links(self, messages: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
        """On rank 0."""
        samples = [[_sample(values) for values in message["samples"]] for message in messages]
        findings, lines = compare_samples(samples, self._reports, on_gpu=device.type == "cuda")
        self._record([*self._findings, *findings], lines, samples)
        return {"lines": lines, "findings": findings}

    def _act(self, answer: dict[str, Any], stage: str) -> None:
        """Tell what was found; refuse it, if it must not be."""
        findings = [Finding(*values) for values in answer["findings"]]
        self._findings += findings
        goes_on = self.config.preflight.on_problem == "warn"
        refused = [each for each in findings if each.severity == "always" or (each.severity == "stop" and not goes_on)]
        told = [f"preflight: {'STOP' if each in refused else 'WARNING'}: {each.text}" for each in findings]
        self.lines += told
        if self.environment.rank == 0:
            for line in told:
                print(printable(line), file=sys.stderr, flush=True)
        if refused:
            self._meeting.wait_until_heard(stage)
            more = f" (and {len(refused) - 1} more, see rank 0's lines)" if len(refused) > 1 else ""
            way_out = "" if refused[0].severity == "always" else " To start all the same: preflight.on_problem=warn."
            raise ValueError(f"preflight: {refused[0].text}{more}{way_out}")

    def _record(
        self,
        findings: list[Finding],
        lines: list[str] | None = None,
        samples: list[list[Sample]] | None = None,
    ) -> None:
        """Leave it all in the run's folder, where it can be; that it cannot is a finding already."""
        record = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "findings": [each._asdict() for each in findings],
            "links": lines,
            "settings": self._reports[0].settings,
            "reports": [to_json(replace(report, settings={})) for report in self._reports],
            "samples": [[each._asdict() for each in of_rank] for of_rank in samples or []],
        }
        with suppress(OSError):
            write_durably(Path(self.config.run.dir) / RECORD, json.dumps(record, indent=1) + "\n")


def _sample(values: list[Any]) -> Sample:
    what, ranks, rate, is_right = values
    return Sample(what, tuple(ranks), rate, is_right)


def take_report(
    config: RunConfig, environment: LaunchEnvironment, meeting: Meeting, reasons: Mapping[str, str]
) -> RankReport:
    """What this rank says about itself; leaves a file in every folder that the run writes to."""
    rank = environment.rank
    folders = {"run.dir": config.run.dir, "checkpoint.dir": config.checkpoint_dir, "data.cache": config.data.cache}
    versions = machine.versions() | machine.gpu_versions()
    if config.engine.name != "deepspeed":
        versions.pop("deepspeed")
    return RankReport(
        rank=rank,
        local_rank=environment.local_rank,
        pid=os.getpid(),
        host=socket.gethostname(),
        machine=machine.machine_id(),
        address=machine.own_address(),
        device=machine.find_device(environment.local_rank),
        versions=versions,
        code=code_digest(),
        code_path=str(Path(megatron_depthattn.__file__).parent),
        config=config_digest(config),
        settings={key: str(operator.attrgetter(key)(config)) for key in config_keys()} | dict(reasons),
        folders=(
            *(machine.probe_folder(key, path, rank, meeting.name) for key, path in folders.items() if path),
            machine.probe_temporary(),
        ),
        shared_memory_bytes=machine.shared_memory_bytes(),
        memory_bytes=machine.memory_bytes(),
        open_files=machine.open_files(),
        variables=communication_variables(),
        clock_offset=meeting.clock_offset,
        clock_error=meeting.clock_error,
    )


def needs_of(config: RunConfig, world_size: int) -> Needs:
    """What the config takes of every machine.

    A checkpoint: the weights in their own type and 12 bytes more of each for the optimizer. Of them ``checkpoint.keep``
    and the one under way, less those that are there; at least one. Shared memory: 32 MiB for NCCL on GPUs.

    Raises:
        ValueError: the config does not fit the world.
    """
    validate(config, world_size)
    weight_bytes = 2 if config.precision.dtype == "bf16" else 4
    there = len(complete_folders(Path(config.checkpoint_dir)))
    return Needs(
        checkpoint_bytes=decoder_shape(config).parameters * (weight_bytes + OPTIMIZER_BYTES),
        checkpoints=max(1, (config.checkpoint.keep or 1) + 1 - there),
        shared_memory_bytes=NCCL_SHARED_MEMORY if torch.cuda.is_available() else 0,
    )
