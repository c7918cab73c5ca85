"""From the ranks' reports to findings, and to the lines that describe ranks which agree.

What most ranks have counts as right (on a tie, what rank 0 has); the others are named, by rank and host.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from megatron_depthattn.parallel.launch_env import BLACKWELL, QUEUES
from megatron_depthattn.parallel.rank_spans import rank_spans
from megatron_depthattn.preflight.report import RankReport, Requirements
from megatron_depthattn.switches import MODEL_SWITCHES

T = TypeVar("T")
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
_MAY_DIFFER = ("transformers", "driver")
"""Software of which a different version is a warning."""
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
        *_named_values(reports),
        *_devices(reports, requirements),
        *_folders(reports, requirements, unseen or {}),
        *_hosts(reports, requirements),
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


def _grouped(reports: Iterable[RankReport], key: Callable[[RankReport], T]) -> dict[T, list[RankReport]]:
    groups: dict[T, list[RankReport]] = defaultdict(list)
    for report in reports:
        groups[key(report)].append(report)
    return groups


def _differences(
    reports: Sequence[RankReport],
    what: str,
    value: Callable[[RankReport], Any],
    severity: Severity,
    advice: str,
    show: Callable[[RankReport], str] | None = None,
) -> list[Finding]:
    """One finding that names everyone who has another ``value`` than most."""
    groups = list(_grouped(reports, value).values())
    if len(groups) < 2:
        return []
    most = max(groups, key=len)  # the first of equals: rank 0's
    groups.sort(key=lambda group: group is most)
    shown = show or (lambda report: str(value(report)))
    parts = [f"{who(group)} {'have' if len(group) > 1 else 'has'} {shown(group[0])}" for group in groups]
    return [Finding(severity, f"different {what}: {'; '.join(parts)}. {advice}")]


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


def _named_values(reports: Sequence[RankReport]) -> list[Finding]:
    """Versions, and variables that steer communication."""
    findings = []
    advice = "Kernels, collectives and checkpoints may differ: install the same on all hosts."
    for name in dict.fromkeys(name for report in reports for name in report.versions):
        version = partial(lambda name, report: report.versions.get(name) or "none", name)
        severity: Severity = "warn" if name in _MAY_DIFFER else "stop"
        findings += _differences(reports, f"versions of {name}", version, severity, advice)
    for name in dict.fromkeys(name for report in reports for name in report.variables):
        if not name.endswith(_PER_RANK_VARIABLES):
            value = partial(lambda name, report: report.variables.get(name, "no value"), name)
            findings += _differences(reports, f"values of {name}", value, "warn", "Set it on all hosts or on none.")
    return findings


def _devices(reports: Sequence[RankReport], requirements: Requirements) -> list[Finding]:
    findings = _differences(
        [report for report in reports if not report.device.problem],
        "devices",
        lambda report: report.device.name,
        "stop",
        "The slowest sets the pace, and numbers may differ: use one kind.",
    )
    for uuid, group in _grouped(reports, lambda report: report.device.uuid).items():
        if uuid and len(group) > 1:
            text = f"one GPU for {len(group)} ranks: {who(group)} share {group[0].device.name} {uuid}. "
            findings.append(Finding("stop", text + "NCCL refuses that: start one rank for each GPU."))
    for report in reports:
        device, used = report.device, report.device.total_bytes - report.device.free_bytes
        if device.problem:
            text = f"no device: {who([report])}: {device.problem}. Start as many ranks on a host as it has GPUs, and "
            findings.append(Finding("stop", text + "see CUDA_VISIBLE_DEVICES and nvidia-smi there."))
        elif used > GPU_IN_USE * device.total_bytes:
            text = f"GPU in use: {who([report])}: {size(used)} of {size(device.total_bytes)} are taken already. "
            findings.append(Finding("warn", text + "See nvidia-smi there for the process that was left over."))
    older = [report for report in reports if requirements.single_queue and 0 < report.device.generation < BLACKWELL]
    for value, group in _grouped(older, lambda report: report.variables.get(QUEUES)).items():
        if value != "1":
            text = f"hardware queues: {who(group)}: {QUEUES} is {value or 'not set'}, and with tensor or context "
            advice = "parallelism GPUs before Blackwell need 1: products and collectives are out of order. Set it to 1."
            findings.append(Finding("warn", text + advice))
    return findings


def _folders(
    reports: Sequence[RankReport], requirements: Requirements, unseen: Mapping[str, Sequence[int]]
) -> list[Finding]:
    findings = []
    failed: dict[tuple[str, str], list[RankReport]] = defaultdict(list)
    short: dict[tuple[Severity, str], list[tuple[int, RankReport]]] = defaultdict(list)
    one = requirements.checkpoint_bytes
    for report in reports:
        for problem in dict.fromkeys(folder.problem for folder in report.folders if folder.problem):
            same = ", ".join(f"{each.key} ({each.path})" for each in report.folders if each.problem == problem)
            failed[problem, same].append(report)
        for folder in report.folders:
            free = requirements.checkpoints * one if folder.free_bytes is None else folder.free_bytes
            if folder.key == "checkpoint.dir" and free < requirements.checkpoints * one:
                short["stop" if free < one else "warn", folder.path].append((free, report))
    for (problem, same), group in failed.items():
        text = f"cannot write: {who(group)}: {problem}: {same}. "
        findings.append(Finding("stop", text + "Fix that there, or name a folder that all ranks can write to."))
    for (severity, path), scarce in short.items():
        copies = 1 if severity == "stop" else requirements.checkpoints
        wanted = f"{copies} checkpoint{'s' * (copies > 1)} of about {size(one)} each"
        text = f"disk space: {who([report for _, report in scarce])}: checkpoint.dir, {path}: "
        text += f"{size(min(free for free, _ in scarce))} free for {wanted}. "
        findings.append(Finding(severity, text + "Free some, or set checkpoint.dir to a larger disk."))
    for key, ranks in unseen.items():
        group = [report for report in reports if report.rank in ranks]
        text = f"not shared: what {who(group)} {'write' if len(group) > 1 else 'writes'} to {key}, rank 0 "
        text += f"({reports[0].host}) does not find there: it is another folder of the same name. "
        findings.append(Finding("stop", text + f"Set {key} to a folder that all hosts share."))
    return findings


def _hosts(reports: Sequence[RankReport], requirements: Requirements) -> list[Finding]:
    """Shared memory and limits; with several machines, one whose own name means itself alone: gloo would offer the
    others that address."""
    findings = []
    machines = {report.machine for report in reports}  # one, under any number of names: its loopback reaches all of it
    for host, group in group_by_host(reports).items():
        wanted = requirements.shared_memory_bytes * len(group)
        there = min((report.shared_memory_bytes or 0) for report in group)
        if there < wanted:
            text = f"shared memory: {host}: /dev/shm has {size(there)} free; its {len(group)} ranks take up to "
            advice = "Make it larger (docker run --shm-size=..., mount -o remount,size=...)."
            findings.append(Finding("stop", f"{text}{size(wanted)}. {advice}"))
        address, has_interface = group[0].address, "GLOO_SOCKET_IFNAME" in group[0].variables
        is_local = address is None or ipaddress.ip_address(address).is_loopback
        if len(machines) > 1 and is_local and not has_interface:
            means = f"resolves to {address}" if address else "does not resolve"
            text = f"address: {host}: its name {means} there, so other hosts cannot reach its ranks over gloo. "
            advice = "Set GLOO_SOCKET_IFNAME to its network interface (ip addr), or fix /etc/hosts."
            findings.append(Finding("stop", text + advice))
        fewest = min(report.open_files for report in group)
        if 0 <= fewest < MIN_OPEN_FILES:
            text = f"open files: {host}: a process may have {fewest} open at once (ulimit -n). "
            findings.append(Finding("warn", text + "Loader processes and sockets need more: raise it to 65536."))
    return findings


def size(num_bytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def describe(reports: Sequence[RankReport]) -> list[str]:
    """What rank 0 runs; on several hosts a line for each: ranks, device, memory, disks."""
    first, hosts = reports[0], group_by_host(reports)
    names = ("python", "torch", "megatron-core", "transformer-engine", "deepspeed")
    versions = ", ".join(f"{name} {version}" for name in names if (version := first.versions.get(name)))
    software = f"{versions}; code {first.code}, config {first.config}"
    place = first.device.name if len(hosts) == 1 else f"{len(hosts)} hosts"
    lines = [f"{len(reports)} rank{'s' * (len(reports) > 1)} on {place}; {software}"]
    for host, group in list(hosts.items())[: MAX_HOSTS if len(hosts) > 1 else 0]:
        device, memory = group[0].device, min(report.memory_bytes for report in group)
        folders = [folder for report in group for folder in report.folders if folder.key != "run.dir"]
        free = {f.key.partition(" (")[0]: f.free_bytes for f in folders if f.free_bytes is not None}
        free = {"/dev/shm": min((report.shared_memory_bytes or 0) for report in group)} | free
        kind = f"{device.name}, {size(device.total_bytes)}" if device.total_bytes else device.name
        ranks = rank_spans([report.rank for report in group])
        disks = "; ".join(f"{name} {size(num_bytes)}" for name, num_bytes in free.items())
        lines.append(f"{host}: {ranks} on {kind}; {size(memory)} of memory free; {disks}")
    return lines + ([f"and {len(hosts) - MAX_HOSTS} more hosts"] if len(hosts) > MAX_HOSTS else [])
