"""Make a small classification task from photographs that other packages carry, without downloads.

    pip install scikit-image
    python -m tools.photo_tiles tiles                   # a folder with train/, val/ and test/, for `insvp train --data`

A class is a photograph of scikit-image or scikit-learn, an image a gray tile of it: which photograph is it from? Every
photograph is divided into cells, and a cell belongs to one split alone. Tiles keep a margin to the border of their
cell, so that no pixel, and no pixel's neighbor, is in two splits.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import skimage
import sklearn.datasets
from PIL import Image

# those that are files of the packages; scikit-image would download others
PHOTOGRAPHS = {
    "skimage": [
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ],
    "sklearn": ["china.jpg", "flower.jpg"],
}
FOLDERS = {
    "skimage": Path(skimage.__file__).parent / "data",
    "sklearn": Path(sklearn.datasets.__file__).parent / "images",
}
SIDE = 384  # pixels of a photograph, which is scaled and cropped to a square
CELLS = 4  # in a row
MARGIN = 4  # pixels between a tile and the border of its cell
TILE = 64
SPLITS = {"train": (8, 2), "val": (4, 3), "test": (4, 6)}  # cells per photograph, and tiles per cell


def load_photograph(path: Path) -> Image.Image:
    """A photograph in gray, its central square scaled to SIDE pixels."""
    image = Image.open(path).convert("L")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


def cut(photograph: Image.Image, generator: random.Random) -> dict[str, list[Image.Image]]:
    """The tiles of each split."""
    cell = SIDE // CELLS
    corners = [(x, y) for x in range(0, SIDE, cell) for y in range(0, SIDE, cell)]
    generator.shuffle(corners)
    tiles: dict[str, list[Image.Image]] = {}
    for split, (cells, per_cell) in SPLITS.items():
        tiles[split] = []
        for x, y in [corners.pop() for _ in range(cells)]:
            for _ in range(per_cell):
                left, top = (corner + generator.randint(MARGIN, cell - MARGIN - TILE) for corner in (x, y))
                tiles[split].append(photograph.crop((left, top, left + TILE, top + TILE)))
    return tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the cells and the positions of tiles")
    args = parser.parse_args()
    generator = random.Random(args.seed)
    for package, names in PHOTOGRAPHS.items():
        for name in names:
            for split, tiles in cut(load_photograph(FOLDERS[package] / name), generator).items():
                folder = args.output / split / Path(name).stem
                folder.mkdir(parents=True, exist_ok=True)
                for i, tile in enumerate(tiles):
                    tile.save(folder / f"{i:02}.png")
    counts = {split: cells * per_cell for split, (cells, per_cell) in SPLITS.items()}
    print(f"{args.output}: {sum(map(len, PHOTOGRAPHS.values()))} classes with {counts} images each")


if __name__ == "__main__":
    main()
