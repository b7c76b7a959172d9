"""The encoder that an index was made by, to embed what is to be found in it."""

from __future__ import annotations

import logging

from simclr_ray.config.uris import hide_passwords, recall
from simclr_ray.errors import ConfigError
from simclr_ray.inference.embed import load_encoder
from simclr_ray.inference.embedding_index import EmbeddingIndex
from simclr_ray.inference.encoder import Encoder

log = logging.getLogger(__name__)


def encoder_of(index: EmbeddingIndex, where: str = "", tracking_uri: str = "") -> Encoder:
    """Return the encoder whose embeddings an index holds.

    Args:
        index: Of the embeddings.
        where: As in `load_encoder`; empty: where it was when they were made.
        tracking_uri: As in `load_encoder`.

    Raises:
        ConfigError: It is another one, or nowhere; or the file does not say which it was.
        CheckpointError: As in `load_encoder`.
        TrackingError: As in `load_encoder`.
    """
    origin = index.origin
    address = where or recall(origin.encoder)
    if not address:
        problem = f"is missing: {index.uri} does not say which encoder it was made by"
        raise ConfigError.of("--encoder", problem)
    if not where:
        log.info("the encoder is %s, as %s says", hide_passwords(address), index.uri)
    encoder = load_encoder(address, tracking_uri=tracking_uri)
    is_other = encoder.feature_dim != index.feature_dim
    if is_other or origin.weights not in ("", encoder.digest):
        sizes = f"{index.feature_dim} numbers, of it {encoder.feature_dim}"
        why = f"embeddings have {sizes}" if is_other else "its weights are others"
        problem = f"{index.uri} was made by another encoder ({why}); embed the images again"
        raise ConfigError.of(address, problem)
    if not origin.weights:
        log.warning("%s does not say by which weights it was made", index.uri)
    return encoder
