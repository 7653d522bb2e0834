"""Every benchmark is seeded, waits for the device, and stores the facts of the machine beside its times.

With ``--benchmark-disable`` each body runs once, most at the smallest size, to test that the benchmarks work.
"""

import pytest
import torch

from insvp_fast.bench.machine import machine_facts
from insvp_fast.bench.timing import clock

torch.backends.cudnn.allow_tf32 = False  # parity in fp32 allows no TF32


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture(scope="session")
def machine():
    return machine_facts()


@pytest.fixture
def tiny(request):
    """Whether nothing is timed."""
    return request.config.getoption("benchmark_disable")


@pytest.fixture(autouse=True)
def _every_benchmark(request, machine, tiny):
    if tiny and "compiled" in request.node.name:
        pytest.skip("compiling takes longer than everything else, and has its tests in tests/")
    torch.manual_seed(0)
    if "benchmark" in request.fixturenames:
        request.getfixturevalue("benchmark").extra_info.update(machine)
