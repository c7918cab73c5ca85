"""The head's side of a meeting: node 0 waits for all nodes, starts them together, and hears how each one ended.

torchrun's own rendezvous waits in silence for nodes that never come, and gives up when one is lost. So before it every
launcher, node 0's too, calls the head at MASTER_ADDR:MASTER_PORT, says who it is, and keeps the connection for as long
as its ranks run. Messages are lines of JSON:

    to the head:  hello {node, settings, host, ...}    beat    ended {...}
    from it:      go {start}    stop {why}    verdict {...}    refused {why}    beat

A connection that closes, or is silent for LOST_SECONDS, is a lost node: the others are told to stop, and all that live
meet again, with the lost one if somebody starts it anew. A head that is lost and started anew is found in the same way.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

from launch.verdict import Ended, Failure, decide, ended_from, to_json
from launch.world import World

BEAT_SECONDS = 2.0
HELLO_SECONDS = 10.0


@dataclass(eq=False)
class Guest:
    """One node's connection."""

    node: int
    hello: dict[str, Any]
    writer: asyncio.StreamWriter
    ended: Ended | None = None
    seen: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return f"node {self.node} ({self.hello['host']})"

    def tell(self, **message: Any) -> None:
        """Send without waiting: what cannot be sent is noticed by the reader of the same connection."""
        if not self.writer.is_closing():
            self.writer.write(json.dumps(message).encode() + b"\n")


