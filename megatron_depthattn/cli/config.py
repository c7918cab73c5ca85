"""Config keys, or the resolved config of a run.

depthattn config                      every key: type, default, meaning
depthattn config optimizer train.steps    those of sections, or single ones
depthattn config CONFIG [OVERLAY ...] [a.b=c ...]    the resolved config, with the origin of every value
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_depthattn.cli.common import find_config, flat, new_parser, run
from megatron_depthattn.terminal import printable


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the config."""

    name: str
    type: str
    default: Any
    meaning: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 1 with one line on stderr."""
    parser = new_parser("config", __doc__)
    words = "sections or keys; or CONFIG, further YAML files, a.b=c settings"
    parser.add_argument("words", metavar="WORD", nargs="*", help=words)
    return run(_config, parser.parse_args(arguments))


def _config(given: argparse.Namespace) -> None:
    from megatron_depthattn.config import RunConfig

    first, *others = given.words or [""]
    if Path(found := find_config(first)).is_file() or first.endswith((".yaml", ".yml")):
        for line in resolved(found, list(map(find_config, others))):
            print(printable(line))
        return
    keys = list(reference(RunConfig))
    for word in given.words or [""]:
        some = [key for key in keys if not word or key.name == word or key.name.startswith(f"{word}.")]
        if not some:
            names = [key.name for key in keys]
            sections = {name.rpartition(".")[0] for name in names}
            near = difflib.get_close_matches(word, [*names, *sections], 1)
            hint = f"; did you mean {near[0]}?" if near else "; `depthattn config` lists all"
            raise ValueError(f"{word!r} is no key, section or YAML file{hint}")
        for key in some:
            print(f"{key.name}={json.dumps(key.default)}    {key.type}")
            print(textwrap.fill(key.meaning, 110, initial_indent="    ", subsequent_indent="    ") or "    -")


def reference(cls: type, prefix: str = "") -> Iterator[Key]:
    """Every key of a dataclass of dataclasses, in the order of its fields, with the docstring that follows it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }
    defaults, types = cls(), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        value, annotation = getattr(defaults, field.name), types[field.name]
        if dataclasses.is_dataclass(value):
            yield from reference(type(value), f"{prefix}{field.name}.")
        else:
            kind = getattr(annotation, "__name__", str(annotation)) if isinstance(annotation, type) else str(annotation)
            kind = kind.replace("typing.", "").replace("megatron_depthattn.config.", "").replace("None", "null")
            yield Key(prefix + field.name, kind, value, texts.get(field.name, ""))


def resolved(path: str, overrides: Sequence[str]) -> Iterator[str]:
    """``key=value`` of a config with what gave it: the default, or the file or setting that changed it last."""
    from megatron_depthattn.config import RunConfig, load_config, to_dict

    files = [word for word in overrides if Path(word).is_file()]
    given = [*files, *(word for word in overrides if word not in files)]
    values = dict(flat(to_dict(RunConfig())))
    origins = dict.fromkeys(values, "default")
    for i, origin in enumerate([path, *given]):
        now = dict(flat(to_dict(load_config(path, given[:i]))))
        origins |= {key: origin for key, value in now.items() if value != values[key]}
        values = now
    for key, value in values.items():
        yield f"{f'{key}={json.dumps(value)}':56}  # {origins[key]}"
