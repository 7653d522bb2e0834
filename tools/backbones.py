"""Say for every architecture of timm how InsVPViT takes it: docs/backbone_table.md.

    python -m tools.backbones                          # some ten minutes: writes the table, prints the counts
    python -m tools.backbones --check --modules eva beit    # compares numbers, writes nothing

The table is made of models as timm builds them, on the meta device, without memory for their weights.

``--check`` makes them tiny, with random weights, and compares the logits and all gradients of ``InsVPViT`` with those
of ``InsVPReference`` in double precision: their error has to be at most 1e-5, or twice that of ``InsVPReference`` in
fp32. Names that are not fast are compared too. The exit status is 1 if one is off.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import AttentionRope
from timm.models import model_entrypoint
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from insvp_fast import InsVPConfig, InsVPReference, InsVPViT, unsupported_reason
from insvp_fast.reference import image_only, structure_of
from insvp_fast.testing import relative_error, trained_gradients

PAGE = Path(__file__).parents[1] / "docs" / "backbone_table.md"
CHECKED = (
    "vision_transformer",
    "eva",
    "deit",
    "beit",
    "swin_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "naflexvit",
    "vitamin",
    "cait",
)
IMAGE_PROMPTS = InsVPConfig(common_prompt=False, specific_prompt=False, global_dropout=0.0)
ALL_PROMPTS = InsVPConfig(prompt_length=3, global_dropout=0.0)
VERDICTS = ("fast", "general", "image prompts only", "refused")
HEADER = """# Every architecture of timm

What `InsVPViT` makes of the {total} architectures of timm {version}, by the module of timm that they are from:

- **fast**: the fast path computes them.
- **general**: with all prompts, on the general path, which calls timm's modules: exact, not fast.
- **image prompts only**: there are no blocks that prompts can be put into. Needs `common_prompt=False` and
  `specific_prompt=False`; anything else is refused in words.
- **refused**: an error says why.

`python -m tools.backbones` made this page. The same is said of one model by `insvp_fast.unsupported_reason(model)`.

| module | classes | fast | general | image prompts only | refused |
|---|---|---|---|---|---|
"""


class Finding(NamedTuple):
    """What was found out about a name."""

    name: str
    module: str  # of timm.models
    cls: str
    verdict: str  # one of VERDICTS
    reason: str  # of a verdict other than "fast"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare numbers of tiny models")
    parser.add_argument("--modules", nargs="*", help=f"of timm.models; with --check {', '.join(CHECKED)}, else all")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the general path warns
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    names = sorted(names_of(options.modules or (CHECKED if options.check else None)), key=lambda pair: pair[1])
    if options.check:
        sys.exit(check(names))
    findings = [look(name, module) for name, module in names]
    print_counts(findings)
    if not options.modules:
        PAGE.write_text(page(findings))


def names_of(modules: list[str] | None) -> Iterator[tuple[str, str]]:
    """The names of timm's architectures and their modules."""
    for name in timm.list_models():
        package, _, module = model_entrypoint(name).__module__.rpartition(".")
        if package == "timm.models" and (modules is None or module in modules):
            yield name, module


# The table


def look(name: str, module: str) -> Finding:
    """How InsVPViT takes an architecture, as timm builds it."""
    with torch.device("meta"):
        backbone = timm.create_model(name)
    return Finding(name, module, type(backbone).__name__, *judge(backbone))


def judge(backbone: nn.Module) -> tuple[str, str]:
    """Verdict and reason; the backbone becomes a model's."""
    try:
        alone = structure_of(backbone) is image_only
        model = InsVPViT(backbone, 10, IMAGE_PROMPTS if alone else ALL_PROMPTS)
    except (TypeError, ValueError) as error:
        return "refused", str(error)
    if alone:
        return judge_image_prompts(backbone, model.patch_size)
    reason = unsupported_reason(model)
    return ("fast", "") if reason is None else ("general", reason)


def judge_image_prompts(backbone: nn.Module, patch_size: int) -> tuple[str, str]:
    """As ``judge``, by a forward pass with an image of the size that timm recommends."""
    size, reason = backbone.pretrained_cfg["input_size"], "no blocks that prompts can be put into"
    fits = not any(side % patch_size for side in size[1:])
    config = dataclasses.replace(IMAGE_PROMPTS, patch_prompt=fits)
    try:
        logits = InsVPReference(backbone, 10, config)(torch.empty(2, *size, device="meta"))
    except RuntimeError as error:
        return "refused", str(error).splitlines()[0]
    assert logits.shape == (2, 10), f"{type(backbone).__name__} returned {tuple(logits.shape)}"
    if not fits:
        reason += f"; images of {size[1]}x{size[2]} pixels need patch_prompt=False, its patches have {patch_size}"
    return "image prompts only", reason


def print_counts(findings: list[Finding]) -> None:
    for module in dict.fromkeys(finding.module for finding in findings):
        counts = Counter(finding.verdict for finding in findings if finding.module == module)
        print(f"{module:32}", *(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]), sep="  ")
    total = Counter(finding.verdict for finding in findings)
    print(f"{'all':32}", *(f"{total[verdict]} {verdict}" for verdict in VERDICTS), sep="  ")


