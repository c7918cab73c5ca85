"""What is installed on this machine, what each feature needs, and whether a config can run here.

With CONFIG: the layout against the ranks (--world), a rank's memory against a GPU's (--gpu), the data's sequence length
and vocabulary, folders, disk space.
Starts nothing. Exit code 0: what the config (or, without one, training) needs is here; 1: it is not, or an error.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_depthattn import doctor
from megatron_depthattn.cli.common import add_config, find_config, new_parser, print_table, run
from megatron_depthattn.paths import user_path
from megatron_depthattn.preflight import machine
from megatron_depthattn.preflight.compare import size
from megatron_depthattn.terminal import printable

if TYPE_CHECKING:
    from megatron_depthattn.config import RunConfig

    Packages = Mapping[str, doctor.Package]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = new_parser("doctor", __doc__)
    add_config(parser, optional=True)
    parser.add_argument("--world", type=int, help="ranks of the run (default: the GPUs here; on CPU one model replica)")
    parser.add_argument("--gpu", metavar="NAME", help="that ranks must fit (default: the GPU here, else H100-80GB)")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write everything to this file as well")
    return run(_doctor, parser.parse_intermixed_args(arguments))  # settings may follow an option


def _doctor(given: argparse.Namespace) -> int:
    packages, host = doctor.find_packages(), doctor.find_host()
    rows = doctor.features(packages, host)
    needed = ["GPU training" if host.devices or host.gpus_of_driver else "CPU training"]
    problems: list[str] = []
    subject = "training"
    if given.config:
        asked, problems, ranks = check_config(given.config, given.overrides, given.world, host, packages, given.gpu)
        needed += asked
        subject = f"{given.config} on {ranks or '?'} ranks, as far as this machine shows"
    fixes = [f"{row.name}: {row.fix}" for row in rows if row.name in needed and row.fix] + problems
    ready = "not ready" if fixes else "ready"
    shared, disk = size(machine.shared_memory_bytes() or 0), size(shutil.disk_usage(".").free)
    memory = size(machine.memory_bytes())
    print(f"python {host.python}; {memory} of memory free, /dev/shm {shared}, disk {disk}; driver: {host.driver}")
    found = [(each.name, each.wanted or "any", each.version or "-", each.error or "") for each in packages.values()]
    print_table(("package", "wanted", "here", ""), found)
    columns = ("feature (* asked for)", "ready", "here", "what to do")
    marked = [(row, " *" if row.name in needed else "") for row in rows]
    print_table(columns, [(row.name + star, "NO" if row.fix else "yes", row.here, row.fix) for row, star in marked])
    for line in (*(f"TO FIX: {fix}" for fix in fixes), f"{ready} for {subject}: {', '.join(needed)}"):
        print(printable(line))
    if given.json is not None:
        report = {"packages": [asdict(each) for each in packages.values()], "machine": asdict(host)}
        report |= {"features": [asdict(row) for row in rows], "needed": needed, "to_fix": fixes}
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if fixes else 0


def check_config(
    name: str,
    overrides: Sequence[str],
    world: int | None,
    host: doctor.Host,
    packages: Packages,
    gpu: str | None = None,
) -> tuple[list[str], list[str], int | None]:
    """The features that a config asks for, what is wrong with it here, and its ranks; prints what `auto` becomes."""
    path, *overrides = map(find_config, (name, *overrides))
    try:
        from megatron_depthattn.config import load_config, to_dict, validate
        from megatron_depthattn.config.load import flatten
        from megatron_depthattn.config.resolve import Available, resolve
        from megatron_depthattn.estimate.counts import checkpoint_bytes
        from megatron_depthattn.estimate.fits import check_data, check_fit

        config = load_config(path, overrides)
    except ImportError as error:
        return [], [f"{path} cannot be read: {error}; make install"], world
    except ValueError as error:
        return [], [str(error)], world
    settings, parallel, paths = flatten(to_dict(config)), config.parallel, config.data.paths.values()
    ranks = world or len(host.devices) or parallel.tensor * parallel.pipeline * parallel.context
    asked = [feature for feature, (key, value) in doctor.ASKED_FOR.items() if settings[key] == value]
    asked += ["S3 streaming"] * any("://" in path for path in paths)
    asked += ["Weights & Biases"] * (config.log.wandb.project is not None)
    asked += ["multi-node torchrun"] * (ranks > len(host.devices) > 0)
    no_te, no_triton = (doctor.install([name], packages) for name in ("transformer-engine", "triton"))
    try:
        validate(config, ranks)
        for line in resolve(config, Available(bool(host.devices), no_te, no_triton)).lines:
            print(printable(f"here {line}"))
    except ValueError as error:
        return asked, [f"{path} on {ranks} ranks: {error}"], ranks
    try:
        fit, problem = check_fit(config, ranks, gpu or _gpu_of(host))
        print(printable(fit.line))
    except ValueError as error:  # of a precision that this GPU has not
        problem = str(error)
    problems = [f"{ranks} ranks: {problem}"] if problem else []
    problems += [
        f"{path} is not there: prepare it with depthattn prepare, or set data.path"
        for path in paths
        if "://" not in path and not Path(path).is_dir()
    ]
    return asked, [*problems, *check_data(config), *_check_folders(config, checkpoint_bytes(config))], ranks


def _gpu_of(host: doctor.Host) -> str:
    """The smallest GPU of this host for the planner, or what a run is sized for without one."""
    from megatron_depthattn.estimate.hardware import GPUS

    devices = [(device["bytes"], device["name"]) for device in host.devices]
    memory, name = min(devices, default=(80e9, "H100"))
    return f"{next((gpu for gpu in GPUS if gpu in name), 'H100')}-{round(memory / 1e9)}GB"


def _check_folders(config: RunConfig, checkpoint_bytes: int) -> Iterator[str]:
    """What is wrong with the folders that the run writes."""
    wanted = {"run.dir": config.run.dir, "checkpoint.dir": config.checkpoint_dir, "data.cache": config.data.cache}
    for key, folder in wanted.items():
        if not folder:
            continue
        place = next(each for each in (Path(folder), *Path(folder).absolute().parents) if each.is_dir())
        probe = machine.probe_folder(key, place, 0, "doctor")
        machine.remove_probe(place, 0)
        if probe.problem:
            yield f"{key}={folder}: {place}: {probe.problem}; set it to a folder that can be written"
        elif key == "checkpoint.dir" and (probe.free_bytes or 0) < checkpoint_bytes:
            free, one = size(probe.free_bytes or 0), size(checkpoint_bytes)
            yield f"{key}={folder}: {free} free, a checkpoint takes about {one}; free some, or set another"
