"""What the ranks of a run wrote, one after the other; the first failure last.

    launch/logs RUN_DIR [--all] [--rank N ...] [--errors] [--first-failure]

Below <run.dir>/logs each launcher has a folder <time>_<host>. Shows the newest of each host.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_depthattn.launch.failures import first_failure
from megatron_depthattn.paths import user_path
from megatron_depthattn.terminal import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser("launch/logs", description="Logs of all ranks of a run, the first failure last.")
    parser.add_argument("run_dir", type=user_path, help="the run's folder (run.dir)")
    parser.add_argument("--all", action="store_true", help="every start, not the newest of each host only")
    parser.add_argument("--rank", type=int, action="append", metavar="N", help="this rank only; may be repeated")
    parser.add_argument("--errors", action="store_true", help="stderr only")
    parser.add_argument("--first-failure", action="store_true", help="the first failure only")
    parser.add_argument("--since", type=float, default=0.0, metavar="SECONDS", help="failures since then (since 1970)")
    options = parser.parse_args(arguments)
    starts = sorted(path for path in (options.run_dir / "logs").glob("*_*") if path.is_dir())
    if not starts:
        print(f"error: {options.run_dir}/logs holds no start; give the run.dir of a run of launch/", file=sys.stderr)
        return 1
    newest = {path.name.partition("_")[2]: path for path in starts}
    if not options.first_failure:
        for start in starts if options.all else newest.values():
            _show(start, options.rank, ("stderr",) if options.errors else ("stdout", "stderr"))
    if failures := [failure for start in newest.values() if (failure := first_failure(start, options.since))]:
        print(printable(f"==== {min(failures).text}"))
    return 0


def _show(start: Path, ranks: Sequence[int] | None, streams: Sequence[str]) -> None:
    for link in sorted(start.glob("rank_*_attempt_*")):
        _, rank, _, attempt = link.name.split("_")
        for path in [link / f"{stream}.log" for stream in streams if not ranks or int(rank) in ranks]:
            if path.is_file() and path.stat().st_size:
                print(printable(f"==== {start.name}: rank {int(rank)}, attempt {attempt}, {path.stem}"))
                with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
                    for line in file:
                        print(printable(line.rstrip("\n")))


if __name__ == "__main__":
    sys.exit(main())
