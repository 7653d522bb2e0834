"""The training loop. Device, precision and distribution are Accelerate's."""

from __future__ import annotations

import math
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from accelerate.utils import gather_object
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from insvp_fast.atomic_files import recover, replace_folder
from insvp_fast.checkpoints.files import read_safetensors
from insvp_fast.checkpoints.names import WEIGHTS_FILE
from insvp_fast.data import Data
from insvp_fast.errors import InsVPError, TrainingError
from insvp_fast.training.accelerator import from_main, peak_memory
from insvp_fast.training.average import WeightAverage, copy_weights
from insvp_fast.training.balance import class_weights, targets_of
from insvp_fast.training.candidates import Candidate
from insvp_fast.training.linear_probe import begins_as_probe, start_as_probe
from insvp_fast.training.loader import create_loader
from insvp_fast.training.loss import Loss
from insvp_fast.training.metrics import compute_metrics
from insvp_fast.training.progress import Progress
from insvp_fast.training.recipe import score_name
from insvp_fast.training.run_logger import RunLogger
from insvp_fast.training.schedule import lr_factor, scale_lr
from insvp_fast.training.state import get_rng_states, load_state, save_state, set_rng_states
from insvp_fast.training.warm_start import warm_start

__all__ = ["Trainer"]

CHECK_EVERY = 10  # batches: reading the loss waits for the device


