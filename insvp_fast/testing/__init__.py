"""What tests and benchmarks share: pairs of models, the rounding errors that are allowed, and made-up data sets."""

from __future__ import annotations

from insvp_fast.testing.accuracy import assert_within_budget, relative_error
from insvp_fast.testing.fake_data import make_fake_dataset
from insvp_fast.testing.models import DEVICE, make_pair, saved_bytes, trained_gradients

__all__ = [
    "DEVICE",
    "assert_within_budget",
    "make_fake_dataset",
    "make_pair",
    "relative_error",
    "saved_bytes",
    "trained_gradients",
]
