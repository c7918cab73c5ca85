"""Reading a config: the defaults < the files under `base:` < the YAML < overlays < `a.b=c`.

    config = load_config("CONFIG.yaml", ["OVERLAY.yaml", "train.steps=100"])

OmegaConf's structured configs check types, literals, optional values and unknown keys. Every value is set on its
own, so that an error names its key and the file. Text is literal: `${...}` reads neither other keys nor the
environment, since a config may come from elsewhere.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import types
import typing
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from megatron_depthattn.config.check import as_yaml
from megatron_depthattn.config.schema import RunConfig
from megatron_depthattn.durable import write_durably

T = TypeVar("T")

COMMAND_LINE = "the command line"
RENAMED = {"train.max_fruitless_starts": "train.max_restarts_without_progress"}
"""Keys of configs that were saved by earlier versions; on the command line they are unknown."""
LONGEST_TEXT = 4096
"""Characters of a string; Linux takes no longer path."""
_TYPES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", types.NoneType: "null"}
"""How a type is named in errors."""


class Layer(NamedTuple):
    """Settings of one origin: nested sections, dotted keys, or both."""

    source: str
    values: Mapping[Any, Any]


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: 1e-3 is a number, 007 is seven, `yes` and dates are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as in the base class

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        names = [repr(self.construct_object(key, deep=True)) for key in own]  # type: ignore[no-untyped-call]
        if len(set(names)) < len(names):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        self.flatten_mapping(node)
        return super().construct_mapping(node, deep=deep)


for _kind, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
    "merge": "<<",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or `_Loader` would take for something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in the base class
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()),
            *_Loader.yaml_implicit_resolvers.get(first, ()),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, then the arguments: those that end in .yaml are overlays, the others are `a.b=c`.

    `a.b=c` wins over every file wherever it stands.

    Raises:
        ValueError: a missing or malformed file, an unknown key or a value of the wrong type.
    """
    overlays = [argument for argument in overrides if _is_overlay(argument)]
    layers = [layer for file in (path, *overlays) for layer in read_yaml(file)]
    settings = [argument for argument in overrides if not _is_overlay(argument)]
    return build(RunConfig, [*layers, parse_overrides(settings)])


def load_record(path: str | Path) -> RunConfig:
    """The config.yaml that a run has left, for tools that only read it.

    That of a looped model with Depth-Attention may be older than loop_sources, and then its sources are ``unrolled``.
    """
    older = Layer("an older run", {"model": {"depth_attention": {"loop_sources": "unrolled"}}})
    config = load_config(path)
    has_rule = config.model.num_loops > 1 and config.model.effective_method == "depth_attention"
    return build(RunConfig, [older, *read_yaml(path)]) if has_rule else config


def _is_overlay(argument: str) -> bool:
    # A key has no slash, a folder may have '=': 'data.path=x.yaml' sets a key, 'runs/lr=1/c.yaml' is a file.
    return argument.endswith((".yaml", ".yml")) and ("=" not in argument or "/" in argument.partition("=")[0])


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain dict of every key."""
    return dataclasses.asdict(config)


def config_digest(config: RunConfig) -> str:
    """SHA-256 of every key and value, shortened: distinguishes two configs."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


def from_dict(values: dict[str, Any], source: str) -> RunConfig:
    """The config of a nested dict, as `to_dict` gives it; `source` names it in errors.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
    """
    return build(RunConfig, [Layer(source, values)])


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write every key as YAML that `load_config` reads back to an equal config."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_durably(Path(path), yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def config_keys() -> tuple[str, ...]:
    """Every dotted key, in the order of the sections."""
    return tuple(leaf_types(RunConfig))


