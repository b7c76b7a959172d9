"""What a sample of the training images and their views shows, before anything is learned."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor


class ViewFacts(NamedTuple):
    """Of a sample of images and two views of each; nothing of it changes while a run goes on."""

    equal_views: float  # share of the images whose two views are the same to the last bit
    blank_views: float  # share of the images both of whose views are of one color
    copied_images: float  # share of the images of which a batch is to hold another exact copy


def view_marks(images: Tensor, views: tuple[Tensor, Tensor]) -> Tensor:
    """Return what `view_facts` counts of each image: int64 `[m, 3]`; ranks exchange these.

    Args:
        images: uint8 `[m, C, S, S]`.
        views: two of each, uint8 `[m, C, S', S']`.
    """
    if not len(images):
        return torch.empty(0, 3, dtype=torch.int64)
    a, b = (view.flatten(2) for view in views)  # [m, C, S'·S']
    equal = (a == b).flatten(1).all(1)
    blank = torch.stack([(v == v[:, :, :1]).flatten(1).all(1) for v in (a, b)]).all(0)
    digests = [_digest(image) for image in images]
    return torch.stack([torch.tensor(digests), equal.long(), blank.long()], 1)


def view_facts(marks: Tensor, batch_size: int) -> ViewFacts:
    """Return the facts of a sample by the marks of all its images: int64 `[M, 3]`."""
    num = len(marks)
    counts = Counter(marks[:, 0].tolist()).values()
    # of k equal ones among M, an image has (k - 1)/(M - 1) of the others
    copied = sum(k for k in counts if (batch_size - 1) * (k - 1) >= num - 1 > 0)
    _, equal, blank = marks.double().mean(0).tolist()
    return ViewFacts(equal, blank, copied / num)


def _digest(image: Tensor) -> int:
    content = image.contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), signed=True)
