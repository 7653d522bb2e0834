from __future__ import annotations

import pytest
import torch

from insvp_fast.runtime import buffers


@pytest.fixture
def unwritten(monkeypatch):
    """Results that hold NaN, and memory that holds bytes of it, until they are computed."""
    empty = buffers.empty

    def filled(*arguments, **keywords):
        x = empty(*arguments, **keywords)
        return x.fill_(torch.nan if x.is_floating_point() else 255)

    monkeypatch.setattr(buffers, "empty", filled)
