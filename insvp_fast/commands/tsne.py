"""Draw a run's test images as points by t-SNE, colored by class: the specific prompts and the features.

Three panels show the specific prompts of the images, the features that the head reads, and the features of the bare
frozen backbone. Their titles have the silhouette score of the classes, from -1 to 1 where they are far apart, in all
dimensions. Of more than 20 classes, 20 are chosen at random.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from insvp_fast.commands.options import add_json, add_loading, make_folder, positive
from insvp_fast.errors import CommandError

SUMMARY = "draw specific prompts and features by t-SNE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder of `insvp train`")
    parser.add_argument("--images", type=positive, metavar="N", default=1000, help="at most so many (default: 1000)")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the choice and of t-SNE (default: 0)")
    parser.add_argument("--output", metavar="FILE", help=".png, .pdf or .svg (default: tsne.png, in RUN)")
    add_loading(parser)
    add_json(parser)


def run(
    run: str, images: int, seed: int, output: str | None, batch_size: int | None, workers: int | None
) -> dict[str, Any]:
    from torch.utils.data import DataLoader, Subset

    from insvp_fast import InsVPViT
    from insvp_fast.data import load_test_data
    from insvp_fast.figures.embedding import choose_images, collect_vectors, plot_tsne
    from insvp_fast.training.accelerator import create_accelerator
    from insvp_fast.training.load import load_run

    file = Path(output or Path(run) / "tsne.png")
    if file.suffix not in (".png", ".pdf", ".svg"):
        raise CommandError(f"--output is {file}: expected a name that ends in .png, .pdf or .svg")
    recipe, model, preprocessing, names = load_run(run)
    if recipe is None or names is None or not isinstance(model, InsVPViT):
        raise CommandError(f"{run}: expected a run of `insvp train` with the method insvp")
    if model.multi_label:
        raise CommandError(f"{run}: its images may have several labels, but a point has one color")
    make_folder(file.parent)
    data = load_test_data(
        recipe.data, preprocessing, recipe.split_seed, names, root=recipe.root, exif_rotation=recipe.exif_rotation
    )
    labels = [int(label) for label in data.classes]
    chosen = choose_images(labels, images, seed)
    device = create_accelerator().device
    workers = recipe.workers if workers is None else workers
    loader = DataLoader(Subset(data, chosen), batch_size or recipe.batch_size, num_workers=workers)
    vectors = collect_vectors(model.to(device), (batch.to(device) for batch, _ in loader))
    scores = plot_tsne(vectors, [labels[i] for i in chosen], names, file, seed)
    print(f"{len(chosen)} images of {len({labels[i] for i in chosen})} classes, silhouette score")
    for title, score in scores.items():
        print(f"  {title}: {score:.3f}")
    print(f"written: {file}")
    return {"file": str(file), "images": len(chosen), "silhouette_scores": scores}
