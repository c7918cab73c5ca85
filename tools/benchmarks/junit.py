"""What a run of tests tells beyond its count: the figures that tests recorded, and why others were skipped."""

from __future__ import annotations

import ast
import shlex
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.benchmarks.result import table


def read_junit(file: Path) -> dict[str, Any]:
    """Of pytest's JUnit file: ``passed``, ``found`` (by test, what it recorded), ``skipped`` (by reason) and
    ``failed`` (by test, the first line of why); nothing without a file."""
    results: dict[str, Any] = {"passed": 0, "found": {}, "skipped": {}, "failed": {}}
    if not file.exists():
        return results
    for case in ElementTree.parse(file).iter("testcase"):
        name, skipped = case.get("name", ""), case.find("skipped")
        problem = next((each for kind in ("failure", "error") if (each := case.find(kind)) is not None), None)
        if problem is not None:
            results["failed"][name] = problem.get("message", "").partition("\n")[0]
        elif skipped is not None:
            reason = skipped.get("message", "")
            results["skipped"][reason] = results["skipped"].get(reason, 0) + 1
        else:
            results["passed"] += 1
        for found in case.iter("property"):
            results["found"][name] = ast.literal_eval(found.get("value", "{}"))
    return results


def tests_page(name: str, arguments: Sequence[str], results: dict[str, Any]) -> str:
    """A Markdown section."""
    rows = [[test, key, f"{value:.3g}"] for test, found in results["found"].items() for key, value in found.items()]
    skipped = sum(results["skipped"].values())
    counted = f"{results['passed']} passed, {len(results['failed'])} failed, {skipped} skipped"
    notes = [f"failed: {test}: {why}" for test, why in results["failed"].items()]
    notes += [f"skipped ({count}): {reason}" for reason, count in results["skipped"].items()]
    return (
        f"### {name}: {counted}\n\n"
        + (f"{table(['test', 'figure', 'found'], rows)}\n" if rows else "")
        + "".join(f"- {note}\n" for note in notes)
        + f"\n`{shlex.join(['python', '-m', 'pytest', *arguments])}`\n"
    )
