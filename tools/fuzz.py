"""Compare InsVPViT with InsVPReference on random models, configurations, dtypes, layouts, CPU levels and pixel values.

    python -m tools.fuzz --cases 10000 --seed 0

Each case computes logits and all gradients three times: by the fast model, by the reference, and by the reference in
double precision, the oracle. Three things are checked:

- The fast model raises where the reference raises, and nowhere else. Results have the reference's dtypes and shapes.
- A number is finite where it is finite in oracle and reference, and not finite where it is so in neither. (Except for
  weights of a convolution that only ever meet padding: PyTorch's kernels differ in whether they compute 0 times NaN.
  And except for numbers so near to the largest one of their dtype that rounding decides.)
- The error against the oracle is at most 1e-5 in fp32, proportionally less in fp64, and in 16 bits twice the error of
  the reference plus one rounding. A single error is random: of two models that are equally exact, either may have twice
  the error of the other, and some gradients jump where rounding decides which of two pixels is the larger. Therefore
  a case that fails is repeated with many images and weights that differ by rounding only, and judged by the root mean
  square of the errors, or by the largest.

The exit status is 1 if a case fails. Each failure is printed as a line of Python that runs it again, after
``from tools.fuzz import Case, check``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import hypothesis
import timm
import torch
from hypothesis import Phase, given, settings
from torch import Tensor, nn

from insvp_fast import InsVPConfig
from insvp_fast.runtime.native import library, native_status
from insvp_fast.testing import make_pair
from tests.model.generated_cases import DTYPES, SCALES, SPECIAL, Case, cases

EPS = torch.finfo(torch.float32).eps
SCALE = 1024.0  # of the loss: without it gradients in fp16 underflow
DRAWS = (8, 32, 128)  # repetitions of a case that fails; each number only if it fails with the one before


@contextlib.contextmanager
def instruction_set(level: str | None) -> Iterator[None]:
    """Limit the native library to an instruction set; None for no limit."""
    before = os.environ.get("INSVP_FAST_CPU_ISA")
    try:
        if level is not None:
            _select(level)
        yield
    finally:
        if level is not None:
            _select(before)


def _select(level: str | None) -> None:
    os.environ.pop("INSVP_FAST_CPU_ISA", None)
    if level is not None:
        os.environ["INSVP_FAST_CPU_ISA"] = level
    library.load.cache_clear()
    library.native_status()


def build(case: Case) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The reference, the fast model and the oracle."""
    torch.manual_seed(case.seed)
    config = dict(case.config)
    make = InsVPConfig.released if config.pop("released", False) else InsVPConfig
    reference, fast = make_pair("vit_tiny_patch16_224", make(**config), case.classes, **case.backbone)
    oracle = copy.deepcopy(reference).double()
    models = reference.to(DTYPES[case.dtype]), fast.to(DTYPES[case.dtype])
    oracle.load_state_dict(reference.state_dict())  # the rounded weights
    for name, value in case.settings.items():
        setattr(fast, name, value)
    return *(model.train(case.train) for model in models), oracle.train(case.train)


def pixels(case: Case) -> Tensor:
    """The images in their dtype; one if the layout is to expand it."""
    rows = min(case.batch, 1) if case.layout == "expanded" else case.batch
    shape = rows, case.backbone.get("in_chans", 3), *case.size
    if case.layout == "8 bits":
        return torch.randint(256, shape, dtype=torch.uint8)
    x = torch.randn(shape, dtype=torch.float64)
    if case.values in SCALES:
        x *= SCALES[case.values]
    elif case.values in SPECIAL and x.numel():
        x.view(-1)[torch.randint(x.numel(), (torch.randint(1, 4, ()),))] = SPECIAL[case.values]
    elif case.values in ("zeros", "constant"):
        x = torch.full_like(x, 0.5 * (case.values == "constant"))
    return x.to(DTYPES[case.image_dtype or case.dtype])


def laid_out(x: Tensor, case: Case) -> Tensor:
    """The same numbers as a batch of the layout of the case."""
    if case.layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if case.layout == "transposed":
        return x.mT.contiguous().mT
    if case.layout == "strided":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    return x.expand(case.batch, -1, -1, -1) if case.layout == "expanded" else x