def page(findings: list[Finding]) -> str:
    """The text of docs/backbone_table.md."""
    by_module: dict[str, list[Finding]] = {}
    for finding in findings:
        by_module.setdefault(finding.module, []).append(finding)
    prompted = {
        module: found for module, found in by_module.items() if {f.verdict for f in found} != {"image prompts only"}
    }
    lines = [HEADER.format(total=len(findings), version=timm.__version__).rstrip("\n")]
    for module, found in prompted.items():
        counts = Counter(finding.verdict for finding in found)
        classes = ", ".join(f"`{cls}`" for cls in sorted({finding.cls for finding in found}))
        lines.append(f"| `{module}` | {classes} | " + " | ".join(str(counts[v] or "") for v in VERDICTS) + " |")
    rest = {module: len(found) for module, found in by_module.items() if module not in prompted}
    lines.append(f"| {len(rest)} others | | | | {sum(rest.values())} | |")
    lines += ["", "The others: " + ", ".join(f"`{module}` ({n})" for module, n in rest.items()) + "."]
    lines += ["", "## What is not fast, and why", "", "All names of the modules above that are not here are fast.", ""]
    lines += ["| module | | reason | names |", "|---|---|---|---|"]
    folded: dict[tuple[str, str, str], list[str]] = {}
    for finding in (finding for found in prompted.values() for finding in found if finding.verdict != "fast"):
        key = finding.module, finding.verdict, re.sub(r"blocks\.\d+", "blocks.N", finding.reason)
        folded.setdefault(key, []).append(finding.name)
    for (module, verdict, reason), names in folded.items():
        lines.append(f"| `{module}` | {verdict} | {reason} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines) + "\n"


# The comparison


def check(names: list[tuple[str, str]]) -> int:
    """Compare tiny models; returns the exit status."""
    counts: dict[str, Counter[str]] = {}
    worst, failed = 0.0, 0
    for name, module in names:
        try:
            backbone, image = tiny(name)
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            print(f"{name}: could not be made tiny: {error}", flush=True)
            counts.setdefault(module, Counter())["not compared"] += 1
            continue
        verdict, error = compare(backbone, image)
        failed += error > 1
        worst = max(worst, error)
        counts.setdefault(module, Counter())[verdict] += 1
        if error > 1:
            print(f"{name} ({verdict}): the error is {error:.1f} times what is allowed", flush=True)
    for module, found in counts.items():
        print(f"{module:32}", *(f"{number} {verdict}" for verdict, number in found.items()), sep="  ")
    print(f"{failed} off; the largest error is {worst:.2f} times what is allowed")
    return int(failed > 0)


def tiny(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The architecture with two blocks, or two stages, and an image of a few patches or windows."""
    with torch.device("meta"):
        full = timm.create_model(name)
    P = structure_of(full).patch_size(full)
    if isinstance(full, SwinTransformer):
        windows = [stage.blocks[0].window_size for stage in full.layers[:2]]
        size = (2 * P * max(max(windows)),) * 2
        arguments: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2), "num_heads": (1, 3), "window_size": windows}
    else:
        size = (2 * P, 2 * P) if getattr(full, "dynamic_img_size", False) else (2 * P, 3 * P)
        arguments = {"embed_dim": 64, "depth": 2, "num_heads": 4}
        if groups := {module.num_kv_groups for module in full.modules() if isinstance(module, AttentionRope)}:
            arguments["num_kv_heads"] = 2 if max(groups) > 1 else 4
        if isinstance(getattr(getattr(full, "patch_embed", None), "proj", None), nn.Identity):
            arguments = {"depth": 2}  # a network makes tokens of its own width
    arguments["img_size"] = size
    torch.manual_seed(0)
    backbone = timm.create_model(name, **arguments)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # timm sets many to 0 or 1, which would hide an error
    return backbone, torch.randn(2, 3, *size)


def compare(backbone: nn.Module, image: torch.Tensor) -> tuple[str, float]:
    """The verdict, and the largest error of logits and gradients as a multiple of what is allowed."""
    alone = structure_of(backbone) is image_only
    # without convolutions: where a ReLU behind them is at 0, their rounding decides whether it has a gradient
    config = InsVPConfig(prompt_length=3, global_prompt=False, specific_prompt=False, common_prompt=not alone)
    reference, fast = InsVPReference(copy.deepcopy(backbone), 10, config), InsVPViT(backbone, 10, config)
    fast.load_state_dict(reference.state_dict())
    reason = unsupported_reason(fast)
    verdict = "image prompts only" if alone else "fast" if reason is None else "general"
    exact = trained_gradients(copy.deepcopy(reference).double(), image.double())
    plain, values = trained_gradients(reference, image), trained_gradients(fast, image)
    errors = [
        relative_error(values[key], exact[key]) / max(1e-5, 2 * relative_error(plain[key], exact[key])) for key in exact
    ]
    return verdict, max(errors)


if __name__ == "__main__":
    main()
