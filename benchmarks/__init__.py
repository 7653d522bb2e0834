"""Timings, and checks that what is timed computes the right numbers."""

import os

# OpenMP reads it when torch is loaded. Threads that spin while they wait slow PyTorch's operations down more than this
# package's, if anything else runs: ratios would flatter it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
