"""Strict layering of settings into a frozen dataclass: defaults < YAML files < `a.b=c`.

The tree of a config is its dataclass, so nothing is declared twice: the dotted keys, their types and their
defaults are read from the fields. A field may be a list of sections, `tuple[SomeDataclass, ...]`, whose value is
given as a whole. Each value remembers where it came from, because "unknown key" is only
useful with the file to open. OmegaConf reads YAML (its loader takes `1e-3` as a number, which plain YAML 1.1 does
not). Its interpolations are not used: they can read environment variables, and a config may come from elsewhere.
`${a.b}` stands for another key of the config and for nothing else.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")

BASE_KEY = "base"
COMMAND_LINE = "the command line"
LONGEST_TEXT = 4096
"""Characters of a string; Linux takes no longer path."""
LONGEST_SHOWN = 200
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_PLAIN_SCALAR = re.compile(r"[\w.+-]*", re.ASCII)
_PADDED_INTEGER = re.compile(r"[+-]?0[0-9]+")
_TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


class Layer(NamedTuple):
    """Settings of one origin: `values` maps dotted keys to what was written there."""

    source: str
    values: dict[str, Any]


def layer(source: str, tree: Mapping[Any, Any]) -> Layer:
    """The layer of a nested mapping."""
    return Layer(source, _flatten(tree))


def leaf_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type annotation for every leaf of a dataclass of dataclasses, in field order."""
    leaves: dict[str, Any] = {}
    for name, annotation in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            leaves |= leaf_types(annotation, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = annotation
    return leaves


def read_yaml(path: str | Path, _including: tuple[Path, ...] = ()) -> list[Layer]:
    """Layers of a YAML, weakest first: those of the files under `base:` (relative to it), then its own."""
    path = Path(path)
    if not path.is_file():
        named_in = f" (named under '{BASE_KEY}' in {_including[-1]})" if _including else ""
        raise ValueError(f"config file {path}{named_in} does not exist; give the path of a YAML file")
    if path.resolve() in (seen.resolve() for seen in _including):
        chain = " -> ".join(str(seen) for seen in (*_including, path))
        raise ValueError(f"{path} includes itself through '{BASE_KEY}': {chain}; remove one of these entries")
    content = load_yaml(path)
    bases = content.pop(BASE_KEY, None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"'{BASE_KEY}' in {path} is {_show(bases)}; give one YAML path or a list of them")
    layers = [
        layer for base in bases for layer in read_yaml(path.parent / os.path.expanduser(base), (*_including, path))
    ]
    return [*layers, layer(str(path), content)]


def load_yaml(path: Path) -> dict[Any, Any]:
    """The sections of one YAML file; ValueError if it cannot be read or holds anything else."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except RecursionError as error:
        raise ValueError(f"{path} is not valid YAML: it is nested too deeply") from error
    except (yaml.YAMLError, OSError, ValueError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} is not valid YAML: {_shortened(repr(' '.join(str(error).split()))[1:-1])}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {_show(content)} at its top level; it must hold 'section: {{key: value}}'")
    return content


def parse_overrides(cls: type, arguments: Sequence[str]) -> Layer:
    """`a.b=c` arguments as one layer: a string key of `cls` takes its text literally, other values are YAML.

    Where a key may be null, `null` or nothing (an unset variable of the shell) is that.
    """
    leaves = leaf_types(cls)
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ValueError(
                f"argument {_quoted(argument)} is neither a .yaml file nor key=value, such as train.steps=100"
            )
        options = _options(leaves.get(key))
        if str in options:
            values[key] = None if text in ("", "null") and types.NoneType in options else text
            continue
        try:
            values |= _flatten({key: _yaml_value(text)})
        except (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
            raise ValueError(f"the value in argument {_quoted(argument)} is not valid YAML; quote it") from error
    return Layer(COMMAND_LINE, values)


def _yaml_value(text: str) -> Any:
    """A number, true, false, null, or a list or section in brackets; any other text is itself."""
    if _PADDED_INTEGER.fullmatch(text):  # octal in YAML 1.1; 007 on a command line is seven
        return int(text)
    if text.startswith(("[", "{")):
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    if _PLAIN_SCALAR.fullmatch(text):  # without what YAML would cut off or split: no space, '#', ':', ...
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)["value"]  # type: ignore[index,call-overload]
    return text


def build(cls: type[T], layers: Sequence[Layer]) -> T:
    """Merge `layers`, weakest first, over the defaults of `cls`; ValueError for unknown keys, wrong types."""
    leaves = leaf_types(cls)
    merged = _flatten(dataclasses.asdict(cls()))  # type: ignore[call-overload]
    sources = dict.fromkeys(merged, f"the defaults of {cls.__name__}")
    for layer in layers:
        for key, value in layer.values.items():
            if key in leaves:
                merged[key], sources[key] = value, layer.source
            elif not (value is None and _is_section(key, leaves)):  # 'train:' with every line commented out
                raise ValueError(_unknown_key(key, layer.source, leaves))
    values: dict[str, Any] = {}
    for key in merged:
        _resolve(key, merged, sources, values)
    return _construct(cls, values, sources, "")


def _resolve(
    key: str, merged: Mapping[str, Any], sources: Mapping[str, str], values: dict[str, Any], chain: tuple[str, ...] = ()
) -> Any:
    """Enter into `values` the value of `key`, with every `${a.b}` in it replaced by that of that key; returns it."""

    def fail(reason: str) -> typing.NoReturn:
        raise ValueError(f"{key} (from {sources[key]}) cannot be resolved: {reason}")

    def referenced(name: str) -> Any:
        if name not in merged:
            fail(
                f"{_quoted(name)} is no key of the config; write '${{section.key}}', environment variables are not read"
            )
        value = _resolve(name, merged, sources, values, (*chain, key))
        if isinstance(value, list | dict):
            fail(f"{name} is a list")
        return value

    def replaced(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [replaced(entry) for entry in value]
        if isinstance(value, Mapping):
            return {name: replaced(entry) for name, entry in value.items()}
        if not isinstance(value, str) or "${" not in value:
            return value
        if len(value) > LONGEST_TEXT:
            fail(f"it has {len(value)} characters; set at most {LONGEST_TEXT}")
        whole = _REFERENCE.fullmatch(value)
        result = referenced(whole[1]) if whole else _REFERENCE.sub(lambda match: str(referenced(match[1])), value)
        if isinstance(result, str) and "${" in result:
            fail(f"{_quoted(result)} holds a '${{' that is no '${{section.key}}'")
        if isinstance(result, str) and len(result) > LONGEST_TEXT:
            fail(f"it would have {len(result)} characters; set at most {LONGEST_TEXT}")
        return result

    if key in chain:
        fail(f"it refers to itself: {' -> '.join((*chain, key))}")
    if key not in values:
        values[key] = replaced(merged[key])
    return values[key]


def _construct(cls: type[T], values: Mapping[str, Any], sources: Mapping[str, str], prefix: str) -> T:
    arguments: dict[str, Any] = {}
    for name, annotation in typing.get_type_hints(cls).items():
        key = prefix + name
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            arguments[name] = _construct(annotation, values, sources, f"{key}.")
        else:
            arguments[name] = _checked(values[key], annotation, key, sources[key])
    return cls(**arguments)


def _options(annotation: Any) -> tuple[Any, ...]:
    """The types that a key may have: those of a union, or the one."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)  # Literal | None is the former
    return typing.get_args(annotation) if is_union else (annotation,)


def _checked(value: Any, annotation: Any, key: str, source: str) -> Any:
    options = _options(annotation)
    for option in options:
        if typing.get_origin(option) is Literal:
            if isinstance(value, str) and value in typing.get_args(option):
                return value
        elif typing.get_origin(option) is tuple:
            if isinstance(value, list | tuple):
                item = typing.get_args(option)[0]
                return tuple(_item(item, entry, f"{key}[{i}]", source) for i, entry in enumerate(value))
        elif type(value) is int and option in (int, float) and abs(value) >= 1 << 63:
            raise ValueError(f"{key} is an integer of {value.bit_length()} bits (from {source}); set one below 2^63")
        elif option is float and type(value) is int:
            return float(value)
        elif option is str and isinstance(value, str):
            return _checked_text(value, key, source)
        elif type(value) is option:  # not isinstance: a bool is an int, and `true` is no layer count
            return value
    raise ValueError(f"{key} is {_show(value)} (from {source}); expected {_describe(options)}")


def _checked_text(text: str, key: str, source: str) -> str:
    """Text that can stand in a path, a log line and a job script; `~` is the home folder, as in a shell."""
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{key} (from {source}) has {len(text)} characters; set at most {LONGEST_TEXT}")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        raise ValueError(
            f"{key} is {_quoted(text)} (from {source}), which has a control character or is not UTF-8; leave it out"
        )
    expanded = os.path.expanduser(text)
    if expanded.partition("/")[0] == "~":
        raise ValueError(
            f"{key} is {_quoted(text)} (from {source}), but no home folder is known; set HOME, or the whole path"
        )
    return expanded


