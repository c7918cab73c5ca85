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

# ---- collectives. How long a rank waits for another is set in code (train.hang_timeout): the watchdog reports more than a time-out
_default TORCH_NCCL_ASYNC_ERROR_HANDLING 3 # a rank whose communicator failed ends, without waiting for an abort that may hang (torch's default, stated)
_default TORCH_FR_BUFFER_SIZE 2000  # the flight recorder keeps the last 2000 collectives of each rank, off by default (torch before 2.9: TORCH_NCCL_TRACE_BUFFER_SIZE)
_default TORCH_FR_DUMP_ON_TIMEOUT 1 # and writes them when a collective times out, to flight_recorder_<rank> beside the rank's log (megatron_depthattn.launch.torchrun sets the path)
_default NCCL_DEBUG WARN            # NCCL is silent otherwise, also about what it then fails on
# Left alone on purpose, as NCCL's choice is right unless measured otherwise: NCCL_ALGO, NCCL_PROTO, NCCL_IB_*, NCCL_SOCKET_IFNAME,
# NCCL_NVLS_ENABLE (0 frees some GPU memory and costs bandwidth; needed only by in-process restarts, which do not exist here).
# GLOO_SOCKET_IFNAME: megatron_depthattn.launch.torchrun sets it to the interface by which the head node was reached.

# ---- GPUs
_default PYTORCH_ALLOC_CONF expandable_segments:True # sequence lengths and microbatches of several sizes fragment fixed segments

# Tensor, sequence and context parallelism overlap a collective with the matrix product that was launched after it, which
# is in order only with a single hardware queue: Megatron asserts 1 on GPUs before Blackwell (compute capability below 10).
# From Blackwell on order is kept without it, and one queue only costs overlap. It must not be 1 with the UCC backend or
# with fully sharded parameters, which this package does not use. Without a GPU nobody reads it.
_gpu_capability() { command -v nvidia-smi >/dev/null && timeout 60 nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -n | sed -n 's/\..*//;1p'; }
if [ -z "${CUDA_DEVICE_MAX_CONNECTIONS+set}" ]; then
    _capability=$(_gpu_capability) || _capability=
    if [[ $_capability =~ ^[0-9]+$ ]] && [ "$_capability" -lt 10 ]; then export CUDA_DEVICE_MAX_CONNECTIONS=1; fi
fi
unset -f _default _gpu_capability
unset _capability