class Trainer:
    """Trains one model by a recipe, and can resume after an interruption.

    In its folder, ``last`` is the state to resume from, and ``best`` the adapter of the best epoch.

    Attributes:
        trained: the trained parameters by name.
        records: of the epochs so far.
        result: the final record; None before ``test``.

    Raises:
        CheckpointError: if the adapter to begin with does not fit.
        TrainingError: if ``last`` is damaged, or was written by another number of processes, or a setting does not suit
            the data.
    """

    def __init__(self, candidate: Candidate, model: nn.Module, data: Data, logger: RunLogger) -> None:
        self.recipe, self.accelerator = recipe, accelerator = logger.recipe, logger.accelerator
        self.name, self.logger, self.folder = candidate.name, logger, logger.folder
        self.lr = scale_lr(recipe.lr, recipe, accelerator.num_processes)
        images = data.train_and_val if recipe.retrain else data.train
        self.train_loader = create_loader(images, recipe, accelerator, shuffle=True)
        self.eval_loaders = {
            split: create_loader(getattr(data, split), recipe, accelerator) for split in ("val", "test")
        }
        self.steps_per_epoch = -(-len(self.train_loader) // recipe.accumulate)
        self.num_classes, self.multi_label = len(data.class_names), data.multi_label
        self.metric = recipe.metric_for(data.multi_label)
        weights = None
        if recipe.class_weights == "auto":
            weights = class_weights(targets_of(images), self.num_classes).to(accelerator.device)
        self.loss = Loss(recipe, self.num_classes, weights, data.multi_label)
        if recipe.init_from and not (self.folder / "last").exists():
            logger.say(warm_start(model, recipe.init_from))
        self.begins_as_probe = begins_as_probe(recipe, model)
        if self.begins_as_probe and not from_main(self.accelerator, lambda: (self.folder / "last").exists()):
            start_as_probe(model, data, logger)
        # of a model, timm does not decay biases and what it takes for embeddings; the release decays all that it trains
        decayed = [p for p in model.parameters() if p.requires_grad] if recipe.released else model
        optimizer = create_optimizer_v2(decayed, opt="adamw", lr=self.lr, weight_decay=recipe.weight_decay)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
        saved = model._adapter()  # type: ignore[operator]
        # what moves with them, as the statistics of a batch norm
        self.buffers = {key: b for key, b in model.named_buffers() if key in saved}
        self.average = WeightAverage(self.trained, recipe.ema)
        self.epoch = self.batch = 0  # completed epochs, and completed batches of the next one
        self.losses: list[Tensor] = []  # of these batches
        # the epoch that is kept, and the first of those that were as good
        self.best: dict[str, Any] = {"score": -1.0, "epoch": 0, "since": 0}
        self.records: list[dict[str, Any]] = []
        self.result: dict[str, Any] | None = None
        self._resume()

    def fit(self) -> None:
        """Train to the last epoch, or till it stops early; each is evaluated, logged and, if it is the best, kept.

        Raises:
            TrainingError: if the loss becomes infinite or not a number.
        """
        if self.begins_as_probe and self.recipe.selection_split and self.epoch == self.batch == 0:
            self._record({"model": self.name, "epoch": 0} | self._evaluate_epoch())
        while not self._is_finished():
            record = {"model": self.name, "epoch": self.epoch + 1} | self._train_epoch()
            with self.average.in_place():
                record |= self._evaluate_epoch()
                self.epoch, self.batch, self.losses = self.epoch + 1, 0, []
                self._record(record)
            if self.epoch % self.recipe.save_every == 0 or self._is_finished():
                self.save()
        if self.epoch < self.recipe.epochs:
            since = f"no better {self.metric} since epoch {self.best['since']}"
            self.logger.say(f"stopped early after {self.epoch} of {self.recipe.epochs} epochs: {since}")

    def test(self) -> dict[str, Any]:
        """Load the weights of the best epoch, or keep the last ones if no split selects; test them, set ``result``."""
        if self.recipe.selection_split:
            best = from_main(self.accelerator, lambda: read_safetensors(self.folder / "best" / WEIGHTS_FILE))
            copy_weights(self.trained.values(), [best[key] for key in self.trained])
            copy_weights(self.buffers.values(), [best[key] for key in self.buffers])
        else:
            self.average.apply()
        # in fp32, as `evaluate_run` does; this takes autocast off the model, whose training is over
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.result = {"model": self.name} | self._evaluate(model, "test")
        self.result |= {
            "metric": self.metric,
            "trained_parameters": sum(p.numel() for p in self.trained.values()),
            "trained_epochs": self.epoch,
            "images_per_s": median(record["images_per_s"] for record in self.records if record["epoch"]),
            "peak_memory_mib": peak_memory(self.accelerator.device) / 2**20,
            "kept_epoch": self.best["epoch"] if self.recipe.selection_split else self.epoch,
            "kept_score": self.best["score"] if self.recipe.selection_split else None,
            "selected_on": self.recipe.selection_split,
            "protocol": self.recipe.protocol,
        }
        return self.result

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """All that changes in training, as ``save_state`` takes it; the tensors are those in use."""
        own = {"random": get_rng_states(self.accelerator.device), "losses": [loss.cpu() for loss in self.losses]}
        weights = {key: p.detach() for key, p in self.trained.items()} | self.buffers
        weights |= {f"ema.{key}": value for key, value in self.average.weights().items()}
        # the spelling of "optimiser" is part of the file format
        tensors = {"optimiser": self.optimizer.state_dict(), "processes": gather_object([own])}
        scaler = self.accelerator.scaler
        facts = {
            "epoch": self.epoch,
            "batch": self.batch,
            "best": self.best,
            "records": self.records,
            "result": self.result,
            "scaler": scaler.state_dict() if scaler else None,
        }
        return weights, tensors, facts

    def restore(self, state: tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]) -> None:
        """Go back to what ``state`` returned.

        Raises:
            TrainingError: if it is of another number of processes, or of a version with other parameters.
        """
        weights, tensors, facts = state
        accelerator, processes = self.accelerator, tensors["processes"]
        if len(processes) != accelerator.num_processes:
            raise TrainingError(
                f"{self.folder} was trained by {len(processes)} processes, found {accelerator.num_processes}:"
                " resume it with as many"
            )
        own_tensors = self.trained | self.buffers
        if missing := sorted(own_tensors.keys() - weights.keys()):
            raise TrainingError(
                f"{self.folder}/last has no {missing[0]}, because an earlier version wrote it: train anew, from its"
                f" weights with `init_from` {self.folder}/best"
            )
        copy_weights(own_tensors.values(), [weights[key] for key in own_tensors])
        self.average.load({key.removeprefix("ema."): value for key, value in weights.items() if key.startswith("ema.")})
        self.optimizer.load_state_dict(tensors["optimiser"])
        if accelerator.scaler and facts["scaler"]:
            accelerator.scaler.load_state_dict(facts["scaler"])
        self.epoch, self.batch, self.best = facts["epoch"], facts["batch"], facts["best"]
        self.records, self.result = facts["records"], facts["result"]
        own = processes[accelerator.process_index]
        self.losses = [loss.to(accelerator.device) for loss in own["losses"]]
        set_rng_states(own["random"], accelerator.device)

    def save(self) -> None:
        """Write ``last``, from which another process resumes with the same numbers to the bit.

        Raises:
            TrainingError: if weights are infinite or not a number; the last good state is kept.
        """
        if not torch.stack([p.isfinite().all() for p in self.trained.values()]).all():
            raise TrainingError(f"the weights of {self.name} became infinite or not a number: try a lower `lr`")
        state = self.state()  # of all processes
        if self.accelerator.is_main_process:
            save_state(self.folder / "last", *state)

    def save_adapter(self, name: str) -> None:
        """Write the adapter with the present weights into a folder of this name in the trainer's folder."""
        if self.accelerator.is_main_process:
            with replace_folder(self.folder / name) as new:
                self.accelerator.unwrap_model(self.model).save_pretrained(new)

    def _train_epoch(self) -> dict[str, float]:
        """Train the rest of the epoch. Returns the mean loss of the epoch and the speed of this rest."""
        recipe, sampler = self.recipe, self.train_loader.sampler
        sampler.epoch, sampler.first_batch = self.epoch, self.batch
        where = f"epoch {self.epoch + 1}/{recipe.epochs}"
        self.model.train()
        with Progress(self.logger, where, self.train_loader, recipe.epochs) as progress:
            for images, targets in self.train_loader:
                loss = self.train_batch(images, targets)
                progress.count(sum(sampler.sizes(self.batch)))
                if self.batch % CHECK_EVERY == 0:
                    progress.show(self._check_loss(loss.item() / len(images), where))
                self.batch += 1
                step, rest = divmod(self.batch, recipe.accumulate)
                in_epoch = self.batch < len(self.train_loader)
                if recipe.save_steps and not rest and not step % recipe.save_steps and in_epoch:
                    self._check_loss(torch.stack(self.losses).sum().item(), where)
                    self.save()
            images_seen = sum(sum(sampler.sizes(batch)) for batch in range(len(sampler)))
            total = sum(gather_object([torch.stack(self.losses).double().sum().item()]))
            return {"loss": self._check_loss(total / images_seen, where)} | progress.speed()

    def train_batch(self, images: Tensor, targets: Tensor) -> Tensor:
        """Forward, backward, and an optimizer step after the last batch of a step. Returns the summed loss."""
        recipe, accelerator, sampler = self.recipe, self.accelerator, self.train_loader.sampler
        step = self.batch // recipe.accumulate
        batches = range(step * recipe.accumulate, min((step + 1) * recipe.accumulate, len(sampler)))
        # all images of a step have the same weight, in every batch and process; DDP averages over the processes
        images_in_step = sum(sum(sampler.sizes(batch)) for batch in batches)
        weight = accelerator.num_processes / images_in_step if sampler.sizes(self.batch)[sampler.rank] else 0.0
        completes_step = self.batch == batches[-1]
        images, targets, smoothing = self.loss.mix(images, targets)
        with nullcontext() if completes_step else accelerator.no_sync(self.model):
            loss = self.loss(self.model(images), targets, smoothing)
            accelerator.backward(loss * weight)
        self.losses.append(loss.detach() if weight else torch.zeros_like(loss))
        if completes_step:
            self._step(self.epoch * self.steps_per_epoch + step)
        return loss

    def lr_of(self, step: int) -> float:
        """The learning rate of a step."""
        return self.lr * lr_factor(step, self.recipe.epochs * self.steps_per_epoch, self.recipe.warmup)

    def _step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_of(step)
        if self.recipe.clip_grad:
            self.accelerator.clip_grad_norm_(list(self.trained.values()), self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(step + 1)

    def _evaluate_epoch(self) -> dict[str, float | None]:
        """The scores of an epoch; val's are None where val is trained on."""
        if self.recipe.retrain:
            return dict.fromkeys((f"val_{score_name(self.metric)}", "val_loss"))
        splits = ("val", "test") if self.recipe.selection_split == "test" else ("val",)
        return {name: score for split in splits for name, score in self._evaluate(self.model, split).items()}

    def _evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        loader = self.eval_loaders[split]
        metrics = compute_metrics(model, loader, self.num_classes, self.accelerator, self.multi_label)
        return {f"{split}_{name}": value for name, value in metrics.scores().items()}

    def _is_finished(self) -> bool:
        patience, waited = self.recipe.patience, self.epoch - self.best["since"]
        return self.epoch >= self.recipe.epochs or 0 < patience <= waited

    def _check_loss(self, loss: float, where: str) -> float:
        if not math.isfinite(loss):
            lr = f"{self.optimizer.param_groups[0]['lr']:.3g}"
            raise TrainingError(f"the loss became {loss} in {where}, at learning rate {lr}: try a lower `lr`")
        return loss

    def _record(self, record: dict[str, Any]) -> None:
        """Log an epoch, and keep it if it is the best; 0 is the one before training."""
        self.records.append(record)
        self.logger.log_epoch(record)
        if self.recipe.selection_split:
            self._keep_best(record)

    def _keep_best(self, record: dict[str, Any]) -> None:
        """Write ``best``; of equally good epochs, the last is kept, which has learned most."""
        score = record[f"{self.recipe.selection_split}_{score_name(self.metric)}"]
        if score >= self.best["score"]:
            since = record["epoch"] if score > self.best["score"] else self.best["since"]
            self.best = {"score": score, "epoch": record["epoch"], "since": since}
            self.save_adapter("best")

    def _resume(self) -> None:
        """Load ``last``, if there is one."""

        def read() -> Any:
            recover(self.folder / "best")
            return load_state(self.folder / "last")

        state = from_main(self.accelerator, read)
        if state is None:
            return
        try:
            self.restore(state)
        except InsVPError:
            raise
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise TrainingError(f"{self.folder / 'last'}: not a state that can be resumed ({error!r})") from error
