"""One node's place in the world, from the variables that a scheduler or a person sets. Nothing is guessed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

HELP = {
    "NNODES": "how many nodes the run has",
    "NODE_RANK": "which of them this is, from 0",
    "MASTER_ADDR": "name or address of node 0, as the others reach it",
    "MASTER_PORT": "a free port of node 0; the port after it is used as well",
    "NPROC_PER_NODE": "processes on this node, one for each GPU",
}


@dataclass(frozen=True)
class World:
    """Sizes and addresses; the same on every node but for ``node_rank``."""

    num_nodes: int
    node_rank: int
    processes_per_node: int
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    meet_seconds: float = 45.0
    """How long nodes wait for each other before the first start."""
    return_seconds: float = 600.0
    """How long a node that was lost may take to come back."""
    lost_seconds: float = 30.0
    """Silence after which a node counts as lost."""
    max_restarts: int = 0
    """New starts after failures that may mend themselves."""

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.processes_per_node

    @property
    def head(self) -> str:
        """Where node 0 is met, for people."""
        return f"{self.master_addr}:{self.master_port}"


def read_world(variables: Mapping[str, str] = os.environ, *, alone: bool) -> World:
    """The world that ``variables`` describe; ``alone``: a single node, which needs no address.

    Raises:
        ValueError: names every variable that is missing or makes no sense, each with what it is for.
    """
    required = ["NPROC_PER_NODE"] if alone else list(HELP)
    values = {name: variables.get(name, "").strip() for name in required}
    if not values["NPROC_PER_NODE"] and (gpus := count_gpus()):
        values["NPROC_PER_NODE"] = str(gpus)
    missing = [name for name, value in values.items() if not value]
    if missing:
        meaning = "; ".join(f"{name}: {HELP[name]}" for name in missing)
        hint = " (nvidia-smi shows no GPU to count)" if "NPROC_PER_NODE" in missing else ""
        raise ValueError(f"{', '.join(missing)} not set{hint}, and a launcher must not guess. Set {meaning}.")
    world = World(
        num_nodes=1 if alone else _whole("NNODES", values["NNODES"], 1),
        node_rank=0 if alone else _whole("NODE_RANK", values["NODE_RANK"], 0),
        processes_per_node=_whole("NPROC_PER_NODE", values["NPROC_PER_NODE"], 1),
        master_addr="127.0.0.1" if alone else values["MASTER_ADDR"],
        master_port=0 if alone else _whole("MASTER_PORT", values["MASTER_PORT"], 1),
        meet_seconds=_seconds(variables, "MEET_SECONDS", World.meet_seconds),
        return_seconds=_seconds(variables, "RETURN_SECONDS", World.return_seconds),
        lost_seconds=_seconds(variables, "LOST_SECONDS", World.lost_seconds),
        max_restarts=_whole("MAX_RESTARTS", variables.get("MAX_RESTARTS") or ("0" if alone else "10"), 0),
    )
    if world.node_rank >= world.num_nodes:
        raise ValueError(
            f"NODE_RANK={world.node_rank} with NNODES={world.num_nodes}: nodes count from 0, so the last one is "
            f"NODE_RANK={world.num_nodes - 1}; set NODE_RANK to one of them, or NNODES to how many there are."
        )
    if world.master_port > 65534:
        raise ValueError(f"MASTER_PORT={world.master_port} is no port with another after it; set 1024 to 65534.")
    return world


def count_gpus() -> int:
    """GPUs that processes of this node would see; 0 without NVIDIA's tools."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    if not shutil.which("nvidia-smi"):
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError("nvidia-smi has not answered for 60 s, so GPUs are not counted: set NPROC_PER_NODE") from error
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def _whole(name: str, value: str, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < least:
        raise ValueError(f"{name}={value[:40]} is not a whole number of {least} or more; it says {_meaning(name)}.")
    return int(value)


def _seconds(variables: Mapping[str, str], name: str, default: float) -> float:
    value = variables.get(name) or str(default)
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{name}={value} is not a number of seconds above 0; unset it for {default:g}.")
    return seconds


def _meaning(name: str) -> str:
    return HELP.get(name, "how often a run that failed is started again")
