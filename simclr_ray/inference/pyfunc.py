"""The model-from-code file of a registered encoder: encoded images in, embeddings out.

MLflow stores this file in the model and runs it where the model is loaded. It knows mlflow, torch,
pillow, numpy and pandas, and neither ray nor simclr_ray: the decoder travels beside it as a folder.
Nothing here, and nothing that it loads, is a pickle.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import uuid
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

BATCH_SIZE = 256  # images decoded and encoded at a time: 150 MB of float32 at 224 px


class Embedder(PythonModel):
    """Embeds the encoded images of column `image` with the exported program of the encoder."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the program and the decoder from the model's artifacts."""
        folder = Path(context.artifacts["encoder"])
        card = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        self.size = int(card["size"])
        self.feature_dim = int(card["feature_dim"])
        self.decode = _package_at(Path(context.artifacts["decode"]))
        self.decoder = self.decode.image_decoder(card["channels"], card["white"])
        self.program = torch.export.load(folder / "encoder.pt2").module()

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002 - MLflow's signature
        model_input: pd.DataFrame,
        params: dict[str, object] | None = None,  # noqa: ARG002
    ) -> npt.NDArray[np.float32]:
        """Return the embeddings, float32 [N, F], of the N images of column `image`.

        Args:
            context: MLflow's; what it holds was read when the model was loaded.
            model_input: one column `image` of encoded images (JPEG, PNG, WebP ...), as bytes.
            params: MLflow's; there are none.

        Raises:
            ValueError: an image cannot be decoded; names its row.
        """
        encoded = list(model_input["image"])
        embeddings = np.empty((len(encoded), self.feature_dim), dtype=np.float32)  # [N, F]
        for start in range(0, len(encoded), BATCH_SIZE):
            some = encoded[start : start + BATCH_SIZE]
            views = np.stack([self._view(item, start + k) for k, item in enumerate(some)])
            images = torch.from_numpy(views).permute(0, 3, 1, 2).float().div(255)  # [n, C, S, S]
            with torch.inference_mode():
                embeddings[start : start + len(some)] = self.program(images.contiguous()).numpy()
        return embeddings

    def _view(self, encoded: bytes, row: int) -> npt.NDArray[np.uint8]:
        """Return one evaluation view, uint8 [S, S, C]."""
        try:
            pixels = self.decoder.decode(bytes(encoded))
            view: npt.NDArray[np.uint8] = self.decode.evaluation_view(pixels, self.size)
        except (ValueError, TypeError) as error:
            raise ValueError(f"row {row}: {error}") from error
        return view


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
