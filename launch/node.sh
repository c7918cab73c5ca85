#!/usr/bin/env bash
# Train on several nodes: start this on each of them, by hand or by any scheduler.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 MASTER_PORT=29500 NPROC_PER_NODE=8 launch/node.sh CONFIG.yaml [a.b=c ...]
#
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: the same on all nodes, but for NODE_RANK, 0 to NNODES-1. Node 0 is the
#   head: MASTER_ADDR is its name or address as the others reach it; MASTER_PORT and the port after it are used there.
# NPROC_PER_NODE: processes of a node, one for each GPU (default: the GPUs that there are).
# MAX_RESTARTS:   new starts after failures that may mend themselves, a lost node included (default 10).
# MEET_SECONDS:   how long nodes wait for each other at first (45).   RETURN_SECONDS: ... for a lost one to return (600).
# LOST_SECONDS:   silence after which a node counts as lost (30).     PYTHON: the interpreter, as for local.sh.
# Exit codes: 0 done, 75 stopped by a signal and saved, 70 hung, 1 an error; see docs/launch.md.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/environment.sh"
. "$root/launch/interpreter.sh"
exec "$PYTHON" -m launch.node "$@"
