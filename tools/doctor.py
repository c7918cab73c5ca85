"""What is installed on this machine, what each feature needs, what would be refused here, and how to mend it.

    tools/doctor.py [CONFIG.yaml [OVERLAY.yaml ...] [a.b=c ...]] [--world N] [--json FILE]

Starts nothing. Exit code 0: what the config (or, without one, training) needs is here; 1: it is not, or an error.
Needs the standard library only; with `rich` its tables are tables.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_depthattn.paths import user_path
from megatron_depthattn.preflight import machine
from megatron_depthattn.preflight.compare import size
from megatron_depthattn.terminal import printable
from tools.diagnosis.facts import Machine, Package, find_machine, find_packages, run_python
from tools.diagnosis.features import ASKED_FOR, Feature, features, install

_NEEDS = """
import json, sys
from megatron_depthattn.config import load_config
from megatron_depthattn.preflight.run import requirements_of
print(json.dumps(requirements_of(load_config(sys.argv[1], sys.argv[3:]), int(sys.argv[2])).checkpoint_bytes))
"""


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description="What is here, what is missing, how to mend it.")
    parser.add_argument("config", nargs="?", help="YAML file of a run, to say what of it would be refused here")
    parser.add_argument("overrides", nargs="*", help="further YAML files and a.b=c settings, later ones win")
    parser.add_argument("--world", type=int, help="ranks of the run (default: the GPUs here; on CPU one model replica)")
    parser.add_argument("--json", type=user_path, help="write everything to this file as well")
    given = parser.parse_intermixed_args()  # settings may follow an option
    packages, here = find_packages(), find_machine()
    rows = features(packages, here, refusal)
    needed = ["GPU training" if here.devices or here.gpus_of_driver else "CPU training"]
    problems: list[str] = []
    if given.config:
        asked, problems = check_config(given.config, given.overrides, given.world, here, packages)
        needed += asked
    mend = [f"{row.name}: {row.mend}" for row in rows if row.name in needed and not row.is_ready] + problems
    show(packages, here, rows, needed)
    for line in mend:
        print(printable(f"TO MEND: {line}"))
    subject = given.config or "training"
    print(printable(f"{'not ready for' if mend else 'ready for'} {subject}: {', '.join(needed)}"))
    if given.json is not None:
        report = {
            "packages": [asdict(each) for each in packages.values()],
            "machine": asdict(here),
            "features": [asdict(row) for row in rows],
            "needed": needed,
            "to_mend": mend,
        }
        try:
            given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            print(
                printable(f"error: --json {given.json}: {error.strerror}; name a file that can be written"),
                file=sys.stderr,
            )
            return 1
    return 1 if mend else 0


def refusal(settings: Sequence[str]) -> str | None:
    """What this version says against these settings, on any machine; None: nothing, or the config cannot be loaded."""
    try:
        from megatron_depthattn import strict_config
        from megatron_depthattn.config import RunConfig, validate
    except ImportError:  # told already: omegaconf or pyyaml is missing
        return None
    extra = ["model.spec=te", "precision.dtype=bf16"] if any("fp8" in setting for setting in settings) else []
    config = strict_config.build(RunConfig, [strict_config.parse_overrides(RunConfig, [*extra, *settings])])
    try:
        validate(config, 1, needs_data=False)
    except ValueError as error:
        return str(error)
    return None


def check_config(
    path: str, overrides: Sequence[str], world: int | None, here: Machine, packages: dict[str, Package]
) -> tuple[list[str], list[str]]:
    """The features that a config asks for, and what would be refused or fail here, in lines; prints what its `auto`
    becomes here."""
    try:
        from megatron_depthattn import strict_config
        from megatron_depthattn.backends import Available, resolve
        from megatron_depthattn.config import RunConfig, load_config, to_dict, validate
    except ImportError as error:
        return [], [f"{path} cannot be read: {error}; make install"]
    try:
        config = load_config(path, overrides)
    except ValueError as error:
        return [], [str(error)]
    settings = to_dict(config)
    defaults = to_dict(strict_config.build(RunConfig, []))
    asked = []
    for name, words in ASKED_FOR.items():
        for key, _, value in (word.partition("=") for word in words):
            if str(_get(settings, key)) == value != str(_get(defaults, key)):
                asked.append(name)
    if any("://" in source.path for source in config.data.sources):
        asked.append("S3 streaming")
    parallel = config.parallel
    replica = parallel.tensor * parallel.pipeline * parallel.context
    ranks = world or len(here.devices) or replica
    if ranks > len(here.devices) > 0:
        asked.append("multi-node torchrun")
    problems = []
    no_te, no_triton = (install([name], packages) for name in ("transformer-engine", "triton"))
    try:
        validate(config, ranks)
        for line in resolve(config, Available(bool(here.devices), no_te, no_triton)).lines:
            print(printable(f"here {line}"))
    except ValueError as error:
        problems.append(f"{path} on {ranks} ranks: {error}")
    else:
        problems += check_folders(path, overrides, ranks, config)
    return asked, problems


def _get(settings: dict[str, Any], key: str) -> Any:
    return functools.reduce(operator.getitem, key.split("."), settings)


def check_folders(path: str, overrides: Sequence[str], ranks: int, config: Any) -> list[str]:
    """Whether data is there, and folders can be written and are large enough."""
    problems = [
        f"{source.path} is not there: prepare it with tools/prepare_data.py, or set data.path"
        for source in config.data.sources
        if "://" not in source.path and not Path(source.path).is_dir()
    ]
    said, error = run_python(_NEEDS, path, str(ranks), *overrides)
    checkpoint_bytes = int(said) if error is None else 0
    if error is not None:
        problems.append(f"the size of a checkpoint is not known: {error}")
    wanted = {"run.dir": config.run.dir, "checkpoint.dir": config.checkpoint_dir, "data.cache": config.data.cache}
    for key, folder in wanted.items():
        if folder:
            place = next(each for each in (Path(folder), *Path(folder).absolute().parents) if each.is_dir())
            probe = machine.probe_folder(key, place, 0, "doctor")
            machine.remove_probe(place, 0)
            if probe.problem:
                problems.append(f"{key}={folder}: {place}: {probe.problem}; set it to a folder that can be written")
            elif key == "checkpoint.dir" and (probe.free_bytes or 0) < checkpoint_bytes:
                free, one = size(probe.free_bytes or 0), size(checkpoint_bytes)
                problems.append(
                    f"{key}={folder}: {free} free, a checkpoint takes about {one}; free some, or set another"
                )
    return problems


def show(packages: dict[str, Package], here: Machine, rows: Sequence[Feature], needed: Sequence[str]) -> None:
    """Print it all."""
    memory, shared = size(here.memory_bytes), size(here.shared_memory_bytes or 0)
    print(
        f"{here.system}; python {here.python}; {memory} of memory free, /dev/shm {shared}, disk {size(here.disk_bytes)}"
    )
    print(
        printable(f"ulimit -n {here.open_files}; text is {here.encoding}; driver: {here.driver or here.driver_error}")
    )
    _table(
        ("package", "wanted", "here", ""),
        [
            (each.name, each.wanted or "any", each.version or "-", "" if each.works else each.error or "other version")
            for each in packages.values()
        ],
    )
    _table(
        ("feature (* asked for)", "ready", "needs", "here", "how to mend"),
        [
            (
                row.name + (" *" if row.name in needed else ""),
                "yes" if row.is_ready else "NO",
                row.needs,
                row.here,
                row.mend,
            )
            for row in rows
        ],
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(printable("\n" + "\n".join(" | ".join(row) for row in (columns, *rows))))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*(printable(cell).replace("[", "\\[") for cell in row))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)


if __name__ == "__main__":
    sys.exit(main())
