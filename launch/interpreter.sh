# The interpreter of a launch, and where it finds this checkout. Sourced by the other scripts here with `root` set;
# PYTHON, if it is set, wins. shellcheck shell=bash
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 # the package comes from PYTHONPATH (a job's frozen copy), never from the folder one stands in
[ -n "${PYTHON:-}" ] || { PYTHON=$root/.venv/bin/python; [ -x "$PYTHON" ] || PYTHON=python3; }
export PYTHON PATH="$PATH:$(dirname "$(command -v "$PYTHON" || echo "$PYTHON")")" # programs of its environment: DeepSpeed wants ninja
