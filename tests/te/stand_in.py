"""TransformerEngine on a machine without a GPU, where nothing of it but its Python files needs to be installed.

`FOLDER` holds either these, as ``make install`` puts them there, or a whole TransformerEngine with its compiled
extension. Without that extension, ``transformer_engine_torch`` is stood in for: by an object whose every attribute is a
mock, except for two enumerations with the values of TransformerEngine 2.20.

What is real under the stand-in: everything that TransformerEngine and Megatron-Core do in Python. That is the modules'
construction, their parameters, names, shapes, attributes and initial values; ``state_dict``, ``sharded_state_dict`` and
the FP8 scaling state in them; the checkpoint function; the autocast contexts and their global state; how the fused
optimizer keeps its state.

What it proves nothing about: kernels. No TransformerEngine layer can compute here, not even with the real extension,
which needs a GPU; and which attention backend or FP8 recipe a GPU would allow is not asked.
"""

from __future__ import annotations

import enum
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

FOLDER = Path(os.environ.get("DEPTHATTN_TE", Path(sys.prefix) / "te"))
"""Where TransformerEngine is; on no path, so that Megatron-Core does not find it in any other process."""
REAL, STAND_IN = "real", "stand-in"
_DTYPE = {
    "kByte": 0,
    "kInt32": 2,
    "kFloat32": 4,
    "kFloat16": 5,
    "kBFloat16": 6,
    "kFloat8E4M3": 7,
    "kFloat8E5M2": 8,
    "kFloat4E2M1": 10,
}
_ATTENTION_BACKEND = {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}


def use_transformer_engine() -> dict[str, str]:
    """Import TransformerEngine; call it before Megatron-Core is imported, which looks for it only then.

    Returns which extension it is and what versions there are.
    """
    import torch

    sys.path.append(str(FOLDER))
    is_compiled = any((FOLDER / "transformer_engine").glob("**/transformer_engine_torch*.so"))
    if not is_compiled:
        _stand_in()
    import transformer_engine.pytorch  # noqa: F401

    return {
        "extension": REAL if is_compiled else STAND_IN,
        "transformer_engine": version("transformer_engine"),
        "megatron-core": version("megatron-core"),
        "torch": str(torch.__version__),
    }


def _stand_in() -> None:
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # transformer_engine.common then loads no core library
    mock: Any = MagicMock(name="transformer_engine_torch")
    mock.DType = enum.IntEnum("DType", _DTYPE)
    mock.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", _ATTENTION_BACKEND)
    sys.modules["transformer_engine_torch"] = mock
    with warnings.catch_warnings():  # the package looks for the extension's file at once, and tells that there is none
        warnings.filterwarnings("ignore", message="Detected a PyTorch installation", category=RuntimeWarning)
        import transformer_engine.common
    common: Any = transformer_engine.common
    common.load_framework_extension = lambda framework: None
