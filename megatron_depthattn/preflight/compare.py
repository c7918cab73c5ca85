"""From the ranks' reports to findings, and to the lines that describe ranks which agree.

What most ranks have counts as right (on a tie, what rank 0 has); the others are named, by rank and host.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from megatron_depthattn.parallel.rank_spans import rank_spans
from megatron_depthattn.preflight.report import RankReport, Requirements
from megatron_depthattn.switches import MODEL_SWITCHES

Severity = Literal["always", "stop", "warn"]
MIN_OPEN_FILES = 1024
GPU_IN_USE = 0.1
"""A GPU of which more than this share is taken before the run has begun is somebody else's as well."""
BACKENDS = {"model.spec", "model.depth_attention.op", *(f"model.{key}" for key in MODEL_SWITCHES)}
"""Keys whose `auto` or null becomes what a machine has."""
_MAX_KEYS = 5
"""Config keys that are named when configs differ."""
_PER_RANK_VARIABLES = ("_IFNAME", "_FILE", "_HCA", "_DEVICES")
"""Ends of the names of variables that may well differ from rank to rank."""
_EQUAL = (
    *("python", "torch", "megatron-core", "transformer-engine", "deepspeed", "nccl", "cuda", "triton"),
    "mosaicml-streaming",
)
"""Software whose versions must be equal; of the others a difference is a warning."""
MAX_HOSTS = 16
"""Hosts that get a line; the others are in preflight.json."""


class Finding(NamedTuple):
    """Something that differs or is missing."""

    severity: Severity
    """warn: logged; stop: no start unless ``preflight.on_problem=warn``; always: no start."""
    text: str
    """One line: who, what it means, what to set."""


def compare_reports(
    reports: Sequence[RankReport], requirements: Requirements, *, unseen: Mapping[str, Sequence[int]] | None = None
) -> list[Finding]:
    """What is wrong with this world; none if it is healthy.

    Args:
        reports: one of each rank, in their order.
        requirements: what the config takes of every machine.
        unseen: by the key of a shared folder, the ranks whose file rank 0 does not find there.
    """
    return [
        *_configs_and_code(reports),
        *_versions(reports),
        *_devices(reports),
        *_folders(reports, requirements, unseen or {}),
        *_memory(reports, requirements),
        *_network(reports),
        *_settings(reports),
    ]


def group_by_host(reports: Iterable[RankReport]) -> dict[str, list[RankReport]]:
    """Reports by the name of their host, numbered where several machines have the same."""
    machines: dict[str, list[str]] = defaultdict(list)
    hosts: dict[str, list[RankReport]] = defaultdict(list)
    for report in reports:
        same_name = machines[report.host]
        if report.machine not in same_name:
            same_name.append(report.machine)
        number = same_name.index(report.machine) + 1
        hosts[report.host if number == 1 else f"{report.host} #{number}"].append(report)
    return dict(hosts)


def who(reports: Sequence[RankReport]) -> str:
    """``ranks 0-3 (node1)``."""
    return f"{rank_spans([report.rank for report in reports])} ({', '.join(group_by_host(reports))})"


def outliers(
    reports: Sequence[RankReport], value: Callable[[RankReport], Any]
) -> tuple[list[RankReport], list[list[RankReport]]]:
    """The ranks that have what most have, and the others, together where they have the same."""
    groups: dict[Any, list[RankReport]] = defaultdict(list)
    for report in reports:
        groups[value(report)].append(report)
    usual = max(groups, key=lambda each: len(groups[each]))  # the first of equals: rank 0's
    return groups[usual], [group for each, group in groups.items() if each != usual]


def _differences(
    reports: Sequence[RankReport],
    what: str,
    value: Callable[[RankReport], Any],
    severity: Severity,
    advice: str,
    show: Callable[[RankReport], str] | None = None,
) -> list[Finding]:
    """One finding that names everyone who has another ``value`` than most."""
    if not reports:
        return []
    most, others = outliers(reports, value)
    if not others:
        return []
    shown = show or (lambda report: str(value(report)))
    odd = "; ".join(f"{who(group)} {_has(group)} {shown(group[0])}" for group in others)
    text = f"different {what}: {odd}; {who(most)} {_has(most)} {shown(most[0])}. {advice}"
    return [Finding(severity, text)]


