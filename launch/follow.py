"""The ranks' output as it grows: on the console what one wants to watch, in one file per node all of it, with times.

A rank writes to its own files, so nothing is lost with a launcher. The launcher reads them ten times a second and adds
each line to <logs>/node_<N>.log with the moment at which it saw it, by this node's clock: the time of a line is right
to about a tenth of a second.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from pathlib import Path
from typing import BinaryIO

from launch.world import World
from megatron_depthattn.terminal import printable

STAMP_WIDTH = len("2026-01-31 23:59:59.999")
OTHERS_LINES = 10
"""Lines from stderr of ranks other than 0 that a node shows on its console in one start; with a thousand ranks one
cannot read more, and all are in the logs."""


class Follower:
    """Reads the output of this node's ranks; call `follow` often.

    Args:
        logs: folder of this start's logs.
        world: which ranks are this node's.
    """

    def __init__(self, logs: Path, world: World) -> None:
        first = world.node_rank * world.processes_per_node
        self._sources = [
            _Source(logs / f"rank_{rank:05d}.{stream}", rank, stream)
            for rank in range(first, first + world.processes_per_node)
            for stream in ("out", "err")
        ]
        self._logs, self._others, self._host = logs, 0, socket.gethostname()
        self._merged = (logs / f"node_{world.node_rank}.log").open("a", encoding="utf-8")

    def follow(self) -> None:
        """Take what has been written since the last call."""
        for source in self._sources:
            for line in source.new_lines():
                self._take(source, line)

    def close(self) -> None:
        """Take what is left, and close."""
        self.follow()
        for source in self._sources:
            if rest := source.close():  # a rank's last line may lack its end
                self._take(source, rest)
        with contextlib.suppress(OSError):
            self._merged.close()

    def _take(self, source: _Source, line: str) -> None:
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))}.{int(now % 1 * 1000):03d}"
        with contextlib.suppress(OSError):  # a full disk must not end the run
            self._merged.write(f"{stamp} {self._host} rank {source.rank} {source.stream} | {line}\n")
            self._merged.flush()
        self._show(source, line)

    def _show(self, source: _Source, line: str) -> None:
        if source.rank == 0:
            print(printable(line), file=sys.stdout if source.stream == "out" else sys.stderr, flush=True)
        elif source.stream == "err" and self._others <= OTHERS_LINES:
            self._others += 1
            text = (
                f"[rank {source.rank}] {line}" if self._others <= OTHERS_LINES else f"more of other ranks: {self._logs}"
            )
            print(printable(text), file=sys.stderr, flush=True)


class _Source:
    def __init__(self, path: Path, rank: int, stream: str) -> None:
        self.path, self.rank, self.stream = path, rank, stream
        self._file: BinaryIO | None = None
        self._rest = b""

    def new_lines(self) -> list[str]:
        if self._file is None:
            if not self.path.exists():
                return []
            self._file = self.path.open("rb")
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def close(self) -> str:
        if self._file:
            self._file.close()
        return self._rest.decode(errors="replace")
