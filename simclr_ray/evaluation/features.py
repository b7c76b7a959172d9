"""Reading a split once, and what a frozen encoder makes of it; rows are ordered by id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Final, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from simclr_ray.augment.decode import (
    DEFAULT_DECODER,
    ImageDecoder,
    ImageError,
    Pixels,
    evaluation_view,
)
from simclr_ray.config.wording import counted
from simclr_ray.data.arrays import Int64s
from simclr_ray.data.row_reader import UnusableRow
from simclr_ray.data.source import Source
from simclr_ray.data.tables import RowTable
from simclr_ray.distributed.machine import cores
from simclr_ray.errors import DataError
from simclr_ray.evaluation.decoded import DECODED
from simclr_ray.evaluation.feature_file import FeatureRows
from simclr_ray.evaluation.sampling import sample_rows
from simclr_ray.nn.precision import Precision, autocast, evaluating

DECODE_THREADS: Final = 8  # Pillow decodes and resizes outside the interpreter lock
# Images of a task of such a thread, at most: a task costs as much as to decode a 32-px image.
DECODED_TOGETHER: Final = 32
# Images of a forward pass on a CPU, a thread: what a layer makes of 512 is read back from memory,
# of 64 from the processor's cache. Measured (ResNet-10, width 0.25, 32 px): 0.42 of the time of
# 512, and the same features to the last bit.
CPU_BATCH: Final = 64


class Split(NamedTuple):
    """Decoded evaluation views, ordered by id.

    `images` uint8 `[M, C, S, S]`; `labels` int64 `[M]`, -1 where there is none; `ids` int64 `[M]`;
    `bad` the chosen rows that could not be decoded and are not among the M.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    bad: list[UnusableRow]

    def labelled(self) -> Split:
        """Return the rows that have a label."""
        kept = self.labels >= 0
        return self if kept.all() else self.at(kept)

    def at(self, rows: Tensor) -> Split:
        """Return the rows at an index or mask."""
        return Split(self.images[rows], self.labels[rows], self.ids[rows], self.bad)


class Features(NamedTuple):
    """A split as features."""

    rows: FeatureRows  # float32 [M, F], in a file where they are too many for memory
    labels: Tensor  # int64 [M], -1 where there is none
    ids: Tensor | None = None  # int64 [M], where single images are told apart

    def labelled(self) -> Features:
        """Return the rows that have a label."""
        kept = self.labels >= 0
        return self if kept.all() else self.at(kept)

    def at(self, rows: Tensor) -> Features:
        """Return the rows at an index or mask."""
        ids = None if self.ids is None else self.ids[rows]
        return Features(self.rows[rows], self.labels[rows], ids)


HalvedT = TypeVar("HalvedT", Split, Features)


