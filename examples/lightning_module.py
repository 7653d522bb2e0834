"""InsVP as a LightningModule.

    pip install -e ".[examples]"
    python examples/lightning_module.py              # offline: the shipped backbone, handwritten digits
    python examples/lightning_module.py --backbone vit_base_patch16_224.orig_in21k --data FOLDER --epochs 100

On several GPUs Lightning starts the processes itself.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from insvp_fast import InsVPViT
from insvp_fast.checkpoints.backbone import create_backbone
from insvp_fast.data import load_data

BACKBONE = "model.backbone."
STATES = {"state_dict", "current_model_state"}  # the second one where a callback averages the weights


class InsVP(lightning.LightningModule):
    def __init__(self, model: InsVPViT, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, classes = batch
        loss = F.cross_entropy(self.model(images), classes)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._log_accuracy("val_accuracy", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._log_accuracy("test_accuracy", batch)

    def _log_accuracy(self, name: str, batch: tuple[Tensor, Tensor]) -> None:
        images, classes = batch
        hits = (self.model(images).argmax(1) == classes).float().mean()
        self.log(name, hits, prog_bar=True, batch_size=len(images), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = OneCycleLR(optimizer, self.lr, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen backbone out of checkpoints."""
        for name in STATES & checkpoint.keys():
            state = checkpoint[name].items()
            checkpoint[name] = {k: v for k, v in state if not k.startswith(BACKBONE)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the backbone from this module; all else has to be in the checkpoint."""
        backbone = {k: v for k, v in self.state_dict().items() if k.startswith(BACKBONE)}
        for name in STATES & checkpoint.keys():
            checkpoint[name] |= backbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_shapes_32", help="shipped with insvp_fast, or any timm ViT")
    parser.add_argument("--data", default="digits", help="from scikit-learn, or an image folder")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output", default="runs/lightning")
    arguments = parser.parse_args()

    lightning.seed_everything(0)
    backbone = create_backbone(arguments.backbone)
    preprocessing = resolve_model_data_config(backbone)
    data = load_data(arguments.data, preprocessing, seed=0)
    model = InsVPViT(backbone, num_classes=len(data.class_names))

    trainer = lightning.Trainer(
        max_epochs=arguments.epochs,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        default_root_dir=arguments.output,
        logger=False,
    )
    module = InsVP(model, arguments.lr)
    train = DataLoader(data.train, arguments.batch_size, shuffle=True)  # num_workers=8 for photographs
    val, test = (DataLoader(split, arguments.batch_size) for split in (data.val, data.test))
    trainer.fit(module, train, val)
    trainer.test(module, test)
    if trainer.is_global_zero:
        model.save_pretrained(arguments.output, class_names=data.class_names, preprocessing=preprocessing)


if __name__ == "__main__":
    main()
