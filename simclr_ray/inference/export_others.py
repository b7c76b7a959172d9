"""Encoders for other programs: torchvision, timm, transformers, and whatever runs ONNX.

Each file or folder is read back by the library that it is for. Where that is transformers, by timm,
whose folders it reads. All take images in [0, 1] of `Encoder.transform`: less no mean, over no
deviation.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from simclr_ray import config as cfg
from simclr_ray.augment.decode import CROP_PROPORTION, WHOLE_IMAGE_SIDE
from simclr_ray.config.sections.model import EncoderSection
from simclr_ray.errors import CheckpointError, ConfigError, one_line
from simclr_ray.inference.encoder import Encoder
from simclr_ray.inference.export_formats import (
    ExportFormat,
    Network,
    permit_reading,
    write_weights,
)
from simclr_ray.nn.encoders import RGB, Architecture, family_of, first_convolution, take_channels
from simclr_ray.nn.timm_models import load_timm
from simclr_ray.nn.torchvision_models import stem_layers

ONNX_EXTRA: Final = "simclr-ray[onnx]"
ONNX_FILE: Final = "encoder.onnx"
WRITES_ANY: Final = "(--to onnx or torch-export writes any)"
COUNTER: Final = "num_batches_tracked"  # of their batch norms; ours counts none

log = logging.getLogger(__name__)


def _config_of(encoder: Encoder) -> Any:
    return cfg.validate(EncoderSection, {"encoder": encoder.config}).encoder


def _in_torchvision(encoder: Encoder) -> Architecture | str:
    return family_of(_config_of(encoder)).in_torchvision(encoder.size)


def _in_timm(encoder: Encoder) -> Architecture | str:
    return family_of(_config_of(encoder)).in_timm(encoder.size)


def torchvision_problem(encoder: Encoder) -> str:
    """Return why torchvision has no such network; empty: it has."""
    architecture = _in_torchvision(encoder)
    return f"{architecture} {WRITES_ANY}" if isinstance(architecture, str) else ""


def timm_problem(encoder: Encoder) -> str:
    """Return why timm has no such network; empty: it has."""
    architecture = _in_timm(encoder)
    return f"{architecture} {WRITES_ANY}" if isinstance(architecture, str) else ""


def exports_line(config: Any, size: int) -> str:
    """Return which formats an encoder can be written in, and why not in the others.

    Args:
        config: Of the encoder.
        size: Side of its views in evaluation.
    """
    family, able, unable = family_of(config), ["safetensors", "torch-export", "onnx"], []
    for names, there in (
        (TORCHVISION.name, family.in_torchvision(size)),
        (f"{TIMM.name}, {HUGGING_FACE.name}", family.in_timm(size)),
    ):
        if isinstance(there, str):
            unable.append(f"; not {names}: {there}")
        else:
            able.append(names)
    return ", ".join(able) + "".join(unable)


def plain_torchvision(encoder: Encoder) -> nn.Module:
    """Return torchvision's network of an encoder, its weights as they come, without classifier."""
    return _altered_torchvision(encoder)[0]


def _altered_torchvision(encoder: Encoder) -> tuple[nn.Module, list[str]]:
    """Return torchvision's network for an encoder, and which of its layers were replaced."""
    import torchvision

    architecture = _in_torchvision(encoder)
    assert not isinstance(architecture, str)  # it was asked whether there is one
    network: nn.Module = torchvision.models.get_model(
        architecture.model, weights=None, **architecture.options
    )
    where = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)][-1]
    layers = stem_layers(architecture.stem) | {where: nn.Identity()}
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, layer)
    replaced = list(layers)
    if encoder.channels != RGB:
        take_channels(network, encoder.channels)
        replaced.append(first_convolution(network)[0])
    return network, list(dict.fromkeys(replaced))


def torchvision_code(encoder: Encoder) -> str:
    """Return the Python that builds torchvision's network for the exported state dict."""
    architecture = _in_torchvision(encoder)
    assert not isinstance(architecture, str)  # it was asked whether there is one
    with torch.device("meta"):
        network, replaced = _altered_torchvision(encoder)
    options = "".join(f", {name}={value!r}" for name, value in architecture.options.items())
    lines = [f"net = torchvision.models.get_model({architecture.model!r}{options})"]
    for name in replaced:
        place = "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in name.split("."))
        lines.append(f"net{place} = torch.nn.{network.get_submodule(name)!r}")
    return "; ".join(lines)


def plain_timm(encoder: Encoder) -> nn.Module:
    """Return timm's network of an encoder, its weights as they come, without classifier."""
    architecture = _in_timm(encoder)
    assert not isinstance(architecture, str)  # it was asked whether there is one
    options = dict(architecture.options)
    if encoder.channels != RGB:
        options["in_chans"] = encoder.channels
    network: nn.Module = load_timm().create_model(
        architecture.model, pretrained=False, num_classes=0, **options
    )
    return network


