"""What an InsVP adapter is made of: one frozen, validated dataclass with a JSON round trip."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["InsVPConfig"]


@dataclass(frozen=True, kw_only=True)
class InsVPConfig:
    """The hyper-parameters of InsVP; the defaults are the paper's.

    The letters are those of the equations in ``insvp_fast/reference.py``. A configuration is immutable; derive another
    with ``dataclasses.replace``.

    Args:
        global_prompt, patch_prompt: the two parts of the image prompt, p_g and p_l (eq. 4 and 5).
        common_prompt, specific_prompt: the two parts of the feature prompt, c_j and p_s (eq. 8 and 9).
        image_weights: (w_g, w_l) of eq. 6, or one number β_I that stands for (β_I, 1-β_I).
        feature_weights: (w_c, w_s) of eq. 10, or one number β_F that stands for (β_F, 1-β_F).
            A prompt whose partner is switched off has weight 1.
        prompt_length: L, the number of prompt tokens in a block; 0 switches the feature prompt off.
        prompted_blocks: None for every block, a number n for the first n, or the indices themselves.
        carry_prompts: let the outputs of the prompts run on into blocks that have no prompts of their own, as the
            authors' release and VPT-Shallow do; otherwise such blocks see no prompts.
        patch_hidden: R, the hidden width of the patch prompter.
        global_hidden: hidden channels of the global prompter.
        global_kernels, global_dilations: its two convolutions.
        specific_kernels: kernel sides of the specific prompter's three convolutions.
        specific_input: "image", or "prompted" for the image with its prompt superposed (the release).
        global_dropout, patch_dropout, common_dropout, specific_dropout: dropout on each prompt while training.
        simam: weigh the input image with SimAM before everything else (the release, for some data sets).

    Raises:
        ValueError: naming the field, its value and what was expected.
    """

    global_prompt: bool = True
    patch_prompt: bool = True
    common_prompt: bool = True
    specific_prompt: bool = True
    image_weights: float | tuple[float, float] = 0.7
    feature_weights: float | tuple[float, float] = 0.5
    prompt_length: int = 9
    prompted_blocks: int | tuple[int, ...] | None = None
    carry_prompts: bool = False
    patch_hidden: int = 16
    global_hidden: int = 6
    global_kernels: tuple[int, int] = (3, 3)
    global_dilations: tuple[int, int] = (5, 12)
    specific_kernels: tuple[int, int, int] = (7, 9, 3)
    specific_input: str = "image"
    global_dropout: float = 0.1
    patch_dropout: float = 0.0
    common_dropout: float = 0.0
    specific_dropout: float = 0.0
    simam: bool = False

    @classmethod
    def released(cls, **overrides: Any) -> InsVPConfig:
        """The configuration of the authors' released code, where it differs from the paper.

        Weights 2 and 1 for the image prompt and 1 and 1 for the feature prompt, dense 11x11 and 25x25 convolutions,
        dropout 0.1 on all four prompts, the prompted image as input of the specific prompter, prompts carried through
        unprompted blocks, ``prompt_length=16``. The released code evaluates the specific prompter anew in every block;
        the twelve results differ only by
        their dropout masks, so here it is evaluated once: the same function in evaluation, one shared mask instead of
        twelve in training.
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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # JSON has no tuples
                object.__setattr__(self, field.name, tuple(value))
        for name in ("global_prompt", "patch_prompt", "common_prompt", "specific_prompt", "carry_prompts", "simam"):
            _check(name, getattr(self, name), lambda v: isinstance(v, bool), "True or False")
        for name in ("image_weights", "feature_weights"):
            _check(
                name, getattr(self, name), lambda v: _is_number(v) or _is_pair(v, _is_number), "a number or two numbers"
            )
        _check("prompt_length", self.prompt_length, lambda v: _is_int(v) and v >= 0, "an integer of at least 0")
        _check(
            "prompted_blocks",
            self.prompted_blocks,
            _is_block_choice,
            "None, a count, or distinct block indices in order",
        )
        for name in ("patch_hidden", "global_hidden"):
            _check(name, getattr(self, name), lambda v: _is_int(v) and v > 0, "a positive integer")
        _check("global_kernels", self.global_kernels, lambda v: _is_pair(v, _is_odd), "two odd positive integers")
        _check("global_dilations", self.global_dilations, lambda v: _is_pair(v, _is_positive), "two positive integers")
        _check(
            "specific_kernels",
            self.specific_kernels,
            lambda v: isinstance(v, tuple) and len(v) == 3 and all(map(_is_odd, v)),
            "three odd positive integers",
        )
        _check("specific_input", self.specific_input, lambda v: v in ("image", "prompted"), "'image' or 'prompted'")
        for name in ("global_dropout", "patch_dropout", "common_dropout", "specific_dropout"):
            _check(name, getattr(self, name), lambda v: _is_number(v) and 0 <= v < 1, "a probability in [0, 1)")

    @property
    def blend_image(self) -> tuple[float, float]:
        """(w_g, w_l) of eq. 6; a switched-off prompt has weight 0 and leaves its partner 1."""
        return _blend(self.image_weights, self.global_prompt, self.patch_prompt)

    @property
    def blend_feature(self) -> tuple[float, float]:
        """(w_c, w_s) of eq. 10; a switched-off prompt has weight 0 and leaves its partner 1."""
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
        chosen = self.prompted_blocks
        indices = tuple(range(depth)) if chosen is None else tuple(range(chosen)) if isinstance(chosen, int) else chosen
        if indices and indices[-1] >= depth:
            raise ValueError(
                f"prompted_blocks={chosen!r} asks for block {indices[-1]}, but the backbone has blocks 0 to {depth - 1}"
            )
        return indices

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-ready values."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InsVPConfig:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: for a key that this version does not know, or a value that does not fit its field.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown configuration keys {unknown}; this version of insvp_fast knows {sorted(known)}")
        return cls(**values)


def _check(name: str, value: Any, fits: Any, expected: str) -> None:
    if not fits(value):
        raise ValueError(f"{name}={value!r}: expected {expected}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_int(value) and value > 0


def _is_odd(value: Any) -> bool:
    return _is_positive(value) and value % 2 == 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: Any, fits: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(fits, value))


def _is_block_choice(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_int(v) and v >= 0 for v in value) and list(value) == sorted(set(value))
    return value is None or (_is_int(value) and value >= 0)


def _blend(weights: float | tuple[float, float], first: bool, second: bool) -> tuple[float, float]:
    if not (first and second):
        return float(first), float(second)
    return weights if isinstance(weights, tuple) else (weights, 1 - weights)
