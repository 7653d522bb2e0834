"""Draw test images as points by t-SNE, colored by class.

Of one run, panels show the specific prompts of InsVP, the features that the head would read from the bare frozen
backbone, if the method has not changed it, and those that it reads. Of several runs on the same data, by whatever
method, each has a panel with what its head reads. Titles have the silhouette score of the classes, from -1 to 1 where
they are far apart, in all dimensions. Of more than 20 classes, 20 are chosen at random.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from insvp_fast.commands.options import add_backbone, add_json, add_loading, integer, output_file, positive
from insvp_fast.errors import CommandError
from insvp_fast.training.setting import SEED

SUMMARY = "draw features and specific prompts by t-SNE"
Collected = tuple[dict[str, Any], tuple[list[tuple[str, int]], list[str]]]  # see _collect
ON_DATA = ("data", "root", "split_seed")  # settings that say which images are for testing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run folder of `insvp train`")
    add_backbone(parser)
    parser.add_argument("--images", type=positive, metavar="N", default=1000, help="at most so many (default: 1000)")
    parser.add_argument(
        "--seed", type=integer(SEED), metavar="N", default=0, help="of the choice and of t-SNE (default: 0)"
    )
    parser.add_argument("--output", metavar="FILE", help=".png, .pdf or .svg (default: tsne.png, in the first RUN)")
    add_loading(parser)
    add_json(parser)


def run(
    runs: list[str],
    backbone: str | None,
    images: int,
    seed: int,
    output: str | None,
    batch_size: int | None,
    workers: int | None,
) -> dict[str, Any]:
    from insvp_fast.figures.embedding import plot_tsne

    file = Path(output or Path(runs[0]) / "tsne.png")
    if file.suffix not in (".png", ".pdf", ".svg"):
        raise CommandError(f"--output is {file}: expected a name that ends in .png, .pdf or .svg")
    titles = _titles(runs)
    output_file(file)
    collected: list[Collected] = []
    for run in runs:
        collected.append(_collect(run, backbone, images, seed, batch_size, workers))
        if collected[-1][1] != collected[0][1]:
            raise CommandError(f"{run} is not tested on the same images as {runs[0]}: expected runs on the same data")
    panels, (chosen, names) = collected[0]
    if len(runs) > 1:
        panels = {title: list(vectors.values())[-1] for title, (vectors, _) in zip(titles, collected, strict=True)}
    labels = [label for _, label in chosen]
    scores = plot_tsne(panels, labels, names, file, seed)
    print(f"{len(labels)} images of {len({*labels})} classes, silhouette score")
    for title, score in scores.items():
        print(f"  {title}: {score:.3f}")
    print(f"written: {file}")
    return {"file": str(file), "images": len(labels), "silhouette_scores": scores}


def _titles(runs: Sequence[str]) -> list[str]:
    """The method and the folder of each run.

    Raises:
        CommandError: if a run is given twice, or the settings of their data differ.
    """
    from insvp_fast.training.candidates import candidates_of
    from insvp_fast.training.run_folder import read_config

    recipes, folders = [read_config(run)[0] for run in runs], [Path(run).resolve() for run in runs]
    for run, recipe in zip(runs, recipes, strict=True):
        for name in ON_DATA:
            if getattr(recipe, name) != (first := getattr(recipes[0], name)):
                problem = f"its `{name}` is {getattr(recipe, name)}, that of {runs[0]} is {first}"
                raise CommandError(f"{run}: {problem}: expected runs on the same data")
        if folders.count(Path(run).resolve()) > 1:
            raise CommandError(f"{run} is given twice: expected each run once")
    names = [folder.name for folder in folders]
    shown = names if len({*names}) == len(names) else runs
    return [f"{candidates_of(recipe)[-1].name}, {name}" for recipe, name in zip(recipes, shown, strict=True)]


def _collect(
    folder: str, backbone: str | None, images: int, seed: int, batch_size: int | None, workers: int | None
) -> Collected:
    """What ``collect_vectors`` gives of a run; names and classes of the images, and the names of the classes."""
    from torch.utils.data import Subset

    from insvp_fast.figures.embedding import choose_images, collect_vectors
    from insvp_fast.training.accelerator import create_accelerator
    from insvp_fast.training.load import load_run, own_test_data
    from insvp_fast.training.loader import Loader
    from insvp_fast.training.sampler import BatchSampler

    recipe, model, _, names, _ = loaded = load_run(folder, backbone)
    if recipe is None or names is None:
        raise CommandError(f"{folder}: expected a run of `insvp train`")
    if model.multi_label:
        raise CommandError(f"{folder}: its images may have several labels, but a point has one color")
    data = own_test_data(loaded)
    labels = [int(label) for label in data.classes]
    chosen = choose_images(labels, images, seed)
    device = create_accelerator().device
    batch_size, workers = loaded.loading(batch_size, workers)
    loader = Loader(Subset(data, chosen), BatchSampler(len(chosen), batch_size), workers, device)
    vectors = collect_vectors(model.to(device), (batch for batch, _ in loader))
    return vectors, ([(data.name(i), labels[i]) for i in chosen], names)
