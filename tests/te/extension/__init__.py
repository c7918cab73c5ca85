"""``transformer_engine_torch``, TransformerEngine's compiled extension, in plain torch: what a dense decoder calls.

Every function has the signature that TransformerEngine's Python expects (2.20), and its docstring names the statement
of TransformerEngine's sources that it follows: paths below ``transformer_engine/common`` (C++ and CUDA), ``csrc``
(``pytorch/csrc``) or ``pytorch``. FP8 tensors have the bytes, scales and copies that the kernels would leave behind;
sums are fp32 in torch's order. It shows what TransformerEngine and Megatron do with these results, not that a GPU's
kernels compute them.

A name that is not here is a class of its own: it can be imported, compared and be a key, and an attribute of it is one
more. Calling it raises `NotImplementedError` with its name.
"""

from __future__ import annotations

import enum
from types import ModuleType
from typing import Any

from tests.te.extension import attention, casts, norms, optimizer, products

NAME = "transformer_engine_torch"
PARTS = (casts, products, norms, attention, optimizer)


class _Missing(type):
    def __getattr__(cls, name: str) -> _Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, missing(f"{cls.__name__}.{name}"))
        return getattr(cls, name)

    def __int__(cls) -> int:  # pytorch/attention/custom_ops.py keys a table by it
        return id(cls)

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{NAME}.{cls.__name__} is not stood in for (tests/te/extension)")


def missing(name: str) -> _Missing:
    return _Missing(name, (), {})


class _Extension(ModuleType):
    def __getattr__(self, name: str) -> _Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, missing(name))
        return getattr(self, name)


def _numbered(name: str, *members: str) -> type[enum.IntEnum]:
    return enum.IntEnum(name, {member: index for index, member in enumerate(members)})


def _gemms(*tensors: str) -> list[str]:
    return [tensor.replace("#", str(gemm)) for gemm in (1, 2, 3) for tensor in tensors]


def module() -> ModuleType:
    """A new module of that name."""
    extension = _Extension(NAME)
    # csrc/extensions/pybind.cpp and common/include/transformer_engine: the values that Python computes with
    extension.DType = casts.DType
    extension.FP8FwdTensors = _numbered("FP8FwdTensors", *_gemms("GEMM#_INPUT", "GEMM#_WEIGHT", "GEMM#_OUTPUT"))
    extension.FP8BwdTensors = _numbered("FP8BwdTensors", *_gemms("GRAD_OUTPUT#", "GRAD_INPUT#"))
    extension.NVTE_Fused_Attn_Backend = attention.Backend
    for part in PARTS:
        for name in part.__all__:
            setattr(extension, name, getattr(part, name))
    # pytorch/cpp_extensions/__init__.py passes on what there is when it is imported
    for name in ("layernorm_fwd", "layernorm_bwd"):
        getattr(extension, name)
    return extension
