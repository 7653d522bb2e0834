"""A linear classifier on frozen features, trained to convergence; as a head, it is where training may begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from insvp_fast.errors import TrainingError
from insvp_fast.model import InsVPViT
from insvp_fast.training.loader import Loader

__all__ = ["LinearProbe", "fit_head", "fit_linear_probe"]

STRENGTHS = tuple(10.0**k for k in range(-3, 5))  # C of scikit-learn's LogisticRegression, whose default is 1
MAX_STEPS = 500  # L-BFGS has converged long before, unless nearly nothing is penalized


class LinearProbe(NamedTuple):
    """Logits ``features @ weight.T + bias``, which were fitted with the strength ``C``."""

    weight: Tensor  # [classes, D]
    bias: Tensor  # [classes]
    C: float
    val_accuracy: float


def fit_linear_probe(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], num_classes: int, strengths: Sequence[float] = STRENGTHS
) -> LinearProbe:
    """Softmax regression with an L2 penalty, whose strength is the one that is best on val.

    Minimizes C·sum(cross entropy) + |W|²/2 by L-BFGS in double precision, from the strongest penalty to the weakest; of
    equally good ones, the strongest is kept.

    Args:
        train, val: features [N, D] and classes [N].
        strengths: the values of C, rising.
    """
    features, classes = train[0].double(), train[1]
    shift, scale = features.mean(0), features.std().clamp(min=1e-12)
    features = (features - shift) / scale  # the same minimum, reached in fewer steps
    weight = features.new_zeros(num_classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(num_classes, requires_grad=True)
    probes = []
    for C in strengths:
        _minimize(features, classes, weight, bias, 0.5 / (C * len(features) * scale.item() ** 2))
        own_weight = (weight / scale).detach()
        own_bias = bias.detach() - own_weight @ shift
        hits = F.linear(val[0].double(), own_weight, own_bias).argmax(1) == val[1]
        probes.append(LinearProbe(own_weight, own_bias, C, hits.double().mean().item()))
    return max(probes, key=lambda probe: probe.val_accuracy)  # the first of equals


def _minimize(features: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, penalty: float) -> None:
    """Change weight and bias to the minimum of the mean cross entropy + penalty·|W|²."""
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_STEPS, tolerance_grad=1e-8, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), classes) + penalty * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


def fit_head(model: InsVPViT, train: Loader, val: Loader, accelerator: Accelerator) -> LinearProbe | None:
    """Set a model's head to a linear probe on the features that it has now, through its untrained prompts.

    Features are computed by all processes, the probe by the main one, the only one whose head is set and that returns
    the probe: DDP sends it to the others.

    Raises:
        TrainingError: if the head is no linear layer.
    """
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise TrainingError(f"`head_init` is probe: expected a head that is one linear layer, found {head}")
    features = [_gather_features(model, loader, accelerator) for loader in (train, val)]
    if not accelerator.is_main_process:
        return None
    probe = fit_linear_probe(features[0], features[1], head.out_features)
    with torch.no_grad():
        head.weight.copy_(probe.weight)
        if head.bias is not None:
            head.bias.copy_(probe.bias)
    return probe


@torch.no_grad()
def _gather_features(model: InsVPViT, loader: Loader, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """The pooled features [N, D] and classes [N] of the images of all processes, on the accelerator's device."""
    was_training = model.training
    model.to(accelerator.device).eval()
    own = []
    with accelerator.autocast():
        for images, classes in loader:
            pooled = model.forward_head(model.forward_features(images), pre_logits=True)
            own.append((pooled.float().cpu(), classes.cpu()))
    model.train(was_training)
    features, classes = zip(*gather_object(own), strict=True)
    return torch.cat(features).to(accelerator.device), torch.cat(classes).to(accelerator.device)
