"""What tests/te needs of TransformerEngine but its kernels, in one process: ``python -m tests.te.worker FOLDER``.

``FOLDER`` holds the checkpoints named in conversion.py; ``RESULTS`` is written there.
"""

import sys
from pathlib import Path
from typing import Any

RESULTS = "results.pt"


def local_layers() -> Any:
    """Loss and gradients of local layers, for which Megatron-Core takes some of TransformerEngine's functions here."""
    from tests.unit.test_recompute import build, loss_and_gradients

    return loss_and_gradients(build(depth_attention_stride=1))


def main(folder: Path) -> None:
    from tests.te.stand_in import use_transformer_engine

    versions = use_transformer_engine()
    from megatron_depthattn.parallel import cpu_runtime

    # As on a GPU: TransformerEngine's Adam keeps the optimizer's state.
    cpu_runtime._replace_fused_optimizer = lambda: None
    cpu_runtime.enter_cpu_runtime()
    import torch
    from transformer_engine.pytorch import quantization

    from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
    from megatron_depthattn.parallel.launch_env import launch_environment
    from tests.te import conversion, layouts, methods, support, switches

    quantization.get_device_compute_capability = lambda: (9, 0)  # an H100's
    initialize_distributed(launch_environment())
    initialize_model_parallel()
    results = {"versions": versions, "conversion": conversion.results(folder)}
    results |= {"support": support.results(), "fp8 attention": support.attention()}
    results |= {"methods": methods.results(folder), "local_layers": local_layers()}
    shut_down()
    for spec in layouts.SPECS:
        results[spec] = {layout.name: layouts.describe(layout, spec) for layout in layouts.LAYOUTS}
        results[spec]["keeps projection"] = layouts.keeps_projection(spec)
        results[spec]["error"] = layouts.error_of(layouts.INDIVISIBLE, spec)
    results["userbuffers"] = switches.userbuffers()
    torch.save(results, folder / RESULTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
