"""What the tests of kernels share; those of one kernel are test_<op>_native.py and test_<op>_triton.py."""

import pytest


@pytest.fixture
def one_thread(threads):
    """At such small sizes more threads are slower, the kernels as well as PyTorch's operations."""
    threads(1)
