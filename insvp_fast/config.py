"""The hyper-parameters of InsVP: one frozen dataclass, validated, and written to JSON and back."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["RELEASED_PREPROCESSING", "InsVPConfig", "is_number"]

# How the authors' released code prepares images for evaluation; the keys are arguments of timm.data.create_transform.
RELEASED_PREPROCESSING: dict[str, Any] = {
    "input_size": [3, 224, 224],
    "interpolation": "bilinear",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "crop_pct": 0.875,
}


def _field(default: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
    """A field with the test that its values must pass, and what that test expects, in words."""
    return dataclasses.field(default=default, metadata={"is_valid": is_valid, "expected": expected})


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63  # as sizes of tensors are


def _is_count(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_int(value) and value > 0


def _is_odd(value: Any) -> bool:
    return _is_positive(value) and value % 2 == 1


def is_number(value: Any) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_tuple(value: Any, length: int, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and len(value) == length and all(map(is_valid, value))


def _is_block_choice(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_count, value)) and list(value) == sorted(set(value))
    return value is None or _is_count(value)


def _switch(default: bool) -> Any:
    return _field(default, lambda v: isinstance(v, bool), "True or False")


def _weights(default: float) -> Any:
    return _field(default, lambda v: is_number(v) or _is_tuple(v, 2, is_number), "a number or two numbers")


def _dropout(default: float) -> Any:
    return _field(default, lambda v: is_number(v) and 0 <= v < 1, "a probability in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class InsVPConfig:
    """The hyper-parameters of InsVP; the defaults are the paper's model (docs/adapters.md: what the paper leaves open).

    The letters are those of the equations in ``insvp_fast/reference``. A configuration is immutable; derive another
    with ``dataclasses.replace``.

    Args:
        global_prompt, patch_prompt: the two parts of the image prompt, p_g and p_l (eq. 4 and 5).
        common_prompt, specific_prompt: the two parts of the feature prompt, c_j and p_s (eq. 8 and 9).
        image_weights: (w_g, w_l) of eq. 6, or one number β_I that stands for (β_I, 1-β_I).
        feature_weights: (w_c, w_s) of eq. 10, or one number β_F that stands for (β_F, 1-β_F).
            Where one prompt of a pair is switched off, the other has weight 1.
        prompt_length: L, the number of prompt tokens in a block; 0 switches the feature prompt off.
        prompted_blocks: the blocks that get prompts: None for all, n for the first n, or a tuple of indices.
        carry_prompts: in blocks without prompts of their own, keep the outputs of the last prompts as tokens, as the
            authors' release and VPT-Shallow do; otherwise such blocks have no prompt tokens.
        patch_hidden: R, the hidden width of the patch prompter.
        global_hidden: hidden channels of the global prompter.
        global_kernels, global_dilations: kernel sides and dilations of its two convolutions.
        specific_kernels: kernel sides of the specific prompter's three convolutions.
        specific_input: what the specific prompter reads: "image", or "prompted" for the image with the image prompt
            added (the release).
        global_dropout, patch_dropout, common_dropout: dropout on each prompt in training.
        specific_dropout: dropout in the specific prompter in training, in front of its second and third convolution.
        simam: weigh the input image with SimAM first (the release, for some data sets).

    Raises:
        ValueError: naming the field, its value and what was expected.
    """

    global_prompt: bool = _switch(True)
    patch_prompt: bool = _switch(True)
    common_prompt: bool = _switch(True)
    specific_prompt: bool = _switch(True)
    image_weights: float | tuple[float, float] = _weights(0.7)
    feature_weights: float | tuple[float, float] = _weights(0.5)
    prompt_length: int = _field(9, _is_count, "an integer of at least 0")
    prompted_blocks: int | tuple[int, ...] | None = _field(
        None, _is_block_choice, "None, a count, or distinct block indices in order"
    )
    carry_prompts: bool = _switch(False)
    patch_hidden: int = _field(16, _is_positive, "a positive integer")
    global_hidden: int = _field(6, _is_positive, "a positive integer")
    global_kernels: tuple[int, int] = _field((3, 3), lambda v: _is_tuple(v, 2, _is_odd), "two odd positive integers")
    global_dilations: tuple[int, int] = _field(
        (5, 12), lambda v: _is_tuple(v, 2, _is_positive), "two positive integers"
    )
    specific_kernels: tuple[int, int, int] = _field(
        (7, 9, 3), lambda v: _is_tuple(v, 3, _is_odd), "three odd positive integers"
    )
    specific_input: str = _field("image", lambda v: v in ("image", "prompted"), "'image' or 'prompted'")
    global_dropout: float = _dropout(0.1)
    patch_dropout: float = _dropout(0.0)
    common_dropout: float = _dropout(0.0)
    specific_dropout: float = _dropout(0.0)
    simam: bool = _switch(False)

    @classmethod
    def released(cls, **overrides: Any) -> InsVPConfig:
        """The configuration of the authors' released code, which differs from the paper; ``overrides`` are fields.

        Weights 2 and 1 for the image prompt and 1 and 1 for the feature prompt, dense 11x11 and 25x25 convolutions,
        dropout 0.1 on three prompts and in the specific prompter, which reads the prompted image, prompts carried
        through unprompted blocks, ``prompt_length=16``.

        The released code runs the specific prompter once per block, and its results differ only in their dropout
        masks. Here it runs once: the same function in evaluation, one mask for all blocks in training.
        """
        release: dict[str, Any] = {
            "image_weights": (2.0, 1.0),
            "feature_weights": (1.0, 1.0),
            "prompt_length": 16,
            "carry_prompts": True,
            "global_kernels": (11, 25),
            "global_dilations": (1, 1),
            "specific_input": "prompted",
            "patch_dropout": 0.1,
            "common_dropout": 0.1,
            "specific_dropout": 0.1,
        }
        return cls(**(release | overrides))

    @classmethod
    def vpt_deep(cls, length: int = 50, **overrides: Any) -> InsVPConfig:
        """VPT-Deep: common prompts alone, with dropout 0.1; ``overrides`` are fields.

        The prompts begin uniform in (-1, 1), as InsVP's. Those of ``insvp_fast.methods.VPTDeep`` begin as VPT's.
        """
        vpt = {"global_prompt": False, "patch_prompt": False, "specific_prompt": False, "prompt_length": length}
        return cls(**(vpt | {"common_dropout": 0.1} | overrides))

    @classmethod
    def vpt_shallow(cls, length: int = 50, **overrides: Any) -> InsVPConfig:
        """VPT-Shallow: as ``vpt_deep``, for the first block, from where the prompts run on through all others."""
        return cls.vpt_deep(length, **({"prompted_blocks": 1, "carry_prompts": True} | overrides))

    @classmethod
    def linear_probe(cls) -> InsVPConfig:
        """No prompts: the head alone is trained."""
        return cls(global_prompt=False, patch_prompt=False, common_prompt=False, specific_prompt=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # JSON has no tuples
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            if not field.metadata["is_valid"](value):
                raise ValueError(f"{field.name}={value!r}: expected {field.metadata['expected']}")

    @property
    def blend_image(self) -> tuple[float, float]:
        """(w_g, w_l) of eq. 6; where one prompt is switched off, its weight is 0 and the other's 1."""
        return _blend(self.image_weights, self.global_prompt, self.patch_prompt)

    @property
    def blend_feature(self) -> tuple[float, float]:
        """(w_c, w_s) of eq. 10; where one prompt is switched off, its weight is 0 and the other's 1."""
        return _blend(self.feature_weights, self.common_prompt, self.specific_prompt)

    @property
    def has_feature_prompt(self) -> bool:
        """Whether any block gets prompt tokens."""
        return (
            (self.common_prompt or self.specific_prompt)
            and self.prompt_length > 0
            and self.prompted_blocks not in (0, ())
        )

    def block_indices(self, depth: int) -> tuple[int, ...]:
        """The blocks, out of ``depth``, that get prompts of their own, in order.

        Raises:
            ValueError: if the configuration names a block that the backbone does not have.
        """
        if not self.has_feature_prompt:
            return ()
        blocks = self.prompted_blocks
        count = depth if blocks is None else blocks
        indices = range(count) if isinstance(count, int) else count
        if indices and indices[-1] >= depth:
            raise ValueError(
                f"prompted_blocks={blocks!r} asks for block {indices[-1]}, but the backbone has blocks 0 to {depth - 1}"
            )
        return tuple(indices)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InsVPConfig:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: for an unknown key, or a value that does not fit its field.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown configuration keys {unknown}; this version of insvp_fast knows {sorted(known)}")
        return cls(**values)


def _blend(weights: float | tuple[float, float], first: bool, second: bool) -> tuple[float, float]:
    if not (first and second):
        return float(first), float(second)
    return weights if isinstance(weights, tuple) else (weights, 1 - weights)
