"""All cases and checks of the Triton mix under Triton's interpreter, in a process of its own: TRITON_INTERPRET decides
when the kernels are imported, and once. Prints one JSON object: results by name, and what went wrong."""

import json
import sys
import time
import traceback

from megatron_depthattn.ops import triton_mix
from tests.gpu.mix_cases import CASES, errors
from tests.gpu.mix_checks import CHECKS

MODEL = "a Megatron model"


def model() -> dict[str, float]:
    """Last: from here on the process has the CPU runtime's changes to torch."""
    from megatron_depthattn.parallel.cpu_runtime import enter_cpu_runtime
    from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
    from megatron_depthattn.parallel.launch_env import launch_environment
    from tests.gpu.mix_model import check_model

    enter_cpu_runtime()
    initialize_distributed(launch_environment())
    initialize_model_parallel()
    found = check_model("cpu")
    shut_down()
    return found


def main() -> None:
    assert triton_mix._kernels().ARE_INTERPRETED, "start this with TRITON_INTERPRET=1"
    todo = {name: lambda case=case: errors(case, "cpu") for name, case in CASES.items()}
    todo |= {name: lambda check=check: check("cpu") for name, check in CHECKS.items()} | {MODEL: model}
    done = {}
    for name, run in todo.items():
        started, result, failure = time.process_time(), None, None
        try:
            result = run()
        except Exception:
            failure = traceback.format_exc()
        done[name] = {"result": result, "failure": failure, "cpu_seconds": time.process_time() - started}
    sys.stdout.write("\n" + json.dumps(done))


if __name__ == "__main__":
    main()
