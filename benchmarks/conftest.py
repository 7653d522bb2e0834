"""Every benchmark carries the machine it ran on and runs on a seeded state."""

import pytest
import torch

from benchmarks import steps


@pytest.fixture(autouse=True)
def _facts(request):
    torch.manual_seed(0)
    if "benchmark" in request.fixturenames:
        request.getfixturevalue("benchmark").extra_info.update(steps.machine())
