"""Train a model on a data set, and measure its accuracy. Device, precision and distribution are Accelerate's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from insvp_fast.checkpoints.files import read_safetensors
from insvp_fast.data import Data
from insvp_fast.errors import TrainingError
from insvp_fast.model import InsVPViT
from insvp_fast.storage import recover, replace_folder
from insvp_fast.training.journal import Journal
from insvp_fast.training.meter import Meter
from insvp_fast.training.order import Loader, loader_for
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.state import get_randomness, read_state, set_randomness, write_state

__all__ = ["Training", "evaluate", "rate"]

CHECK_EVERY = 10  # batches between two looks at the loss: reading it waits for the device


def rate(step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step as a part of its highest: a line up, then a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, steps - rising))


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Loader, accelerator: Accelerator) -> float:
    """The part of all images, in [0, 1], whose class the model finds; each counts once, whoever looks at it."""
    model = accelerator.unwrap_model(model).eval()  # DDP's own forward would wait for processes with fewer batches
    hits = [(model(images).argmax(1) == classes).sum() for images, classes in loader]
    found = int(torch.stack(hits).sum()) if hits else 0
    return sum(gather_object([found])) / loader.order.count


class Training:
    """One model on its way through a recipe, with all that it needs to go on after an interruption.

    In ``folder``, ``last`` is the state to go on from, and ``best`` the adapter of the best epoch.

    Attributes:
        records: of the epochs so far.
        result: how the model did in the end; None before ``finish``.

    Raises:
        TrainingError: if ``last`` is damaged, or was written by another number of processes.
    """

    def __init__(self, name: str, model: InsVPViT, data: Data, lr: float, journal: Journal, folder: Path) -> None:
        self.name, self.lr, self.journal, self.folder = name, lr, journal, folder
        self.recipe, self.accelerator = recipe, accelerator = journal.recipe, journal.accelerator
        in_training, plain = data.on_device or (None, None)
        images = data.train_and_val if recipe.retrain and data.train_and_val else data.train
        self.train = loader_for(images, recipe, accelerator, shuffle=True, transform=in_training)
        self.splits = {
            part: loader_for(getattr(data, part), recipe, accelerator, transform=plain) for part in ("val", "test")
        }
        self.steps = -(-len(self.train) // recipe.accumulate)  # of an epoch
        self.mix = _mixup(recipe, len(data.class_names))
        # the release decays every trained tensor; of a model, timm leaves out biases and what counts as an embedding
        decayed = [p for p in model.parameters() if p.requires_grad] if recipe.released else model
        optimiser = create_optimizer_v2(decayed, opt="adamw", lr=lr, weight_decay=recipe.weight_decay)
        self.model, self.optimiser = accelerator.prepare(model, optimiser)
        self.trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
        self.ema: ModelEmaV3 | None = None
        if recipe.ema:  # of the trained weights alone; warmed up, or the first weights would outlive a short run
            self.ema = ModelEmaV3(nn.ParameterList(self.trained.values()), recipe.ema, use_warmup=True)
        self.epoch = self.batch = 0  # epochs done, batches of the next one done
        self.losses: list[Tensor] = []  # of these batches
        self.best: dict[str, Any] = {"accuracy": -1.0, "epoch": 0}
        self.records: list[dict[str, Any]] = []
        self.result: dict[str, Any] | None = None
        self._restore()

    # ------------------------------------------------------------------------------------------------------------ train

    def fit(self) -> None:
        """Train to the last epoch; each is evaluated, logged and, if it is the best, kept.

        Raises:
            TrainingError: if the loss becomes infinite or not a number.
        """
        while self.epoch < self.recipe.epochs:
            record = {"model": self.name, "epoch": self.epoch + 1} | self._train_epoch()
            with self._averaged():
                record |= self._watch()
                self.epoch, self.batch, self.losses = self.epoch + 1, 0, []
                self.records.append(record)
                self.journal.epoch(record)
                if self.recipe.selects_on:
                    self._keep_best(record)
            if self.epoch % self.recipe.save_every == 0 or self.epoch == self.recipe.epochs:
                self.save()

    def finish(self) -> dict[str, Any]:
        """Take the best epoch's weights, or the last's where nothing selects, and test them; returns ``result``."""
        if self.recipe.selects_on:
            best = self._from_main(lambda: read_safetensors(self.folder / "best" / "adapter_model.safetensors"))
            self._set({key: best[key] for key in self.trained})
        elif self.ema:
            self._set(self._average())
        accuracy = evaluate(self.model, self.splits["test"], self.accelerator)
        self.result = {
            "model": self.name,
            "test_accuracy": accuracy,
            "trained_parameters": sum(p.numel() for p in self.trained.values()),
            "kept_epoch": self.best["epoch"] if self.recipe.selects_on else self.epoch,
            "selected_on": self.recipe.selects_on,
            "protocol": self.recipe.protocol,
        }
        return self.result

    def _train_epoch(self) -> dict[str, float]:
        """What is left of an epoch. Returns its mean loss, and how fast it was."""
        recipe, order = self.recipe, self.train.order
        order.epoch, order.first = self.epoch, self.batch
        where = f"epoch {self.epoch + 1}/{recipe.epochs}"
        self.model.train()
        with Meter(self.journal, where, self.train, recipe.epochs) as meter:
            for images, classes in self.train:
                loss = self._train_batch(images, classes)
                meter.count(sum(order.sizes(self.batch)))
                if self.batch % CHECK_EVERY == 0:
                    meter.show(self._finite(loss.item() / len(images), where))
                self.batch += 1
                step, rest = divmod(self.batch, recipe.accumulate)
                if recipe.save_steps and not rest and not step % recipe.save_steps and self.batch < len(self.train):
                    self._finite(torch.stack(self.losses).sum().item(), where)
                    self.save()
            seen = sum(sum(order.sizes(batch)) for batch in range(len(order)))
            own = torch.stack(self.losses).double().sum().item()
            return {"loss": self._finite(sum(gather_object([own])) / seen, where)} | meter.speed()

    def _train_batch(self, images: Tensor, classes: Tensor) -> Tensor:
        """Forward and backward, and the step if it is complete. Returns the sum of the losses of the images."""
        recipe, accelerator, order = self.recipe, self.accelerator, self.train.order
        step = self.batch // recipe.accumulate
        batches = range(step * recipe.accumulate, min((step + 1) * recipe.accumulate, len(order)))
        # all images of a step weigh the same, in whatever batch and process they are; DDP takes the processes' mean
        together = sum(sum(order.sizes(batch)) for batch in batches)
        weight = accelerator.num_processes / together if order.sizes(self.batch)[order.rank] else 0.0
        complete = self.batch == batches[-1]
        targets, smoothing = classes, recipe.label_smoothing
        if self.mix and len(images) % 2 == 0:
            (images, targets), smoothing = self.mix(images, classes), 0.0  # it has smoothed the targets
        with nullcontext() if complete else accelerator.no_sync(self.model):
            loss = F.cross_entropy(self.model(images), targets, reduction="sum", label_smoothing=smoothing)
            accelerator.backward(loss * weight)
        self.losses.append(loss.detach() if weight else torch.zeros_like(loss))
        if complete:
            self._step(self.epoch * self.steps + step)
        return loss

    def _step(self, step: int) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * rate(step, self.recipe.epochs * self.steps, self.recipe.warmup)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.ema:
            self.ema.update(nn.ParameterList(self.trained.values()), step=step + 1)

    def _watch(self) -> dict[str, float | None]:
        """The accuracies of an epoch; none on images that it was trained on."""
        watched = {"val": not self.recipe.retrain, "test": self.recipe.selects_on == "test"}
        accuracies: dict[str, float | None] = {"val_accuracy": None}
        for part in (part for part, wanted in watched.items() if wanted):
            accuracies[f"{part}_accuracy"] = evaluate(self.model, self.splits[part], self.accelerator)
        return accuracies

    def _finite(self, loss: float, where: str) -> float:
        if not math.isfinite(loss):
            rate_now = f"{self.optimiser.param_groups[0]['lr']:.3g}"
            raise TrainingError(f"the loss became {loss} in {where}, at learning rate {rate_now}: try a lower --lr")
        return loss

    # ------------------------------------------------------------------------------------------------------------- keep

    def _keep_best(self, record: dict[str, Any]) -> None:
        """Write ``best``; of epochs that are equally good the last is kept, it has learnt most."""
        accuracy = record[f"{self.recipe.selects_on}_accuracy"]
        if accuracy >= self.best["accuracy"]:
            self.best = {"accuracy": accuracy, "epoch": record["epoch"]}
            self.write_adapter(self.folder / "best")

    def write_adapter(self, folder: Path) -> None:
        """Replace a folder by the adapter of the weights as they are."""
        if self.accelerator.is_main_process:
            with replace_folder(folder) as new:
                self.accelerator.unwrap_model(self.model).save_pretrained(new)

    def save(self) -> None:
        """Write ``last``, from which another process goes on bit for bit.

        Raises:
            TrainingError: if the weights are not numbers any more: the last good state is kept.
        """
        if not torch.stack([p.isfinite().all() for p in self.trained.values()]).all():
            raise TrainingError(f"the weights of {self.name} became infinite or not a number: try a lower --lr")
        own = {"random": get_randomness(self.accelerator.device), "losses": [loss.cpu() for loss in self.losses]}
        processes, scaler = gather_object([own]), self.accelerator.scaler
        if self.accelerator.is_main_process:
            weights = {key: p.detach() for key, p in self.trained.items()}
            weights |= {f"ema.{key}": value for key, value in self._average().items()}
            tensors = {"optimiser": self.optimiser.state_dict(), "processes": processes}
            facts = {
                "epoch": self.epoch,
                "batch": self.batch,
                "best": self.best,
                "records": self.records,
                "result": self.result,
                "scaler": scaler.state_dict() if scaler else None,
            }
            write_state(self.folder / "last", weights, tensors, facts)

    def _restore(self) -> None:
        """Go on from ``last``, if there is one."""
        recover(self.folder / "best")
        state = self._from_main(lambda: read_state(self.folder / "last"))
        if state is None:
            return
        weights, tensors, facts = state
        accelerator, processes = self.accelerator, tensors["processes"]
        if len(processes) != accelerator.num_processes:
            raise TrainingError(
                f"{self.folder} was trained by {len(processes)} processes, found {accelerator.num_processes}:"
                " resume it with as many"
            )
        self._set({key: weights[key] for key in self.trained})
        if self.ema:
            self._set({key: weights[f"ema.{key}"] for key in self.trained}, self.ema.module)
        self.optimiser.load_state_dict(tensors["optimiser"])
        if accelerator.scaler and facts["scaler"]:
            accelerator.scaler.load_state_dict(facts["scaler"])
        self.epoch, self.batch, self.best = facts["epoch"], facts["batch"], facts["best"]
        self.records, self.result = facts["records"], facts["result"]
        own = processes[accelerator.process_index]
        self.losses = [loss.to(accelerator.device) for loss in own["losses"]]
        set_randomness(own["random"], accelerator.device)

    def _from_main(self, read: Callable[[], Any]) -> Any:
        """What the main process reads, for all of them: they may not share a disk."""
        return broadcast_object_list([read() if self.accelerator.is_main_process else None])[0]

    # ---------------------------------------------------------------------------------------------------------- average

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The moving average, if there is one, in the place of the trained weights."""
        before = {key: p.detach().clone() for key, p in self.trained.items()} if self.ema else {}
        self._set(self._average())
        try:
            yield
        finally:
            self._set(before)

    def _average(self) -> dict[str, Tensor]:
        if self.ema is None:
            return {}
        return {key: p.detach() for key, p in zip(self.trained, self.ema.module, strict=True)}

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor], to: Any = None) -> None:
        for p, value in zip(self.trained.values() if to is None else to, values.values(), strict=bool(values)):
            p.copy_(value)


def _mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    if not recipe.mixup and not recipe.cutmix:
        return None
    return Mixup(
        recipe.mixup,
        recipe.cutmix,
        prob=recipe.mix_prob,
        label_smoothing=recipe.label_smoothing,
        num_classes=num_classes,
    )
