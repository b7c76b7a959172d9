"""What evaluation reads of a large set in a bucket before the first step, by one rank and three.

    python -m benchmarks.evaluation_reads PARQUET [--groups 2000] [--group-rows 160]
        [--folder runs/evaluation_reads]

Rows of PARQUET are repeated until there are enough, and written anew in 125 files. The bucket is
served by moto on loopback, which notes each answer. The training set is the kNN bank as well. Ranks
are processes that share a gloo group; each makes the sample of 1,024 images and the bank of 5,000
rows, as a worker does beside the stream of its views, and scores an untrained encoder. Counted are
bytes of the training set's image column, by the places that the footers give it. A footer is read
with what lies before it, in one request of 64 KiB; what of that is images is counted apart. Writes
`benchmarks/results/evaluation_reads.json`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.bucket import Bucket, Read, serving
from benchmarks.record import portable, store
from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.data.source import Source
from simclr_ray.distributed import collectives
from simclr_ray.distributed.spawn import spawn
from simclr_ray.evaluation.online import OnlineEvaluation
from simclr_ray.nn.build import build_model

FILES: Final = 125  # small ones: for each range that is asked for, moto reads a file whole
TEST_ROWS: Final = 2_000
RANKS: Final = (1, 3)


class Span(NamedTuple):
    """Where the images of a row group lie in their file: bytes `first` to before `last`."""

    first: int
    last: int


class ImageColumn(NamedTuple):
    """The images of a file: where those of each row group lie, and how long the file is."""

    spans: list[Span]
    size: int

    @classmethod
    def of(cls, file: Path) -> ImageColumn:
        """Return it by the file's footer."""
        metadata, spans = pq.ParquetFile(file).metadata, []
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            columns = [group.column(place) for place in range(group.num_columns)]
            (images,) = (column for column in columns if column.path_in_schema == "image")
            first = min(filter(None, (images.dictionary_page_offset, images.data_page_offset)))
            spans.append(Span(first, first + images.total_compressed_size))
        return cls(spans, file.stat().st_size)

    def bytes_in(self, read: Read) -> int:
        """Return how many of the bytes that were read are images."""
        last = read.first + read.size
        return sum(
            max(0, min(last, span.last) - max(read.first, span.first)) for span in self.spans
        )

    def ends_with(self, read: Read) -> bool:
        """Return whether a read reaches the file's end, where the footer is."""
        return read.first + read.size >= self.size


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parquet")
    parser.add_argument("--groups", type=int, default=2_000)
    parser.add_argument("--group-rows", type=int, default=160)
    parser.add_argument("--folder", type=Path, default=Path("runs/evaluation_reads"))
    args = parser.parse_args()
    folder = args.folder.resolve()
    files = write(args.parquet, args.groups, args.group_rows, folder / "train")
    test = write(args.parquet, TEST_ROWS // args.group_rows + 1, args.group_rows, folder / "test")
    columns = {f"bench/train/{file.name}": ImageColumn.of(file) for file in files}
    of_set = sum(span.last - span.first for column in columns.values() for span in column.spans)
    rows = []
    with serving(folder / "services") as bucket:
        experiment = experiment_of(bucket.put("train", files), bucket.put("test", test))
        for ranks in RANKS:
            rows.append(measured(bucket, experiment, ranks, columns, of_set))
            print(rows[-1], flush=True)
    result = {
        "command": "python -m benchmarks.evaluation_reads " + " ".join(map(portable, sys.argv[1:])),
        "set": {
            "rows": args.groups * args.group_rows,
            "row_groups": args.groups,
            "image_bytes": of_set,
        },
        "of_ranks": rows,
    }
    store("evaluation_reads", result)


def write(parquet: str, groups: int, group_rows: int, folder: Path) -> list[Path]:
    """Write a set of so many row groups, unless it is there; return its files."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        source = pq.read_table(parquet, columns=["image", "label"]).combine_chunks()
        num = groups * group_rows
        per_file = -(-groups // FILES) * group_rows
        for index, first in enumerate(range(0, num, per_file)):
            rows = np.arange(first, min(num, first + per_file))
            table = source.take(rows % len(source)).append_column("id", pa.array(rows))
            pq.write_table(table, folder / f"{index}.parquet", row_group_size=group_rows)
    return sorted(folder.iterdir())


def experiment_of(train: str, test: str) -> Experiment:
    """Return what is evaluated: a small encoder, and 1,024 and 5,000 rows of the training set."""
    encoder = {"name": "resnet", "depth": 10, "width": 0.125, "stem": "cifar"}
    tree: dict[str, Any] = {
        "name": "reads",
        "data": {"train": train, "test": test},
        "encoder": encoder,
        "augment": {"size": 32},
        "evaluation": {"every_epochs": 1},
    }
    return cfg.validate(Experiment, tree)


def measured(
    bucket: Bucket,
    experiment: Experiment,
    ranks: int,
    columns: dict[str, ImageColumn],
    of_set: int,
) -> dict[str, Any]:
    """Return what so many ranks read before the first step."""
    before = len(bucket.reads())
    held = spawn(evaluated, ranks, experiment)
    reads = bucket.reads()[before:]
    of_images = {True: 0, False: 0}  # by whether it is a footer that was read
    for read in reads:
        if read.path in columns:
            of_images[columns[read.path].ends_with(read)] += columns[read.path].bytes_in(read)
    return {
        "ranks": ranks,
        "rows_of_each": held,
        "image_bytes": of_images[False],
        "of_set": round(of_images[False] / of_set, 5),
        "beside_footers": of_images[True],
        "all_bytes": sum(read.size for read in reads),
        "requests": len(reads),
    }


def evaluated(rank: int, experiment: Experiment) -> tuple[int, int]:
    """Evaluate as a worker does before its first step; return how many rows this rank decoded."""
    source, cpu = Source.open(experiment.data.train), torch.device("cpu")
    online = OnlineEvaluation(experiment, source, rank, collectives.world_size(), cpu)
    model = build_model(experiment).eval()
    online.before_training(model)
    online(model)
    assert online.bank is not None
    return len(online.probe.images), len(online.bank.images)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
