"""All cases and checks of the Triton mix under Triton's interpreter, in a process of its own: TRITON_INTERPRET decides
when the kernels are imported, and once. Prints one JSON object: results by name, and what went wrong."""

import json
import sys
import time
import traceback

from megatron_depthattn.ops import triton_mix
from tests.gpu.mix_cases import CASES, CHECKS, errors


def main() -> None:
    assert triton_mix._kernels().ARE_INTERPRETED, "start this with TRITON_INTERPRET=1"
    todo = {name: lambda case=case: errors(case, "cpu") for name, case in CASES.items()}
    todo |= {name: lambda check=check: check("cpu") for name, check in CHECKS.items()}
    done = {}
    for name, run in todo.items():
        started, result, failure = time.perf_counter(), None, None
        try:
            result = run()
        except Exception:
            failure = traceback.format_exc()
        done[name] = {"result": result, "failure": failure, "seconds": time.perf_counter() - started}
    json.dump(done, sys.stdout)


if __name__ == "__main__":
    main()
