"""A trained encoder as users hold it: a network with the preprocessing that belongs to it.

What a plain resize makes of an image is another image, of which the same weights make another
embedding. So the preprocessing travels with the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from simclr_ray.augment.decode import (
    DEFAULT_DECODER,
    ImageDecoder,
    ImageError,
    Pixels,
    evaluation_view,
)
from simclr_ray.data.arrays import Float32s
from simclr_ray.nn.precision import evaluating

NOT_FINITE: Final = "not finite"  # why a row is left out: the encoder has diverged
BATCH_SIZE: Final = 256  # 150 MB of float32 at 224 px
AnyImage = bytes | bytearray | memoryview | str | Path | Image.Image | npt.NDArray[Any] | Tensor
OnBad = Callable[[int, str], None]


class EvaluationTransform:
    """Turns an image of any kind into the input of an encoder, as evaluation does.

    Serves as `transform` of a torchvision dataset; it pickles.

    Args:
        size: Side S of the view in pixels.
        decoder: How images are decoded, and how many channels C they have.
    """

    def __init__(self, size: int, decoder: ImageDecoder) -> None:
        self.size, self.decoder = size, decoder

    def __call__(self, image: AnyImage) -> Tensor:
        """Return the view of one image, float32 [C, S, S] in [0, 1].

        Args:
            image: An encoded image as bytes; the path of one; Pillow's; an array, uint8 or uint16
                [H, W], [H, W, C] or [C, H, W]; or a tensor, uint8 [C, H, W].

        Raises:
            ImageError: It cannot be decoded, or has other channels.
            OSError: The file cannot be read.
            TypeError: It is none of these.
        """
        return as_inputs([self.view(image)])[0]

    def view(self, image: AnyImage) -> Pixels:
        """Return the view of one image as evaluation crops and resizes it, uint8 [S, S, C]."""
        return evaluation_view(self._pixels(image), self.size)

    def _pixels(self, image: AnyImage) -> Pixels:
        if isinstance(image, (str, Path)):
            image = Path(image).read_bytes()
        if isinstance(image, (bytes, bytearray, memoryview)):
            return self.decoder.decode(bytes(image))
        if isinstance(image, Tensor):
            if image.ndim == 3:
                image = image.permute(1, 2, 0)
            return self.decoder.convert(image.cpu().numpy())
        if isinstance(image, (Image.Image, np.ndarray)):
            return self.decoder.convert(image)
        raise TypeError(
            f"expected an image as bytes, path, Pillow image, uint8 array or uint8 tensor; "
            f"got {type(image).__name__}"
        )

    def __repr__(self) -> str:
        """Return what it does, on one line."""
        return f"EvaluationTransform(size={self.size}, channels={self.decoder.channels})"


def as_inputs(views: Sequence[Pixels]) -> Tensor:
    """Return views, uint8 [S, S, C] each, as the input of an encoder: float32 [n, C, S, S]."""
    stacked = torch.from_numpy(np.stack(views))
    return stacked.permute(0, 3, 1, 2).float().div(255).contiguous()


class Encoder(nn.Module):
    """Embeds images by a trained network and the preprocessing that it was trained for.

    Args:
        network: Float [N, C, S, S] in [0, 1] -> [N, F].
        config: Tree of its config: `experiment.encoder`.
        size: Side S of its evaluation view in pixels.
        feature_dim: F.
        decoder: Of its images.

    Attributes:
        network: As given; its `state_dict` has the architecture's own names.
        transform: Makes the input of one image of any kind, float32 [C, S, S].
        feature_dim: F.

    Example:
        >>> encoder = sr.load_encoder("runs/cifar10_cpu-1a2b3c4d")
        >>> encoder.embed(["a.jpg", "b.jpg"]).shape
        (2, 128)
        >>> folder = torchvision.datasets.ImageFolder("photos", transform=encoder.transform)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        config: Mapping[str, Any],
        size: int,
        feature_dim: int,
        decoder: ImageDecoder = DEFAULT_DECODER,
    ) -> None:
        super().__init__()
        self.network, self.config, self.feature_dim = network, dict(config), feature_dim
        self.transform = EvaluationTransform(size, decoder)

    @property
    def size(self) -> int:
        """Side S of the views in pixels."""
        return self.transform.size

    @property
    def channels(self) -> int:
        """C of the images."""
        return self.decoder.channels

    @property
    def decoder(self) -> ImageDecoder:
        """How its images are decoded."""
        return self.transform.decoder

    @property
    def digest(self) -> str:
        """SHA-256 of the names and values of its weights."""
        weights = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            weights.update(name.encode())
            weights.update(tensor.cpu().contiguous().numpy().tobytes())
        return weights.hexdigest()

    def forward(self, images: Tensor) -> Tensor:
        """Return h [N, F] of images [N, C, H, W] in [0, 1]."""
        h: Tensor = self.network(images)
        return h

    def embed(
        self,
        images: Sequence[AnyImage],
        *,
        batch_size: int = BATCH_SIZE,
        on_bad: OnBad | None = None,
    ) -> Float32s:
        """Return the embeddings of N images of any kind, float32 [N, F], where its weights are.

        Args:
            images: As `transform` takes them.
            batch_size: Images decoded and encoded at a time.
            on_bad: Gets position and reason of an image that cannot be read or decoded, or whose
                numbers are not finite; its row is then NaN.

        Raises:
            ImageError: An image cannot be decoded and there is no `on_bad`; names the position.
            OSError: A file cannot be read and there is no `on_bad`.
            TypeError: An item is no image.
        """
        return self._rows(images, self, self.feature_dim, batch_size, on_bad)

    @torch.inference_mode()
    def _rows(
        self,
        images: Sequence[AnyImage],
        network: Callable[[Tensor], Tensor],
        width: int,
        batch_size: int,
        on_bad: OnBad | None,
    ) -> Float32s:
        """Return what a network gives for N images, float32 [N, width], NaN for those left out."""
        if isinstance(images, (str, Path, bytes)):
            raise TypeError(f"expected a sequence of images; got one {type(images).__name__}")
        rows = np.full((len(images), width), np.nan, dtype=np.float32)
        first = next(self.parameters(), torch.empty(0))
        with evaluating(self):
            for start in range(0, len(images), batch_size):
                places = range(start, min(start + batch_size, len(images)))
                views = self._views(images, places, on_bad)
                if views:
                    inputs = as_inputs(list(views.values())).to(first.device, first.dtype)
                    rows[list(views)] = network(inputs).float().cpu().numpy()
                if on_bad is not None:
                    _leave_out(rows, list(views), on_bad)
        return rows

    def _views(
        self, images: Sequence[AnyImage], places: range, on_bad: OnBad | None
    ) -> dict[int, Pixels]:
        views = {}
        for place in places:
            try:
                views[place] = self.transform.view(images[place])
            except ImageError as error:
                if on_bad is None:
                    raise ImageError(f"image {place}: {error}") from error
                on_bad(place, str(error))
            except OSError as error:
                if on_bad is None:
                    raise
                on_bad(place, error.strerror or str(error))
        return views


