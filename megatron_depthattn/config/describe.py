"""Every key of the config with its type, default and meaning, for `depthattn config` and the help of `train`."""

import ast
import inspect
from functools import reduce
from typing import Any, NamedTuple

from megatron_depthattn.config import schema
from megatron_depthattn.config.load import leaf_types, type_name


class Key(NamedTuple):
    """One key of the config."""

    name: str
    type: str
    """In words, such as `an integer or null`."""
    default: Any
    meaning: str
    """The docstring under its field."""


def config_reference() -> list[Key]:
    """Every dotted key, in the order of the sections."""
    meanings = {
        (section.name, ast.unparse(entry.target)): ast.literal_eval(following.value)
        for section in ast.parse(inspect.getsource(schema)).body
        if isinstance(section, ast.ClassDef)
        for entry, following in zip(section.body, section.body[1:], strict=False)
        if isinstance(entry, ast.AnnAssign) and isinstance(following, ast.Expr)
    }
    keys = []
    for name, annotation in leaf_types(schema.RunConfig).items():
        *path, last = name.split(".")
        section = reduce(getattr, path, schema.RunConfig())
        meaning = " ".join(meanings[type(section).__name__, last].split())
        keys.append(Key(name, type_name(annotation), getattr(section, last), meaning))
    return keys
