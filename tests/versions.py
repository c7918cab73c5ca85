"""Write the versions of a green run into docs/verification.md: python -m tests.versions NAME JUNIT.xml."""

import platform
import re
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parents[1] / "docs/verification.md"
PACKAGES = (
    "megatron-core",
    "torch",
    "transformers",
    "mosaicml-streaming",
    "deepspeed",
    "omegaconf",
    "triton",
    "pytest",
)
BEGIN, END = "<!-- versions: begin -->", "<!-- versions: end -->"
HEAD = "| run | date | passed | skipped | minutes | Python | " + " | ".join(PACKAGES) + " |"


def row(name: str, report: Path) -> str:
    """The table's line about the run that wrote `report`; ValueError if a test of it failed."""
    suites = list(ElementTree.parse(report).iter("testsuite"))
    tests, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    if failures or errors or not tests:
        raise ValueError(f"{report} has {tests} tests, {failures} failures and {errors} errors: only green runs count")
    minutes = sum(float(suite.get("time", 0)) for suite in suites) / 60
    cells = [name, date.today().isoformat(), str(tests - skipped), str(skipped), f"{minutes:.1f}"]
    return f"| {' | '.join([*cells, platform.python_version(), *map(version, PACKAGES)])} |"


def with_row(page: str, name: str, line: str) -> str:
    """`page` with the line of `name` replaced, or added."""
    before, table, after = re.split(f"{re.escape(BEGIN)}\n|{re.escape(END)}", page)
    rows = [old for old in table.splitlines()[2:] if not old.startswith(f"| {name} |")]
    lines = [HEAD, "|---" * (HEAD.count("|") - 1) + "|", *rows, line]
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_row(PAGE.read_text(), sys.argv[1], row(sys.argv[1], Path(sys.argv[2]))))
