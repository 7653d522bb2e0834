"""Metrics."""

import pytest
import torch

from insvp_fast.training.metrics import metrics_from_confusion


def test_classes_without_images_do_not_count():
    metrics = metrics_from_confusion(torch.tensor([[3, 1, 0], [0, 0, 0], [1, 0, 1]]), top5_hits=5)
    assert metrics.per_class == [0.75, None, 0.5]
    assert (metrics.mean_per_class, metrics.images) == (0.625, 6)
    assert (metrics.top1, metrics.top5) == (pytest.approx(4 / 6), pytest.approx(5 / 6))
