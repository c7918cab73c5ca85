"""Config keys, or the resolved config of a run.

depthattn config                      every key: type, default, meaning
depthattn config optimizer train.steps    those of sections, or single ones
depthattn config CONFIG [OVERLAY ...] [a.b=c ...]    the resolved config, with the origin of every value
"""

from __future__ import annotations

import argparse
import difflib
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_depthattn.cli.common import find_config, new_parser, run
from megatron_depthattn.terminal import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 1 with one line on stderr."""
    parser = new_parser("config", __doc__)
    parser.add_argument("words", metavar="WORD", nargs="*", help="sections or keys; or CONFIG, YAML files, a.b=c")
    return run(_config, parser.parse_args(arguments))


def _config(given: argparse.Namespace) -> None:
    from megatron_depthattn.config import config_reference

    first, *others = given.words or [""]
    if Path(found := find_config(first)).is_file() or first.endswith((".yaml", ".yml")):
        for line in resolved(found, list(map(find_config, others))):
            print(printable(line))
        return
    keys = config_reference()
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


def resolved(path: str, overrides: Sequence[str]) -> Iterator[str]:
    """``key=value`` of a config with what gave it: the default, or the file or setting that changed it last."""
    from megatron_depthattn.config import RunConfig, to_dict
    from megatron_depthattn.config.load import build, flatten, parse_overrides, read_yaml

    files = [word for word in overrides if Path(word).is_file() or "=" not in word]
    layers = [(layer.source, layer) for file in (path, *files) for layer in read_yaml(file)]
    layers += [(word, parse_overrides([word])) for word in overrides if word not in files]
    values = flatten(to_dict(RunConfig()))
    origins = dict.fromkeys(values, "default")
    for i, (origin, _) in enumerate(layers, 1):
        now = flatten(to_dict(build(RunConfig, [layer for _, layer in layers[:i]])))
        origins |= {key: origin for key, value in now.items() if value != values[key]}
        values = now
    for key, value in values.items():
        yield f"{f'{key}={json.dumps(value)}':56}  # {origins[key]}"
