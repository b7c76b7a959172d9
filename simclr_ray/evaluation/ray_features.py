"""From rows to features: actors of Ray Data read, decode and encode, and only features come back.

A piece of work is some rows of one row group. Pieces come back whole and in order while later ones
are being worked on, so neither a split nor its features need fit one process. Each image is decoded
once for all networks.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
import torch
from torch import Tensor, nn

from simclr_ray.augment.decode import DEFAULT_DECODER, ImageDecoder
from simclr_ray.config.experiment import EvaluationConfig
from simclr_ray.config.schema import AUTO
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.row_reader import UnusableRow
from simclr_ray.data.source import Source
from simclr_ray.data.tables import RowTable
from simclr_ray.distributed.placement import check_actors, matches, nodes
from simclr_ray.distributed.selectors import shown
from simclr_ray.distributed.worker_exit import skip_destructors
from simclr_ray.errors import ClusterError, DataError, one_line
from simclr_ray.evaluation.feature_columns import (
    ERROR,
    FAILED,
    ID,
    LABEL,
    PATH,
    PIECE,
    ROW,
    feature_column,
    kept_column,
)
from simclr_ray.evaluation.feature_file import FeatureFile, FeatureRows
from simclr_ray.evaluation.features import (
    extract_features,
    grouped,
    views_or_reasons,
)
from simclr_ray.evaluation.sampling import sample_rows
from simclr_ray.nn.precision import Precision, best_device

IN_MEMORY_BYTES: Final = 2**30  # features of more lie in a file
CPUS_OF_AN_ACTOR: Final = 8  # decoding by more threads than that waits for one encoder

log = logging.getLogger(__name__)


class SplitFeatures(NamedTuple):
    """What networks make of a split, ordered by id."""

    features: list[FeatureRows]  # float32 [M, F] of each network
    labels: Tensor  # int64 [M], -1 where there is none
    ids: Tensor  # int64 [M]
    bad: list[UnusableRow]


class Actors(NamedTuple):
    """How many actors encode, what each has, and on nodes with which labels they lie."""

    num: int
    cpus: float
    gpus: float = 0.0
    label_selector: Mapping[str, str] = {}


class Encoding(NamedTuple):
    """How rows become features.

    Attributes:
        networks: `[m, C, S, S]` in [0, 1] -> `[m, F]`; they pickle.
        size: Side S of the views in pixels.
        decoder: Of the images.
        batch_size: Images per forward pass, and rows of a table that an actor hands over.
        precision: Same as `extract_features`.
        keep: Columns of the rows that are handed on.
    """

    networks: Sequence[nn.Module]
    size: int
    decoder: ImageDecoder = DEFAULT_DECODER
    batch_size: int = 256
    precision: Precision = "float32"
    keep: Sequence[str] = ()


class _Extractor:
    """A Ray Data actor with the networks."""

    def __init__(self, source: Source, kept: Sequence[Any], threads: int) -> None:
        skip_destructors()
        self.device = best_device()
        encoding: Encoding = ray.get(kept[0])
        self.source, self.encoding = source, encoding
        self.networks = [network.to(self.device) for network in encoding.networks]
        torch.set_num_threads(threads)
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)
        self.ahead = ThreadPoolExecutor(1)

    def __call__(self, batch: dict[str, Any]) -> Iterator[pa.Table]:
        """Yield the rows of one piece in tables of at most `batch_size`."""
        (piece,), (rows,) = batch[PIECE], batch["rows"]
        try:
            yield from self._tables(int(piece), np.asarray(rows, np.int64))
        except DataError as error:  # as text: Ray would bury it
            yield pa.table({PIECE: [int(piece)], FAILED: [str(error)]})
        except (torch.OutOfMemoryError, MemoryError) as error:
            text = f"no memory for batches of {self.encoding.batch_size}: {one_line(error)}"
            yield pa.table({PIECE: [int(piece)], FAILED: [text]})

    def _tables(self, piece: int, rows: Int64s) -> Iterator[pa.Table]:
        read, kept = self.source.read_rows(rows), self._kept(rows)
        step = self.encoding.batch_size
        cuts = [slice(first, first + step) for first in range(0, len(rows), step)]
        # the next images are decoded while these are encoded
        coming = self.ahead.submit(self._views, read, cuts[0])
        for cut, following in zip(cuts, [*cuts[1:], None], strict=True):
            views = coming.result()
            if following is not None:
                coming = self.ahead.submit(self._views, read, following)
            yield self._table(piece, rows[cut], cut, read, views, kept)

    def _views(self, read: RowTable, cut: slice) -> list[npt.NDArray[np.uint8] | str]:
        size, decoder = self.encoding.size, self.encoding.decoder
        return views_or_reasons(read.images[cut], size, decoder, self.threads, self.pool)

    def _table(
        self,
        piece: int,
        rows: Int64s,
        cut: slice,
        read: RowTable,
        views: list[npt.NDArray[np.uint8] | str],
        kept: dict[str, pa.Array],
    ) -> pa.Table:
        good = [i for i, view in enumerate(views) if not isinstance(view, str)]
        labels = read.labels[cut] if read.labels is not None else np.full(len(rows), NO_LABEL)
        columns: dict[str, Any] = {
            PIECE: np.full(len(rows), piece),
            ROW: rows,
            ID: read.ids[cut],
            LABEL: labels,
            ERROR: pa.array([v if isinstance(v, str) else None for v in views], pa.string()),
        }
        if read.paths is not None:
            columns[PATH] = pa.array(read.paths[cut], pa.string())
        stacked = np.stack([views[i] for i in good]) if good else None
        for index, network in enumerate(self.networks):
            columns[feature_column(index)] = self._features(network, stacked, good, len(rows))
        return pa.table(columns | {kept_column(name): array[cut] for name, array in kept.items()})

    def _features(
        self, network: nn.Module, views: npt.NDArray[Any] | None, good: list[int], num: int
    ) -> pa.Array:
        """Return features as lists of F numbers, null where there is no image."""
        if views is None:
            return pa.nulls(num)
        h = extract_features(
            network,
            torch.from_numpy(views).permute(0, 3, 1, 2),
            self.encoding.batch_size,
            self.device,
            self.encoding.precision,
        ).numpy()
        lists = pa.FixedSizeListArray.from_arrays(h.reshape(-1), h.shape[1])
        if len(good) == num:
            return lists
        places = np.full(num, -1)
        places[good] = np.arange(len(good))
        return lists.take(pa.array(places, mask=places < 0))

    def _kept(self, rows: Int64s) -> dict[str, pa.Array]:
        """Return the columns that are handed on, of rows of one row group."""
        if not self.encoding.keep:
            return {}
        group = self.source.row_groups[int(self.source.groups_of(rows[:1])[0])]
        within = pa.array(rows - group.first_row)
        return {
            name: self.source.read_column(group, name).take(within).combine_chunks()
            for name in self.encoding.keep
        }


@functools.cache  # Ray prints it once a process as well
def _explain_line_of_ray() -> None:
    """Say what a line of Ray's own is, which looks like a fault in a run that has none.

    Ray 2.60 writes it for any actors of Ray Data with restarts. What would silence it, its level
    `fatal` for this process, would silence as well why a lost cluster has ended the process.
    """
    log.info(
        "of Ray comes a line with an E, of constructor arguments in the object store: no fault, "
        "they are kept"
    )


def stream(
    source: Source, pieces: Sequence[Int64s], encoding: Encoding, actors: Actors
) -> Iterator[pa.Table]:
    """Yield a table a piece, in order: `row`, `id`, `label`, `path`, `error` and features.

    Args:
        source: The opened dataset.
        pieces: Rows of one row group each, not empty.
        encoding: What is made of them. Features of network i are `feature_column(i)`, lists of F
            float32, null where `error` says why there is no image.
        actors: Where.

    Raises:
        ClusterError: The actors ask for more than the cluster has.
        DataError: A file cannot be read.
    """
    check_actors(actors.num, actors.cpus, actors.gpus, actors.label_selector)
    kept = ray.put(encoding)  # by this process until the end: an actor that Ray restarts needs it
    _explain_line_of_ray()
    planned = ray.data.from_blocks(
        [pa.table({PIECE: [i], "rows": [rows.tolist()]}) for i, rows in enumerate(pieces)]
    )
    planned.context.enable_progress_bars = False
    planned.context.print_on_execution_start = False
    planned.context.execution_options.preserve_order = True
    encoded = planned.map_batches(
        _Extractor,
        fn_constructor_args=(source, [kept], max(1, int(actors.cpus))),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(actors.num, len(pieces))),
        num_cpus=actors.cpus,
        num_gpus=actors.gpus,
        label_selector=dict(actors.label_selector),
    )
    waiting: list[pa.Table] = []
    for block in _blocks_of(encoded):
        if FAILED in block.column_names:
            raise DataError(block[FAILED][0].as_py())
        waiting.append(block)
        piece = waiting[0][PIECE][0].as_py()
        if sum(table.num_rows for table in waiting) >= len(pieces[piece]):
            whole = pa.concat_tables(waiting, promote_options="permissive")
            done, left = _split_at_pieces(whole, pieces)
            yield from done
            waiting = [left] if left.num_rows else []


def _blocks_of(encoded: ray.data.Dataset) -> Iterator[pa.Table]:
    """Yield what comes back, in order. Raises `ClusterError` where Ray loses the actors."""
    try:
        # a block fetched ahead of its use would be waited for before the first is handed over
        yield from encoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except ray.exceptions.RayTaskError:  # a fault of the code, with its traceback
        raise
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the actors that encode have failed: {one_line(error)}") from error


def _split_at_pieces(table: pa.Table, pieces: Sequence[Int64s]) -> tuple[list[pa.Table], pa.Table]:
    """Return the whole pieces of a table, and what is left of it."""
    done = []
    while table.num_rows and table.num_rows >= (num := len(pieces[table[PIECE][0].as_py()])):
        done.append(table.slice(0, num).drop_columns([PIECE]))
        table = table.slice(num)
    return done, table


def actors_of(evaluation: EvaluationConfig, label_selector: Mapping[str, str]) -> Actors:
    """Return the actors of a config: those that it names, or one a device of the cluster."""
    if evaluation.actors == AUTO:
        return devices_of_cluster(label_selector)
    num, cpus, gpus = evaluation.num_actors, evaluation.cpus_per_actor, evaluation.gpus_per_actor
    return Actors(num, cpus, gpus, label_selector)


def devices_of_cluster(label_selector: Mapping[str, str] | None = None) -> Actors:
    """Return actors for all devices there are: one a GPU, or on a node without one by its CPUs.

    Args:
        label_selector: Of the nodes that are used; all without one.
    """
    selector = label_selector or {}
    alive = [n for n in nodes() if n.is_alive and n.cpus >= 1 and matches(selector, n.labels)]
    # nodes without a GPU stay idle where others have one: one run's features come from one kind
    with_gpus = [node for node in alive if node.gpus >= 1]
    used = with_gpus or alive
    if not used:
        where = f" and the labels {shown(selector)}" if selector else ""
        raise ClusterError(f"the cluster has no node with a CPU{where} to encode on")
    counts = [int(n.gpus) if with_gpus else max(1, int(n.cpus) // CPUS_OF_AN_ACTOR) for n in used]
    cpus = min(int(node.cpus) // num for node, num in zip(used, counts, strict=True))
    return Actors(sum(counts), float(max(1, cpus)), float(bool(with_gpus)), selector)


def extract(
    source: Source,
    networks: Sequence[nn.Module],
    size: int,
    evaluation: EvaluationConfig,
    *,
    limit: int = 0,
    labelled: bool = False,
    decoder: ImageDecoder = DEFAULT_DECODER,
    precision: Precision = "float32",
    label_selector: Mapping[str, str] | None = None,
) -> SplitFeatures:
    """Return what each network makes of the rows that `load_split` would choose.

    Features of more than `IN_MEMORY_BYTES` lie in a file without a name.

    Args:
        source: The opened split.
        networks: `[m, C, S, S]` in [0, 1] -> `[m, F]`; they pickle.
        size: Side S of the views in pixels.
        evaluation: Number of actors, their resources, and images per forward pass.
        limit: Rows at most, the same ones as `load_split`; 0 takes all.
        labelled: Whether rows without a label are left out.
        decoder: Of its images.
        precision: Same as `extract_features`.
        label_selector: Of the nodes where the actors lie; any without one.

    Raises:
        ClusterError: The actors ask for more than the cluster has.
        DataError: No chosen row can be decoded.
        StorageError: There is no room for the features in the folder for temporary files.
    """
    rows = sample_rows(source, limit)
    places, pieces = zip(*grouped(source, rows), strict=True)  # by id, as `rows` are
    encoding = Encoding(list(networks), size, decoder, evaluation.batch_size, precision)
    actors = actors_of(evaluation, label_selector or {})
    gathered: list[FeatureFile] = []
    labels, ids = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    good, bad = np.ones(len(rows), np.bool_), []
    for place, table in zip(places, stream(source, pieces, encoding, actors), strict=True):
        labels[place], ids[place] = table[LABEL].to_numpy(), table[ID].to_numpy()
        reasons = table[ERROR].to_pylist()
        good[place] = is_good = np.array([reason is None for reason in reasons])
        bad += [UnusableRow(int(i), r) for i, r in zip(ids[place], reasons, strict=True) if r]
        if not is_good.any():
            continue
        for index in range(len(encoding.networks)):
            part = features_of(table, index)
            if len(gathered) == index:
                gathered.append(FeatureFile(len(rows), part.shape[1]))
            gathered[index].write(place[is_good], part)
    if not good.any():
        problem = f"none of {len(good)} rows is an image: {bad[0].reason}"
        raise DataError(f"{source.shown_uri}: {problem}")
    good &= (labels >= 0) | (not labelled)
    features: list[FeatureRows] = []
    for file in gathered:
        file.keep(good)
        num, width = file.shape
        features.append(file[:] if 4 * num * width <= IN_MEMORY_BYTES else file)
    return SplitFeatures(
        features, torch.from_numpy(labels[good]), torch.from_numpy(ids[good]), sorted(bad)
    )


def features_of(table: pa.Table, index: int = 0) -> npt.NDArray[np.float32]:
    """Return the features of the rows that have some, float32 [m, F], of network `index`."""
    lists = table[feature_column(index)].drop_null().combine_chunks()
    values: npt.NDArray[np.float32] = lists.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(lists), -1)
