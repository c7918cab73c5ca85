"""What several tests need: one process with Megatron's groups."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TOGETHER = {
    **dict.fromkeys((f"tests/parallel/test_{name}.py" for name in ("parity", "depth_record", "muon")), "campaign"),
    **dict.fromkeys(("tests/te/test_te_spec.py", "tests/te/test_te_methods.py"), "te"),
    **dict.fromkeys(
        ("tests/launch/test_local.py", "tests/launch/test_two_nodes.py", "tests/launch/test_slurm.py"), "launch"
    ),
}
"""Files whose tests share what takes up to a minute to make: with several pytest processes, one makes it once."""

CORE = (
    "tests/unit/",
    "tests/parallel/test_parity.py::test_losses_and_gradients_are_those_of_one_process[LAYOUT-stride2-window1-none]",
    "tests/parallel/test_parity.py::test_a_resumed_run",
    "tests/parallel/test_muon.py",
    "tests/e2e/test_data_order.py",
    "tests/e2e/test_conversion.py",
    "tests/e2e/test_quickstart.py",
    "tests/te/test_inside.py::test_inside[blackwell]",
    *(f"tests/e2e/test_{name}.py" for name in ("benchmarks", "loader", "prepare_tool", "prepare_workers")),
)
"""Tests marked `core`, by the beginnings of their names: what every supported series of Megatron-Core must pass."""
CORE_LAYOUTS = ("single", "dp2", "tp2+sp", "cp2", "pp2", "pp2xvpp2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    beginnings = tuple(name.replace("LAYOUT", layout) for name in CORE for layout in CORE_LAYOUTS)
    for item in items:
        if item.nodeid.startswith(beginnings):
            item.add_marker("core")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` a process takes all files that belong together; marks of `xdist_group` do nothing under
    pytest 9.2."""
    from xdist.scheduler import LoadFileScheduling

    class LoadFilesTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

    return LoadFilesTogether(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real corpus for whole commands: this package's own source."""
    from tests.e2e.small_run import prepare_small_corpus

    folder = tmp_path_factory.mktemp("corpus") / "mds"
    prepare_small_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def megatron_world_of_one() -> Iterator[None]:
    """Megatron-Core on this process alone, without a launcher; on CPU where there is no GPU."""
    # here, because tests/hf also runs where there is no Megatron
    from megatron_depthattn.parallel.cpu_runtime import enter_cpu_runtime
    from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
    from megatron_depthattn.parallel.launch_env import launch_environment

    enter_cpu_runtime()
    initialize_distributed(launch_environment())
    initialize_model_parallel()
    yield
    shut_down()
