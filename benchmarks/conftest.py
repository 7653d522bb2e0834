"""Every benchmark carries the machine it ran on, waits for the device, and runs on a seeded state.

With ``--benchmark-disable`` each body runs once, on the smallest sizes: a test that the benchmarks work.
"""

import pytest
import torch

from insvp_fast import bench

torch.backends.cudnn.allow_tf32 = False  # fp32 parity is meant to the last bits


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=bench.clock))


@pytest.fixture(scope="session")
def machine():
    return bench.machine()


@pytest.fixture
def tiny(request):
    """Whether nothing is timed; what is compiled is then left out, which takes longer than all the rest."""
    tiny = request.config.getoption("benchmark_disable")
    if tiny and "compiled" in request.node.name:
        pytest.skip("compiled models and operations have their tests in tests/")
    return tiny


@pytest.fixture(autouse=True)
def _facts(request, machine):
    torch.manual_seed(0)
    if "benchmark" in request.fixturenames:
        request.getfixturevalue("benchmark").extra_info.update(machine)