def leaf_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Type of every dotted key of a dataclass of dataclasses."""
    leaves: dict[str, Any] = {}
    for name, annotation in typing.get_type_hints(cls).items():
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            leaves |= leaf_types(annotation, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = annotation
    return leaves


def read_yaml(path: str | Path, _including: tuple[Path, ...] = ()) -> list[Layer]:
    """Layers of a YAML, weakest first: those of the files under `base:` (relative to it), then its own."""
    path = Path(path)
    if not path.is_file():
        named_in = f" (named under 'base' in {_including[-1]})" if _including else ""
        raise ValueError(f"config file {path}{named_in} does not exist; give the path of a YAML file")
    if path.resolve() in (seen.resolve() for seen in _including):
        way = " -> ".join(map(str, (*_including, path)))
        raise ValueError(f"{path} includes itself through 'base': {way}; remove one of these entries")
    try:
        content = yaml.load(path.read_text("utf-8"), _Loader)
        content = {} if content is None else content
    except RecursionError as error:
        raise ValueError(f"{path} is not valid YAML: it is nested too deeply") from error
    except (yaml.YAMLError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not valid YAML: {_quoted(' '.join(str(error).split()))[1:-1]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {_show(content)} at its top level; it must hold 'section: {{key: value}}'")
    bases = content.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"'base' in {path} is {_show(bases)}; give one YAML path or a list of them")
    below = [path.parent / os.path.expanduser(base) for base in bases]
    return [*(layer for base in below for layer in read_yaml(base, (*_including, path))), Layer(str(path), content)]


def parse_overrides(arguments: Sequence[str], cls: type = RunConfig) -> Layer:
    """`a.b=c` arguments for ``cls``: a string key takes its text literally, others numbers, true, false, null, lists.

    Where a key may be null, `null` or nothing (an unset variable of the shell) is that.
    """
    leaves, values = leaf_types(cls), dict[str, Any]()
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ValueError(
                f"argument {_quoted(argument)} is neither a .yaml file nor key=value, such as train.steps=100"
            )
        options = _options(leaves.get(key))
        values[key] = text
        if str in options:
            values[key] = None if text in ("", "null") and types.NoneType in options else text
        elif text.startswith(("[", "{")) or re.fullmatch(r"[\w.+~-]*", text, re.ASCII):  # YAML would cut at ' #'
            try:
                values[key] = yaml.load(text, _Loader)
            except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise ValueError(f"the value in argument {_quoted(argument)} is not valid YAML; quote it") from error
    return Layer(COMMAND_LINE, values)


def build(cls: type[T], layers: Sequence[Layer]) -> T:
    """Merge `layers`, weakest first, over the defaults of `cls`; ValueError for unknown keys, wrong types."""
    leaves, config = leaf_types(cls), OmegaConf.structured(cls)
    source = f"the defaults of {cls.__name__}"
    try:
        for source, values in layers:
            for key, value in flatten(values, leaves).items():
                known = key if source == COMMAND_LINE else RENAMED.get(key, key)
                _set(config, known, value, leaves, source)
        return typing.cast(T, _mapped(OmegaConf.to_object(config), lambda text: text.replace("\0", "")))
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} is missing (in {source}); set it") from error
    except RecursionError as error:
        raise ValueError(f"a value in {source} is nested too deeply") from error


def _set(config: DictConfig, key: str, value: Any, leaves: Mapping[str, Any], source: str) -> None:
    """Set one key of a structured config."""
    if key not in leaves:
        inside = [leaf for leaf in leaves if leaf.startswith(f"{key}.")]
        if inside and value in (None, {}):  # 'train:' with every line commented out
            return
        if inside:
            raise ValueError(f"'{key}' in {source} is a section and takes no value; set one of {', '.join(inside)}")
        raise ValueError(_unknown_key(key, source, leaves))
    if type(value) is int and abs(value) >= 1 << 63:
        raise ValueError(f"{key} is an integer of {value.bit_length()} bits (from {source}); set one below 2^63")
    if isinstance(value, str) and (named := re.search(r"\$\{([\w.]+)\}", value)) and named[1] in leaves:
        raise ValueError(
            f"{key} is {_quoted(value)} (from {source}): keys are not read in values; write what it stands for"
        )
    section, _, name = key.rpartition(".")
    node = OmegaConf.select(config, section) if section else config
    OmegaConf.set_readonly(node, False)  # frozen are the objects that it becomes
    try:
        if type(value) not in chain(*map(_accepted, _options(leaves[key]))):  # OmegaConf would take `1` for true
            raise TypeError
        if dict[str, str] in _options(leaves[key]) and isinstance(value, dict):
            if not all(isinstance(text, str) for text in chain(*value.items())):  # OmegaConf would make it text
                raise TypeError
            node[name] = None  # it replaces what weaker layers say, as a list does
        node.merge_with({name: _mapped(value, lambda text: _literal(text, key, source))})
    except ConfigKeyError as error:
        known = [field.name for field in dataclasses.fields(typing.cast(Any, error.object_type))]
        raise ValueError(_unknown_key(f"{key}.{error.key}", source, [f"{key}.{name}" for name in known])) from error
    except (OmegaConfBaseException, TypeError) as error:
        nested = isinstance(value, list | dict) and str(error)
        detail = f" ({nested.splitlines()[0]})" if nested else ""
        raise ValueError(
            f"{key} is {_show(value)} (from {source}); expected {type_name(leaves[key])}{detail}"
        ) from error


def _literal(text: str, key: str, source: str) -> str:
    """Text for OmegaConf, with a NUL where it would see a reference or a missing value; `~` is the home folder."""
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{key} (from {source}) has {len(text)} characters; set at most {LONGEST_TEXT}")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        raise ValueError(
            f"{key} is {_quoted(text)} (from {source}), which has a control character or is not UTF-8; leave it out"
        )
    text = os.path.expanduser(text)
    if text.partition("/")[0] == "~":
        raise ValueError(
            f"{key} is {_quoted(text)} (from {source}), but no home folder is known; set HOME, or the whole path"
        )
    return f"\0{text}" if text == "???" else text.replace("${", "$\0{")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(entry, change) for entry in value]
    if isinstance(value, dict):
        return {name: _mapped(entry, change) for name, entry in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{name: _mapped(entry, change) for name, entry in vars(value).items()})
    return value


def flatten(tree: Mapping[Any, Any], leaves: Mapping[str, Any] | None = None, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value of nested sections, down to the keys of `leaves` (null: those of a run's config)."""
    flat: dict[str, Any] = {}
    leaves = leaf_types(RunConfig) if leaves is None else leaves
    for name, value in tree.items():
        if isinstance(value, Mapping) and value and f"{prefix}{name}" not in leaves:
            flat |= flatten(value, leaves, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _options(annotation: Any) -> tuple[Any, ...]:
    """The types that a key may have: those of a union, or the one."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)  # Literal | None is the former
    return typing.get_args(annotation) if is_union else (annotation,)


def _accepted(option: Any) -> tuple[type, ...]:
    """The types of YAML that an option takes."""
    kind = typing.get_origin(option) or option
    return (dict,) if dataclasses.is_dataclass(kind) else {Literal: (str,), float: (int, float)}.get(kind, (kind,))


def type_name(annotation: Any) -> str:
    """The type of a key in words."""
    names = []
    for option in _options(annotation):
        origin, items = typing.get_origin(option), typing.get_args(option)
        if origin is Literal:
            names.append("one of " + ", ".join(items))
        elif origin is list:
            inside = _TYPES.get(items[0]) or f"{{{', '.join(leaf_types(items[0]))}}}"
            names.append(f"a list, each entry {inside}")
        elif option == dict[str, str]:
            names.append(f"{{name: {_TYPES[str]}}}")
        else:
            names.append(_TYPES.get(option, "a section"))
    return " or ".join(names)


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return as_yaml(value)
    kinds = {str: "string ", list: "list ", dict: "section ", int: "integer ", float: "number "}
    return f"{kinds.get(type(value), '')}{_quoted(value)}"


def _quoted(value: Any) -> str:
    """A value in a message: control characters escaped, and not too long to read."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _unknown_key(key: str, source: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    # The right name in the wrong section ('train.lr') is a commoner slip than a wrong name in the right one.
    same_name = [leaf for leaf in known if leaf.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = difflib.get_close_matches(key, same_name or list(known), n=1, cutoff=0.0)[0]
    return f"unknown key {_quoted(key)} in {source}; the nearest valid key is '{nearest}'"
