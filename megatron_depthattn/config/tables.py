"""The generated tables of docs/support.md: `python -m megatron_depthattn.config.tables` writes them anew."""

import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from megatron_depthattn.config.check import Check
from megatron_depthattn.config.checks import CHECKS
from megatron_depthattn.config.hardware_checks import ACCELERATOR_CHECKS, KERNEL_CHECKS
from megatron_depthattn.config.resolve import AUTO_CHECKS

START, END = "<!-- generated: the tables of unsupported combinations -->", "<!-- end of the generated tables -->"
PAGE = Path(__file__).parents[2] / "docs" / "support.md"


def tables() -> str:
    """Every check as a row of Markdown: those of a run's config, and those of the layer specs alone."""
    from megatron_depthattn.model.unsupported import MEGATRON_CHECKS  # imports Megatron-Core

    of_runs = (*CHECKS, *ACCELERATOR_CHECKS, *KERNEL_CHECKS, *AUTO_CHECKS)
    return (
        f"## Unsupported in a run's config\n\n{_table(of_runs)}\n\n"
        f"## Unsupported in Megatron's `TransformerConfig`, with the layer specs alone\n\n{_table(MEGATRON_CHECKS)}"
    )


def page(text: str) -> str:
    """The page with its tables anew."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{tables()}\n{END}{rest.partition(END)[2]}"


def _table(checks: Iterable[Check]) -> str:
    lines = ["| | unsupported | because | instead |", "|---|---|---|---|"]
    ordered = sorted(checks, key=lambda check: check.section)
    for (section, why, remedy), alike in groupby(ordered, lambda check: (check.section, check.why, check.remedy)):
        given = ", ".join(_marked(check.given) for check in alike)
        lines.append(f"| {section} | {given} | {_marked(why)} | {_marked(remedy)} |")
    return "\n".join(lines)


def _marked(text: str) -> str:
    """Keys in backticks; `{key=}` and `{key is}` by the key, what is only known in a run by its name."""
    text = re.sub(r"\{(\w+)=\}", r"`\1`", text)
    text = re.sub(r"\{(\w+)\}", r"<\1>", text)
    text = re.sub(r"\{([\w.]+)(?:=| is)?(?:\|([^}]*))?\}", lambda m: " ".join(filter(None, m.groups())), text)
    key = r"<\w+>\.\w+|(?<![\w/-])[a-z_]+(?:\.[a-z_0-9]+)+|\b[a-z]\w*(?==)"
    text = re.sub(rf"((?:{key})(?:=[\w<>.'/]+)?|<\w+>)", r"`\1`", text)
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