def split_halves(split: HalvedT) -> tuple[HalvedT, HalvedT]:
    """Return the labelled rows in two halves, drawn once for all: one to learn from, one to score.

    Raises:
        DataError: There are fewer than two.
    """
    labelled = split.labelled()
    num = len(labelled.labels)
    if num < 2:
        images = counted(num, "labelled image")
        raise DataError(f"{images} cannot be halved; give data.eval_train")
    order = np.random.Generator(np.random.Philox(key=num)).permutation(num)
    first, second = (torch.from_numpy(np.sort(o)) for o in (order[: num // 2], order[num // 2 :]))
    return labelled.at(first), labelled.at(second)


def load_split(
    source: Source, size: int, limit: int = 0, decoder: ImageDecoder = DEFAULT_DECODER
) -> Split:
    """Return the evaluation views of a split, all in memory: C·size² bytes a row.

    Args:
        source: the opened split.
        size: side S of the views in pixels.
        limit: rows at most, as `sampling.sample_rows` draws them; 0 takes all.
        decoder: of its images.

    Raises:
        DataError: the files cannot be read, or no chosen row can be decoded.
    """
    split = decoded_rows(source, sample_rows(source, limit), size, decoder)
    if not len(split.images):
        reason = split.bad[0].reason
        raise DataError(f"{source.shown_uri}: none of {len(split.bad)} rows is an image: {reason}")
    return split


def decoded_rows(source: Source, rows: Int64s, size: int, decoder: ImageDecoder) -> Split:
    """Return the evaluation views of `rows`, in their order; those that are none are `bad`.

    Nobody may write to them: a process that keeps them returns the same ones again.

    Raises:
        DataError: a file cannot be read.
    """
    chosen = hashlib.sha256(rows.tobytes()).digest()
    key = (source.uri, source.fingerprint, source.label, chosen, size, decoder)
    return DECODED.get(key, lambda: _decoded_rows(source, rows, size, decoder))


def _decoded_rows(source: Source, rows: Int64s, size: int, decoder: ImageDecoder) -> Split:
    images = torch.empty(len(rows), decoder.channels, size, size, dtype=torch.uint8)
    labels = torch.full((len(rows),), -1, dtype=torch.int64)
    ids = torch.empty(len(rows), dtype=torch.int64)
    good = torch.ones(len(rows), dtype=torch.bool)
    bad: list[UnusableRow] = []
    for places, wanted in grouped(source, rows):
        part = source.read_rows(wanted)
        ids[torch.from_numpy(places)] = torch.from_numpy(part.ids)
        for place, view in zip(places, _views(part, size, decoder), strict=True):
            if isinstance(view, str):
                bad.append(UnusableRow(int(ids[place]), view))
                good[place] = False
            else:  # Pillow's memory is read-only
                images[place] = torch.tensor(view).permute(2, 0, 1)
        if part.labels is not None:
            labels[torch.from_numpy(places)] = torch.from_numpy(part.labels)
    if not bad:
        return Split(images, labels, ids, bad)
    return Split(images[good], labels[good], ids[good], sorted(bad))


@torch.inference_mode()
def extract_features(
    encoder: nn.Module,
    images: Tensor | Iterable[Tensor],
    batch_size: int = 512,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> Tensor:
    """Return h of every image in order, float32 `[M, F]` on the CPU; no collective.

    The encoder runs in eval mode, in the dtype of its weights, and each of its modules is put
    back into the mode that it was in.

    Args:
        encoder: `[m, C, S, S]` in [0, 1] -> `[m, F]`, its weights on `device`.
        images: uint8 `[M, C, S, S]`, or parts of it one after the other.
        batch_size: images per forward pass; on a CPU of `CPU_BATCH` a thread at most.
        device: where the encoder is.
        precision: `bf16` runs under autocast; the other two change nothing.

    Raises:
        ValueError: an empty iterable.
    """
    device = torch.device(device)
    form = {
        "dtype": next((p.dtype for p in encoder.parameters()), torch.float32),
        "memory_format": torch.channels_last,  # as in training; 0.7 of the time of the other
    }
    parts: list[Tensor] = []
    if device.type == "cpu":
        batch_size = min(batch_size, CPU_BATCH * keep_within_cores())
    with evaluating(encoder), autocast(device, precision):
        for part in [images] if isinstance(images, Tensor) else images:
            for batch in part.split(batch_size):
                h = encoder(batch.to(device).to(**form) / 255)
                parts.append(h.float().cpu())
    if not parts:
        raise ValueError("there are no images")
    return torch.cat(parts)


def keep_within_cores() -> int:
    """Have torch use no more threads than there are cores; return how many it uses.

    torch counts the machine's and sees no CPU limit of a container: the threads that are too many
    are stopped in the middle of an operation, and the others wait for them.
    """
    if torch.get_num_threads() > cores():
        torch.set_num_threads(cores())
    return torch.get_num_threads()


def grouped(source: Source, rows: Int64s) -> Iterator[tuple[Int64s, Int64s]]:
    """Yield of each row group that has some of `rows` their places in `rows`, and these rows."""
    owner = source.groups_of(rows)
    for group in np.unique(owner):
        places = np.flatnonzero(owner == group)
        yield places, rows[places]


def view_or_reason(encoded: bytes | None, size: int, decoder: ImageDecoder) -> Pixels | str:
    """Return the view of a row, uint8 `[S, S, C]`, or the reason why there is none."""
    if encoded is None:
        return "null"
    try:
        return evaluation_view(decoder.decode(encoded), size)
    except ImageError as error:
        return str(error)


def views_or_reasons(
    images: Sequence[bytes | None], size: int, decoder: ImageDecoder, threads: int, pool: Executor
) -> list[Pixels | str]:
    """Return of each row its view or the reason why there is none, by the threads of a pool.

    A task has some of them: of small images one takes no longer than to hand it over.
    """

    def made(some: Sequence[bytes | None]) -> list[Pixels | str]:
        return [view_or_reason(image, size, decoder) for image in some]

    together = max(1, min(DECODED_TOGETHER, -(-len(images) // threads)))
    parts = [images[first : first + together] for first in range(0, len(images), together)]
    return [view for views in pool.map(made, parts) for view in views]


def _views(rows: RowTable, size: int, decoder: ImageDecoder) -> list[Pixels | str]:
    threads = min(DECODE_THREADS, cores())
    with ThreadPoolExecutor(threads) as pool:
        return views_or_reasons(rows.images, size, decoder, threads, pool)
