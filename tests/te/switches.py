"""A switch that only TransformerEngine's layers have: userbuffers."""

from __future__ import annotations

from typing import Any
from unittest.mock import create_autospec, patch

import torch
from transformer_engine.pytorch.module import base

from megatron_depthattn.train.build import build_chunk, initialize_userbuffers, transformer_config
from tests.te.layouts import Layout, _a_gpu, _world
from tests.te.small import small_config


def userbuffers() -> dict[str, Any]:
    """What is asked of TransformerEngine before the model is built, and which layers then use it for what."""
    with _world(Layout("small", tensor=2)), _a_gpu(torch.device("cpu")):
        config = small_config("te", tensor=2, sequence=True, tp_comm_overlap=True)
        initialize = create_autospec(base.initialize_ub)  # its signature; the buffers are GPU memory
        with patch.object(base, "initialize_ub", initialize):
            initialize_userbuffers(config)
        with patch.object(base, "_ub_initialized", True):
            model = build_chunk(config, transformer_config(config))
        ways = ("ub_overlap_ag_fprop", "ub_overlap_rs_fprop", "ub_bulk_dgrad", "ub_bulk_wgrad")
        asked = initialize.call_args.kwargs
        return {
            "asked": asked | {"quantization_modes": [mode.value for mode in asked["quantization_modes"]]},
            "layers": {
                name: (module.ub_name, [way for way in ways if getattr(module, way)])
                for name, module in model.decoder.layers[0].named_modules()
                if getattr(module, "ub_name", None)
            },
        }
