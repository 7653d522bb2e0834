"""Make the small backbone of this package: a Vision Transformer that is pretrained on procedurally drawn scenes.

    python -m tools.pretrain_backbone                      # about 20 minutes on 2 CPU cores

No data is downloaded. From its class token the network learns which shapes and textures are in a scene (see scenes.py),
how many, in which colors, and how the background is oriented; from the token of each patch, which of its pixels a shape
covers. There are no letters or digits among the shapes, on purpose: handwriting stays a new domain for the backbone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from tools.scenes import SHAPES, SIZE, TEXTURES, draw_scenes

NAME = "vit_shapes_32"
PATCH = 8
MEAN, STD = 0.5, 0.5
HELD_OUT = 2048  # scenes on which the result is measured
ARCHITECTURE = {
    "img_size": SIZE,
    "patch_size": PATCH,
    "in_chans": 3,
    "num_classes": 0,
    "global_pool": "token",
    "embed_dim": 192,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 4.0,
}
OUTPUT_SIZES = {
    "shapes": len(SHAPES),
    "number": 2,
    "ground": len(TEXTURES),
    "fill": len(TEXTURES),
    "colors": 12,
    "slant": 2,
}


class Pretraining(nn.Module):
    """The backbone with two linear layers, from the class token to the labels and from the patch tokens to the mask."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone
        self.labels = nn.Linear(backbone.embed_dim, sum(OUTPUT_SIZES.values()))
        self.mask = nn.Linear(backbone.embed_dim, PATCH * PATCH)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.backbone.forward_features((images - MEAN) / STD)
        outputs = dict(zip(OUTPUT_SIZES, self.labels(tokens[:, 0]).split(list(OUTPUT_SIZES.values()), 1), strict=True))
        patches, grid = self.mask(tokens[:, 1:]), SIZE // PATCH
        mask = patches.reshape(-1, grid, grid, PATCH, PATCH).transpose(2, 3).reshape(-1, SIZE, SIZE)
        return outputs | {"mask": mask}


def compute_loss(outputs: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    total = F.binary_cross_entropy_with_logits(outputs["mask"], labels["mask"]) * 3
    total = total + 2 * F.binary_cross_entropy_with_logits(outputs["shapes"], labels["shapes"]) * math.sqrt(len(SHAPES))
    for name in ("number", "ground", "fill"):
        total = total + F.cross_entropy(outputs[name], labels[name])
    return total + 5 * sum(F.mse_loss(outputs[name], labels[name]) for name in ("colors", "slant"))


def accuracies(outputs: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
    correct = {name: outputs[name].argmax(1) == labels[name] for name in ("number", "ground", "fill")}
    likeliest = outputs["shapes"].argmax(1, keepdim=True)
    correct["shapes"] = labels["shapes"].gather(1, likeliest) > 0
    correct["mask"] = (outputs["mask"] > 0) == (labels["mask"] > 0.5)
    return {name: round(hit.float().mean().item(), 4) for name, hit in correct.items()}


def pretrain(steps: int, batch: int, lr: float, seed: int) -> tuple[VisionTransformer, dict[str, float]]:
    """Train a backbone; return it and its accuracies on held-out scenes.

    Step i draws its scenes with the seed (seed + 1)·10⁶ + i, the held-out ones have i = -1.
    """
    torch.manual_seed(seed)
    backbone = VisionTransformer(**ARCHITECTURE)
    model = Pretraining(backbone)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, weight_decay=0.05), lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(steps):
        images, labels = draw_scenes(batch, (seed + 1) * 10**6 + step)
        outputs = model(images)
        loss = compute_loss(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            speed = (step + 1) * batch / (time.perf_counter() - start)
            print(
                f"{step}/{steps} loss {loss.item():.3f} {accuracies(outputs, labels)} {speed:.0f} images/s", flush=True
            )
    with torch.inference_mode():
        images, labels = draw_scenes(HELD_OUT, (seed + 1) * 10**6 - 1)
        return backbone, accuracies(model.eval()(images), labels)


def write(backbone: VisionTransformer, folder: Path, facts: dict[str, object]) -> None:
    """Write NAME.safetensors, in fp16, and NAME.json beside it."""
    data = save({name: tensor.half().contiguous() for name, tensor in backbone.state_dict().items()})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.safetensors").write_bytes(data)
    description = {
        "architecture": ARCHITECTURE,
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "sha256": hashlib.sha256(data).hexdigest(),
        **facts,
    }
    (folder / f"{NAME}.json").write_text(json.dumps(description, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "insvp_fast" / "assets")
    args = parser.parse_args()
    backbone, held_out = pretrain(args.steps, args.batch, args.lr, args.seed)
    options = " ".join(f"--{name} {getattr(args, name)}" for name in ("steps", "batch", "lr", "seed"))
    facts = {
        "made_by": f"python -m tools.pretrain_backbone {options}",
        "made_with": f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)",
        "accuracy_on_unseen_scenes": held_out,
    }
    write(backbone, args.output, facts)
    print(f"unseen scenes: {held_out}; written to {args.output}")


if __name__ == "__main__":
    main()
