"""Classify image files with several adapters at once: one pass through one backbone, whatever the adapters.

    python examples/adapter_bank.py image.png ... --adapters digits=runs/pytorch birds=OWNER/NAME
    python examples/adapter_bank.py image.jpg --backbone vit_base_patch16_224.augreg_in21k --adapters ...

Every image is classified by every adapter, each in the row of the batch that names it. The adapters must have been
trained around the backbone, which their hash of its weights tells.
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image, ImageOps
from timm.data import create_transform

from insvp_fast import AdapterBank

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", nargs="+", help="image files")
parser.add_argument("--adapters", nargs="+", required=True, metavar="NAME=FOLDER", help="or NAME=OWNER/REPOSITORY")
parser.add_argument("--backbone", default="vit_shapes_32", help="what the adapters were trained around")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
arguments = parser.parse_args()

device = torch.device(arguments.device)
bank = AdapterBank.from_pretrained(arguments.backbone, dict(adapter.split("=", 1) for adapter in arguments.adapters))
bank = bank.to(device)
transforms = {name: create_transform(**adapter.preprocessing) for name, adapter in bank.adapters.items()}

for file in arguments.images:
    stored = Image.open(file)
    upright, names = ImageOps.exif_transpose(stored), list(bank.adapters)
    images = [upright if adapter.exif_rotation else stored for adapter in bank.adapters.values()]
    # each as its adapter was trained
    batch = torch.stack([transforms[name](image.convert("RGB")) for name, image in zip(names, images, strict=True)])
    with torch.inference_mode():
        logits = bank(batch.to(device), names)  # rows of fewer classes end in -inf, of which both functions make 0
    for (name, adapter), row in zip(bank.adapters.items(), logits, strict=True):
        chances = row.sigmoid() if adapter.multi_label else row.softmax(0)
        chance, index = chances.max(0)
        print(f"{file}: {name}: {adapter.class_names[index]} ({chance:.1%})")
