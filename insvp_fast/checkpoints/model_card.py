"""The README.md of an adapter: its metadata for the Hub, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from insvp_fast.checkpoints.backbone import hub_id, source_of, unlike_timm
from insvp_fast.config import InsVPConfig

__all__ = ["make_model_card"]

TEMPLATE = """---
{metadata}
---

# InsVP adapter

An adapter for a frozen backbone: prompts generated from the image itself, and a classification head.

- Backbone, not part of these files: {backbone}
- Classes: {num_classes}
- Method: [InsVP: Efficient Instance Visual Prompting from Image Itself]({paper})

```python
from insvp_fast import InsVPViT

model = InsVPViT.from_pretrained("<this folder or repository>"{argument})
logits = model(images)
print(model.class_names, model.preprocessing)
```

Configuration:

```json
{configuration}
```
"""


def make_model_card(
    backbone: nn.Module, num_classes: int, config: InsVPConfig, paper: str | None, metadata: Mapping[str, Any]
) -> ModelCard:
    """The model card of an adapter around ``backbone``.

    Args:
        paper: the address of the paper.
        metadata: fields of ``ModelCardData``; without ``base_model`` in it, that is the backbone's repository on the
            Hub, if it has one.
    """
    base_model = {"base_model": repository} if (repository := hub_id(backbone)) else {}
    name, changed = source_of(backbone), unlike_timm(backbone)
    given = f"`{name}`, but changed by hand" if changed else "not made by timm"
    return ModelCard(
        TEMPLATE.format(
            metadata=ModelCardData(**{**base_model, **metadata}).to_yaml(),
            backbone=f"`{name}`" if name and not changed else f"{given}, to be given as `backbone=`",
            argument="" if name and not changed else ", backbone=backbone",
            num_classes=num_classes,
            paper=paper,
            configuration=json.dumps(config.to_dict(), indent=2),
        )
    )
