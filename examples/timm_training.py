"""InsVP in timm's own training ingredients: data set, loader with augmentation, mixup, optimizer, scheduler.

    python examples/timm_training.py --fake           # offline: made-up images, the shipped backbone
    python examples/timm_training.py --data FOLDER --model insvp_vit_base_patch16_224.orig_in21k --workers 8

FOLDER holds ``train`` and ``validation``, each with a folder of images per class. timm's own script does the same:

    python train.py --device-modules insvp_fast --model insvp_vit_base_patch16_224.orig_in21k --pretrained ...
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from timm import create_model
from timm.data import Mixup, create_dataset, create_loader, resolve_model_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy

import insvp_fast  # noqa: F401, registers the names with insvp_
from insvp_fast.testing import make_fake_dataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="data/images", help="an image folder")
parser.add_argument("--fake", action="store_true", help="make a small image folder of noise, and train on that")
parser.add_argument("--model", default="insvp_vit_shapes_32", help="insvp_, and the name of a backbone")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--workers", type=int, default=0)
arguments = parser.parse_args()

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if arguments.fake:
    arguments.data = make_fake_dataset("folder", tempfile.mkdtemp(), images_per_class=64, classes=4)
    (Path(arguments.data) / "val").rename(Path(arguments.data) / "validation")  # timm's name

sets = {split: create_dataset("", arguments.data, split) for split in ("train", "validation")}
classes = len(sets["train"].reader.class_to_idx)
model = create_model(arguments.model, pretrained=True, num_classes=classes, prompt_length=9).to(device)

loading = resolve_model_data_config(model) | {"num_workers": arguments.workers, "device": device}
loading |= {"batch_size": arguments.batch_size, "use_prefetcher": device.type == "cuda"}
train = create_loader(sets["train"], is_training=True, **loading)
validation = create_loader(sets["validation"], **loading)
mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=classes)
criterion = SoftTargetCrossEntropy()

optimizer = create_optimizer_v2(model, opt="adamw", lr=arguments.lr, weight_decay=1e-3)  # takes what is not frozen
scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=arguments.epochs, warmup_epochs=1)

for epoch in range(epochs):
    model.train()
    losses, hits = AverageMeter(), AverageMeter()
    for images, labels in train:
        images, targets = mixup(images.to(device), labels.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = criterion(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.update(loss.item(), len(images))
    scheduler.step(epoch + 1)
    model.eval()
    for images, labels in validation:
        with torch.inference_mode():
            hits.update(accuracy(model(images.to(device)), labels.to(device))[0].item(), len(images))
    print(f"epoch {epoch + 1}: loss {losses.avg:.3f}, top-1 {hits.avg:.1f} %")
