# The interpreter of a launch, and where it finds the package. Sourced by the other scripts here with `here` set, the
# folder of these scripts: launch/ of a checkout or of a job's frozen code, or inside an installed package.
# PYTHON, if it is set, wins. shellcheck shell=bash
root=$(cd "$here/.." && pwd)
[ -d "$root/megatron_depthattn" ] || root=$(cd "$here/../../.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 # the package comes from PYTHONPATH (a job's frozen copy), never from the folder one stands in
for _python in "$root/.venv/bin/python" "$root/../../../bin/python" "$(command -v python3)"; do
    [ -n "${PYTHON:-}" ] || { [ -x "$_python" ] && PYTHON=$_python; }
done
unset _python
export PYTHON PATH="$PATH:$(dirname "$(command -v "$PYTHON" || echo "$PYTHON")")" # programs of its environment: DeepSpeed wants ninja
