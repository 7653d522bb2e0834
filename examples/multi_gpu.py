"""InsVP on several GPUs, with Accelerate and DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 examples/multi_gpu.py --cpu     # offline: two processes on a CPU, by gloo
    torchrun --standalone --nproc-per-node 8 examples/multi_gpu.py --backbone NAME --data FOLDER

Only the adapter's gradients are sent, about 1 MB per step for a ViT-B/16. Needs the extra ``train``.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
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
parser.add_argument("--batch-size", type=int, default=32, help="of each process")
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--cpu", action="store_true")
parser.add_argument("--output", default="runs/multi_gpu", help="the folder of the adapter")
arguments = parser.parse_args()

accelerator = Accelerator(cpu=arguments.cpu, mixed_precision="no" if arguments.cpu else "bf16")
set_seed(0)  # the same initial weights in every process

with accelerator.local_main_process_first():  # one process of a machine downloads the weights
    backbone = create_backbone(arguments.backbone)
preprocessing = resolve_model_data_config(backbone)
data = load_data(arguments.data, preprocessing, seed=0)
model = InsVPViT(backbone, num_classes=len(data.class_names))
set_seed(0, device_specific=True)  # but other dropout masks

train = DataLoader(data.train, arguments.batch_size, shuffle=True)  # num_workers=8 for photographs
test = DataLoader(data.test, arguments.batch_size)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=1e-2)
# every trained parameter has a gradient in every step: DDP needs no find_unused_parameters
model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
scheduler = OneCycleLR(optimizer, arguments.lr, arguments.epochs * len(train), pct_start=0.1)

for epoch in range(arguments.epochs):
    model.train()
    for images, classes in train:
        loss = F.cross_entropy(model(images), classes)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

model.eval()
hits = count = 0
with torch.inference_mode():
    for images, classes in test:
        # leaves out the images that Accelerate repeats to fill the last batch
        found, expected = accelerator.gather_for_metrics((model(images).argmax(1), classes))
        hits, count = hits + (found == expected).sum().item(), count + len(expected)
accelerator.print(f"test accuracy {hits / count:.1%} of {count} images, {accelerator.num_processes} processes")

if accelerator.is_main_process:
    adapter = accelerator.unwrap_model(model)
    adapter.save_pretrained(arguments.output, class_names=data.class_names, preprocessing=preprocessing)
accelerator.wait_for_everyone()  # one that exits while another still works can be aborted by PyTorch
accelerator.end_training()
