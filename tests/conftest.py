"""What several tests need: one process with Megatron's groups."""

from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TOGETHER = {
    **dict.fromkeys(("parallel/test_parity.py", "parallel/test_depth_record.py"), "campaign"),
    **dict.fromkeys(("launch/test_local.py", "launch/test_two_nodes.py", "launch/test_slurm.py"), "launch"),
}
"""Files whose tests share worlds that take a minute to run: with several pytest processes, one makes them once."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup`: a process takes a whole file at a time, or all files that belong together."""
    for item in items:
        file = item.path.relative_to(TESTS).as_posix()
        item.add_marker(pytest.mark.xdist_group(TOGETHER.get(file, file)))


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
