"""Metrics."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score

from insvp_fast.errors import InsVPError
from insvp_fast.training.accelerator import create_accelerator
from insvp_fast.training.metrics import compute_metrics, metrics_of_labels, metrics_of_pairs


def test_classes_without_images_do_not_count():
    metrics = metrics_of_pairs(torch.tensor([[0, 0, 0, 0, 2, 2], [0, 1, 0, 0, 2, 0]]), 3, top5_hits=5)
    assert metrics.confusion.tolist() == [[3, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert metrics.per_class == [0.75, None, 0.5]
    assert (metrics.mean_per_class, metrics.images) == (0.625, 6)
    scores = {"accuracy": metrics.top1, "mean_per_class": 0.625, "f1": metrics.f1, "loss": 0}
    assert metrics.scores() == scores and metrics.f1 != 0.625
    assert (metrics.top1, metrics.top5) == (pytest.approx(4 / 6), pytest.approx(5 / 6))


@pytest.mark.parametrize(("images", "classes"), [(1, 2), (37, 5), (200, 3)])
def test_metrics_are_those_of_scikit_learn(images, classes):
    true, predicted = torch.randint(classes, (2, images))
    metrics = metrics_of_pairs(torch.stack([true, predicted]), classes, images)
    assert metrics.f1 == pytest.approx(f1_score(true, predicted, average="macro"), rel=1e-12)
    assert metrics.confusion.tolist() == confusion_matrix(true, predicted, labels=range(classes)).tolist()


@pytest.mark.parametrize(("images", "classes"), [(1, 2), (37, 5), (200, 3)])
def test_metrics_of_several_labels_are_those_of_scikit_learn(images, classes):
    targets, logits = (torch.rand(images, classes) < 0.4).float(), torch.randn(images, classes).round(decimals=1)
    targets[0] = 1  # every class has an image
    targets[:, -1] = 0  # but the last, which counts for F1 alone, if an image was taken for it
    metrics = metrics_of_labels(targets, logits)
    labels, taken = targets.bool().numpy(), torch.sigmoid(logits).numpy() >= 0.5
    expected = [average_precision_score(labels[:, i], logits[:, i]) for i in range(classes - 1)]
    assert metrics.per_class == [*map(pytest.approx, expected), None]
    assert metrics.map == pytest.approx(np.mean(expected))
    macro = f1_score(labels, taken, average=None, zero_division=np.nan)
    assert metrics.f1 == pytest.approx(np.nanmean(macro), rel=1e-12)
    assert metrics.f1_micro == pytest.approx(f1_score(labels, taken, average="micro"), rel=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_have_no_metrics(value):
    with pytest.raises(InsVPError, match="infinite or not a number"):
        metrics_of_labels(torch.ones(2, 3), torch.tensor([[0.0, 1.0, value]] * 2))


def test_a_model_whose_logits_are_no_numbers_has_no_accuracy():
    """NaN would rank first: its class would be found in every image."""
    head = torch.nn.Linear(2, 4)
    head.bias.data[3] = torch.nan
    with pytest.raises(InsVPError, match="the logits became infinite or not a number"):
        compute_metrics(head, [(torch.ones(5, 2), torch.tensor([0, 1, 2, 3, 3]))], 4, create_accelerator())


def test_classes_without_images_that_none_was_taken_for_do_not_count_for_f1():
    true, predicted = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    metrics = metrics_of_pairs(torch.stack([true, predicted]), 5, top5_hits=3)
    assert metrics.f1 == pytest.approx(f1_score(true, predicted, average="macro"))
    assert metrics.per_class == [0.5, 1, None, None, None]


@pytest.mark.parametrize("multi_label", [False, True])
def test_without_images_all_metrics_are_zero(multi_label):
    metrics = compute_metrics(torch.nn.Linear(2, 3), [], 3, create_accelerator(), multi_label)
    assert not any(metrics.scores().values()) and metrics.images == 0
    assert metrics.per_class == [None] * 3


def test_a_model_is_evaluated_in_evaluation_mode():
    model = torch.nn.Sequential(torch.nn.Dropout(1.0), torch.nn.Linear(2, 2, bias=False)).train()
    model[1].weight.data = torch.eye(2)
    metrics = compute_metrics(model, [(torch.eye(2), torch.tensor([0, 1]))], 2, create_accelerator())
    assert metrics.top1 == 1.0
