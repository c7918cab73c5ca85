"""Code lines (no comments, docstrings, blank lines) of each room of the repository: python tests/code_lines.py."""

import ast
import collections
import io
import subprocess
import tokenize
from pathlib import Path

SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(source: str) -> int:
    """Lines of Python ``source`` with code on them."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def room(path: str) -> str:
    """The folder that a file is counted under: two levels at most."""
    return "/".join(path.split("/")[:-1][:2])


def main() -> None:
    """Print the table and the sums of product and tests."""
    files = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True).stdout.split()
    rooms: collections.Counter[str] = collections.Counter()
    for path in files:
        rooms[room(path)] += code_lines(Path(path).read_text())
    for name, lines in sorted(rooms.items()):
        print(f"{lines:7,d}  {name}")
    tests = sum(lines for name, lines in rooms.items() if name.startswith("tests"))
    print(f"{rooms.total() - tests:7,d}  product\n{tests:7,d}  tests")


if __name__ == "__main__":
    main()
