"""The linear probe: logistic regression to convergence on what the head reads."""

from collections import OrderedDict

import pytest
import timm
import torch
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression
from torch.utils.data import TensorDataset

from insvp_fast.methods import create_model
from insvp_fast.training import linear_probe
from insvp_fast.training.linear_probe import WEIGHT_DECAYS, Features, fit_linear, read_features, set_head
from insvp_fast.training.loader import create_loader
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run import train
from tests.training.small_runs import make_folder, quick, read_records


@pytest.fixture
def noisy() -> Features:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(120, 7, dtype=torch.float64, generator=generator)
    scores = inputs @ torch.randn(7, 5, dtype=torch.float64, generator=generator)
    targets = (scores + 2 * torch.randn(120, 5, dtype=torch.float64, generator=generator)).argmax(1)
    return Features(3 * inputs + 1, targets)


def test_it_is_scikit_learns_minimum(noisy):
    fit = fit_linear(noisy, noisy, 5, [1e-2])
    scaled = (noisy.inputs - noisy.inputs.mean(0)) / noisy.inputs.std(0, correction=0)
    # scikit-learn minimizes C times the sum of the losses plus half the squared norm
    theirs = LogisticRegression(C=1 / (1e-2 * len(scaled)), tol=1e-10, max_iter=10000).fit(scaled, noisy.targets)
    assert fit.converged
    found = (noisy.inputs @ fit.weight.T + fit.bias).log_softmax(1)
    torch.testing.assert_close(found, torch.from_numpy(theirs.predict_log_proba(scaled)), rtol=0, atol=1e-3)
    assert fit.loss == pytest.approx(torch.nn.functional.nll_loss(found, noisy.targets).item())


def test_a_feature_that_is_the_same_in_all_images_counts_for_nothing(noisy):
    wider = Features(torch.cat([noisy.inputs, torch.full((120, 1), 0.25)], 1), noisy.targets)
    alone, beside = (fit_linear(features, features, 5, [1e-2]) for features in (noisy, wider))
    torch.testing.assert_close(beside.weight, torch.cat([alone.weight, torch.zeros(5, 1)], 1), check_dtype=False)


def test_the_weight_decay_is_chosen_on_held_out_images(noisy):
    shifted = Features(noisy.inputs, noisy.targets.roll(1))  # nothing can be learned
    scores = [fit_linear(shifted, noisy, 5, [decay]).score for decay in WEIGHT_DECAYS]
    assert fit_linear(shifted, noisy, 5).score == max(scores) > min(scores)


def test_where_an_image_may_have_several_classes_each_is_fitted_by_itself(noisy):
    targets = torch.stack([noisy.targets % 2, noisy.targets == 0], dim=1).double()
    both, first = (Features(noisy.inputs, part) for part in (targets, targets[:, :1]))
    # the mean over two classes halves each loss
    halved, whole = fit_linear(both, both, 2, [1e-2]), fit_linear(first, first, 1, [2e-2])
    torch.testing.assert_close(halved.weight[:1], whole.weight, rtol=0, atol=1e-4)
    assert halved.score == pytest.approx(-halved.loss)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])  # one head, two heads
def test_a_head_gives_the_logits_of_the_fit(name):
    model = create_model("linear", timm.create_model(name, depth=1, img_size=32), 3).eval()
    images, accelerator = torch.randn(9, 3, 32, 32), Accelerator(cpu=True)
    loader = create_loader(TensorDataset(images, torch.arange(9) % 3), Recipe(batch_size=4), accelerator)
    features = read_features(model, loader, accelerator)
    fit = fit_linear(features, features, 3, [1e-1])
    set_head(model, fit)
    with torch.inference_mode():
        logits = model(images).double()
    torch.testing.assert_close(logits, features.inputs @ fit.weight.T + fit.bias, rtol=0, atol=1e-5)


def test_features_are_read_without_dropout_and_leave_the_model_as_it_was():
    layers = OrderedDict(pixels=torch.nn.Flatten(), drop=torch.nn.Dropout(0.5), head=torch.nn.Linear(12, 2))
    model, images, accelerator = torch.nn.Sequential(layers).train(), torch.rand(5, 3, 2, 2) + 1, Accelerator(cpu=True)
    loader = create_loader(TensorDataset(images, torch.arange(5) % 2), Recipe(batch_size=2), accelerator)
    features = read_features(model, loader, accelerator)
    assert torch.equal(features.inputs, images.flatten(1).double())
    assert not model.head._forward_pre_hooks


def test_a_process_without_images_has_the_features_of_the_others(monkeypatch):
    model = torch.nn.Sequential(OrderedDict(head=torch.nn.Linear(2, 2)))
    others = torch.ones(3, 2, dtype=torch.float64), torch.eye(3, 2)
    monkeypatch.setattr(linear_probe, "gather_object", lambda own: [*own, others])
    features = read_features(model, [], Accelerator(cpu=True))
    assert torch.equal(features.inputs, others[0])
    assert features.targets.dtype == torch.float64 and torch.equal(features.targets, others[1].double())


@pytest.mark.parametrize(
    ("settings", "steps", "fits"),
    [
        ({}, 1, [(8, 2, 6)]),
        ({"select_on": "test"}, 1000, [(8, 6, 6)]),
        # again to train and val, with the weight decay chosen before
        ({"retrain": True}, 1000, [(8, 2, 6), (10, 2, 1)]),
    ],
)
def test_what_a_probe_is_fitted_to_and_selected_on(settings, steps, fits, tmp_path, monkeypatch, capsys):
    data, seen, fit = make_folder(tmp_path / "data", {"train": 4, "val": 1, "test": 3}), [], fit_linear

    def spy(train, held_out, classes, weight_decays=WEIGHT_DECAYS):
        seen.append((len(train.targets), len(held_out.targets), len(weight_decays)))
        return fit(train, held_out, classes, weight_decays)

    monkeypatch.setattr(linear_probe, "fit_linear", spy)
    monkeypatch.setattr(linear_probe, "MAX_STEPS", steps)
    run = train(quick(data, tmp_path, method="linear", prompt_length=None, **settings))
    assert seen == fits
    records = read_records(run)
    assert [record.get("kept_epoch", 0) for record in records] == [0, None]
    assert read_records(train(resume=run)) == records  # fitted again
    warned = "warning: the linear probe did not converge in 1 steps of L-BFGS" in capsys.readouterr().out
    assert warned == (steps == 1)


def test_of_equally_good_weight_decays_the_strongest_is_taken():
    inputs, targets = torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.tensor([0, 1])
    separable = Features(inputs, targets)
    assert fit_linear(separable, separable, 2).weight_decay == WEIGHT_DECAYS[0]
