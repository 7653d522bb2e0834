"""DAM-VP, diversity-aware visual prompting (Huang et al., CVPR 2023): a frame of pixels for each cluster of images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from insvp_fast.errors import DataError, TrainingError
from insvp_fast.methods.checks import require_at_least
from insvp_fast.methods.vp import VP
from insvp_fast.reference import Geometry, PromptMethod

__all__ = ["DAMVP", "NUM_IMAGES"]

NUM_IMAGES = 1000  # that are clustered


class DAMVP(PromptMethod):
    """x~ = x + v_i, where i is the cluster whose center is nearest to the features of the image.

    The features are those of the frozen backbone without prompts: a second pass. ``fit`` makes the clusters from images
    of the training set, and must run before the first forward pass. The paper begins with prompts that were
    meta-trained on other data sets; here they begin as those of ``VP``.

    Args:
        num_prompts: the number of clusters, each with a prompt. The paper instead cuts the tree of clusters at a
            distance that is chosen for each backbone.
        padding: the width of the frames, as that of ``VP``.

    Raises:
        ValueError: without clusters, or as ``VP`` does.
    """

    centers: Tensor  # [K, D]; not a number before ``fit``

    def __init__(self, geometry: Geometry, *, num_prompts: int = 10, padding: int | None = None) -> None:
        super().__init__(geometry)
        require_at_least(1, num_prompts=num_prompts)
        if not geometry.widths:
            raise ValueError("dam_vp around a backbone without blocks that take prompts: expected a backbone of blocks")
        self.frames = nn.ModuleList(VP(geometry, padding=padding) for _ in range(num_prompts))
        self.register_buffer("centers", torch.full((num_prompts, geometry.widths[-1]), torch.nan))
        self.is_fitted = False
        self._bare: tuple[nn.Module, ...] = ()  # in a tuple, so that the backbone is not a part of the method

    def attach(self, bare: nn.Module) -> None:
        """Take the features that this model without prompts gives."""
        self._bare = (bare,)

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """The pooled features of the bare backbone, [B, D], of normalized images [B, C, H, W]."""
        (bare,) = self._bare
        return bare(image)

    def fit(self, batches: Iterable[Any], num_images: int = NUM_IMAGES) -> None:
        """Cluster images by their features: average linkage, cut into as many clusters as there are prompts.

        Args:
            batches: as ``features_of`` takes them. Needs scipy.
            num_images: that are used; at least one for each prompt.

        Raises:
            DataError: for fewer images than prompts.
        """
        self.fit_features(self.features_of(batches, max(num_images, len(self.frames))))

    def features_of(self, batches: Iterable[Any], num_images: int) -> Tensor:
        """The features of the first ``num_images`` images, [N, D].

        Args:
            batches: normalized images [B, C, H, W], or tuples that begin with them, as a shuffled loader of the
                training set gives.
        """
        found = [self.centers[:0]]
        count = 0
        for batch in batches:
            image = batch if isinstance(batch, Tensor) else batch[0]
            found.append(self.features(image.to(self.centers.device)))
            count += len(image)
            if count >= num_images:
                break
        return torch.cat(found)[:num_images]

    def fit_features(self, features: Tensor) -> None:
        """As ``fit``, from features [N, D]."""
        from scipy.cluster.hierarchy import cut_tree, linkage

        self.require(len(features))
        tree = linkage(features.double().cpu().numpy(), method="average")
        clusters = torch.from_numpy(cut_tree(tree, n_clusters=len(self.frames))[:, 0]).to(features.device)
        centers = [features[clusters == i].mean(0) for i in range(len(self.frames))]
        self.centers.copy_(torch.stack(centers))
        self.is_fitted = True

    def require(self, num_images: int) -> None:
        """Check that there are enough images to cluster.

        Raises:
            DataError: for fewer images than prompts.
        """
        if num_images < len(self.frames):
            raise DataError(f"DAM-VP has {len(self.frames)} prompts: expected as many images, found {num_images}")

    def nearest(self, features: Tensor) -> Tensor:
        """The cluster of each row of features [B, D]: [B], int64."""
        dtype = torch.promote_types(self.centers.dtype, torch.float32)
        # not torch.cdist, which computes the distances of more than 25 images in another way
        distances = (features.to(dtype)[:, None] - self.centers.to(dtype)).square().sum(-1)
        return distances.argmin(dim=1)

    def prompt_image(self, image: Tensor) -> tuple[Tensor, Any]:
        """x~, and no context.

        Raises:
            TrainingError: before ``fit``.
            ValueError: for images of another size than the backbone was made for.
        """
        if not self.is_fitted:
            raise TrainingError("DAM-VP has no clusters yet: expected model.method.fit(batches of training images)")
        frames: list[Any] = [*self.frames]
        canvases = torch.stack([frame.canvas(image) for frame in frames])
        return image + canvases[self.nearest(self.features(image))], None

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.is_fitted = bool(self.centers.isfinite().all())
