#!/usr/bin/env bash
# A node as a supervisor keeps it: launch/node.sh is started again when it was killed, and only then.
#   machine.sh FOLDER CONFIG [a.b=c ...]      FOLDER/node<N>.pid is the supervisor's
echo $$ >"$1/node$NODE_RANK.pid"; shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
while :; do
    launch/node.sh "$@" & wait $!
    code=$?
    [ $code -gt 128 ] || exit $code
    echo "supervisor: node $NODE_RANK was killed ($code); starting it again in 3 s" >&2
    sleep 3
done
