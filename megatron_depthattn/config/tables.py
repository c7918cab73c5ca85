"""The generated tables of docs/support.md: `python -m megatron_depthattn.config.tables` writes them anew."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_depthattn.config.check import Check
from megatron_depthattn.config.checks import CHECKS, validate
from megatron_depthattn.config.hardware_checks import ACCELERATOR_CHECKS, KERNEL_CHECKS, PACKAGE_CHECKS
from megatron_depthattn.config.load import load_config
from megatron_depthattn.config.resolve import AUTO_CHECKS
from megatron_depthattn.config.schema import RunConfig

SIZES = ("360m", "410m", "500m", "710m", "1.5b", "3b")
START, END = "<!-- generated: the tables of unsupported combinations -->", "<!-- end of the generated tables -->"
PAGE = Path(__file__).parents[2] / "docs" / "support.md"


def tables() -> str:
    """Every check as a row of Markdown: those of a run's config, and those of the layer specs alone."""
    from megatron_depthattn.model.unsupported import MEGATRON_CHECKS  # imports Megatron-Core

    of_runs = (*CHECKS, *ACCELERATOR_CHECKS, *KERNEL_CHECKS, *PACKAGE_CHECKS, *AUTO_CHECKS)
    return (
        f"## Layouts of the shipped sizes\n\n{_layouts()}\n\n"
        f"## Unsupported in a run's config\n\n{_table(of_runs)}\n\n"
        f"## Unsupported in Megatron's `TransformerConfig`, with the layer specs alone\n\n{_table(MEGATRON_CHECKS)}"
    )


def _layouts() -> str:
    """Ranks that each axis may have by the checks, the other axes being 1."""
    axes: dict[str, tuple[str, Any]] = {
        "`parallel.tensor`": ("tensor", None),
        "`parallel.tensor` with FP8 (mxfp8: some fewer)": ("tensor", "tensorwise"),
        "`parallel.pipeline`": ("pipeline", None),
        "`parallel.context`": ("context", None),
    }
    lines = [f"| ranks of one axis, up to 64 | {' | '.join(axes)} |", f"|---|{'---|' * len(axes)}"]
    for size in SIZES:
        config = load_config(PAGE.parents[1] / f"configs/{size}.yaml")
        allowed = (", ".join(_allowed(config, axis, fp8)) or "none" for axis, fp8 in axes.values())
        lines.append(f"| `configs/{size}.yaml` | {' | '.join(allowed)} |")
    more = (
        "Their products run as well; `parallel.virtual_pipeline` divides the layers of a stage, and with "
        "`parallel.sequence` `parallel.tensor` divides the sequence."
    )
    return "\n".join([*lines, "", more])


def _allowed(config: RunConfig, axis: str, fp8: Any) -> Iterator[str]:
    precision = replace(config.precision, fp8=fp8)
    for ranks in range(1, 65):
        sizes: dict[str, Any] = {axis: ranks}
        layout = replace(config, parallel=replace(config.parallel, **sizes), precision=precision)
        try:
            validate(layout, ranks, needs_data=False)
        except ValueError:
            continue
        yield str(ranks)


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
