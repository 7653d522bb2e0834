"""A linear probe: logistic regression on the features of the frozen backbone, to convergence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from insvp_fast.data import Data
from insvp_fast.errors import TrainingError
from insvp_fast.reference.heads import DistilledHead
from insvp_fast.training.loader import Loader, create_loader
from insvp_fast.training.metrics import compute_metrics
from insvp_fast.training.recipe import Recipe, score_name
from insvp_fast.training.run_logger import RunLogger

__all__ = [
    "Features",
    "LinearFit",
    "begins_as_probe",
    "fit_linear",
    "read_features",
    "set_head",
    "start_as_probe",
    "train_linear_probe",
]

WEIGHT_DECAYS = tuple(10.0**-i for i in range(6))
MAX_STEPS = 1000  # of L-BFGS, for each of them
HISTORY = 10  # steps that L-BFGS remembers; with more, it takes fewer steps and more time
CONVERGED = 1e-5  # the largest element of the gradient


class Features(NamedTuple):
    """What the linear layers of a head read, and the classes of the images.

    Attributes:
        inputs: float64 [N, D], on the CPU; of several layers side by side.
        targets: class indices [N], or float64 [N, classes] where an image may have several.
    """

    inputs: Tensor
    targets: Tensor


class LinearFit(NamedTuple):
    """A linear classifier: ``inputs @ weight.T + bias``, in float64.

    Attributes:
        score: on the held-out images, see ``fit_linear``.
        loss: the mean loss on the training images, without the weight decay.
        converged: whether the gradient of this fit became zero to within 1e-5.
    """

    weight: Tensor
    bias: Tensor
    weight_decay: float
    score: float
    loss: float
    converged: bool


def train_linear_probe(name: str, model: nn.Module, data: Data, logger: RunLogger) -> None:
    """Fit the head of a model without prompts, evaluate it and record both.

    It is fitted to the training images as evaluation sees them, without augmentation; the weight decay is chosen
    by ``fit_linear`` on the split that selects epochs, and where the run keeps no val (``retrain``), the head is then
    fitted again to train and val together.
    """
    recipe, accelerator, classes = logger.recipe, logger.accelerator, len(data.class_names)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.say(f"\n{name}: {parameters:,} trained parameters, logistic regression to convergence")
    model = accelerator.prepare(model)
    train_loader, val_loader, test_loader = (
        create_loader(images, recipe, accelerator) for images in (data.plain_train, data.val, data.test)
    )
    train, val = (read_features(model, loader, accelerator) for loader in (train_loader, val_loader))
    selects = val if recipe.selection_split != "test" else read_features(model, test_loader, accelerator)
    fit = fit_linear(train, selects, classes)
    if recipe.retrain:
        both = Features(*(torch.cat(parts) for parts in zip(train, val, strict=True)))
        fit = fit_linear(both, val, classes, [fit.weight_decay])
    fit = broadcast_object_list([fit])[0]  # the processes' sums may differ in their last bits
    if not fit.converged:
        logger.say(f"warning: the {name} did not converge in {MAX_STEPS} steps of L-BFGS")
    set_head(accelerator.unwrap_model(model, keep_fp32_wrapper=False), fit)
    metric = recipe.metric_for(data.multi_label)

    def evaluate(split: str, loader: Loader) -> dict[str, float]:
        metrics = compute_metrics(model, loader, classes, accelerator, data.multi_label)
        return {f"{split}_{key}": value for key, value in metrics.scores().items()}

    unknown = dict.fromkeys((f"val_{score_name(metric)}", "val_loss"))
    scores = unknown if recipe.retrain else evaluate("val", val_loader)
    tested = evaluate("test", test_loader)
    logger.restore(name, [], None)  # it was fitted again, also where the run is resumed
    logger.log_epoch({"model": name, "epoch": 1, "loss": fit.loss} | scores)
    logger.log_result(
        {"model": name}
        | tested
        | {
            "metric": metric,
            "trained_parameters": parameters,
            "kept_epoch": None,
            "weight_decay": fit.weight_decay,
            "selected_on": recipe.selection_split,
            "protocol": recipe.protocol,
        }
    )


def begins_as_probe(recipe: Recipe, model: nn.Module) -> bool:
    """Whether training begins with ``start_as_probe``, by ``recipe.head_init``.

    Raises:
        TrainingError: if that is asked for, and the head is not one linear layer.
    """
    is_linear = isinstance(model.head, nn.Linear | DistilledHead)
    if recipe.head_init == "probe" and not is_linear:
        kind = type(model.head).__name__
        raise TrainingError(f"`head_init` is probe: expected a head that is one linear layer, found a {kind}")
    auto = is_linear and not recipe.released and not recipe.init_from
    return auto if recipe.head_init == "auto" else recipe.head_init == "probe"


def start_as_probe(model: nn.Module, data: Data, logger: RunLogger) -> None:
    """Fit the head to what a model gives it before training, so that training begins from a linear probe.

    Prompts are as they were drawn: they move the features of a good backbone far, but leave the classes separable.
    "LP-FT" of Kumar et al., 2022 (arXiv 2202.10054) for prompts instead of a whole network.
    """
    recipe, accelerator = logger.recipe, logger.accelerator
    model.to(accelerator.device)
    with accelerator.autocast():
        loaders = (create_loader(images, recipe, accelerator) for images in (data.plain_train, data.val))
        train, val = (read_features(model, loader, accelerator) for loader in loaders)
    fit = broadcast_object_list([fit_linear(train, val, len(data.class_names))])[0]
    set_head(model, fit)
    logger.say(f"the head begins as a linear probe, weight decay {fit.weight_decay:g}")


@torch.no_grad()  # not inference mode: the features are used in a gradient
def read_features(model: nn.Module, loader: Loader, accelerator: Accelerator) -> Features:
    """What the head of ``model`` reads for all images of a loader, the same in every process."""
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=True).eval()
    layers, read = _linear_layers(accelerator.unwrap_model(model, keep_fp32_wrapper=False)), []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].double().cpu())) for layer in layers
    ]
    inputs, targets = [], []
    try:
        for images, classes in loader:
            read.clear()
            plain(images)
            inputs.append(torch.cat(read, dim=1))
            targets.append(classes.cpu())
    finally:
        for hook in hooks:
            hook.remove()
    shards = gather_object([(torch.cat(inputs), torch.cat(targets))] if inputs else [])
    features, classes = (torch.cat(parts) for parts in zip(*shards, strict=True))
    return Features(features, classes.double() if classes.is_floating_point() else classes)


def fit_linear(
    train: Features, held_out: Features, num_classes: int, weight_decays: Sequence[float] = WEIGHT_DECAYS
) -> LinearFit:
    """Minimize the mean cross-entropy plus ``weight_decay / 2 · |W|²`` by L-BFGS, on inputs scaled to unit variance.

    With several classes an image the loss is the binary cross-entropy of each class. The bias does not decay. Of the
    weight decays 1 to 1e-5 the one with the best score on ``held_out`` is returned: the accuracy, or where images have
    several classes, minus the loss; of equally good ones, the first.

    Args:
        weight_decays: from strong to weak: each fit starts where the one before ended.
    """
    mean, std = train.inputs.mean(0), train.inputs.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    scaled = (train.inputs - mean) / std
    weight = torch.zeros(num_classes, scaled.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    fits = []
    for weight_decay in weight_decays:
        loss, converged = _minimize(weight, bias, scaled, train.targets, weight_decay)
        w = weight.detach() / std
        b = bias.detach() - w @ mean
        score = _score(F.linear(held_out.inputs, w, b), held_out.targets)
        fits.append(LinearFit(w, b, weight_decay, score, loss, converged))
    return max(fits, key=lambda fit: fit.score)


def _score(logits: Tensor, targets: Tensor) -> float:
    if targets.is_floating_point():
        return -F.binary_cross_entropy_with_logits(logits, targets).item()
    return (logits.argmax(1) == targets).double().mean().item()


def set_head(model: nn.Module, fit: LinearFit) -> None:
    """Give the head of a model the fitted weights."""
    layers = _linear_layers(model)
    widths = [layer.in_features for layer in layers]
    with torch.no_grad():
        # a distilled DeiT averages the logits of its two layers
        for layer, weight in zip(layers, (fit.weight * len(layers)).split(widths, dim=1), strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(fit.bias)


def _linear_layers(model: Any) -> list[nn.Linear]:
    return [layer for layer in model.head.modules() if isinstance(layer, nn.Linear)]


def _minimize(weight: Tensor, bias: Tensor, inputs: Tensor, targets: Tensor, weight_decay: float) -> tuple[float, bool]:
    """Fit in place. Returns the mean loss without the weight decay, and whether it converged."""
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_STEPS,
        history_size=HISTORY,
        tolerance_grad=CONVERGED,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    measure = F.binary_cross_entropy_with_logits if targets.is_floating_point() else F.cross_entropy

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = measure(F.linear(inputs, weight, bias), targets) + 0.5 * weight_decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    total = closure().item() - 0.5 * weight_decay * weight.detach().square().sum().item()
    return total, max(p.grad.abs().max().item() for p in (weight, bias) if p.grad is not None) <= CONVERGED
