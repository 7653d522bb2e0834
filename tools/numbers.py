"""SHA-256 of what models compute from a fixed seed, to check that a refactoring changes no bit.

    python -m tools.numbers > before.json            # on one commit
    python -m tools.numbers --compare before.json    # on the other, on the same machine

Only names that exist in both commits may be used here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from insvp_fast import InsVPConfig, InsVPReference, InsVPViT

CONFIGS = {
    "paper": {},
    "no global prompt": {"global_prompt": False},
    "no patch prompt": {"patch_prompt": False},
    "VPT-Deep": {"global_prompt": False, "patch_prompt": False, "specific_prompt": False},
    "four blocks, carried": {"prompted_blocks": 4, "carry_prompts": True},
    "SimAM": {"simam": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mlp computed again": {"recompute": "mlp"},
    "blocks computed again": {"recompute": "block"},
    "norms apart": {"fold_norm": False},
    "GELU in 8 bits": {"gelu_in_8_bits": True},
    "reference attention": {"attention": "reference"},
    "SDPA": {"attention": "sdpa"},
}
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--compare", metavar="FILE", help="output of another commit; the exit status is 1 if anything differs"
    )
    compare = parser.parse_args().compare
    warnings.simplefilter("ignore")
    found = dict(numbers())
    if compare is None:
        print(json.dumps(found, indent=1))
        return 0
    before = json.loads(Path(compare).read_text())
    different = sorted(name for name in before | found if before.get(name) != found.get(name))
    print(*(f"different: {name}" for name in different), f"{len(found)} compared, {len(different)} differ", sep="\n")
    return 1 if different else 0


def numbers() -> Iterator[tuple[str, str]]:
    """The name of each case and the SHA-256 of its results."""
    for name, fields in CONFIGS.items():
        for precision in ("fp32", "bf16"):
            yield f"{name}, {precision}", step(InsVPViT, InsVPConfig(**fields), precision)
    for name, options in OPTIONS.items():
        for precision in AUTOCAST:
            yield f"{name}, {precision}", step(InsVPViT, InsVPConfig(), precision, **options)
    for precision in AUTOCAST:
        yield f"released, {precision}", step(InsVPViT, InsVPConfig.released(), precision)
        yield f"reference, {precision}", step(InsVPReference, InsVPConfig(), precision)
        yield f"reference of the release, {precision}", step(InsVPReference, InsVPConfig.released(), precision)
        yield f"8-bit images, {precision}", step(InsVPViT, InsVPConfig(), precision, pixels=True)
        yield f"general path, {precision}", step(InsVPViT, InsVPConfig(), precision, hooked=True)
        yield (
            f"general path, computed again, {precision}",
            step(InsVPViT, InsVPConfig(), precision, hooked=True, recompute="block"),
        )
    for dtype in (torch.bfloat16, torch.float64):
        yield f"weights in {dtype}", step(InsVPViT, InsVPConfig(), "fp32", dtype=dtype)
    yield "one trained run", train()


def step(
    cls: type[nn.Module],
    config: InsVPConfig,
    precision: str,
    pixels: bool = False,
    hooked: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> str:
    """Logits in evaluation mode, then logits, loss and all gradients in training mode."""
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=5, num_classes=0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model = cls(backbone, 7, config, **options).to(dtype)
    if hooked:
        backbone.blocks[1].register_forward_hook(lambda module, inputs, output: None)
    image = (
        torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8) if pixels else torch.randn(3, 3, 96, 96, dtype=dtype)
    )
    amp = AUTOCAST[precision]
    results: list[Tensor] = []
    for mode in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", amp) if amp else nullcontext(), torch.set_grad_enabled(mode):
            logits = model.train(mode)(image)
        results.append(logits)
    loss = nn.functional.cross_entropy(results[1].float(), torch.tensor([1, 0, 6]))
    loss.backward()
    return digest([*results, loss, *(p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)])


def train() -> str:
    """The adapter after two epochs on the digits."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "insvp_fast", "train", "--epochs", "2", "--amp", "off", "--output", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        tensors = load_file(next(Path(folder).glob("*/adapter/*.safetensors")))
    return digest([tensors[key] for key in sorted(tensors)])


def digest(tensors: list[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
