"""One view of what all ranks wrote: launch/logs RUN_DIR [--all] [--rank N ...] [--errors]

Lines of all nodes in the order of their times, each with host and rank. A line's time is when its node's launcher saw
it, by that node's clock: right to a tenth of a second, and between nodes as far as their clocks agree. Shows the newest
start; ends with the first failure, where there was one.
"""

from __future__ import annotations

import argparse
import heapq
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from launch.follow import STAMP_WIDTH
from launch.node import LAST_ERROR
from megatron_depthattn.paths import user_path
from megatron_depthattn.terminal import printable

_HEAD = re.compile(r"[-0-9]{10} [:.0-9]{12} \S+ rank [0-9]{1,9} (out|err) \| ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="launch/logs", description="Logs of all ranks, merged by time.")
    parser.add_argument("run_dir", type=user_path)
    parser.add_argument("--all", action="store_true", help="every start, not the newest only")
    parser.add_argument("--rank", type=int, action="append", help="these ranks only")
    parser.add_argument("--errors", action="store_true", help="stderr only")
    options = parser.parse_args(arguments)
    starts = sorted(path for path in (options.run_dir / "logs").glob("*") if path.is_dir())
    if not starts:
        print(f"error: {options.run_dir}/logs holds no start; give the run.dir of a run of launch/", file=sys.stderr)
        return 1
    for start in starts if options.all else starts[-1:]:
        print(printable(f"==== start {start.name}"))
        for line in merged(start):
            rank, stream = line.split(" | ", 1)[0].split()[-2:]
            if (not options.rank or int(rank) in options.rank) and (stream == "err" or not options.errors):
                print(printable(line))
        failure = start / LAST_ERROR
        if failure.exists():
            print(printable(f"==== {failure.read_text(encoding='utf-8', errors='replace').rstrip()}"))
    return 0


def merged(start: Path) -> Iterator[str]:
    """The lines of all nodes of a start, by time."""
    files = [_lines(path) for path in sorted(start.glob("node_*.log"))]
    return heapq.merge(*files, key=lambda line: line[:STAMP_WIDTH])


def _lines(path: Path) -> Iterable[str]:
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:  # a progress bar's "\r" ends no line
        for line in file:
            if _HEAD.match(line):  # not one that a crash has cut off
                yield line.rstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
