"""The tables and figures of the paper that compare models: rows, data sets, and the paper's own numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from insvp_fast.config import InsVPConfig
from insvp_fast.data.sets import HTA, VTAB
from insvp_fast.studies.entries import Row
from insvp_fast.training.candidates import insvp_config
from insvp_fast.training.recipe import Recipe

__all__ = ["ABLATION", "PROMPTS", "STUDIES", "UNVARIED", "VTAB_GROUPS", "PaperStudy", "method_rows", "sensitivity"]

NAMES = {  # of the methods, as the paper has them where it has them
    "full": "Full",
    "linear": "Linear",
    "partial_1": "Partial-1",
    "mlp_3": "MLP-3",
    "bias": "Bias",
    "sidetune": "Sidetune",
    "adapter": "Adapter",
    "adaptformer": "AdaptFormer",
    "lora": "LoRA",
    "ssf": "SSF",
    "vp": "VP",
    "vpt_shallow": "VPT-Shallow",
    "vpt_deep": "VPT",  # the paper's is VPT-Deep
    "dam_vp": "DAM-VP",
    "e2vpt": "E2VPT",
    "insvp": "InsVP",
}
BETAS = (0.1, 0.3, 0.5, 0.7, 0.9)
PROMPTS = {"l": "patch_prompt", "g": "global_prompt", "c": "common_prompt", "s": "specific_prompt"}


def method_rows(methods: tuple[str, ...] = tuple(NAMES)) -> list[Row]:
    """A row for each method."""
    return [Row(NAMES.get(method, method), {"method": method}) for method in methods]


def _prompts(*letters: str) -> dict[str, Any]:
    """The settings with which InsVP has only these of its prompts: l, g, c, s."""
    return {"method": "insvp"} | {name: False for letter, name in PROMPTS.items() if letter not in letters}


ABLATION = [  # table 5, cumulative, then each prompt alone
    Row("no prompts", {"method": "linear"}),
    Row("p_l", _prompts("l")),
    Row("p_l p_g", _prompts("l", "g")),
    Row("p_l p_g p_c", _prompts("l", "g", "c")),
    Row("p_l p_g p_c p_s", _prompts("l", "g", "c", "s")),
    Row("p_g", _prompts("g")),
    Row("p_c", _prompts("c")),
    Row("p_s", _prompts("s")),
]


UNVARIED = Row("the recipe", {})  # of figure 7


def sensitivity(recipe: Recipe, depth: int) -> dict[str, dict[float, Row]]:
    """Of each panel of figure 7 the rows by the value of its setting; ``UNVARIED`` where that is the recipe's own.

    Panels of prompts that are off are left out, and those of weights where a prompt is alone and so has weight 1.

    Args:
        depth: the number of blocks of the backbone.
    """
    quarters = (-(-depth * quarter // 4) for quarter in range(1, 5))
    own = insvp_config(recipe)
    values: dict[str, tuple[str, Iterable[float]]] = {}
    if own.common_prompt or own.specific_prompt:
        values["length of the feature prompt, L_p"] = "prompt_length", (1, 2, 4, 8, 16)
        values["prompted blocks"] = "prompted_blocks", sorted({1, *quarters})
    if own.global_prompt and own.patch_prompt:
        values["weight of the global prompt, beta_I"] = "image_weights", BETAS
    if own.common_prompt and own.specific_prompt:
        values["weight of the common prompt, beta_F"] = "feature_weights", BETAS

    def config(changes: dict[str, Any]) -> InsVPConfig:
        config = insvp_config(dataclasses.replace(recipe, **changes))
        return dataclasses.replace(config, prompted_blocks=config.block_indices(depth))

    def row(name: str, value: float) -> Row:
        changes = {name: [value] if "weights" in name else value}
        return UNVARIED if config(changes) == config({}) else Row(f"{name}={value}", changes)

    return {title: {value: row(name, value) for value in chosen} for title, (name, chosen) in values.items()}


TEN = {  # table 1, in percent
    "Full": (64.3, 87.3, 82.7, 89.4, 98.8, 84.9, 68.9, 97.4, 97.1, 87.4),
    "Linear": (63.2, 85.3, 75.9, 86.2, 97.9, 84.4, 63.4, 96.3, 68.0, 36.6),
    "Partial-1": (70.1, 85.6, 77.8, 85.5, 98.2, 83.8, 78.0, 95.0, 89.3, 82.4),
    "MLP-3": (66.2, 85.1, 77.3, 84.9, 97.9, 84.6, 77.5, 93.2, 71.8, 60.5),
    "Bias": (69.8, 88.4, 84.2, 91.2, 98.8, 86.2, 82.9, 96.9, 89.9, 82.5),
    "Sidetune": (57.7, 84.7, 75.8, 85.8, 96.9, 78.7, 68.8, 90.4, 90.9, 80.5),
    "Adapter": (62.7, 87.1, 84.3, 89.8, 98.5, 86.0, 74.2, 97.7, 91.1, 36.3),
    "AdaptFormer": (64.2, 87.3, 84.1, 88.1, 98.4, 85.7, 79.4, 96.5, 91.7, 83.0),
    "VP": (59.5, 84.6, 77.7, 84.5, 97.7, 80.5, 78.7, 94.2, 89.4, 87.6),
    "VPT": (65.8, 88.5, 84.2, 90.2, 99.0, 83.3, 78.8, 96.8, 90.7, 78.1),
    "DAM-VP": (73.1, 87.5, 82.1, 92.3, 99.2, 86.9, 88.1, 97.3, 90.6, 87.9),
    "E2VPT": (66.8, 88.4, 84.2, 91.3, 99.0, 84.0, 80.4, 97.1, 91.0, 79.2),
    "InsVP": (74.5, 89.3, 84.6, 93.6, 99.2, 89.5, 91.3, 98.4, 96.1, 96.1),
}
VTAB_GROUPS = {  # of the benchmark
    "natural": ("caltech101", "cifar", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"),
    "specialized": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    "structured": (
        "clevr_count",
        "clevr_dist",
        "dmlab",
        "kitti",
        "dsprites_loc",
        "dsprites_ori",
        "smallnorb_azi",
        "smallnorb_ele",
    ),
}
GROUPS = {  # table 2: natural, specialized, structured
    "Full": (75.9, 83.4, 47.6),
    "Linear": (68.9, 77.2, 26.8),
    "Partial-1": (69.4, 78.5, 34.2),
    "MLP-3": (67.8, 72.8, 30.6),
    "Bias": (73.3, 78.3, 44.1),
    "Sidetune": (58.2, 68.1, 23.4),
    "Adapter": (70.4, 77.1, 33.4),
    "VPT": (78.5, 82.4, 55.0),
    "E2VPT": (80.0, 84.4, 57.4),
    "InsVP": (81.8, 85.2, 58.4),
}
FIVE = ("cub", "nabirds", "cifar100", "gtsrb", "svhn")
SWIN = {  # table 3
    "Full": (89.7, 86.8, 73.3, 97.1, 91.2),
    "VP": (86.5, 82.9, 80.6, 82.4, 80.3),
    "VPT": (90.0, 85.4, 80.5, 86.2, 87.8),
    "DAM-VP": (90.4, 86.9, 88.1, 86.8, 81.7),
    "E2VPT": (90.3, 85.2, 83.5, 87.1, 88.2),
    "InsVP": (91.2, 87.7, 90.3, 90.1, 91.4),
}
MOCO = {  # table 4
    "Full": (78.8, 72.8, 84.0, 96.8, 90.6),
    "VP": (75.4, 69.0, 79.1, 89.8, 91.3),
    "VPT": (72.1, 65.3, 72.8, 88.5, 61.8),
    "DAM-VP": (79.7, 71.4, 81.8, 92.8, 89.3),
    "E2VPT": (73.3, 66.8, 80.4, 89.2, 80.3),
    "InsVP": (80.2, 72.8, 83.5, 95.6, 92.7),
}
FOUR = ("cub", "nabirds", "cifar100", "svhn")
ABLATED = {  # table 5
    "no prompts": (85.3, 75.9, 63.4, 36.6),
    "p_l": (87.1, 83.1, 85.5, 85.3),
    "p_l p_g": (87.9, 83.5, 87.0, 91.8),
    "p_l p_g p_c": (88.9, 84.3, 90.3, 94.5),
    "p_l p_g p_c p_s": (89.3, 84.6, 91.3, 96.1),
}
SIX = ("full", "vp", "vpt_deep", "dam_vp", "e2vpt", "insvp")


class PaperStudy(NamedTuple):
    """A table of the paper.

    Attributes:
        title: what it compares.
        rows: its models.
        sets: its data sets.
        reference: the row that the others are compared with, seed by seed.
        numbers: the paper's, in percent: of a row one for each data set, or for each group of them.
        settings: that it needs besides those of the recipe.
    """

    title: str
    rows: list[Row]
    sets: tuple[str, ...]
    reference: str
    numbers: Mapping[str, tuple[float, ...]]
    settings: dict[str, Any] = {}  # noqa: RUF012 (a default that nobody changes)


STUDIES = {
    "table1": PaperStudy("methods on ten data sets", method_rows(), tuple(HTA), "InsVP", TEN),
    "table2": PaperStudy("methods on VTAB-1k", method_rows(), tuple(VTAB), "InsVP", GROUPS),
    "table3": PaperStudy(
        "methods on a Swin Transformer",
        method_rows(SIX),
        FIVE,
        "InsVP",
        SWIN,
        {"backbone": "swin_base_patch4_window7_224.ms_in22k"},
    ),
    "table4": PaperStudy("methods on a ViT trained by MoCo v3", method_rows(SIX), FIVE, "InsVP", MOCO),
    "table5": PaperStudy("the four prompts of InsVP", ABLATION, FOUR, "no prompts", ABLATED),
}
