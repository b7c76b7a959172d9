"""Images of any origin in, shuffled parquet shards and a manifest out.

The rows are listed and shuffled with a seed (contiguous reads of sorted images make poor
batches), cut into shards, and each shard is one task of a Ray Data stream: it reads, tests and
stores its images where it runs, so neither the driver nor the object store ever holds one, and
Ray bounds how many are under way. A rerun after an interruption keeps the finished shards. The
manifest is written last: a folder without one is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from simclr_ray.config import digest_of
from simclr_ray.config.column_keys import column_keys
from simclr_ray.config.experiment import ColumnsConfig
from simclr_ray.config.sections.data import FolderGroups, FolderLabels
from simclr_ray.config.wording import counted
from simclr_ray.data.classes import NO_LABEL
from simclr_ray.data.columns import GROUP_COLUMN
from simclr_ray.data.footer import INDEX, MANIFEST
from simclr_ray.data.image_groups import group_column, groups_of, open_grouped
from simclr_ray.data.inputs import groups_of_input, open_input
from simclr_ray.data.items import Input
from simclr_ray.data.listing import all_parquet, below, images_among, part_split
from simclr_ray.data.manifest import GroupSizes, Manifest, read_manifest
from simclr_ray.data.ray_tasks import run_tasks
from simclr_ray.data.regroup import FOLDER as REGROUPED
from simclr_ray.data.regroup import bring_together
from simclr_ray.data.shards import (
    SCHEMA_VERSION,
    ShardPlan,
    ShardReport,
    SizeRange,
    read_report,
    shard_name,
    write_shard,
)
from simclr_ray.data.source import Source
from simclr_ray.data.tar_input import first_of
from simclr_ray.distributed.ray_cluster import check_machine, connect
from simclr_ray.errors import DataError, TooManyBadImages, one_line
from simclr_ray.storage.filesystem import (
    address_below,
    cache_folder,
    filesystem,
    info_of,
    is_local,
    open_whole,
    remove_file,
    write_text_whole,
)
from simclr_ray.storage.provenance import versions_of
from simclr_ray.storage.run_lock import LockedError, hold

LIBRARIES = ("numpy", "pillow", "pyarrow", "ray", "simclr-ray")
NUM_REASONS_SHOWN = 5

OnRows = Callable[[int, int], None]

logger = logging.getLogger(__name__)


@column_keys("columns.")
def prepare(
    kind_or_path: str,
    out: str,
    *,
    num_images: int = 0,
    seed: int = 0,
    columns: ColumnsConfig | None = None,
    split: str | None = None,
    size: int | None = None,
    labels: FolderLabels | None = None,
    groups: FolderGroups | None = None,
    download_folder: str | None = None,
    rows_per_shard: int = 5000,
    max_bad_fraction: float = 0.01,
    max_pixels: int = 50_000_000,
    overwrite: bool = False,
    on_progress: OnRows | None = None,
) -> Manifest:
    """Write the images of `kind_or_path` to `out` as parquet shards; return the manifest.

    Uses the Ray cluster that is connected, or starts one. Ids are the parquet's own, else the
    place in the sorted listing; bad images are left out and leave a gap.

    Args:
        kind_or_path: `shapes`, a folder of images, parquet, tar shards or a folder of
            Hugging Face's `datasets` (path or URI; of tars also `train-{000..146}.tar`), or a
            torchvision name. A file or folder of that name goes
            before a torchvision dataset.
        out: folder or URI of the shards, shared by all nodes.
        num_images: keep the first only; 0 keeps all (of `shapes`: 20,000).
        seed: of the shuffle, and of the set of `shapes`.
        columns: which columns of a parquet input hold what; of tar shards, the ending of the images
            (all), and where labels stand: `cls`, or a key of `.json`. The
            images of one group of `columns.group` (parquet) are written into one row group, the
            column as `group`.
        split: which of several, as `PATH#SPLIT` names it; empty: the only one, and `train` of a
            torchvision dataset.
        size: side of the images of `shapes`, in pixels; None: 32.
        labels: of a folder of images, also of one that parquet lies in: `folders`, whose names are
            the classes, `none`, or `auto` (as None): the folders, saying which images lie in none.
        groups: of a folder of images: with `folders`, those of one folder are a group, of its name.
        download_folder: where torchvision keeps its files; None: a cache folder of the user.
        rows_per_shard: at most; fewer where parquet rows are large.
        max_bad_fraction: share of unusable images that stops, in [0, 1].
        max_pixels: larger images are rejected undecoded.
        overwrite: start over where `out` holds another dataset.
        on_progress: called with (images looked at, all images), first with those of shards that
            were finished before.

    Raises:
        ConfigError: an option is given that the input does not take.
        DataError: the input cannot be read, or `out` holds something else.
        TooManyBadImages: more than `max_bad_fraction` were unusable; no manifest is written.
    """
    fs, folder = filesystem(out)
    _check_apart(first_of(kind_or_path), out)
    images = open_input(
        kind_or_path,
        columns=columns,
        split=split,
        root=download_folder,
        num_images=num_images,
        size=size,
        seed=seed,
        labels=labels,
        groups=groups,
    )
    groups_kind = groups_of_input(images)
    identity = {
        "schema_version": SCHEMA_VERSION,
        "input": images.identity,
        "class_names": list(images.class_names),
        "seed": seed,
        "rows_per_shard": rows_per_shard,
        "max_pixels": max_pixels,
    }
    plan = digest_of(identity)
    shards = [
        ShardPlan(index, part, plan, images.class_names, max_pixels, groups_kind)
        for index, part in enumerate(images.parts(rows_per_shard, seed))
    ]
    if info_of(fs, folder).type == pafs.FileType.NotFound:
        check_machine(None)  # else it would be made for nothing
    with _only_one(fs, folder, out):
        reports = _finished(fs, folder, out, shards, overwrite=overwrite)
        if len(reports) == len(shards) and (manifest := read_manifest(fs, folder, plan)):
            return manifest
        connect()  # after all that a look at input and output can refuse
        if len(reports) < len(shards):
            pieces = address_below(out, f"{REGROUPED}/{plan}")
            parts = bring_together([shard.part for shard in shards], pieces)
            shards = [replace(s, part=part) for s, part in zip(shards, parts, strict=True)]
        _write_all(shards, reports, out, _Limit(images.num_rows, max_bad_fraction), on_progress)
        if fs.get_file_info(f"{folder}/{REGROUPED}").type == pafs.FileType.Directory:
            fs.delete_dir(f"{folder}/{REGROUPED}")
        return _write_manifest(fs, folder, out, images, plan, [reports[s.index] for s in shards])


@contextmanager
def _only_one(fs: pafs.FileSystem, folder: str, out: str) -> Iterator[None]:
    """Refuse a second command of this user and machine: it would clear what the first writes."""
    if not is_local(fs):
        yield
        return
    key = hashlib.sha256(str(Path(folder).resolve()).encode(errors="surrogateescape")).hexdigest()
    with ExitStack() as held:
        try:
            held.enter_context(hold(cache_folder("prepare") / key[:16]))
        except LockedError as error:
            raise DataError(f"{out} is being prepared by {error}") from error
        except OSError as error:  # of a user without a home that can be written to
            logger.debug("%s is not locked: %s", out, error)
        yield


@dataclass(frozen=True)
class _Limit:
    """How many images may be unusable."""

    num_rows: int
    max_fraction: float

    def check(self, reports: Sequence[ShardReport]) -> None:
        """Raise `TooManyBadImages` as soon as the rest cannot mend it."""
        rejected = sorted(r for report in reports for r in report.rejected)
        if len(rejected) <= self.max_fraction * self.num_rows and len(rejected) < self.num_rows:
            return
        shown = [f"{r.name}: {r.reason}" for r in rejected[:NUM_REASONS_SHOWN]]
        raise TooManyBadImages(
            f"{len(rejected)} of {self.num_rows} images are unusable so far, more than the "
            f"{self.max_fraction:.2%} that are allowed (max_bad_fraction); the first: "
            f"{'; '.join(shown)}"
        )


def _check_apart(kind_or_path: str, out: str) -> None:
    """Refuse an output that would lie among other images."""
    _check_outside(kind_or_path, out)
    _check_no_images(*filesystem(out), out)


def _check_outside(kind_or_path: str, out: str) -> None:
    """Refuse an output inside its input, or the other way round: a rerun would read itself."""
    folder, origin = filesystem(out)[1], part_split(*filesystem(kind_or_path))[0]
    if folder == origin and kind_or_path != "shapes":
        raise DataError(f"{out} is the input; prepare into a folder of its own")
    if "://" not in kind_or_path and not Path(origin).exists():
        return  # a name, of `shapes` or of a torchvision dataset
    if kind_or_path != "shapes" and f"{folder}/".startswith(f"{origin}/"):
        raise DataError(f"{out} lies inside {kind_or_path}; prepare into a folder of its own")
    if f"{origin}/".startswith(f"{folder}/") and Path(origin).exists():
        raise DataError(f"{kind_or_path} lies inside {out}; prepare into a folder of its own")


def _check_no_images(fs: pafs.FileSystem, folder: str, out: str) -> None:
    """Refuse an output among images: which of both is meant could not be said any more."""
    if info_of(fs, folder).type != pafs.FileType.Directory:
        return
    images = images_among(fs, all_parquet(fs, folder, out).others)
    if images:
        shown = f"{counted(len(images), 'image')} ({below(folder, images[0].path)})"
        raise DataError(f"{out} holds {shown}; prepare into a folder of its own")


def _finished(
    fs: pafs.FileSystem, folder: str, out: str, shards: Sequence[ShardPlan], *, overwrite: bool
) -> dict[int, ShardReport]:
    """Return the reports of the shards that are already whole, after clearing what is not ours.

    Only names that `prepare` gives are ever deleted, and finished ones only with `overwrite`.
    """
    present = _present(fs, folder)
    parquet = {n: p for n, p in present.items() if n.endswith(".parquet") and n[0] not in "._"}
    reports: dict[int, ShardReport] = {}
    for shard in shards:
        path = parquet.get(shard.file_name, "")
        if path and (report := read_report(fs, path, shard.plan)) is not None:
            reports[shard.index] = report
    if len(reports) < len(shards) and MANIFEST in present:
        remove_file(fs, present.pop(MANIFEST))  # what it says is true no more
    finished = {shard_name(index) for index in reports}
    others = [name for name in parquet if name not in finished]
    if not others:
        return reports
    foreign = [name for name in others if not name.startswith("part-")]
    if foreign:
        raise DataError(
            f"{out} holds {foreign[0]}, which is no shard of ours; choose another folder"
        )
    if not overwrite:
        raise DataError(
            f"{out} holds {others[0]}, which is of another dataset or of other settings; "
            "choose an empty folder, or start over (--overwrite, in Python overwrite=True)"
        )
    if MANIFEST in present:
        remove_file(fs, present[MANIFEST])
    for name in others:
        remove_file(fs, parquet[name])
    return reports


def _present(fs: pafs.FileSystem, folder: str) -> dict[str, str]:
    """Return the files of the folder by name; what a killed run left half-written is removed."""
    try:
        fs.create_dir(folder, recursive=True)
    except OSError as error:
        if is_local(fs):  # said as the system says it
            raise
        raise DataError(f"{folder} cannot be written to: {one_line(error)}") from error
    present = {}
    for info in fs.get_file_info(pafs.FileSelector(folder)):
        name = info.base_name
        if name.startswith((".part-", f".{MANIFEST}")) and name.endswith(".tmp"):
            remove_file(fs, info.path)
        elif info.type == pafs.FileType.File:
            present[name] = info.path
    return present


def _write_all(
    shards: Sequence[ShardPlan],
    reports: dict[int, ShardReport],
    out: str,
    limit: _Limit,
    on_progress: OnRows | None,
) -> None:
    """Write the shards that `reports` lacks, and add their reports."""
    show = on_progress or _log_progress

    def tell() -> None:
        show(sum(report.num_seen for report in reports.values()), limit.num_rows)

    tell()
    limit.check(list(reports.values()))
    work = [partial(_write_one, shard, out) for shard in shards if shard.index not in reports]
    for index, report in run_tasks(work):
        reports[index] = report
        tell()
        limit.check(list(reports.values()))


def _write_one(shard: ShardPlan, out: str) -> tuple[int, ShardReport]:
    """Write one shard, in a Ray task; return its number and what came of it."""
    with column_keys("columns."):
        return shard.index, write_shard(shard, *filesystem(out))


def _write_manifest(
    fs: pafs.FileSystem,
    folder: str,
    out: str,
    images: Input,
    plan: str,
    reports: Sequence[ShardReport],
) -> Manifest:
    groups = None
    if groups_of_input(images):
        source = open_grouped(out, ColumnsConfig(group=GROUP_COLUMN))
        each = groups_of(source).sizes
        groups = GroupSizes(len(each), int(each.min()), int(each.max()))
    else:
        source = Source.open(out)
    if source.has_ids:
        _write_index(fs, f"{folder}/{INDEX}", source)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        num_rows=source.num_rows,
        num_shards=len(reports),
        fingerprint=source.fingerprint,
        class_names=images.class_names,
        rejected=tuple(sorted(r for report in reports for r in report.rejected)),
        input=images.identity,
        plan=plan,
        has_index=source.has_ids,
        libraries={"python": platform.python_version()} | versions_of(LIBRARIES),
        sizes=_sizes(reports),
        groups=groups,
    )
    tree = asdict(manifest) | {"rejected": [r._asdict() for r in manifest.rejected]}
    tree["groups"] = groups._asdict() if groups else None
    write_text_whole(fs, f"{folder}/{MANIFEST}", json.dumps(tree, indent=2) + "\n")
    return manifest


def _sizes(reports: Sequence[ShardReport]) -> SizeRange | None:
    """Return the sizes of all images; None where a shard does not say those of its own."""
    sizes: SizeRange | None = None
    for report in reports:
        if report.sizes is not None:
            sizes = report.sizes.united(sizes)
        elif report.num_rows:
            return None
    return sizes


def _write_index(fs: pafs.FileSystem, path: str, source: Source) -> None:
    """Write ids, labels and groups of all rows, in order: nobody reads each shard for them."""
    labels = pa.nulls(source.num_rows, pa.int64())
    if source.has_labels:
        values = source.labels()
        labels = pa.array(values, mask=values == NO_LABEL)
    with open_whole(fs, path) as stream:
        columns = {"id": source.ids(), "label": labels}
        if source.num_groups:
            columns[GROUP_COLUMN] = group_column(source)
        pq.write_table(pa.table(columns), stream)


def _log_progress(done: int, total: int) -> None:
    logger.info("prepare: %d of %d images", done, total)
