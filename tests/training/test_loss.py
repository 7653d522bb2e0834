"""The training loss."""

import numpy as np
import pytest
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy

from insvp_fast.training.loss import Loss, plain_loss
from insvp_fast.training.recipe import Recipe


def logits_and_labels(batch, classes):
    return torch.randn(batch, classes, dtype=torch.float64), (torch.rand(batch, classes) < 0.4).double()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (7, 3), (4, 11)])
def test_losses_are_those_of_timm(batch, classes, smoothing):
    logits, labels = logits_and_labels(batch, classes)
    recipe, targets = Recipe(label_smoothing=smoothing), torch.randint(classes, (batch,))
    one = LabelSmoothingCrossEntropy(smoothing)(logits, targets)
    several = BinaryCrossEntropy(smoothing, smooth_dense=True)(logits, labels)
    for multi_label, of_timm, truth in ((False, one, targets), (True, several, labels)):
        loss = Loss(recipe, classes, multi_label=multi_label)
        _, truth, left = loss.mix(torch.zeros(batch, 3, 2, 2), truth)
        torch.testing.assert_close(loss(logits, truth, left), batch * of_timm, rtol=1e-12, atol=1e-12)


def test_class_weights_multiply_terms():
    logits, labels = logits_and_labels(5, 3)
    weights, targets = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    weighted = -(weights * torch.eye(3)[targets] * logits.log_softmax(1)).sum()
    torch.testing.assert_close(Loss(Recipe(), 3, weights)(logits, targets), weighted)
    terms = -(weights * labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log())
    torch.testing.assert_close(Loss(Recipe(), 3, weights, multi_label=True)(logits, labels), terms.mean(1).sum())


def test_several_labels_are_mixed_and_smoothed_once():
    loss = Loss(Recipe(mixup=0.8, mix_prob=1.0, label_smoothing=0.2), 3, multi_label=True)
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    _, mixed, smoothing = loss.mix(torch.rand(2, 3, 4, 4), labels)
    assert smoothing == 0
    torch.testing.assert_close(mixed[:, 1:], torch.tensor([[0.9, 0.1]] * 2))
    assert 0.1 < mixed[0, 0] < 0.9


@pytest.mark.parametrize("mixing", [{"mixup": 0.8}, {"cutmix": 1.0}])
@pytest.mark.parametrize(("count", "partners"), [(1, [0]), (4, [3, 2, 1, 0]), (5, [4, 4, 3, 2, 1])])
def test_every_image_is_mixed_with_another_and_its_target_alike(mixing, count, partners):
    images, targets = torch.randn(count, 1, 6, 6), torch.arange(count)
    np.random.seed(3)
    mixed, found, _ = Loss(Recipe(mix_prob=1.0, **mixing), count).mix(images.clone(), targets)
    assert len(mixed) == len(found) == count
    for i, partner in enumerate(partners):
        share = found[i, i].item()  # of the image in its target, which must be its share of the pixels
        expected = share * targets.eq(i) + (1 - share) * targets.eq(partner)
        torch.testing.assert_close(found[i], expected.float())
        if "mixup" in mixing:
            torch.testing.assert_close(mixed[i], share * images[i] + (1 - share) * images[partner])
        else:
            own = (mixed[i] == images[i]).double().mean().item()
            assert ((mixed[i] == images[i]) | (mixed[i] == images[partner])).all()
            assert own == pytest.approx(share if partner != i else 1)
    assert count == 1 or 0 < found[0, 0] < 1


def test_models_are_compared_without_smoothing_and_weights():
    logits, labels = logits_and_labels(4, 3)
    targets = torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(plain_loss(logits, targets), Loss(Recipe(), 3)(logits, targets))
    torch.testing.assert_close(plain_loss(logits, labels), Loss(Recipe(), 3, multi_label=True)(logits, labels))


def test_a_batch_is_left_alone_where_mix_prob_says_so():
    images, targets = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 1, 0])
    mixed, found, _ = Loss(Recipe(mixup=0.8, cutmix=1.0, mix_prob=0.0), 2).mix(images.clone(), targets)
    assert torch.equal(mixed, images) and torch.equal(found, torch.eye(2)[targets])
