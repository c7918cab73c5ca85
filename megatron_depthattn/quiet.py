"""Silence for what libraries print about themselves and about optional packages, so that a console holds our lines."""

from __future__ import annotations

import logging
import sys
import warnings

_LIBRARIES = r"(megatron\.core|torch|torchao|transformers|huggingface_hub|streaming|deepspeed|apex)\b"
# Warnings that libraries attribute to their caller, or that come from processes which a library starts.
_MESSAGES = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "TransformerEngine",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "`load_state_dict` is deprecated",
    "torch.jit.script",
)
_LOGGERS = ("megatron.core", "torch.utils.cpp_extension", "torch.distributed.elastic.multiprocessing.redirects")


def silence_libraries() -> None:
    """Hide warnings of libraries, here and in the processes that they start; call it before torch is imported."""
    warnings.filterwarnings("ignore", module=_LIBRARIES)
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=f".*{message}")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.warnoptions += [f"ignore:{message}" for message in _MESSAGES]  # multiprocessing hands them to its children
