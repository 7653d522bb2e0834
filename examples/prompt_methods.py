"""Train a few other methods beside InsVP, and compare their accuracy and their trained parameters.

    python examples/prompt_methods.py                                    # offline: the shipped backbone, digits
    python examples/prompt_methods.py --methods vpt_deep vapt --backbone vit_base_patch16_224.orig_in21k --data FOLDER

FOLDER holds ``train`` and ``val`` or ``test``, each with a folder of images per class. Needs the extra ``train``.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch.utils.data import DataLoader

from insvp_fast import InsVPViT
from insvp_fast.checkpoints.backbone import create_backbone
from insvp_fast.data import load_data
from insvp_fast.methods import METHODS, create_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--methods", nargs="+", default=["insvp", "vpt_deep", "vfpt"], choices=["insvp", *METHODS])
parser.add_argument("--backbone", default="vit_shapes_32", help="shipped with insvp_fast, or any timm ViT")
parser.add_argument("--data", default="digits", help="from scikit-learn, or an image folder")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--output", default="runs/methods", help="gets a folder for the adapter of each method")
arguments = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
preprocessing = resolve_model_data_config(create_backbone(arguments.backbone))
data = load_data(arguments.data, preprocessing, seed=0)
train = DataLoader(data.train, arguments.batch_size, shuffle=True)
test = DataLoader(data.test, arguments.batch_size)
num_classes = len(data.class_names)

for name in arguments.methods:
    torch.manual_seed(0)
    backbone = create_backbone(arguments.backbone)
    model = InsVPViT(backbone, num_classes) if name == "insvp" else create_model(name, backbone, num_classes)
    model = model.to(device)
    if name == "dam_vp":
        model.method.fit(train)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], arguments.lr)
    for _ in range(arguments.epochs):
        model.train()
        for images, classes in train:
            F.cross_entropy(model(images.to(device)), classes.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        hits = sum((model(images.to(device)).argmax(1).cpu() == classes).sum().item() for images, classes in test)
    trained, _ = model.get_nb_trainable_parameters()
    print(f"{name}: test accuracy {hits / len(data.test):.1%}, {trained:,} trained parameters")
    model.save_pretrained(f"{arguments.output}/{name}", data.class_names, preprocessing)
