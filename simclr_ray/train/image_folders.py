"""Folders of images as data of a run: each gets a list of its images, which is read as parquet."""

from __future__ import annotations

from pyarrow.fs import FileType

from simclr_ray.config.experiment import ColumnsConfig, Experiment
from simclr_ray.data.folder_input import index_folder
from simclr_ray.data.listing import list_parquet, part_split
from simclr_ray.storage.filesystem import address_below, filesystem, info_of

LISTS = "_lists"  # below the storage


def resolve_folders(experiment: Experiment) -> Experiment:
    """Return the experiment with a list of images below its storage for each folder of images."""
    data, lists = experiment.data, address_below(experiment.storage, LISTS)
    paths = {"train": data.train, "test": data.test, "eval_train": data.eval_train}
    listed = {
        key: index_folder(uri, lists)
        for key, uri in paths.items()
        if _is_of_images(uri, data.columns)
    }
    if not listed:
        return experiment
    return experiment.model_copy(update={"data": data.model_copy(update=listed)})


def _is_of_images(uri: str, columns: ColumnsConfig) -> bool:
    """Return whether a path is a folder without parquet; what is wrong with it is said later."""
    if not uri:
        return False
    fs, root = filesystem(uri)
    folder = info_of(fs, part_split(fs, root)[0])
    return folder.type == FileType.Directory and not list_parquet(fs, root, uri, columns).files
