"""A node's side of a meeting: calls the head, waits for the start, and stays in touch while the ranks run."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from launch.meet import BEAT_SECONDS
from launch.verdict import Ended, Verdict, to_json, verdict_from
from launch.world import World

_LOOPBACK_SECONDS = 15.0
"""Longest wait for a head at this node's own loopback address, which only makes sense with both on one machine."""


class Refused(ValueError):
    """The head, or the lack of it, rules this start out."""


class HeadLost(ConnectionError):
    """The head is gone, or does not get through."""


class Stopped(Exception):
    """A signal came while waiting."""


class Guest:
    """One connection to the head, for one start.

    Args:
        world: where the head is.
        settings: what must be the same on all nodes, by name.
        seconds: how long the head may stay away.
        is_stopped: asked while waiting; true ends the wait with `Stopped`.

    Raises:
        Refused: no head within that time, or it refuses this node.
    """

    def __init__(self, world: World, settings: dict[str, str], seconds: float, is_stopped: Callable[[], bool]) -> None:
        self._world, self._is_stopped = world, is_stopped
        self._socket = self._connect(seconds)
        self._socket.settimeout(world.lost_seconds)
        self._lines = self._socket.makefile("rb")
        self.interface = _interface(self._socket.getsockname()[0])
        """Network interface by which the head is reached."""
        self._lock, self._closed = threading.Lock(), threading.Event()
        self.stop = ""
        """Why the ranks of this node should end: what the head said, or that it is gone; empty while they may run."""
        self._verdict: Verdict | None = None
        self._heard = threading.Event()
        self._tell(hello={"node": world.node_rank, "host": socket.gethostname(), "settings": settings})
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def wait_for_start(self) -> str:
        """The name of this start, the same on all nodes.

        Raises:
            Refused: with the head's reason.
            HeadLost: it went away.
            Stopped: a signal came.
        """
        while True:
            if self._is_stopped():
                self.close()
                raise Stopped
            message = self._read()
            if "refused" in message:
                self.close()
                raise Refused(message["refused"])
            if "go" in message:
                threading.Thread(target=self._listen, name="listen", daemon=True).start()
                return str(message["go"]["start"])

    def report(self, ended: Ended) -> Verdict:
        """Tell how the start ended here and wait for what follows.

        Raises:
            HeadLost: it went away before it said.
        """
        self._tell(ended=to_json(ended))
        self._heard.wait()
        self.close()
        if self._verdict is None:
            raise HeadLost(self.stop)
        return self._verdict

    def close(self) -> None:
        """Hang up."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _connect(self, seconds: float) -> socket.socket:
        world, began = self._world, time.monotonic()
        while True:
            if self._is_stopped():
                raise Stopped
            problem: OSError
            try:
                return socket.create_connection((world.master_addr, world.master_port), timeout=5.0)
            except OSError as error:
                problem = error
            loopback = world.node_rank > 0 and _is_loopback(world.master_addr)
            limit = min(seconds, _LOOPBACK_SECONDS) if loopback else seconds
            if time.monotonic() - began > limit:
                raise Refused(self._unreachable(problem, limit, loopback))
            time.sleep(0.5)

    def _unreachable(self, problem: OSError, limit: float, loopback: bool) -> str:
        world = self._world
        line = f"node {world.node_rank} ({socket.gethostname()}) cannot reach the head node at {world.head} "
        line += f"after {limit:g} s ({problem}): "
        if loopback:
            return line + (
                f"{world.master_addr} is this node itself here, and NODE_RANK={world.node_rank} is not the head; set "
                "MASTER_ADDR to the name or address of node 0 in the network that the nodes share"
            )
        if isinstance(problem, socket.gaierror):
            return line + "this node cannot resolve the name; set MASTER_ADDR to an address, or mend name resolution"
        if world.node_rank == 0:
            return line + "node 0 calls itself by that address, as the others do; set MASTER_ADDR to one of its own"
        return line + (
            "start launch/node.sh with NODE_RANK=0 there, see that no firewall is between, or wait longer with "
            "MEET_SECONDS"
        )

    def _read(self) -> dict[str, Any]:
        try:
            if line := self._lines.readline():
                return dict(json.loads(line))
            why = "closed the connection"
        except TimeoutError:
            why = f"was silent for {self._world.lost_seconds:g} s"
        except (OSError, ValueError) as error:
            why = f"cannot be heard ({error})"
        raise HeadLost(f"the head node at {self._world.head} {why}")

    def _listen(self) -> None:
        """While the ranks run: what the head says, until its verdict or its end."""
        try:
            while self._verdict is None:
                message = self._read()
                if "stop" in message:
                    self.stop = message["stop"]
                if "verdict" in message:
                    self._verdict = verdict_from(message["verdict"])
        except HeadLost as lost:
            self.stop = self.stop or str(lost)
        self._heard.set()

    def _beat(self) -> None:
        while not self._closed.wait(min(BEAT_SECONDS, self._world.lost_seconds / 5)):
            self._tell(beat=1)

    def _tell(self, **message: Any) -> None:
        with self._lock, contextlib.suppress(OSError):  # the reader of the same connection notices
            self._socket.sendall(json.dumps(message).encode() + b"\n")


def _is_loopback(name: str) -> bool:
    try:
        return all(ipaddress.ip_address(info[4][0]).is_loopback for info in socket.getaddrinfo(name, None))
    except OSError:
        return False


def _interface(address: str) -> str:
    """The network interface that has an address; empty if none is found."""
    for name, addresses in psutil.net_if_addrs().items():
        if address.removeprefix("::ffff:") in (entry.address.partition("%")[0] for entry in addresses):
            return name
    return ""
