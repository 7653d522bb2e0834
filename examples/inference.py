"""Classify image files with a trained adapter.

    python examples/inference.py runs/pytorch image.png ...
    python examples/inference.py OWNER/NAME image.jpg --device cuda --bf16     # an adapter on the Hugging Face Hub

The adapter records its backbone: the shipped one is built offline, another is fetched by timm. For the runs of
``insvp train``, ``insvp predict`` does the same, with CSV and JSON lines as output.
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image, ImageOps
from timm.data import create_transform

from insvp_fast import InsVPViT

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", help="a folder or a repository, written by save_pretrained")
parser.add_argument("images", nargs="+", help="image files")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--bf16", action="store_true", help="faster where the hardware multiplies bf16")
parser.add_argument("--batch-size", type=int, default=32)
arguments = parser.parse_args()

device = torch.device(arguments.device)
model = InsVPViT.from_pretrained(arguments.adapter).to(device)  # in evaluation mode
transform = create_transform(**model.preprocessing)  # as in training; it travels with the adapter


def read(file: str) -> Image.Image:
    image = Image.open(file)
    return (ImageOps.exif_transpose(image) if model.exif_rotation else image).convert("RGB")


for first in range(0, len(arguments.images), arguments.batch_size):
    files = arguments.images[first : first + arguments.batch_size]
    images = torch.stack([transform(read(file)) for file in files])
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
        logits = model(images.to(device))
    chances = logits.float().sigmoid() if model.multi_label else logits.float().softmax(1)
    for file, row in zip(files, chances, strict=True):
        likely = (row >= 0.5).nonzero().flatten() if model.multi_label else [row.argmax()]
        print(f"{file}: {', '.join(f'{model.class_names[index]} ({row[index]:.1%})' for index in likely)}")
