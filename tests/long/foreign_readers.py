"""Read exported encoders by the libraries that they are for, and write the features of each.

    python foreign_readers.py FOLDER

FOLDER holds `inputs.pth` (the tensors of `Encoder.transform`), `images/` and a folder an encoder,
with what was exported of it and `how.json`. Run by `test_exports.py` in an environment of its own,
which sees transformers, timm, torchvision and onnxruntime but not simclr_ray.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel


def by_torchvision(folder: Path, how: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return torchvision's network, filled strictly."""
    network: Any = torchvision.models.get_model(how["torchvision"], weights=None)
    network.fc = nn.Identity()
    if how["small_stem"]:
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    network.load_state_dict(torch.load(folder / "torchvision.pth", weights_only=True), strict=True)
    evaluating: Callable[[Tensor], Tensor] = network.eval()
    return evaluating


def by_timm(folder: Path, how: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return timm's network by its name."""
    path = str(folder / "timm.safetensors")
    made = timm.create_model(how["timm"], num_classes=0, checkpoint_path=path, **how["options"])
    return made.eval()


def by_timm_folder(folder: Path, how: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return timm's network of the Hugging Face folder."""
    where = f"local-dir:{folder / 'huggingface'}"
    return timm.create_model(where, pretrained=True, num_classes=0).eval()


def by_transformers(folder: Path, how: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return the pooled output of `AutoModel`."""
    model = AutoModel.from_pretrained(folder / "huggingface").eval()
    return lambda images: model(pixel_values=images).pooler_output


def by_onnxruntime(folder: Path, how: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return the session's answer."""
    session = onnxruntime.InferenceSession(folder / "encoder.onnx")
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def by_torch_export(folder: Path, how: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return the exported program."""
    return torch.export.load(folder / "encoder.pt2").module()


READERS = {
    "torchvision": by_torchvision, "timm": by_timm, "timm_folder": by_timm_folder,
    "transformers": by_transformers, "onnx": by_onnxruntime, "torch_export": by_torch_export,
}  # fmt: skip


def processed(folder: Path, files: list[Path]) -> Tensor:
    """Return what the folder's own image processor makes of image files."""
    processor = AutoImageProcessor.from_pretrained(folder / "huggingface")
    shown = [Image.open(file).convert("RGB") for file in files]
    views = [processor(image, return_tensors="pt")["pixel_values"] for image in shown]
    return torch.cat([torch.as_tensor(np.asarray(view)) for view in views])


def main(root: Path) -> None:
    """Write `features.pth` into each encoder's folder."""
    files = sorted((root / "images").iterdir())
    for path in sorted(root.glob("*/how.json")):
        folder, how = path.parent, json.loads(path.read_text())
        images = torch.load(folder / "inputs.pth", weights_only=True)
        features: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in how["readers"]:
                network = READERS[name](folder, how)
                # in two batches, of which one is a single image
                features[name] = torch.cat([network(images[:1]), network(images[1:])])
                if name == "transformers":
                    features["processor"] = processed(folder, files)
                    features["processed"] = network(features["processor"])
        torch.save(features, folder / "features.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
