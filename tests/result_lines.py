"""A plugin of pytest: a line of JSON for every test that begins or ends, so that a killed run leaves what it has.

python -m pytest -p tests.result_lines --result-lines FILE ...
"""

import json
from pathlib import Path

import pytest

STARTED = "started"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--result-lines", metavar="FILE", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Lines(config.getoption("--result-lines")))


class Lines:
    def __init__(self, file: Path) -> None:
        self._file = file

    def _write(self, test: str, outcome: str, said: str = "", **more: object) -> None:
        with self._file.open("a") as file:
            record = {"test": test.rpartition("::")[2] or test, "outcome": outcome, "said": said, **more}
            file.write(json.dumps(record, default=str) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid, STARTED)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            said = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self._write(report.nodeid, report.outcome, said, found=dict(report.user_properties).get("found"))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report.nodeid, report.outcome, report.longreprtext)
