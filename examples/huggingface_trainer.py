"""InsVP with the Trainer of Hugging Face transformers.

    pip install -e ".[examples]"
    python examples/huggingface_trainer.py           # offline: the shipped backbone, handwritten digits
    python examples/huggingface_trainer.py --backbone vit_base_patch16_224.orig_in21k --data FOLDER --epochs 100

On several GPUs: ``torchrun --standalone --nproc-per-node 8 examples/huggingface_trainer.py ...``.
"""

from __future__ import annotations

import argparse

import torch
from timm.data import resolve_model_data_config
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainingArguments

from insvp_fast import InsVPViT
from insvp_fast.checkpoints.backbone import create_backbone
from insvp_fast.data import load_data
from insvp_fast.huggingface import InsVPForImageClassification


def collate(items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    images, labels = zip(*items, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_shapes_32", help="shipped with insvp_fast, or any timm ViT")
    parser.add_argument("--data", default="digits", help="from scikit-learn, or an image folder")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output", default="runs/huggingface")
    arguments = parser.parse_args()

    training = TrainingArguments(
        arguments.output,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        weight_decay=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # a part of all steps
        bf16=torch.cuda.is_available(),
        eval_strategy="epoch",
        save_strategy="epoch",  # checkpoints hold what is trained, without the backbone
        save_total_limit=1,
        load_best_model_at_end=True,
        remove_unused_columns=False,  # the data set has tuples, not columns
        report_to="none",
        seed=0,
    )
    backbone = create_backbone(arguments.backbone)
    preprocessing = resolve_model_data_config(backbone)
    data = load_data(arguments.data, preprocessing, seed=0)
    model = InsVPForImageClassification(InsVPViT(backbone, num_classes=len(data.class_names)))
    trainer = Trainer(
        model,
        training,
        data_collator=collate,
        train_dataset=data.train,
        eval_dataset=data.val,
        compute_metrics=accuracy,
    )
    trainer.train()
    metrics = trainer.evaluate(data.test, metric_key_prefix="test")
    if trainer.is_world_process_zero():
        print(f"test accuracy {metrics['test_accuracy']:.1%}")
        model.save_pretrained(arguments.output, class_names=data.class_names, preprocessing=preprocessing)


if __name__ == "__main__":
    main()
