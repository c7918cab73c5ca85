"""What the verbs share: parsers, errors of one line, exit codes, shipped configs by name."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import megatron_depthattn
from megatron_depthattn.quiet import silence_libraries
from megatron_depthattn.terminal import printable


def new_parser(verb: str, description: str | None, **settings: Any) -> argparse.ArgumentParser:
    """A parser that is called ``depthattn VERB``, or by the name of the file in tools/ that was started."""
    script = Path(sys.argv[0])
    prog = script.name if script.parent.name == "tools" else f"depthattn {verb}"
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=prog, description=description, formatter_class=layout, **settings)


def add_config(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """The arguments CONFIG and overrides."""
    shipped = "YAML file of a run, or the name of a shipped one, such as quickstart"
    parser.add_argument("config", metavar="CONFIG", nargs="?" if optional else None, help=shipped)
    override = "further YAML files and settings; later ones win. `depthattn config` lists all keys"
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help=override)


def shipped_folder(name: str) -> Path:
    """``configs`` of the checkout, or its copy in the installed package."""
    package = Path(megatron_depthattn.__file__).parent
    return package.parent / name if (package.parent / "pyproject.toml").is_file() else package / name


def find_config(text: str) -> str:
    """The path of a config or overlay: a file that exists, or a shipped one of this name; settings stay."""
    folder = shipped_folder("configs")
    shipped = (str(path) for path in (folder / f"{text}.yaml", folder.parent / text) if path.is_file())
    return text if "=" in text or Path(text).exists() else next(shipped, text)


def run(
    function: Callable[[argparse.Namespace], int | None], given: argparse.Namespace, *errors: type[Exception]
) -> int:
    """The exit code of a verb: the function's (None: 0), 1 after an error of one line, 130 after Ctrl-C.

    Args:
        errors: what else, beside ValueError and OSError, is the user's to fix.
    """
    caught: tuple[type[Exception], ...] = (ValueError, OSError, *errors)
    try:
        with warnings.catch_warnings():
            silence_libraries()
            warnings.simplefilter("ignore")
            return function(given) or 0
    except caught as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"error: interrupted{error}", file=sys.stderr)
        return 130


def check(*conditions: tuple[bool, str]) -> None:
    """Raise ValueError with the text of the first condition that is true."""
    for is_wrong, text in conditions:
        if is_wrong:
            raise ValueError(text)


def lacks_folder(option: str, file: Path | None) -> tuple[bool, str]:
    """A condition for `check`: there is no folder to write ``file`` to."""
    lacks = file is not None and not file.absolute().parent.is_dir()
    return lacks, f"{option} {file}: its folder does not exist; make it first"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int = 160, **settings: Any) -> None:
    """Print a table as wide as the terminal, or ``width`` in a file; plain lines where ``rich`` is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(printable("\n".join(" | ".join(row) for row in (columns, *rows))))
        return
    table = Table(*columns, **settings)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else width).print(table)