def _item(cls: type, entry: Any, key: str, source: str) -> Any:
    """An entry of a list, which holds a value for every field of `cls`."""
    leaves = leaf_types(cls, f"{key}.")
    if not isinstance(entry, Mapping):
        raise ValueError(f"{key} is {_show(entry)} (from {source}); expected a section with {', '.join(leaves)}")
    values = _flatten(entry, f"{key}.")
    for unknown in (name for name in values if name not in leaves):
        raise ValueError(_unknown_key(unknown, source, leaves))
    for missing in (name for name in leaves if name not in values):
        raise ValueError(f"{missing} is missing (in {source}); set it")
    return _construct(cls, values, dict.fromkeys(values, source), f"{key}.")


def _describe(options: Sequence[Any]) -> str:
    names: list[str] = []
    for option in options:
        if typing.get_origin(option) is Literal:
            names.append("one of " + ", ".join(typing.get_args(option)))
        elif typing.get_origin(option) is tuple:
            names.append(f"a list of {{{', '.join(leaf_types(typing.get_args(option)[0]))}}}")
        elif option is not types.NoneType:
            names.append(_TYPE_NAMES[option])
    return " or ".join([*names, "null"] if types.NoneType in options else names)


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    kinds = {str: "string ", list: "list ", dict: "section ", int: "integer ", float: "number "}
    return f"{kinds.get(type(value), '')}{_quoted(value) if isinstance(value, str) else _shortened(repr(value))}"


def _quoted(text: str) -> str:
    """Text of a user or a file in a message: control characters escaped, and not too long to read."""
    return _shortened(repr(text))


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = None if value == {} else value
    return flat


def _is_section(key: str, leaves: Mapping[str, Any]) -> bool:
    return any(leaf.startswith(key + ".") for leaf in leaves)


def _unknown_key(key: str, source: str, leaves: Mapping[str, Any]) -> str:
    if _is_section(key, leaves):
        inside = ", ".join(leaf for leaf in leaves if leaf.startswith(key + "."))
        return f"'{key}' in {source} is a section and takes no value; set one of {inside}"
    nearest = difflib.get_close_matches(key, leaves, n=1, cutoff=0.0)[0]
    # The right name in the wrong section ('train.lr') is a commoner slip than a wrong name in the right one.
    same_name = [leaf for leaf in leaves if leaf.rpartition(".")[2] == key.rpartition(".")[2]]
    if same_name:
        nearest = difflib.get_close_matches(key, same_name, n=1, cutoff=0.0)[0]
    return f"unknown key {_quoted(key)} in {source}; the nearest valid key is '{nearest}'"