def _leave_out(rows: Float32s, places: Sequence[int], on_bad: OnBad) -> None:
    """Make NaN of rows that hold numbers which are not finite, and name them."""
    for place in places:
        if not np.isfinite(rows[place]).all():
            rows[place] = np.nan
            on_bad(place, NOT_FINITE)


class Classifier(Encoder):
    """An encoder with the classifier that was fine-tuned on it.

    Args:
        encoder: It shares its network.
        head: Float [N, F] -> class scores [N, K].
        head_config: Tree of its config: `experiment.head`.
        class_names: Of the K classes.

    Attributes:
        head: As given: `classifier.head(classifier(images))` are the class scores.
        class_names: As given.

    Example:
        >>> classifier = sr.load_encoder("runs/cifar10_cpu-tuned-10pct-1a2b3c4d")
        >>> classifier.predict(["a.jpg"])
        ['frog']
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        head: nn.Module,
        head_config: Mapping[str, Any],
        class_names: Sequence[str],
    ) -> None:
        super().__init__(
            encoder.network,
            config=encoder.config,
            size=encoder.size,
            feature_dim=encoder.feature_dim,
            decoder=encoder.decoder,
        )
        self.head, self.head_config = head, dict(head_config)
        self.class_names = tuple(class_names)

    def predict_proba(
        self,
        images: Sequence[AnyImage],
        *,
        batch_size: int = BATCH_SIZE,
        on_bad: OnBad | None = None,
    ) -> Float32s:
        """Return the probability of each class for N images, float32 [N, K]; rows sum to 1.

        Args:
            images: As in `embed`.
            batch_size: As in `embed`.
            on_bad: As in `embed`.

        Raises:
            ImageError: As in `embed`.
            OSError: As in `embed`.
            TypeError: As in `embed`.
        """

        def probabilities(inputs: Tensor) -> Tensor:
            scores: Tensor = self.head(self(inputs))
            return scores.softmax(1)

        return self._rows(images, probabilities, len(self.class_names), batch_size, on_bad)

    def predict(
        self,
        images: Sequence[AnyImage],
        *,
        batch_size: int = BATCH_SIZE,
        on_bad: OnBad | None = None,
    ) -> list[str]:
        """Return the most probable class of each of N images by its name; "" for a bad one.

        Args:
            images: As in `embed`.
            batch_size: As in `embed`.
            on_bad: As in `embed`.

        Raises:
            ImageError: As in `embed`.
            OSError: As in `embed`.
            TypeError: As in `embed`.
        """
        rows = self.predict_proba(images, batch_size=batch_size, on_bad=on_bad)
        return ["" if np.isnan(row[0]) else self.class_names[row.argmax()] for row in rows]
