"""VAPT, visual adaptive prompt tuning (Le et al., arXiv 2501.18936): prompts made from the tokens of their block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from insvp_fast.methods.checks import require_at_least, require_probabilities
from insvp_fast.methods.vpt import VPTDeep
from insvp_fast.reference import Geometry, Prompts

__all__ = ["VAPT"]


class VAPT(VPTDeep):
    """Prompts that depend on the image, made from the patch tokens x that enter the block; the first block has VPT's.

        p_j = g(A_j · conv_j(norm_j(x)) + b_j),  g(y) = y + W_2 ReLU(W_1 y)

    conv_j has one kernel for all channels of the map of patches, A_j [L, N'] averages over what that gives, W_1 and W_2
    are shared by all blocks. A_j and conv_j, both linear and over patches alone, are multiplied with each other first:
    so the product with the tokens is one of [L, N] and [N, D].

    Args:
        kernel: the side of conv_j's kernel.
        hidden: the width between W_1 and W_2.
        channel_dropout: the probability that a channel of an image is dropped behind conv_j, in training.
        hidden_dropout: dropout behind the ReLU.

    Other arguments and errors: see ``VPTDeep``. The image size is that for which the backbone was made.

    Raises:
        ValueError: if the kernel is larger than the map of patches.
    """

    reads_tokens = True

    def __init__(
        self,
        geometry: Geometry,
        *,
        length: int = 10,
        kernel: int = 3,
        hidden: int = 8,
        dropout: float = 0.1,
        channel_dropout: float = 0.1,
        hidden_dropout: float = 0.1,
    ) -> None:
        super().__init__(geometry, length=length, dropout=dropout, blocks=(0,))
        height, width = self.grid = tuple(side // geometry.patch_size for side in geometry.fixed_image_size)
        require_at_least(1, kernel=kernel, hidden=hidden)
        require_probabilities(channel_dropout=channel_dropout, hidden_dropout=hidden_dropout)
        if not kernel <= min(self.grid):
            raise ValueError(f"kernel={kernel}: expected 1 to {min(self.grid)}, the patches of a {height}x{width} map")
        D = geometry.width
        self.prompted_blocks = geometry.blocks(None)
        adaptive = self.prompted_blocks[1:]
        shape = length, 1, height - kernel + 1, width - kernel + 1
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in adaptive)
        self.kernels = nn.ParameterList(torch.randn(1, 1, kernel, kernel) for _ in adaptive)
        self.averages = nn.ParameterList(torch.zeros(shape) for _ in adaptive)
        self.biases = nn.ParameterList(torch.zeros(length, 1) for _ in adaptive)
        self.fc1, self.fc2 = nn.Linear(D, hidden, bias=False), nn.Linear(hidden, D, bias=False)
        self.channel_dropout, self.hidden_dropout = nn.Dropout(channel_dropout), nn.Dropout(hidden_dropout)

    def block_prompts(self, block: int, context: Any, batch: int, tokens: Tensor | None = None) -> Prompts | None:
        """p_j of each image, from its tokens.

        Raises:
            ValueError: for images of another size than the backbone was made for.
        """
        if block == 0:
            return super().block_prompts(block, context, batch)
        assert tokens is not None, "reads_tokens=True: the model gives them"
        i, (height, width) = block - 1, self.grid
        x = tokens[:, self.geometry.num_prefix_tokens :].to(self.fc1.weight.dtype)
        if x.shape[1] != height * width:
            raise ValueError(f"images have {x.shape[1]} patches: expected {height * width}, those of a fixed size")
        average = F.conv_transpose2d(self.averages[i], self.kernels[i]).flatten(1)  # A_j · conv_j, [L, N]
        kept = self.channel_dropout(x.new_ones(batch, 1, x.shape[2]))
        y = average @ self.norms[i](x) * kept + self.biases[i]
        return Prompts(y + self.fc2(self.hidden_dropout(self.fc1(y).relu())))
