"""TransformerEngine on a machine without a GPU, where nothing of it but its Python files needs to be installed.

`FOLDER` holds either these, as ``make install`` puts them there, or a whole TransformerEngine with its compiled
extension. Without that extension, ``transformer_engine_torch`` is stood in for by tests/te/extension.

What is real under the stand-in: everything that TransformerEngine and Megatron-Core do in Python. That is the modules'
construction, their parameters, names, shapes, attributes and initial values; ``state_dict``, ``sharded_state_dict`` and
the FP8 scaling state in them; the checkpoint function; the autocast contexts and their global state; the optimizer;
and, within `tests.te.kernels.computing`, what layers do with the results of the kernels.

What it proves nothing about: the kernels themselves, fused attention, and what a GPU can run.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("DEPTHATTN_TE", Path(sys.prefix) / "te"))
"""Where TransformerEngine is; on no path, so that Megatron-Core does not find it in any other process."""
REAL, STAND_IN = "real", "stand-in"
is_computing = False
"""Whether this process runs tests in tests/te/inside.py."""


def use_transformer_engine() -> dict[str, str]:
    """Import TransformerEngine; call it before Megatron-Core is imported, which looks for it only then.

    Returns which extension it is and what versions there are.
    """
    import torch

    sys.path.append(str(FOLDER))
    if not is_compiled():
        _stand_in()
    import transformer_engine.pytorch  # noqa: F401

    return {
        "extension": REAL if is_compiled() else STAND_IN,
        "transformer_engine": version("transformer_engine"),
        "megatron-core": version("megatron-core"),
        "torch": str(torch.__version__),
    }


def is_compiled() -> bool:
    """Whether `FOLDER` holds the extension too."""
    return any((FOLDER / "transformer_engine").glob("**/transformer_engine_torch*.so"))


def _stand_in() -> None:
    from tests.te import extension

    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # transformer_engine.common then loads no core library
    sys.modules[extension.NAME] = extension.module()
    with warnings.catch_warnings():  # the package looks for the extension's file at once, and warns that there is none
        warnings.filterwarnings("ignore", message="Detected a PyTorch installation", category=RuntimeWarning)
        import transformer_engine.common
    common: Any = transformer_engine.common
    common.load_framework_extension = lambda framework: None
