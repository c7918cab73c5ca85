# Every environment variable that a run needs beyond torchrun's own, with its reason. Read by megatron_depthattn.launch.torchrun
# and sourced by deepspeed.sh; harmless to source twice. What the user has set already wins, an empty value too.
#
# Sources: PyTorch's "ProcessGroupNCCL Environment Variables", NCCL's "Environment Variables", megatron.training.arguments,
# the PyTorch notes on CUDA memory. shellcheck shell=bash

_default() { [ -n "${!1+set}" ] || export "$1=$2"; } # _default NAME VALUE

# ---- processes
_default OMP_NUM_THREADS 1          # several ranks share a host: without this each starts a thread per core. torchrun does the same, and warns
_default TOKENIZERS_PARALLELISM false # tokenizers' threads and forked loader workers do not go together
_default PYTHONUNBUFFERED 1         # the last lines before a death are the ones that are needed
_default PYTHONFAULTHANDLER 1       # a crash in C leaves the Python stack

# ---- collectives. How long a rank waits for another, and the flight recorder, are set in code (parallel/groups.py), for every start
_default NCCL_DEBUG WARN            # NCCL is silent otherwise, also about what it then fails on
# Left alone on purpose, as NCCL's choice is right unless measured otherwise: NCCL_ALGO, NCCL_PROTO, NCCL_IB_*, NCCL_SOCKET_IFNAME,
# NCCL_NVLS_ENABLE (0 frees some GPU memory and costs bandwidth; needed only by in-process restarts, which do not exist here).
# GLOO_SOCKET_IFNAME: megatron_depthattn.launch.torchrun sets it to the interface by which the head node was reached.

# ---- GPUs
_default PYTORCH_ALLOC_CONF expandable_segments:True # sequence lengths and microbatches of several sizes fragment fixed segments
# CUDA_DEVICE_MAX_CONNECTIONS: each rank sets it (parallel/launch_env.py)

unset -f _default