def _has(group: Sequence[RankReport]) -> str:
    return "have" if len(group) > 1 else "has"


def _configs_and_code(reports: Sequence[RankReport]) -> list[Finding]:
    keys = dict.fromkeys(key for report in reports for key in report.settings)
    differ = [key for key in keys if len({report.settings.get(key) for report in reports}) > 1][:_MAX_KEYS]
    advice = "start all ranks with the same files and arguments."
    if BACKENDS & set(differ):
        advice = "give all hosts the same software, or set in place of auto or null what all of them have."
    return [
        *_differences(
            reports,
            "run configs",
            lambda report: report.config,
            "always",
            f"They would train different models, or wait for each other forever: {advice}",
            lambda report: ", ".join(f"{key}={report.settings.get(key)}" for key in differ) or report.config,
        ),
        *_differences(
            reports,
            "versions of this package's code",
            lambda report: report.code,
            "stop",
            "They may compute different things: give all hosts the same checkout.",
            lambda report: f"{report.code} ({report.code_path})",
        ),
    ]


def _versions(reports: Sequence[RankReport]) -> list[Finding]:
    names = dict.fromkeys(name for report in reports for name in report.versions)
    advice = "Kernels, collectives and checkpoints may differ: install the same on all hosts."
    findings = []
    for name in names:
        severity: Severity = "stop" if name in _EQUAL else "warn"

        def version(report: RankReport, name: str = name) -> str:
            return report.versions.get(name) or "none"

        findings += _differences(reports, f"versions of {name}", version, severity, advice)
    return findings


def _devices(reports: Sequence[RankReport]) -> list[Finding]:
    findings = [
        Finding(
            "stop",
            f"no device: {who([report])}: {report.device.problem}. Start as many ranks on a host as it has GPUs, and "
            "see CUDA_VISIBLE_DEVICES and nvidia-smi there.",
        )
        for report in reports
        if report.device.problem
    ]
    findings += _differences(
        [report for report in reports if not report.device.problem],
        "devices",
        lambda report: (report.device.name, report.device.capability),
        "stop",
        "The slowest sets the pace, and numbers may differ: use one kind.",
        lambda report: report.device.name,
    )
    by_uuid: dict[str, list[RankReport]] = defaultdict(list)
    for report in reports:
        if report.device.uuid:
            by_uuid[report.device.uuid].append(report)
    for uuid, sharing in by_uuid.items():
        if len(sharing) > 1:
            text = f"one GPU for {len(sharing)} ranks: {who(sharing)} share {sharing[0].device.name} {uuid}. "
            findings.append(Finding("stop", text + "NCCL refuses that: start one rank for each GPU."))
    for report in reports:
        used = report.device.total_bytes - report.device.free_bytes
        if used > GPU_IN_USE * report.device.total_bytes:
            text = f"GPU in use: {who([report])}: {size(used)} of {size(report.device.total_bytes)} are taken already. "
            findings.append(Finding("warn", text + "See nvidia-smi there for the process that was left over."))
    return findings


def _folders(
    reports: Sequence[RankReport], requirements: Requirements, unseen: Mapping[str, Sequence[int]]
) -> list[Finding]:
    findings = []
    failed: dict[tuple[str, str], list[RankReport]] = defaultdict(list)
    short: dict[tuple[str, str], list[tuple[int, RankReport]]] = defaultdict(list)
    for report in reports:
        for problem in dict.fromkeys(folder.problem for folder in report.folders if folder.problem):
            same = ", ".join(f"{each.key} ({each.path})" for each in report.folders if each.problem == problem)
            failed[same, problem].append(report)
        for folder in report.folders:
            if folder.key == "checkpoint.dir" and folder.free_bytes is not None:
                short[folder.key, folder.path].append((folder.free_bytes, report))
    for (same, problem), group in failed.items():
        text = f"cannot write: {who(group)}: {problem}: {same}. "
        findings.append(Finding("stop", text + "Fix that there, or name a folder that all ranks can write to."))
    for (key, path), free_of in short.items():
        for severity, copies, below in (("stop", 1, 0), ("warn", requirements.checkpoints, 1)):
            low, high = below * requirements.checkpoint_bytes, copies * requirements.checkpoint_bytes
            scarce = [(free, report) for free, report in free_of if low <= free < high]
            if scarce:
                free = size(min(free for free, _ in scarce))
                wanted = f"{copies} checkpoint{'s' * (copies > 1)} of about {size(requirements.checkpoint_bytes)} each"
                text = f"disk space: {who([report for _, report in scarce])}: {key}, {path}: {free} free for {wanted}. "
                advice = "Free some, or set checkpoint.dir to a larger disk."
                findings.append(Finding("stop" if severity == "stop" else "warn", text + advice))
    for key, ranks in unseen.items():
        group = [report for report in reports if report.rank in ranks]
        text = f"not shared: what {who(group)} {'write' if len(group) > 1 else 'writes'} to {key}, rank 0 "
        text += f"({reports[0].host}) does not find there: it is another folder of the same name. "
        findings.append(Finding("stop", text + f"Set {key} to a folder that all hosts share."))
    return findings


