"""Random models, configurations, batches and settings for ``tools/fuzz.py``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
SPECIAL = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
SCALES = {"normal": 1.0, "denormal": 1e-40, "tiny": 1e-20, "large": 1e4, "huge": 1e30}
VALUES = (*SCALES, "zeros", "constant", *SPECIAL)
LAYOUTS = ("contiguous", "channels last", "transposed", "strided", "expanded", "8 bits")


@dataclass(frozen=True)
class Case:
    """One model, one batch, and how they are computed; the defaults make the simplest case."""

    seed: int = 0
    backbone: dict[str, Any] = field(default_factory=dict)  # timm's arguments
    config: dict[str, Any] = field(default_factory=dict)
    classes: int = 3
    batch: int = 2
    size: tuple[int, int] = (16, 16)
    dtype: str = "fp32"
    image_dtype: str | None = None  # None: that of the model
    autocast: str | None = None
    layout: str = "contiguous"
    values: str = "normal"
    image_gradient: bool = True
    no_grad: bool = False
    train: bool = False
    settings: dict[str, Any] = field(default_factory=dict)  # of InsVPViT
    isa: str | None = None  # None: the best of this machine

    def __repr__(self) -> str:
        simplest = Case()
        changed = {name: value for name, value in vars(self).items() if value != getattr(simplest, name)}
        return f"Case({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    @property
    def computed_in(self) -> torch.dtype:
        """The dtype of products: PyTorch's autocast leaves fp64 alone."""
        return DTYPES[self.autocast if self.autocast and self.dtype != "fp64" else self.dtype]


def some(**choices: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A dictionary with any subset of the keys."""
    return st.fixed_dictionaries({}, optional=choices)


def flags(*names: str) -> dict[str, st.SearchStrategy[Any]]:
    return {name: st.booleans() for name in names}


@st.composite
def backbones(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, int]]:
    """timm's arguments for a backbone, and the size of an image."""
    heads, patch = draw(st.integers(1, 3)), draw(st.sampled_from([4, 7, 8, 14, 16]))
    most = max(1, 56 // patch)
    token = draw(st.sampled_from([True, True, False]))
    pools = ["avg", "avgmax", "max", "map", "", *(["token"] * 5 if token else [])]
    optional = draw(
        some(
            **flags("qk_norm", "pre_norm", "no_embed_class", "fc_norm", "final_norm", "dynamic_img_size"),
            reg_tokens=st.sampled_from([1, 4]),
            init_values=st.sampled_from([0.1, 1.0]),
            qkv_bias=st.just(False),
            proj_bias=st.just(False),
            mlp_ratio=st.sampled_from([1.0, 2.5]),
            pos_embed=st.just("none"),
            in_chans=st.sampled_from([1, 4]),
        )
    )
    sides = st.tuples(*[st.integers(1, most).map(lambda n: n * patch)] * 2)
    fixed = {
        "img_size": draw(sides),
        "patch_size": patch,
        "embed_dim": heads * draw(st.sampled_from([4, 8, 12, 16])),
        "num_heads": heads,
        "depth": draw(st.integers(1, 3)),
        "class_token": token,
        "global_pool": draw(st.sampled_from(pools)),
    }
    size = draw(sides) if optional.get("dynamic_img_size") else fixed["img_size"]
    wrong = draw(st.sampled_from([0] * 30 + [1]))  # an image of a wrong size, which both models have to refuse
    return fixed | optional, (size[0] + wrong, size[1])


@st.composite
def configurations(draw: st.DrawFn, depth: int) -> dict[str, Any]:
    """Arguments of InsVPConfig, or "released" among them for the authors' release."""
    weights = st.one_of(st.floats(0, 1), st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
    blocks = st.lists(st.integers(0, depth - 1), unique=True).map(lambda chosen: tuple(sorted(chosen)))
    odd = st.sampled_from([1, 3, 5])
    return draw(
        some(
            released=st.just(True),
            **flags("global_prompt", "patch_prompt", "common_prompt", "specific_prompt", "carry_prompts", "simam"),
            image_weights=weights,
            feature_weights=weights,
            prompt_length=st.one_of(st.integers(0, 4), st.sampled_from([9, 20])),
            prompted_blocks=st.one_of(st.integers(0, depth), blocks),
            patch_hidden=st.integers(1, 17),
            global_hidden=st.integers(1, 7),
            global_kernels=st.tuples(odd, odd),
            global_dilations=st.tuples(st.integers(1, 6), st.integers(1, 12)),
            specific_kernels=st.tuples(odd, odd, odd),
            specific_input=st.sampled_from(["image", "prompted"]),
            **{f"{name}_dropout": st.just(0.3) for name in ("global", "patch", "common", "specific")},
        )
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case; where the machine lacks the instruction set, it limits nothing."""
    backbone, size = draw(backbones())
    dtype = draw(st.sampled_from(["fp32"] * 5 + ["bf16", "fp16", "fp64"]))
    halves = {"bf16": ["bf16"], "fp16": ["fp16"]}  # torch.cat refuses the other one under autocast
    autocast = draw(st.sampled_from([None, None, None, *halves.get(dtype, ["bf16", "bf16", "fp16"])]))
    train = draw(st.booleans())
    refused = {"8 bits": "in_chans" in backbone}  # mean and deviation are those of three channels
    smallest = 1 if "dynamic_img_size" in backbone or "pos_embed" in backbone else 0  # timm refuses 0
    layouts = [layout for layout in LAYOUTS if not refused.get(layout)]
    case = Case(
        seed=draw(st.integers(0, 2**31 - 1)),
        backbone=backbone,
        config=draw(configurations(backbone["depth"])),
        classes=draw(st.sampled_from([3, 3, 3, 1, 0])),
        batch=draw(st.integers(smallest, 3)),
        size=size,
        dtype=dtype,
        image_dtype=draw(st.sampled_from([None] * 9 + list(DTYPES))),
        autocast=autocast,
        layout=draw(st.sampled_from([LAYOUTS[0], *layouts])),
        values=draw(st.sampled_from(["normal"] * 8 + list(VALUES))),
        image_gradient=draw(st.booleans()),
        no_grad=draw(st.sampled_from([False] * 5 + [True])),
        train=train,
        isa=draw(st.sampled_from(ISAS)),
    )
    implementations = ["auto", "auto", "reference", "sdpa"]
    if case.computed_in in (torch.float32, torch.bfloat16):
        implementations.append("native")
    recompute, attention = st.sampled_from(["none", "mlp", "block"]), st.sampled_from(implementations)
    chosen = draw(some(recompute=recompute, attention=attention, fold_norm=st.booleans()))
    return dataclasses.replace(case, settings=chosen)
