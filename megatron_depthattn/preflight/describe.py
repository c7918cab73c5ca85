"""What a preflight says of a world that agrees: one line for all of it, and one for each host."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_depthattn.parallel.rank_spans import rank_spans
from megatron_depthattn.preflight.compare import group_by_host, odd_ones, size
from megatron_depthattn.preflight.report import RankReport

MAX_HOSTS = 16
"""Hosts that get a line; the others are in preflight.json."""


def describe_world(reports: Sequence[RankReport]) -> list[str]:
    """What most ranks run, then a line for each host: ranks, device, memory, disks, clock."""
    most, _ = odd_ones(reports, lambda report: tuple(sorted(report.versions.items(), key=str)))
    versions = ", ".join(f"{name} {version}" for name, version in most[0].versions.items() if version)
    hosts = group_by_host(reports)
    lines = [
        f"preflight: {len(reports)} rank{'s' * (len(reports) > 1)} on {len(hosts)} host{'s' * (len(hosts) > 1)}; "
        f"{versions}; code {most[0].code}, config {most[0].config}"
    ]
    for host, group in list(hosts.items())[:MAX_HOSTS]:
        lines.append(f"preflight: {host}: {_host(group)}")
    if len(hosts) > MAX_HOSTS:
        lines.append(f"preflight: and {len(hosts) - MAX_HOSTS} more hosts")
    return lines


def _host(group: Sequence[RankReport]) -> str:
    device = group[0].device
    memory = f", {size(device.total_bytes)}" if device.total_bytes else ""
    clock = max(group, key=lambda report: abs(report.clock_offset))
    shared = min((report.shared_memory_bytes or 0) for report in group)
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
            f"/dev/shm {size(shared)}",
            *(f"{key.partition(' (')[0]} {size(free)}" for key, free in disks.items()),
            f"clock {clock.clock_offset:+.3f} s (to {clock.clock_error:.3f})",
        ]
    )
