#!/usr/bin/env bash
# Train on several nodes: start this on each of them, by hand or by any scheduler.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 MASTER_PORT=29500 NPROC_PER_NODE=8 launch/node.sh CONFIG.yaml [a.b=c ...]
#
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: the same on all nodes, but for NODE_RANK, 0 to NNODES-1. Node 0 is the
#   head, which keeps torchrun's rendezvous: MASTER_ADDR is its name or address as the others reach it, MASTER_PORT free.
# NPROC_PER_NODE: processes of a node, one for each GPU (default: the GPUs that there are).
# MAX_RESTARTS:   restarts after retryable failures, a lost node included (default 10).
# JOIN_TIMEOUT:   seconds that nodes wait for each other, at first and after a failure (default 60).
# RDZV_ID:        a name of this run, if several use one MASTER_PORT.     PYTHON: the interpreter, as for local.sh.
# Exit codes: 0 done, 75 stopped by a signal and saved, 70 hung, 1 an error; see docs/launch.md.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/interpreter.sh"
die() { echo "error: ${*//[[:cntrl:]]/?}" >&2; exit 1; }

missing=
for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT; do [ -n "${!name:-}" ] || missing="$missing${missing:+, }$name"; done
[ -z "$missing" ] || die "$missing not set, and a launcher must not guess. Set NNODES: how many nodes the run has;" \
    "NODE_RANK: which of them this is, from 0; MASTER_ADDR: name or address of node 0, as the others reach it;" \
    "MASTER_PORT: a free port of node 0."
: "${JOIN_TIMEOUT:=60}" "${MAX_RESTARTS:=10}"
for name in NNODES NODE_RANK MASTER_PORT JOIN_TIMEOUT MAX_RESTARTS; do
    [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$name=${!name} is not a whole number of 0 or more; set one."
done
[ "$NODE_RANK" -lt "$NNODES" ] || die "NODE_RANK=$NODE_RANK with NNODES=$NNODES: nodes count from 0, so the last one is" \
    "NODE_RANK=$((NNODES - 1)); set NODE_RANK to one of them, or NNODES to how many there are."
[ "$JOIN_TIMEOUT" -gt 0 ] || die "JOIN_TIMEOUT=0 leaves nodes no time to join; set seconds, or unset it for 60."
[ "$NODE_RANK" = 0 ] && is_head=1 || is_head=0
# Under Slurm a node is called by the name that Slurm has for it: its own may resolve to a loopback address
exec "$PYTHON" -m megatron_depthattn.launch.torchrun --nnodes="$NNODES" --nproc-per-node="${NPROC_PER_NODE:-gpu}" \
    --max-restarts="$MAX_RESTARTS" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="${RDZV_ID:-run}" \
    --rdzv-conf="join_timeout=$JOIN_TIMEOUT,is_host=$is_head" ${SLURMD_NODENAME:+"--local-addr=$SLURMD_NODENAME"} \
    -m megatron_depthattn.train "$@"