class Head:
    """The server, in a thread of its own, for all starts of this launcher.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, world: World) -> None:
        self._world, self._restarts_left = world, world.max_restarts
        self._waiting: dict[int, Guest] = {}
        self._running: dict[int, Guest] = {}
        self._since, self._starts = time.monotonic(), 0
        self._open: set[Guest] = set()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, listens_at(world.master_addr), port=world.master_port, reuse_address=True)
        )
        self._loop.create_task(self._keep_time())
        threading.Thread(target=self._loop.run_forever, name="head", daemon=True).start()

    def wait_until_all_left(self, seconds: float) -> None:
        """Stay until all nodes have heard what was last said: a head that leaves first looks like a lost one."""
        limit = time.monotonic() + seconds
        while self._open and time.monotonic() < limit:
            time.sleep(0.05)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        guest = None
        why = "closed its connection"
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), HELLO_SECONDS))["hello"]
            guest = Guest(int(hello["node"]), hello, writer)
            self._open.add(guest)
            if not self._welcome(guest):
                await writer.drain()
            while line := await asyncio.wait_for(reader.readline(), self._world.lost_seconds):
                guest.seen = time.monotonic()
                if guest in self._running.values() and (ended := json.loads(line).get("ended")):
                    self._note_end(guest, ended_from(ended))
        except TimeoutError:
            why = f"was silent for {self._world.lost_seconds:g} s"
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a reset, or somebody who does not speak this language
        finally:
            if guest:
                self._open.discard(guest)
                self._leave(guest, why)
            writer.close()

    # ---- before a start

    def _welcome(self, guest: Guest) -> bool:
        """Let a node wait for the others, or refuse it, and with it the whole start."""
        first = self._waiting.get(guest.node)
        objection = _objection(guest, self._reference(), self._world.num_nodes)
        if first and not objection:
            objection = f"two launchers say that they are node {guest.node}: {first.name} and {guest.hello['host']}"
            objection += "; give each its own NODE_RANK"
        if objection:
            for other in {*self._waiting.values(), guest}:
                other.tell(refused=objection)
            return False
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting[guest.node] = guest
        self._start_if_complete()
        return True

    def _reference(self) -> Guest | None:
        """Whose settings are the right ones: the head's own, or those of whoever came first."""
        return self._waiting.get(0) or next(iter((self._waiting or self._running).values()), None)

    def _start_if_complete(self) -> None:
        if self._running or len(self._waiting) < self._world.num_nodes:
            return
        self._running, self._waiting = self._waiting, {}
        self._starts += 1
        start = time.strftime("%Y%m%dT%H%M%S")
        for guest in self._running.values():
            guest.tell(go={"start": start})

    async def _keep_time(self) -> None:
        while True:
            await asyncio.sleep(min(BEAT_SECONDS, self._world.lost_seconds / 5))
            now = time.monotonic()
            for guest in [*self._waiting.values(), *self._running.values()]:
                guest.tell(beat=1)
            for guest in list(self._waiting.values()):
                other = self._running.get(guest.node)
                if other and other.ended is None and now - self._since > self._world.lost_seconds + 5:
                    guest.tell(refused=f"{other.name} is running: end it first, or give this one another NODE_RANK")
                    del self._waiting[guest.node]
            limit = self._world.return_seconds if self._starts else self._world.meet_seconds
            if self._waiting and not self._running and now - self._since > limit:
                for guest in self._waiting.values():
                    guest.tell(refused=self._who_is_missing(limit))
                self._waiting = {}

    def _who_is_missing(self, limit: float) -> str:
        missing = [str(node) for node in range(self._world.num_nodes) if node not in self._waiting]
        names = f"node{'s' if len(missing) > 1 else ''} {', '.join(missing[:16])}{', ...' if len(missing) > 16 else ''}"
        return (
            f"{names} of {self._world.num_nodes} did not {'come back' if self._starts else 'come'} to "
            f"{self._world.head} within {limit:g} s ({len(self._waiting)} did): start launch/node.sh there, see what "
            f"it says, or wait longer with {'RETURN_SECONDS' if self._starts else 'MEET_SECONDS'}"
        )

    # ---- while it runs

    def _note_end(self, guest: Guest, ended: Ended) -> None:
        guest.ended = ended
        if ended.outcome in ("failed", "hung", "lost"):
            for other in self._running.values():
                if other.ended is None:
                    other.tell(stop=f"{guest.name}: {ended.failure.summary if ended.failure else ended.outcome}")
        ends = [other.ended for other in self._running.values() if other.ended]
        if self._running and len(ends) == len(self._running):
            verdict = decide(ends, self._restarts_left)
            self._restarts_left -= verdict.again
            for other in self._running.values():
                other.tell(verdict=to_json(verdict))
            self._running = {}
            self._since = time.monotonic()
            self._start_if_complete()

    def _leave(self, guest: Guest, why: str) -> None:
        if self._waiting.get(guest.node) is guest:
            del self._waiting[guest.node]
        elif self._running.get(guest.node) is guest and guest.ended is None:
            # a second early: its neighbours may have failed for want of it before this was noticed
            failure = Failure(time.time() - 1, guest.hello["host"], f"node {guest.node}", f"its launcher {why}")
            self._note_end(guest, Ended(guest.node, "lost", failure))


def listens_at(master_addr: str) -> list[str] | None:
    """MASTER_ADDR alone where that is an IP address of this node or localhost, else all interfaces (None): a name may
    mean another address on other nodes, and another address is translated on the way."""
    numeric = socket.AI_NUMERICHOST if master_addr != "localhost" else 0
    try:
        infos = socket.getaddrinfo(master_addr, None, type=socket.SOCK_STREAM, flags=numeric)
    except OSError:
        return None
    found = {str(info[4][0]) for info in infos}
    own = {each.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for each in addresses}
    return sorted(found & own) or None


def _objection(guest: Guest, reference: Guest | None, num_nodes: int) -> str:
    """Why this node cannot be one of this world; empty if it can."""
    if reference:
        mine, theirs = guest.hello["settings"], reference.hello["settings"]
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                return (
                    f"{guest.name} has another {key} than {reference.name}: {mine.get(key)} and {theirs.get(key)}; "
                    "start all nodes with the same settings, config and code"
                )
    if not 0 <= guest.node < num_nodes:
        return f"{guest.name} is not one of {num_nodes} nodes, which count from 0; give each its own NODE_RANK"
    return ""
