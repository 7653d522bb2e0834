"""InsVP in a plain PyTorch training loop.

    python examples/pytorch_loop.py                  # offline: the shipped backbone, handwritten digits
    python examples/pytorch_loop.py --backbone vit_base_patch16_224.orig_in21k --data FOLDER --epochs 100

FOLDER holds ``train`` and ``val`` or ``test``, each with a folder of images per class. Needs the extra ``train``.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from insvp_fast import InsVPViT
from insvp_fast.checkpoints.backbone import create_backbone
from insvp_fast.data import load_data

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backbone", default="vit_shapes_32", help="shipped with insvp_fast, or any timm ViT")
parser.add_argument("--data", default="digits", help="from scikit-learn, or an image folder")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--output", default="runs/pytorch", help="the folder of the adapter")
arguments = parser.parse_args()

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

backbone = create_backbone(arguments.backbone)  # a timm VisionTransformer with its pretrained weights
preprocessing = resolve_model_data_config(backbone)  # mean, std, size, ... that the weights were trained with
data = load_data(arguments.data, preprocessing, seed=0)
train = DataLoader(data.train, arguments.batch_size, shuffle=True)  # num_workers=8 for photographs
test = DataLoader(data.test, arguments.batch_size)

# freezes the backbone; prompters, prompts and head are trained
model = InsVPViT(backbone, num_classes=len(data.class_names)).to(device)
model.print_trainable_parameters()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=1e-2)
scheduler = OneCycleLR(optimizer, arguments.lr, arguments.epochs * len(train), pct_start=0.1)

for epoch in range(arguments.epochs):
    model.train()  # the frozen backbone stays in evaluation mode
    for images, classes in train:
        images, classes = images.to(device), classes.to(device)
        # bf16 needs no GradScaler; the CPUs that lack it are slow in it
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(model(images), classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

model.eval()
with torch.inference_mode():
    hits = sum((model(images.to(device)).argmax(1).cpu() == classes).sum().item() for images, classes in test)
print(f"test accuracy {hits / len(data.test):.1%}")

# the adapter alone: about 1 MB for a ViT-B/16; inference.py loads it
model.save_pretrained(arguments.output, class_names=data.class_names, preprocessing=preprocessing)
