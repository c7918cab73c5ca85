#!/usr/bin/env bash
# Score the checkpoints of a run beside it: the task of the job that launch/submit --evaluate adds.
#
#   launch/evaluate.sh --follow RUN_DIR ...      as depthattn evaluate, which says how
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/interpreter.sh"
exec "$PYTHON" -m megatron_depthattn.cli evaluate "$@"