def _memory(reports: Sequence[RankReport], requirements: Requirements) -> list[Finding]:
    findings = []
    for host, group in group_by_host(reports).items():
        wanted = requirements.shared_memory_bytes * len(group)
        there = min((report.shared_memory_bytes or 0) for report in group)
        if there < wanted:
            text = f"shared memory: {host}: /dev/shm has {size(there)} free; its {len(group)} ranks take up to "
            advice = "Make it larger (docker run --shm-size=..., mount -o remount,size=...)."
            findings.append(Finding("stop", f"{text}{size(wanted)}. {advice}"))
    return findings


def _network(reports: Sequence[RankReport]) -> list[Finding]:
    """Several machines, and one whose own name means itself alone: gloo would offer the others that address."""
    if len({report.machine for report in reports}) == 1:  # under any number of names: its loopback reaches all of them
        return []
    findings = []
    for host, group in group_by_host(reports).items():
        address, has_interface = group[0].address, "GLOO_SOCKET_IFNAME" in group[0].variables
        if not has_interface and (address is None or ipaddress.ip_address(address).is_loopback):
            means = f"resolves to {address}" if address else "does not resolve"
            text = f"address: {host}: its name {means} there, so other hosts cannot reach its ranks over gloo. "
            findings.append(
                Finding("stop", text + "Set GLOO_SOCKET_IFNAME to its network interface (ip addr), or fix /etc/hosts.")
            )
    return findings


def _settings(reports: Sequence[RankReport]) -> list[Finding]:
    findings = []
    for host, group in group_by_host(reports).items():
        fewest = min(report.open_files for report in group)
        if 0 <= fewest < MIN_OPEN_FILES:
            text = f"open files: {host}: a process may have {fewest} open at once (ulimit -n). "
            findings.append(Finding("warn", text + "Loader processes and sockets need more: raise it to 65536."))
    names = dict.fromkeys(name for report in reports for name in report.variables)
    for name in names:
        if not name.endswith(_PER_RANK_VARIABLES):

            def value(report: RankReport, name: str = name) -> str:
                return report.variables.get(name, "no value")

            findings += _differences(reports, f"values of {name}", value, "warn", "Set it on all hosts or on none.")
    return findings


def size(num_bytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def describe(reports: Sequence[RankReport]) -> list[str]:
    """What most ranks run; on several hosts a line for each: ranks, device, memory, disks."""
    most, _ = outliers(reports, lambda report: tuple(sorted(report.versions.items(), key=str)))
    versions = ", ".join(f"{name} {version}" for name in _EQUAL[:5] if (version := most[0].versions.get(name)))
    hosts = group_by_host(reports)
    ranks = f"{len(reports)} rank{'s' * (len(reports) > 1)}"
    software = f"{versions}; code {most[0].code}, config {most[0].config}"
    if len(hosts) == 1:
        return [f"{ranks} on {most[0].device.name}; {software}"]
    lines = [f"{ranks} on {len(hosts)} hosts; {software}"]
    lines += [f"{host}: {_describe_host(group)}" for host, group in list(hosts.items())[:MAX_HOSTS]]
    if len(hosts) > MAX_HOSTS:
        lines.append(f"and {len(hosts) - MAX_HOSTS} more hosts")
    return lines


def _describe_host(group: Sequence[RankReport]) -> str:
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
