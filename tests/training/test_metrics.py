"""Metrics and the plot of the confusion matrix."""

import pytest
import torch
from PIL import Image

from insvp_fast.figures.runs import plot_confusion
from insvp_fast.training.metrics import metrics_from_confusion


def test_classes_without_images_do_not_count():
    metrics = metrics_from_confusion(torch.tensor([[3, 1, 0], [0, 0, 0], [1, 0, 1]]), top5_hits=5)
    assert metrics.per_class == [0.75, None, 0.5]
    assert (metrics.mean_per_class, metrics.images) == (0.625, 6)
    assert (metrics.top1, metrics.top5) == (pytest.approx(4 / 6), pytest.approx(5 / 6))


def test_a_confusion_matrix_of_many_classes_is_drawn_without_names(tmp_path):
    plot_confusion(torch.eye(555, dtype=torch.int64), [f"class {i}" for i in range(555)], tmp_path / "birds.png")
    assert Image.open(tmp_path / "birds.png").size[0] < 2000
