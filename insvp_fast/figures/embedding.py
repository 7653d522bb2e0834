"""Pictures of vectors in two dimensions, by t-SNE (van der Maaten and Hinton, JMLR 2008)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import Tensor

from insvp_fast.errors import DataError
from insvp_fast.figures.modes import evaluating
from insvp_fast.figures.style import COLORS, MARKERS, drawable, drawing
from insvp_fast.methods import TunedViT
from insvp_fast.methods.load import AnyModel
from insvp_fast.reference import InsVPReference

__all__ = ["MAX_CLASSES", "choose_images", "collect_vectors", "plot_tsne", "specific_prompts"]

MAX_CLASSES = 20  # that colors and markers tell apart
PCA_DIMENSIONS = 50  # before t-SNE, as its authors do
PERPLEXITY = 30.0
MAX_COLUMNS = 4  # of panels


def choose_images(classes: Sequence[int], count: int, seed: int) -> list[int]:
    """Indices of at most ``count`` random images of at most 20 random classes, in ascending order.

    Raises:
        DataError: if there are fewer than three images or two classes, too few to compare.
    """
    random, labels = np.random.default_rng(seed), np.asarray(classes)
    names = np.unique(labels)
    kept = random.choice(names, min(MAX_CLASSES, len(names)), replace=False)
    of_kept = np.flatnonzero(np.isin(labels, kept))
    chosen = np.sort(random.choice(of_kept, min(count, len(of_kept)), replace=False))
    if not 2 <= len(np.unique(labels[chosen])) < len(chosen):
        raise DataError(f"t-SNE of {len(chosen)} images of {len(np.unique(labels[chosen]))} classes: expected more")
    return [int(index) for index in chosen]


@torch.inference_mode()
def collect_vectors(model: AnyModel, batches: Iterable[Tensor]) -> dict[str, np.ndarray]:
    """What t-SNE is to show of images, fp32 [N, width] by title.

    These are the specific prompts p_s, if there are any, the features that the head would read from the bare frozen
    backbone, if the method leaves that as it is, and last those that it reads.
    """
    found: dict[str, list[Tensor]] = {}
    with evaluating(model):
        for images in batches:
            for title, vectors in _vectors(model, images).items():
                found.setdefault(title, []).append(vectors.float().cpu())
    return {title: torch.cat(vectors).numpy() for title, vectors in found.items()}


def _vectors(model: AnyModel, images: Tensor) -> dict[str, Tensor]:
    if isinstance(model, TunedViT):
        return {"features": model.pooled_features(images)}
    prompts = specific_prompts(model, images) if isinstance(model, InsVPReference) else None
    own = {} if prompts is None else {"specific prompts": prompts}
    parts: dict[str, Any] = {"without": model.backbone, "with": model}
    for word, part in parts.items():
        own[f"features {word} prompts"] = model.forward_head(part.forward_features(images), pre_logits=True)
    return own


def specific_prompts(model: InsVPReference, images: Tensor) -> Tensor | None:
    """p_s of images [B, C, H, W] in one row each, [B, L·D] or, of several widths, [B, L·(D + ...)]; None if off."""
    _, prompts = model.prompt_image(images)
    if prompts is None:
        return None
    return torch.cat([p.flatten(1) for p in (prompts if isinstance(prompts, tuple) else (prompts,))], dim=1)


def plot_tsne(
    panels: Mapping[str, np.ndarray],
    classes: Sequence[int],
    class_names: Sequence[str],
    file: str | Path,
    seed: int = 0,
) -> dict[str, float]:
    """t-SNE of the vectors [N, width] of each panel, colored by class.

    Returns:
        The silhouette score of each panel's classes, which its title also has: 1 if they are far apart, 0 if they
        overlap. It is that of the vectors themselves, which t-SNE does not preserve.

    Raises:
        DataError: if the vectors of a panel are all equal or not finite, which have no places.
    """
    labels = np.asarray(classes)
    for title, vectors in panels.items():
        if not (np.isfinite(vectors).all() and np.ptp(vectors, axis=0).any()):
            raise DataError(f"t-SNE of {title}: the vectors are all equal or not finite: expected different ones")
    scores = {title: float(silhouette_score(vectors, labels)) for title, vectors in panels.items()}
    rows = math.ceil(len(panels) / MAX_COLUMNS)
    columns = math.ceil(len(panels) / rows)
    with drawing(file, 3.1 * columns + 1.3, 3.5 * rows + 0.2) as figure:
        figure.suptitle(f"t-SNE of {len(labels)} images")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for unused in grid[len(panels) :]:
            unused.remove()
        for axes, (title, vectors) in zip(grid, panels.items(), strict=False):
            points = _tsne(vectors, seed)
            for i, label in enumerate(np.unique(labels)):
                own = points[labels == label]
                marker, color = MARKERS[i // len(COLORS) % len(MARKERS)], COLORS[i % len(COLORS)]
                name = drawable(class_names[label])
                axes.scatter(*own.T, s=14, marker=marker, c=color, alpha=0.75, linewidths=0, label=name)
            axes.set(xticks=[], yticks=[], title=f"{drawable(title)}\nsilhouette {scores[title]:.2f}")
            axes.set_box_aspect(1)
            for side in ("right", "top"):
                axes.spines[side].set_visible(True)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", markerscale=1.5)
    return scores


def _tsne(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Points [N, 2]."""
    count, width = vectors.shape
    if width > PCA_DIMENSIONS < count:
        vectors = PCA(PCA_DIMENSIONS, random_state=seed).fit_transform(vectors)
    points: np.ndarray = TSNE(perplexity=min(PERPLEXITY, (count - 1) / 3), random_state=seed).fit_transform(vectors)
    return points
