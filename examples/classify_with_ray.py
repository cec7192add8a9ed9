"""Classify millions of pictures on one machine or many, with Ray Data; it needs ``pip install qvit 'ray[data]'``.

The pictures are in folders (at any depth), in WebDataset shards (.tar), or in Parquet files with the columns name and
bytes. Each worker has an engine of its own; Ray reads, spreads, retries and writes. What comes out is a folder of
Parquet files with the columns name, class, probability and error, the last for pictures that cannot be read.

Examples:
  python examples/classify_with_ray.py model.safetensors photos --out classes --workers 2
  python examples/classify_with_ray.py model.safetensors first.tar second.tar --out classes --workers 2
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import ray
import ray.data

import qvit
from qvit.errors import CorruptImageError
from qvit.images import suffixes

Columns = dict[str, Any]


class Classifier:
    """A worker: an engine, which Ray has pickled for it, and what it does with a batch."""

    def __init__(self, engine: qvit.Engine) -> None:
        self.engine = engine

    def __call__(self, batch: Columns) -> Columns:
        """Return the columns of a batch with ``name`` and ``bytes``."""
        answers = [self.answer(picture) for picture in batch["bytes"]]
        return {"name": batch["name"], **{column: [answer[column] for answer in answers] for column in answers[0]}}

    def answer(self, picture: bytes) -> Columns:
        """Return the most probable class of a picture, or why there is none."""
        try:
            (((name, probability),),) = self.engine.predict(picture, top_k=1)
        except CorruptImageError as error:
            return {"class": None, "probability": None, "error": str(error)}
        return {"class": name, "probability": probability, "error": None}


def pictures(sources: list[str]) -> ray.data.Dataset:
    """Return a data set of ``name`` and ``bytes``."""
    if sources[0].endswith(".parquet"):
        return ray.data.read_parquet(sources).select_columns(["name", "bytes"])
    if sources[0].endswith(".tar"):
        return ray.data.read_webdataset(sources, decoder=None).map(from_shard)
    extensions = [suffix.lstrip(".") for suffix in suffixes()]
    files = ray.data.read_binary_files(sources, include_paths=True, file_extensions=extensions)
    return files.rename_columns({"path": "name"})


def from_shard(sample: Columns) -> Columns:
    """Return name and bytes of the picture in a WebDataset sample."""
    # Samples of one block have one another's columns, without bytes.
    files = {column: value for column, value in sample.items() if isinstance(value, bytes)}
    kind = next(column for column in files if f".{column.lower()}" in suffixes())
    return {"name": f"{sample['__key__']}.{kind}", "bytes": sample[kind]}


def main() -> None:
    """Read, classify and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a packed file")
    parser.add_argument("sources", nargs="+", help="folders of pictures, .tar files or .parquet files")
    parser.add_argument("--out", required=True, help="folder for Parquet files, or another place that Ray writes to")
    parser.add_argument("--workers", type=int, default=2, help="engines, on all machines together")
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    arguments = parser.parse_args()
    if "RAY_ADDRESS" not in os.environ:  # this machine alone: engines on all processors would keep readers from theirs
        ray.init(num_cpus=arguments.workers * arguments.threads + 1)
    model = arguments.model.read_bytes()  # goes along with the engine: other machines lack the file
    engine = qvit.load(model, threads=arguments.threads)
    classes = pictures(arguments.sources).map_batches(
        Classifier,
        fn_constructor_args=[engine],
        batch_size=64,
        compute=ray.data.ActorPoolStrategy(size=arguments.workers),
        num_cpus=arguments.threads,
    )
    classes.write_parquet(arguments.out)


if __name__ == "__main__":
    main()
