#!/usr/bin/env bash
# Train on this machine.
#
#   [NPROC_PER_NODE=2] launch/local.sh CONFIG.yaml [OVERLAY.yaml ...] [a.b=c ...]
#
# NPROC_PER_NODE: processes, one for each GPU (default: the GPUs that there are; without any it must be set).
# MAX_RESTARTS:   restarts after retryable failures (default 0).
# PYTHON:         the interpreter (default: .venv/bin/python of this checkout, else python3).
# Exit codes: 0 done, 75 stopped by a signal and saved, 70 hung, 1 an error; see docs/launch.md.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/interpreter.sh"
exec "$PYTHON" -m megatron_depthattn.launch.torchrun --nproc-per-node="${NPROC_PER_NODE:-gpu}" \
    --max-restarts="${MAX_RESTARTS:-0}" -m megatron_depthattn.train "$@"
