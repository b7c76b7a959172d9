"""A map of embeddings in two dimensions, by t-SNE, as one HTML page to move about in.

scikit-learn's t-SNE of 50 principal components: near on the map was near among the embeddings; how
far apart groups lie, and how large they are, says nothing. Time grows with the number of images, so
of more a sample is drawn; thumbnails of photographs are decoded whole, which may take longer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from simclr_ray.config.wording import counted
from simclr_ray.data.arrays import Float32s, Int64s
from simclr_ray.data.contact_sheet import data_uri
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.inference.embedded_images import EmbeddedImages
from simclr_ray.inference.embedding_index import EXTRA, EmbeddingIndex, kept_columns, read_column
from simclr_ray.storage.filesystem import filesystem, write_text_whole
from simclr_ray.storage.page import render_page

COMPONENTS: Final = 50  # as van der Maaten & Hinton 2008 give t-SNE
PERPLEXITY: Final = 30.0
LEAST_IMAGES: Final = 10
THUMBNAIL_SIDE: Final = 48  # 1.5 kB of text each
MOST_CLASSES: Final = 20  # as many colors tell apart; the rest are one
OTHERS: Final = "others"
SAME: Final = 1e-6


class EmbeddingMap(NamedTuple):
    """Where images lie on a map.

    Attributes:
        positions: int64 [m], in the index, ascending.
        points: float32 [m, 2], in [0, 1].
        classes: Text a point; empty: there are none.
    """

    positions: Int64s
    points: Float32s
    classes: Sequence[str] = ()


def make_map(index: EmbeddingIndex, num: int, *, label: str = "", seed: int = 0) -> EmbeddingMap:
    """Return the map of an index; the same index and seed give the same map.

    Args:
        index: Of the images.
        num: Images at most; of more, a sample.
        label: Column that was handed on (`embed --keep`), whose values become colors.
        seed: Of the sample.

    Raises:
        ConfigError: scikit-learn is not installed, or there is no such column.
        DataError: There are too few images, or all embeddings are the same.
    """
    tsne, pca = _import_sklearn()
    total = len(index.names)
    if total < LEAST_IMAGES:
        raise DataError(f"{index.uri} has {counted(total, 'image')}; a map takes {LEAST_IMAGES}")
    classes = _classes(index, label) if label else []
    drawn = np.random.Generator(np.random.Philox(key=seed)).permutation(total)[:num]
    positions = np.sort(drawn).astype(np.int64)
    vectors = index.vectors[positions]
    if np.ptp(vectors, axis=0).max() < SAME:  # t-SNE would divide by their deviation
        raise DataError(f"{index.uri}: its embeddings are all the same; there is nothing to map")
    if min(vectors.shape) > COMPONENTS:
        vectors = pca(COMPONENTS, random_state=seed).fit_transform(vectors)
    perplexity = min(PERPLEXITY, (len(positions) - 1) / 3)
    points = tsne(perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors)
    points -= points.min(axis=0)
    points /= np.maximum(points.max(axis=0), np.finfo(np.float32).tiny)
    chosen = [classes[position] for position in positions] if label else ()
    return EmbeddingMap(positions, points.astype(np.float32), chosen)


def write_map(out: str, index: EmbeddingIndex, made: EmbeddingMap, where: str = "") -> None:
    """Write the page, with a thumbnail a point.

    Args:
        out: Path or URI of the page.
        index: What the map is of.
        made: The map.
        where: As in `EmbeddedImages`.

    Raises:
        DataError: As in `EmbeddedImages`.
        OSError: The page cannot be written.
    """
    with EmbeddedImages(index, where) as images:
        thumbnails = images.thumbnails(made.positions.tolist(), side=THUMBNAIL_SIDE)
    names = _legend(made.classes)
    number_of = {name: number for number, name in enumerate(names)}
    points = [
        [
            round(float(x), 4),
            round(float(y), 4),
            number_of.get(made.classes[i], len(names) - 1) if made.classes else -1,
            f"{shown.name} ({made.classes[i]})" if made.classes else shown.name,
            "" if shown.image is None else data_uri(shown.image),
        ]
        for i, ((x, y), shown) in enumerate(zip(made.points, thumbnails, strict=True))
    ]
    page = render_page(
        "inference",
        "embedding_map.html.j2",
        title=f"Map of {counted(len(points), 'image')}",
        says=f"Of {len(index.names):,} in {index.uri}, by t-SNE: near is alike, distances between "
        "groups say nothing",
        classes=names,
        # within a script element `<` could end it
        points=json.dumps(points, ensure_ascii=True).replace("<", "\\u003c"),
    )
    fs, path = filesystem(out)
    write_text_whole(fs, path, page)


def _classes(index: EmbeddingIndex, label: str) -> list[str]:
    names = list(kept_columns(index.uri))
    if label not in names:
        kept = f"the columns: {', '.join(names)}" if names else "embed --keep hands columns on"
        raise ConfigError.of("--label", f"there is no column {label!r}; {kept}")
    values = read_column(index.uri, label)
    classes = index.origin.classes.get(label, ())

    def name_of(value: Any) -> str:
        is_class = isinstance(value, int) and 0 <= value < len(classes)
        return str(classes[value] if is_class else value)

    return [name_of(values[row]) for row in index.rows]


def _legend(classes: Sequence[str]) -> list[str]:
    """Return the most frequent classes, in order; where there are more, `others` after them."""
    names, counts = np.unique(np.array(classes, str), return_counts=True)
    chosen = names[np.argsort(-counts, kind="stable")][:MOST_CLASSES]
    return sorted(chosen.tolist()) + [OTHERS] * (len(names) > MOST_CLASSES)


def _import_sklearn() -> tuple[Any, Any]:
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError as error:
        problem = f"needs scikit-learn: pip install '{EXTRA}' ({error})"
        raise ConfigError.of("map", problem) from error
    return TSNE, PCA