def filled(network: nn.Module, encoder: Encoder) -> nn.Module:
    """Return a network of another library with an encoder's weights, strictly, in eval mode.

    Raises:
        CheckpointError: They do not fit.
    """
    names = family_of(_config_of(encoder)).file_names(encoder.network)
    tensors = {names[own]: t for own, t in encoder.network.state_dict().items()}
    counters = {n: t for n, t in network.state_dict().items() if n.endswith(COUNTER)}
    try:
        network.load_state_dict({**counters, **tensors})
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit: {one_line(error)}") from error
    return network.eval()


def _write_torchvision(path: Path, encoder: Encoder, example: Tensor) -> None:  # noqa: ARG001 - needs none
    torch.save(filled(plain_torchvision(encoder), encoder).state_dict(), path)
    log.info("%s is for: %s", path.name, torchvision_code(encoder))


def _check_torchvision(path: Path, encoder: Encoder) -> Network:
    network = plain_torchvision(encoder)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


def _write_timm(path: Path, encoder: Encoder, example: Tensor) -> None:  # noqa: ARG001 - as above
    write_weights(path, filled(plain_timm(encoder), encoder).state_dict())


def _check_timm(path: Path, encoder: Encoder) -> Network:
    network = plain_timm(encoder)
    network.load_state_dict(load_file(path))
    return network.eval()


def _write_hugging_face(path: Path, encoder: Encoder, example: Tensor) -> None:  # noqa: ARG001 - as above
    """Write a folder as timm does, which transformers reads with `AutoModel`."""
    network: Any = filled(plain_timm(encoder), encoder)
    network.pretrained_cfg = dict(network.pretrained_cfg) | {
        "input_size": [encoder.channels, encoder.size, encoder.size],
        "mean": [0.0] * encoder.channels,
        "std": [1.0] * encoder.channels,
        "crop_pct": crop_fraction(encoder.size) if encoder.size > WHOLE_IMAGE_SIDE else 1.0,
        "crop_mode": "center" if encoder.size > WHOLE_IMAGE_SIDE else "squash",
        "interpolation": "bicubic",
        "num_classes": 0,
        **dict.fromkeys(("tag", "url", "hf_hub_id", "license", "origin_url"), ""),
    }
    architecture = _in_timm(encoder)
    assert not isinstance(architecture, str)  # it was asked whether there is one
    load_timm().models.save_for_hf(
        network, path, model_args=dict(architecture.options), safe_serialization=True
    )
    permit_reading(path / "model.safetensors")
    config = path / "config.json"
    tree = json.loads(config.read_text(encoding="utf-8"))
    tree["model_args"].pop("num_classes", None)  # transformers gives it itself, and takes it once
    config.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def crop_fraction(size: int) -> float:
    """Return the `crop_pct` by which timm's view of side `size` is nearest to ours.

    timm resizes the shorter side to floor(size / crop_pct) and cuts the middle out, to whole
    pixels. A side from which an even number is cut keeps the middle where ours has it.
    """
    resized = size + 2 * round(size * (1 / CROP_PROPORTION - 1) / 2)
    return size / (resized + 0.25)  # nowhere near the next whole number, whatever is rounded


def _check_hugging_face(path: Path, encoder: Encoder) -> Network:  # noqa: ARG001 - compared by the caller
    timm = load_timm()
    network: nn.Module = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0)
    return network.eval()


def _write_onnx(path: Path, encoder: Encoder, example: Tensor) -> None:
    """Export with a free batch, and a free size where the network takes any.

    Raises:
        CheckpointError: The exporter cannot, with a free batch alone either.
    """
    _load_onnx()
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    sizes = {2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)}
    network = encoder.network
    for dimensions in (free | sizes, free):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch's own deprecated internals
                torch.onnx.export(
                    network,
                    (example,),
                    path,
                    input_names=["images"],
                    output_names=["features"],
                    dynamic_shapes=(dimensions,),
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                )
            return
        except torch.onnx.errors.OnnxExporterError as error:
            if dimensions == free:  # the rest of its text is advice to debug
                cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
                message = one_line(cause)
                raise CheckpointError(f"onnx cannot be written: {message}") from error


def _check_onnx(path: Path, encoder: Encoder) -> Network:  # noqa: ARG001 - compared by the caller
    session = _load_onnx().InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return run


def _load_onnx() -> Any:
    """Return the module onnxruntime, where all that writes ONNX is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        problem = f"onnx needs the extra: pip install '{ONNX_EXTRA}' ({error})"
        raise ConfigError.of("--to", problem) from error
    return onnxruntime


TORCHVISION: Final = ExportFormat(
    "torchvision", "torchvision.pth", _write_torchvision, _check_torchvision, torchvision_problem
)
TIMM: Final = ExportFormat("timm", "timm.safetensors", _write_timm, _check_timm, timm_problem)
HUGGING_FACE: Final = ExportFormat(
    "huggingface", "huggingface", _write_hugging_face, _check_hugging_face, timm_problem
)
ONNX: Final = ExportFormat("onnx", ONNX_FILE, _write_onnx, _check_onnx)
OTHERS: Final = (TORCHVISION, TIMM, HUGGING_FACE, ONNX)
