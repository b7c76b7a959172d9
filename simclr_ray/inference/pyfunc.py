"""The model-from-code file of a registered encoder: images in, embeddings or classes out.

MLflow stores this file in the model and runs it where the model is loaded. It knows mlflow, torch,
pillow, numpy and pandas, and neither ray nor simclr_ray: the decoder travels beside it as a folder.
Nothing here, and nothing that it loads, is a pickle.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
import sys
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

BATCH_SIZE = 256  # images decoded and encoded at a time: 150 MB of float32 at 224 px


class Embedder(PythonModel):
    """Embeds the images of column `image` with the exported program of the encoder.

    One with a classifier names their classes instead.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the programs and the decoder from the model's artifacts."""
        folder = Path(context.artifacts["encoder"])
        card = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        self.size = int(card["size"])
        self.decode = _package_at(Path(context.artifacts["decode"]))
        self.decoder = self.decode.image_decoder(card["channels"], card["white"])
        self.program = torch.export.load(folder / "encoder.pt2").module()
        self.class_names = (card.get("classifier") or {}).get("class_names", [])
        self.width = len(self.class_names) or int(card["feature_dim"])
        if self.class_names:
            self.classifier = torch.export.load(folder / "classifier.pt2").module()

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002 - MLflow's signature
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> npt.NDArray[np.float32] | pd.DataFrame:
        """Return the embeddings, float32 [N, F], of the N images of column `image`.

        Of a classifier instead a table: `label`, the most probable class of each image by its name,
        and of each class NAME a column `p(NAME)`, its probability.

        Args:
            context: MLflow's; what it holds was read when the model was loaded.
            model_input: one column `image` of encoded images (JPEG, PNG, WebP ...): as bytes, as
                base64 text, or as `pathlib.Path`. Text is never a path: a server hands on what
                anybody has sent, and would open files of its own for them.
            params: `batch_size`, images decoded and encoded at a time.

        Raises:
            ValueError: an image cannot be decoded, or is given as something else; names its row.
        """
        items = list(model_input["image"])
        batch_size = int((params or {}).get("batch_size", BATCH_SIZE))
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; it must be at least 1")
        rows = np.empty((len(items), self.width), dtype=np.float32)
        for start in range(0, len(items), batch_size):
            some = items[start : start + batch_size]
            views = np.stack([self._view(item, start + k) for k, item in enumerate(some)])
            images = torch.from_numpy(views).permute(0, 3, 1, 2).float().div(255)  # [n, C, S, S]
            with torch.inference_mode():
                out = self.program(images.contiguous())
                if self.class_names:
                    out = self.classifier(out).softmax(1)
            rows[start : start + len(some)] = out.numpy()
        return self._named(rows) if self.class_names else rows

    def _named(self, probabilities: npt.NDArray[np.float32]) -> pd.DataFrame:
        """Return probabilities [N, K] as a table, the most probable class before them."""
        names = np.array(self.class_names, dtype=object)
        table = pd.DataFrame(probabilities, columns=[f"p({name})" for name in names])
        table.insert(0, "label", names[probabilities.argmax(axis=1)])
        return table

    def _view(self, image: object, row: int) -> npt.NDArray[np.uint8]:
        """Return one evaluation view, uint8 [S, S, C]."""
        try:
            pixels = self.decoder.decode(self._encoded(image))
            view: npt.NDArray[np.uint8] = self.decode.evaluation_view(pixels, self.size)
        except (ValueError, OSError) as error:
            raise ValueError(f"row {row}: {error}") from error
        return view

    def _encoded(self, image: object) -> bytes:
        if isinstance(image, (bytes, bytearray, memoryview)):
            return self._whole(bytes(image))
        if isinstance(image, Path):
            return image.read_bytes()
        if not isinstance(image, str):
            got = type(image).__name__
            raise ValueError(f"expected an image as bytes, base64 text or pathlib.Path; got {got}")
        encoded = self._of_base64(image)
        if encoded:
            return encoded
        shown = image if len(image) <= 80 else f"{image[:77]}..."
        raise ValueError(f"{shown!r} is no base64 of an image; a path is given as pathlib.Path")

    def _whole(self, data: bytes) -> bytes:
        """Return the image in bytes, which of some forms of request are still base64 text."""
        if self.decode.format_of(data[: self.decode.FIRST_BYTES]) is None and data.isascii():
            return self._of_base64(data.decode()) or data
        return data

    def _of_base64(self, text: str) -> bytes:
        """Return the image in base64 text, a data URI as well; nothing where there is none."""
        try:
            encoded = base64.b64decode(text.rpartition(";base64,")[2], validate=True)
        except (binascii.Error, ValueError):  # the latter of text beyond ASCII
            return b""
        is_image = self.decode.format_of(encoded[: self.decode.FIRST_BYTES]) is not None
        return encoded if is_image else b""


def _package_at(folder: Path) -> ModuleType:
    """Return the package in a folder, by a name of its own: two loaded versions share no module."""
    name = f"encoder_decode_{uuid.uuid4().hex}"
    path = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its own files find it
    spec.loader.exec_module(module)
    return module


set_model(Embedder())
