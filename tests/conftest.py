"""What several tests need: one process with Megatron's groups."""

from collections.abc import Iterator

import pytest


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
