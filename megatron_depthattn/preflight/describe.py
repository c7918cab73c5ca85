"""What a preflight says of ranks that agree: one line, and on several hosts one for each."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_depthattn.parallel.rank_spans import rank_spans
from megatron_depthattn.preflight.compare import group_by_host, outliers, size
from megatron_depthattn.preflight.report import RankReport

MAX_HOSTS = 16
"""Hosts that get a line; the others are in preflight.json."""
NAMED = ("python", "torch", "megatron-core", "transformer-engine", "deepspeed")
"""Versions that are shown; all are in preflight.json."""


def describe(reports: Sequence[RankReport]) -> list[str]:
    """What most ranks run; on several hosts a line for each: ranks, device, memory, disks."""
    most, _ = outliers(reports, lambda report: tuple(sorted(report.versions.items(), key=str)))
    versions = ", ".join(f"{name} {version}" for name in NAMED if (version := most[0].versions.get(name)))
    hosts = group_by_host(reports)
    ranks = f"{len(reports)} rank{'s' * (len(reports) > 1)}"
    software = f"{versions}; code {most[0].code}, config {most[0].config}"
    if len(hosts) == 1:
        return [f"{ranks} on {most[0].device.name}; {software}"]
    lines = [f"{ranks} on {len(hosts)} hosts; {software}"]
    lines += [f"{host}: {_host(group)}" for host, group in list(hosts.items())[:MAX_HOSTS]]
    if len(hosts) > MAX_HOSTS:
        lines.append(f"and {len(hosts) - MAX_HOSTS} more hosts")
    return lines


def _host(group: Sequence[RankReport]) -> str:
    device = group[0].device
    memory = f", {size(device.total_bytes)}" if device.total_bytes else ""
    disks = {
        folder.key: folder.free_bytes
        for report in group
        for folder in report.folders
        if folder.free_bytes is not None and folder.key != "run.dir"
    }
    return "; ".join(
        [
            f"{rank_spans([report.rank for report in group])} on {device.name}{memory}",
            f"{size(min(report.memory_bytes for report in group))} of memory free",
            f"/dev/shm {size(min((report.shared_memory_bytes or 0) for report in group))}",
            *(f"{key.partition(' (')[0]} {size(free)}" for key, free in disks.items()),
        ]
    )