def compute(model: nn.Module, x: Tensor, case: Case, exact: bool = False) -> dict[str, Tensor] | Exception:
    """Logits and the gradients of a fixed random loss by image and trained parameters, or the exception."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(case.image_gradient and case.layout != "8 bits")
    autocast = None if exact or case.autocast is None else DTYPES[case.autocast]
    try:
        torch.manual_seed(case.seed)
        amp = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None)
        with amp, torch.set_grad_enabled(not case.no_grad):
            logits = model(laid_out(x, case))
        torch.manual_seed(case.seed)
        target = torch.randn(logits.shape, dtype=torch.float64).to(logits)
        wide = torch.promote_types(logits.dtype, torch.float32)
        if logits.requires_grad:
            (SCALE * (logits.to(wide) - target.to(wide)).square().mean()).backward()
    except Exception as error:
        return error
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    image = {} if x.grad is None else {"image": x.grad}
    return {"logits": logits.detach(), **image, **{name: grad.clone() for name, grad in gradients.items()}}


def normalized(fast: nn.Module, x: Tensor) -> Tensor:
    """Pixels for the reference, which takes no 8-bit images."""
    return fast._normalize(x) if x.dtype == torch.uint8 else x


def check(case: Case) -> str | None:
    """What is wrong with a case, or None."""
    with warnings.catch_warnings(), instruction_set(case.isa):
        warnings.simplefilter("ignore")
        reference, fast, oracle = models = build(case)
        x = pixels(case)
        plain, value = compute(reference, normalized(fast, x), case), compute(fast, x, case)
        if isinstance(plain, Exception) or isinstance(value, Exception):
            raised = [isinstance(result, Exception) for result in (plain, value)]
            return None if all(raised) else f"the reference: {_text(plain)}; fast: {_text(value)}"
        exact = compute(oracle, normalized(fast, x).double(), case, exact=True)
        assert isinstance(exact, dict), exact
        if wrong := _structure(value, plain):
            return wrong
        if _finiteness(case, value, exact, plain):
            single = compute(copy.deepcopy(reference).float(), normalized(fast, x).float(), case, exact=True)
            if wrong := _finiteness(case, value, exact, plain, single):
                return wrong
        suspects = [name for name in plain if not _passes(*_errors(case, name, value, plain, exact), case)]
        return _judge(case, models, x, suspects, exact) if suspects else None


def _text(result: dict[str, Tensor] | Exception) -> str:
    return f"{type(result).__name__}: {str(result)[:160]}" if isinstance(result, Exception) else "no error"


def _structure(value: dict[str, Tensor], plain: dict[str, Tensor]) -> str | None:
    if value.keys() != plain.keys():
        return f"results of {sorted(value.keys() ^ plain.keys())} on one side only"
    for name, expected in plain.items():
        facts = [(t.dtype, tuple(t.shape)) for t in (value[name], expected)]
        if facts[0] != facts[1]:
            return f"{name} is {facts[0]}, in the reference {facts[1]}"
    return None


def _finiteness(
    case: Case, value: dict[str, Tensor], exact: dict[str, Tensor], *others: dict[str, Tensor]
) -> str | None:
    for name, got in value.items():
        finite = torch.stack([other[name].isfinite() for other in (exact, *others)])
        lost, appeared = ~finite.any(0) & got.isfinite(), finite.all(0) & ~got.isfinite()
        unsure = exact[name].isfinite() & (exact[name].abs() > torch.finfo(case.computed_in).max / 2)
        if name.startswith("global_prompter.") and name.endswith("weight"):
            unsure |= exact[name] == 0
        for wrong, what in ((lost & ~unsure, "finite"), (appeared & ~unsure, "not finite")):
            if wrong.any():
                return f"{name}: {int(wrong.sum())} of {got.numel()} numbers are {what}, unlike the reference's"
    return None


def _errors(
    case: Case, name: str, value: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]
) -> list[float]:
    """Relative errors of fast and reference, of the numbers that are finite everywhere."""
    both = value[name].isfinite() & plain[name].isfinite() & exact[name].isfinite()
    wanted, info = exact[name][both], torch.finfo(torch.promote_types(value[name].dtype, torch.float32))
    # Denormal numbers have few digits. The gradient of the last bias is zero up to rounding, because the norm behind it
    # subtracts any constant: its error is compared with the largest gradient of the prompter. That of its own weight
    # would be too small a measure where the image is black.
    lost = 0.0
    if name == "specific_prompter.conv3.bias":
        gradients = [t for other, t in exact.items() if other.startswith("specific_prompter.")]
        lost = 4 * torch.finfo(case.computed_in).eps * max(t[t.isfinite()].norm().item() for t in gradients)
    scale = max(wanted.norm().item(), info.tiny / info.eps)
    return [max((t[name][both].double() - wanted).norm().item() - lost, 0.0) / scale for t in (value, plain)]


def _passes(error: float, own: float, case: Case) -> bool:
    rounding = max(torch.finfo(dtype).eps for dtype in (case.computed_in, DTYPES[case.dtype]))
    floor = 0.0 if rounding > EPS else 1e-5 * rounding / EPS
    return error <= max(floor, 2 * own + rounding)


def _judge(case: Case, models: Any, x: Tensor, suspects: list[str], exact: dict[str, Tensor]) -> str | None:
    """Repeat a failing case with images and weights that differ by rounding; what still fails, as text.

    Errors are against the oracle for the original image and weights. It is enough if either their root mean square
    or their largest passes: where two pixels compete for a maximum, one model may pick the other pixel more often.
    """
    reference, fast, _ = models
    x, weights = normalized(fast, x), copy.deepcopy(reference.state_dict())
    rounding = torch.finfo(case.computed_in).eps
    if rounding <= EPS:  # every partial sum is rounded; in 16 bits only the result is
        rounding *= 16

    def near(t: Tensor) -> Tensor:
        return (t.double() * (1 + rounding * (torch.rand(t.shape, dtype=torch.float64) - 0.5))).to(t.dtype)

    errors: dict[str, list[list[float]]] = {name: [] for name in suspects}
    done = 0
    for count in DRAWS:
        while done < count:
            torch.manual_seed(done)
            image, changed = near(x), {name: near(weight) for name, weight in weights.items()}
            for model in (reference, fast):
                model.load_state_dict(changed)
            value, plain = compute(fast, image, case), compute(reference, image, case)
            assert isinstance(value, dict) and isinstance(plain, dict)
            for name in suspects:
                errors[name].append(_errors(case, name, value, plain, exact))
            done += 1
        suspects = [name for name in suspects if not any(_passes(*of(errors[name]), case) for of in (_mean, _worst))]
        if not suspects:
            return None
    texts = (
        f"{name}: error {found:.1e}, the reference's {own:.1e}"
        for name in suspects
        for found, own in [_mean(errors[name])]
    )
    return "; ".join(texts)


def _mean(errors: list[list[float]]) -> list[float]:
    return [math.hypot(*column) / len(column) ** 0.5 for column in zip(*errors, strict=True)]


def _worst(errors: list[list[float]]) -> list[float]:
    return [max(column) for column in zip(*errors, strict=True)]


def simplified(case: Case) -> Case:
    """The case without all that its failure does not depend on."""
    simplest = Case()
    for name, value in vars(case).items():
        if isinstance(value, dict):
            needed = ("img_size", "patch_size")  # the size of the image depends on them
            for key in [key for key in value if key not in needed]:
                rest = {k: v for k, v in getattr(case, name).items() if k != key}
                case = _if_it_fails(dataclasses.replace(case, **{name: rest}), case)
        elif name != "size":
            case = _if_it_fails(dataclasses.replace(case, **{name: getattr(simplest, name)}), case)
    return case


def _if_it_fails(simpler: Case, case: Case) -> Case:
    try:
        return simpler if check(simpler) else case
    except Exception:
        return case


def run(count: int, seed: int, simplify: bool = False) -> list[tuple[Case, str]]:
    """Check ``count`` cases, print those that fail, and return them with the reasons."""
    failures: list[tuple[Case, str]] = []
    start, done, seen = time.monotonic(), 0, set[int]()

    def each(case: Case) -> None:
        nonlocal done
        if case.seed in seen or done == count:  # hypothesis tries five near-copies of each case
            return
        seen.add(case.seed)
        done += 1
        try:
            wrong = check(case)
        except Exception as error:
            wrong = f"the check itself: {_text(error)}"
        if wrong:
            failures.append((case, wrong))
            print(f"FAILED {wrong}\n    check({simplified(case) if simplify else case!r})", flush=True)
        if done % 100 == 0:
            print(f"{done} cases, {len(failures)} failed, {done / (time.monotonic() - start):.1f} a second", flush=True)

    drawn = settings(
        max_examples=500,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    for part in range(count):  # hypothesis slows down with the number of examples of one run
        if done < count:
            hypothesis.seed(1000 * seed + part)(drawn(given(cases())(each)))()
    print(f"{done} cases, seed {seed}: {len(failures)} failed")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--simplify", action="store_true", help="reduce failing cases to what matters; slow")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the models are tiny
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, timm, hypothesis)}
    print(", ".join(f"{name} {version}" for name, version in versions.items()), native_status(), sep="; ", flush=True)
    return 1 if run(arguments.cases, arguments.seed, arguments.simplify) else 0


if __name__ == "__main__":
    sys.exit(main())
