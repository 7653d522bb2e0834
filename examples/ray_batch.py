"""Classify a folder or a bucket of images on many machines, with Ray Data.

    python examples/ray_batch.py runs/digits-1 images --output predictions
    python examples/ray_batch.py /shared/adapter s3://BUCKET/images --output s3://BUCKET/answers --models 16 --gpus 1

Each of the models is an actor: a process that loads the run or the adapter once and reads images as ``insvp predict``
does. Every machine needs ``insvp_fast[train]`` and the folder of the model. The output is Parquet files with a class
and its probability, or an error, for each path. Needs ``pip install 'ray[data]'``.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import pyarrow
import ray
import torch

from insvp_fast.errors import DataError
from insvp_fast.training.prediction import load_classifier

# given, because a file whose images all have an answer would have no type for its errors
COLUMNS = [("path", pyarrow.string()), ("class", pyarrow.string()), ("probability", pyarrow.float32())]
SCHEMA = pyarrow.schema([*COLUMNS, ("error", pyarrow.string())])


class Classify:
    """Batches of files, as columns ``bytes`` and ``path``, to the likeliest class of each or why it cannot be read."""

    def __init__(self, model: str) -> None:
        self.classifier = load_classifier(model)

    def __call__(self, batch: dict[str, Any]) -> pyarrow.Table:
        files = self.classifier.images(list(map(io.BytesIO, batch["bytes"])))
        images, errors = [], []
        for index in range(len(files)):
            try:
                images.append(files[index][0])
                errors.append(None)
            except DataError as error:
                errors.append(str(error))
        rankings = iter(self.classifier.rank(self.classifier.logits(torch.stack(images)), 1) if images else ())
        best = [next(rankings)[0] if error is None else (None, None) for error in errors]
        columns = [batch["path"], *zip(*best, strict=True), errors]
        return pyarrow.table([list(column) for column in columns], schema=SCHEMA)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a run folder of `insvp train`, or an adapter folder")
parser.add_argument("images", help="a folder, s3://BUCKET/... or gs://BUCKET/...")
parser.add_argument("--output", default="predictions", help="a folder for Parquet files")
parser.add_argument("--models", type=int, default=1, help="how many work at the same time")
parser.add_argument("--cpus", type=float, default=1, help="of each")
parser.add_argument("--gpus", type=float, default=0, help="of each")
parser.add_argument("--batch-size", type=int, default=32)
arguments = parser.parse_args()

ray.init()  # the cluster that RAY_ADDRESS names, or this machine
files = ray.data.read_binary_files(arguments.images, include_paths=True)
predictions = files.map_batches(
    Classify,
    fn_constructor_args=(str(Path(arguments.model).resolve()),),
    batch_size=arguments.batch_size,
    compute=ray.data.ActorPoolStrategy(size=arguments.models),
    num_cpus=arguments.cpus,
    num_gpus=arguments.gpus,
)
predictions.write_parquet(arguments.output)
print(f"predictions: {arguments.output}")
