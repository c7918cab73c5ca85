#!/usr/bin/env bash
# Train on the hosts of a DeepSpeed hostfile, with DeepSpeed's own launcher.
#
#   HOSTFILE=hosts MASTER_ADDR=host0 MASTER_PORT=29500 launch/deepspeed.sh CONFIG.yaml [OVERLAY.yaml ...] [a.b=c ...]
#
# HOSTFILE:    a line for each host: `name slots=N`, N processes there (one for each GPU).
# MASTER_ADDR: the first host's name or address as the others reach it.   MASTER_PORT: a free port of it.
# NODE_RANK:   start this on every host by hand, with the host's place in HOSTFILE, from 0; unset: this reaches the
#              hosts itself, over ssh without a password, with pdsh.
# SSH_ARGS:    further arguments of ssh, such as `-p 2222 -i key`.   PYTHON: the interpreter, the same on all hosts.
# This checkout, the data and run.dir must be at the same places on all hosts. The launcher neither restarts nor
# requeues, and a signal to it ends the ranks at once: launch/node.sh does that better (docs/deepspeed.md).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/environment.sh"
. "$here/interpreter.sh"
if [ "${1:-}" = --rank ]; then # what the launcher starts on the hosts, for each process
    mapfile -d '' -t arguments < <(base64 -d <<<"$2")
    exec "$PYTHON" -m megatron_depthattn.train "${arguments[@]}"
fi
die() { echo "error: ${*//[[:cntrl:]]/?}" >&2; exit 1; } # a terminal obeys nothing of a file that came from elsewhere

[ $# -gt 0 ] || die "no config: HOSTFILE=... MASTER_ADDR=... MASTER_PORT=... launch/deepspeed.sh CONFIG.yaml [a.b=c ...]"
missing=
for name in HOSTFILE MASTER_ADDR MASTER_PORT; do [ -n "${!name:-}" ] || missing="$missing${missing:+, }$name"; done
[ -z "$missing" ] || die "$missing not set, and a launcher must not guess. Set HOSTFILE: a file with a line" \
    "\`host slots=N\` for each host; MASTER_ADDR: its first host, as the others reach it; MASTER_PORT: a free port of it."
# Without the file DeepSpeed would start a world of this machine's GPUs.
[ -f "$HOSTFILE" ] || die "HOSTFILE=$HOSTFILE: no such file; it holds a line \`host slots=N\` for each host."
[[ $MASTER_PORT =~ ^[1-9][0-9]{0,4}$ ]] && [ "$MASTER_PORT" -le 65535 ] ||
    die "MASTER_PORT=$MASTER_PORT is no port; set a free one of the first host, 1024 to 65535."
address='^[A-Za-z0-9:][A-Za-z0-9._:-]*$' # a program that is given another one may take it for an option, or for several hosts
[[ $MASTER_ADDR =~ $address ]] || die "MASTER_ADDR=$MASTER_ADDR is no host name or address; set that of the first host."

hosts=() slots=0 number=0
while read -r host rest || [ -n "$host" ]; do
    number=$((number + 1))
    case $host in '' | '#'*) continue ;; esac
    [[ ${host##*@} =~ $address && $host =~ ^([A-Za-z0-9_][A-Za-z0-9._-]*@)?[^@]+$ ]] ||
        die "$HOSTFILE, line $number: '$host' is no host name or address; write \`host slots=N\`, or user@host."
    [[ $rest =~ ^slots=([1-9][0-9]{0,5})[[:space:]]*$ ]] ||
        die "$HOSTFILE, line $number: '$host${rest:+ $rest}' is not \`host slots=N\` with N of 1 or more."
    [[ " ${hosts[*]-} " != *" $host "* ]] || die "$HOSTFILE, line $number: $host is there already; give each host one line."
    hosts+=("$host") slots=$((slots + BASH_REMATCH[1]))
done <"$HOSTFILE"
[ "${#hosts[@]}" -gt 0 ] || die "$HOSTFILE names no host; it holds a line \`host slots=N\` for each host."
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("deepspeed") is None)' ||
    die "$PYTHON has no DeepSpeed: pip install 'megatron-depthattn[deepspeed]', or start with launch/node.sh."
"$PYTHON" - "$slots" "$@" <<'END'
import sys
from megatron_depthattn.config import load_config, validate
try:
    validate(load_config(sys.argv[2], sys.argv[3:]), int(sys.argv[1]))
except ValueError as error:
    sys.exit(f"error: with {sys.argv[1]} processes (the hostfile's slots): {error}")
END

launcher=("$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_addr "$MASTER_ADDR"
    --master_port "$MASTER_PORT" --no_python --no_local_rank)
if [ -n "${NODE_RANK:-}" ]; then
    [[ $NODE_RANK =~ ^[0-9]+$ ]] && [ "$NODE_RANK" -lt "${#hosts[@]}" ] ||
        die "NODE_RANK=$NODE_RANK with ${#hosts[@]} hosts in $HOSTFILE; set 0 to $((${#hosts[@]} - 1)), or unset it."
    launcher+=(--no_ssh --node_rank "$NODE_RANK")
else
    obeyed='[][[:space:][:cntrl:]$`"\\;&|<>(){}*?!#'\']
    for path in "$here" "$PWD" "$PYTHON"; do # DeepSpeed hands them to a shell of the hosts as they are
        [[ ! $path =~ $obeyed ]] ||
            die "the path $path reaches the hosts through a shell, unquoted: use one without blanks and without any of" \
                "[ ] \$ \` \" ' \\ ; & | < > ( ) { } * ? ! #, or set NODE_RANK and start this on every host."
    done
    for program in ssh pdsh; do
        command -v "$program" >/dev/null || die "$program is not installed, by which the hosts are reached; install it" \
            "(apt-get install $program), or set NODE_RANK and start this on every host."
    done
    for host in "${hosts[@]}"; do
        # shellcheck disable=SC2086 # several arguments
        ssh -o BatchMode=yes -o ConnectTimeout=10 ${SSH_ARGS:-} -- "$host" true </dev/null ||
            die "$host ($HOSTFILE) cannot be reached with 'ssh -o BatchMode=yes ${SSH_ARGS:-} $host' (see above)."
    done
    export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} ${SSH_ARGS:-}"
    # --force_multi: a single host is reached as well; DeepSpeed would take this machine for it.
    launcher+=(--no_ssh_check --force_multi --launcher pdsh)
fi
# In base64, which reads the same to every shell on the way; DeepSpeed quotes nothing for pdsh.
exec "${launcher[@]}" "$here/deepspeed.sh" --rank "$(printf '%s\0' "$@" | base64 -w0)"
