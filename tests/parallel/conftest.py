"""The campaign: every world is started once, when the first test asks for one of its results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.cases import CONTROLS, DOCUMENTS, LAYOUTS, PARITY, VANILLA_LOOPED, Job, needs
from tests.parallel.compare import worst_gradient_error, worst_loss_error
from tests.parallel.launch import run_jobs

WORST_ERRORS = pytest.StashKey[dict[str, dict[str, Any]]]()


class Campaign:
    """Results of the jobs of the tests that were selected, and of the jobs that those need."""

    def __init__(self, folder: Path, wanted: list[Job]) -> None:
        self.folder = folder
        everything = list(dict.fromkeys(job for one in wanted for job in (*needs(one), one)))
        # A job runs after what it needs: the single process first, the saving worlds before the resuming ones.
        rounds: list[tuple[int, list[Job]]] = []
        for resuming in (False, True):
            for world_size in (1, 4, 2):
                jobs = [
                    j for j in everything if LAYOUTS[j.layout].world_size == world_size and bool(j.resume) == resuming
                ]
                # The single process first writes the common weights; then layout by layout.
                jobs.sort(key=lambda j: (j != j.reference, list(LAYOUTS).index(j.layout), j.loops))
                rounds.append((world_size, jobs))
        self._rounds = rounds

    def result(self, job: Job) -> dict[str, Any]:
        """What the job measured; fails the calling test if the job failed."""
        while self._rounds and not self._is_done(job):
            world_size, jobs = self._rounds.pop(0)
            for one in jobs:
                if broken := [other.name for other in needs(one) if self._error(other).exists()]:
                    self._error(one).write_text(f"not run: it needs {broken}, which failed")
            run_jobs(self.folder, world_size, jobs)
        error = self._error(job)
        if error.exists():
            pytest.fail(f"{job.name} failed:\n{error.read_text()}", pytrace=False)
        return json.loads((self.folder / f"{job.name}.json").read_text())

    def _error(self, job: Job) -> Path:
        return self.folder / f"{job.name}.error"

    def _is_done(self, job: Job) -> bool:
        return (self.folder / f"{job.name}.json").exists() or self._error(job).exists()

    def worst_errors(self) -> dict[str, dict[str, Any]]:
        """What a reader quotes: the worst errors of each layout's parity jobs, and of every control."""
        table: dict[str, dict[str, Any]] = {}
        for job in (*PARITY, *VANILLA_LOOPED, *DOCUMENTS, *CONTROLS):
            both = (job, job.reference)
            if any(self._error(one).exists() or not self._is_done(one) for one in both):
                continue
            result, reference = self.result(job), self.result(job.reference)
            is_ours = job.method == "depth_attention"
            kind = ["looped" * (job.loops > 1), "unrolled" * job.unrolled, job.method * (not is_ours)]
            kind += [f"documents {job.documents}" * bool(job.documents), job.sabotage]
            row = table.setdefault(
                " ".join(filter(None, [job.layout, *kind])),
                {"cases": 0, "steps": 0, "loss": 0.0, "gradient": 0.0, "parameters": 0, "seconds": 0.0},
            )
            row["cases"] += 1
            row["steps"] = max(row["steps"], len(result["losses"]))
            row["loss"] = max(row["loss"], worst_loss_error(result["losses"], reference["losses"]))
            row["gradient"] = max(row["gradient"], worst_gradient_error(result))
            row["parameters"] = len(result["gradient_errors"])
            row["seconds"] += result["seconds"]
        return table


@pytest.fixture(scope="session")
def campaign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    """Runs, world by world, exactly the jobs of the selected tests that are not skipped."""
    items = [item for item in request.session.items if not any(mark.args[0] for mark in item.iter_markers("skipif"))]
    asking = [item for item in items if "campaign" in getattr(item, "fixturenames", ())]
    wanted = [item.callspec.params["job"] for item in asking if hasattr(item, "callspec")]
    made = Campaign(tmp_path_factory.mktemp("parity"), wanted)
    yield made
    request.config.stash[WORST_ERRORS] = made.worst_errors()  # the folder is gone before the summary


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table of worst errors, after the tests."""
    table = config.stash.get(WORST_ERRORS, {})
    if not table:
        return
    terminalreporter.section("parity with one process: worst relative errors (last rows: deliberate mistakes)")
    terminalreporter.write_line(f"{'layout':<36}{'cases':>6}{'steps':>6}{'loss':>9}{'gradient':>9}{'parameters':>11}")
    for name, row in table.items():
        terminalreporter.write_line(
            f"{name:<36}{row['cases']:>6}{row['steps']:>6}{row['loss']:>9.1e}{row['gradient']:>9.1e}{row['parameters']:>11}"
        )
