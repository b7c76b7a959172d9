"""The runs of `benchmarks.collapse`: healthy ones, injected causes, and rates that are too high."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

from simclr_ray.data.batch import Batch
from simclr_ray.nn.build import SimCLRModel

Settings = Mapping[str, Any]
PX = 32


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: Of it.
        settings: Dotted config keys, where they differ from the base.
        images: Writes other images: path of a parquet file, seed.
        model: Changes the model in place before the first step.
        batch: Changes each batch.
        before_step: Called with the model and the step that comes.
        step_s: What a step is to take by the meter's clock; 0: what it takes.
    """

    name: str
    settings: Settings = field(default_factory=dict)
    images: Callable[[Path, int], None] | None = None
    model: Callable[[SimCLRModel], None] | None = None
    batch: Callable[[Batch], Batch] | None = None
    before_step: Callable[[SimCLRModel, int], None] | None = None
    step_s: float = 0.0


@dataclass(frozen=True)
class Cause(Case):
    """A run with a cause of collapse or divergence in it.

    Attributes:
        named: What the message is to hold.
    """

    named: str = ""


def write_images(path: Path, images: list[np.ndarray[Any, Any]]) -> None:
    """Write arrays uint8 [H, W, 3] as a dataset."""
    encoded = []
    for image in images:
        out = io.BytesIO()
        Image.fromarray(image).save(out, "png")
        encoded.append(out.getvalue())
    ids = pa.array(range(len(images)), pa.int64())
    pq.write_table(pa.table({"id": ids, "image": pa.array(encoded, pa.binary())}), path)


def _smooth(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return an image of large spots of color."""
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(small.resize((PX, PX), Image.Resampling.BICUBIC))


def constant(path: Path, seed: int) -> None:
    """Write 320 images of one color each."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 256, (320, 3), dtype=np.uint8)
    write_images(path, [np.broadcast_to(c, (PX, PX, 3)).copy() for c in colors])


def copies_of(distinct: int, of: int = 320) -> Callable[[Path, int], None]:
    """Return what writes `of` images, of which only so many are distinct."""

    def write(path: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        images = [_smooth(rng) for _ in range(distinct)]
        write_images(path, [images[k % distinct] for k in range(of)])

    return write


def partly_blank(path: Path, seed: int) -> None:
    """Write 320 images, of which three in ten are white."""
    rng = np.random.default_rng(seed)
    white = np.full((PX, PX, 3), 255, np.uint8)
    write_images(path, [white if k % 10 < 3 else _smooth(rng) for k in range(320)])


def few(path: Path, seed: int) -> None:
    """Write 128 images."""
    copies_of(128, 128)(path, seed)


def smooth(path: Path, seed: int) -> None:
    """Write 320 images of spots of color."""
    copies_of(320)(path, seed)


def freeze(model: SimCLRModel) -> None:
    """Let nothing of the encoder train."""
    model.encoder.requires_grad_(requires_grad=False)


def kill_head(model: SimCLRModel) -> None:
    """Make z nearly the same for all images, as a head does whose shift outgrows the rest."""
    model.head.register_forward_hook(lambda _m, _i, z: 1e-6 * z + 1.0)


def leak_places(model: SimCLRModel) -> None:
    """Tell both views of an image, in training mode alone, where in the batch it lies."""
    codes = 10 * torch.randn(4096, 512, generator=torch.Generator().manual_seed(0))

    def add(module: nn.Module, _: object, h: Tensor) -> Tensor:
        half = len(h) // 2
        code = codes[:half, : h.shape[1]].repeat(2, 1)
        return h + code if module.training else h

    model.encoder.register_forward_hook(add)


def bad_gradient(model: SimCLRModel, step: int) -> None:
    """Have the gradient of one step hold a NaN."""
    if step == 150:
        spoilt = next(model.parameters())

        def spoil(gradient: Tensor) -> Tensor:
            handle.remove()
            return gradient * float("nan")

        handle = spoilt.register_hook(spoil)  # type: ignore[no-untyped-call] # torch's


def other_image(batch: Batch) -> Batch:
    """Make view b that of the next image."""
    return batch._replace(b=batch.b.roll(1, 0))


SGD = {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-4}
ADAM = {"name": "adamw", "weight_decay": 1e-2}


def _stages(*stages: Settings) -> Settings:
    return {"name": "pipeline", "size": 12, "a": [*stages]}


def _sgd(rate: float, **rest: Any) -> Settings:
    return {"optimizer": SGD, "schedule.learning_rate": rate, **rest}


def _adam(rate: float, **rest: Any) -> Settings:
    return {"optimizer": ADAM, "schedule.learning_rate": rate, "schedule.scaling": "none", **rest}


CLASSES = {"loss": {"name": "cross_entropy"}, "head": {"name": "classifier", "num_classes": 10}}
HEALTHY: tuple[Case, ...] = (
    Case("plain"),
    Case("steps_of_200_s", step_s=200.0),
    Case("steps_of_200_s_of_adamw", _adam(1e-3), step_s=200.0),
    Case("steps_of_200_s_of_8_images", {"batch_size": 8, "data.limit": 160}, step_s=200.0),
    *(Case(f"batch_{n}", {"batch_size": n, "data.limit": 20 * n}) for n in (2, 3, 4, 8, 32, 64)),
    Case("batch_128", {"batch_size": 128, "data.limit": 1280, "epochs": 26}),
    Case("batch_2_of_sgd", _sgd(1.0, **{"batch_size": 2, "data.limit": 40})),
    Case("batch_4_of_adamw", _adam(3e-4, **{"batch_size": 4, "data.limit": 80})),
    *(Case(f"temperature_{t}", {"loss.temperature": t}) for t in (0.05, 0.1, 0.5, 1.0)),
    Case("temperature_learned", {"loss.learn_temperature": True}),
    Case("negatives_of_other_view", {"loss.negatives": "other"}),
    Case("not_normalised", {"loss.normalize": False, "loss.temperature": 1.0}),
    Case("ntlogistic", {"loss": {"name": "ntlogistic", "temperature": 0.2}}),
    Case("triplet", {"loss": {"name": "triplet"}}),
    Case("triplet_semi_hard", {"loss": {"name": "triplet", "semi_hard": True}}),
    Case("dcl", {"loss": {"name": "dcl", "temperature": 0.2}}),
    Case("dcl_weighted", {"loss": {"name": "dcl", "temperature": 0.2, "sigma": 0.5}}),
    Case("supcon", {"loss": {"name": "supcon", "temperature": 0.2}}),
    Case("cross_entropy", CLASSES),
    Case("cross_entropy_of_adamw", {**CLASSES, **_adam(1e-3)}),
    Case("sgd", _sgd(0.5)),
    Case("sgd_clipped", {"optimizer": {**SGD, "clip_norm": 1.0}, "schedule.learning_rate": 1.0}),
    Case("adamw", _adam(1e-3)),
    Case("adamw_slow", _adam(1e-4)),
    Case("rate_a_tenth", {"schedule.learning_rate": 0.3}),
    Case("rate_of_three", {"schedule.learning_rate": 9.0}),
    Case("no_warm_up", {"schedule.warmup_epochs": 0.0}),
    Case("warm_up_of_half", {"schedule.warmup_epochs": 4.0}),
    Case("constant_rate", {"schedule.decay": "constant"}),
    Case("weight_decay_0", {"optimizer": {"name": "lars", "weight_decay": 0.0}}),
    Case("weight_decay_0.1", {"optimizer": {"name": "lars", "weight_decay": 0.1}}),
    Case("flips_alone", {"augment": _stages({"name": "crop", "min_area": 1.0})}),
    Case("crops_of_nine_tenths", {"augment.min_area": 0.9, "augment.strength": 0.0}),
    Case("weak_color", {"augment.min_area": 0.8, "augment.strength": 0.1}),
    Case("strong_views", {"augment.min_area": 0.08, "augment.strength": 1.0, "augment.blur": 0.5}),
    Case("no_head", {"head": {"name": "none"}}),
    Case("groups_of_half", {"batch_norm.group_size": 8}),
    Case("bf16", {"precision": "bf16"}),
    Case("128_images", {"epochs": 32, "evaluation.every_epochs": 4}, images=few),
    Case("images_of_spots", images=smooth),
    Case("three_in_ten_blank", images=partly_blank),
    Case("never_evaluated", {"evaluation.every_epochs": 0}),
)
NOTHING = _stages({"name": "crop", "min_area": 1.0, "flip": 0.0})
CAUSES: tuple[Cause, ...] = (
    Cause("rate", {"schedule.learning_rate": 9000.0, "schedule.warmup_epochs": 0.0},
          named="probably the rate"),
    Cause("rate_of_sgd", _sgd(1e6, **{"schedule.warmup_epochs": 0.0}), named="probably the rate"),
    Cause("bad_value", before_step=bad_gradient, named="a single bad value"),
    Cause("temperature", _sgd(1.0, **{"loss.normalize": False, "loss.temperature": 0.001}),
          named="the temperature"),
    Cause("identical_views", {"augment": NOTHING}, named="are identical"),
    Cause("constant_images", images=constant, named="two views of one color"),
    Cause("duplicates", images=copies_of(10), named="exact duplicates"),
    Cause("weight_decay", _sgd(0.5, **{"optimizer": {**SGD, "weight_decay": 3.0}}),
          named="probably weight decay"),
    Cause("batch_norm_leak", model=leak_places, named="a leak through batch norm"),
    Cause("frozen_encoder", model=freeze, named="a frozen encoder"),
    Cause("wrong_pairs", batch=other_image, named="pairs that share nothing"),
    Cause("dead_head", model=kill_head, named="probably the head"),
)  # fmt: skip
AT_ONCE = {"schedule.warmup_epochs": 0.0}
BARE = {"head": {"name": "mlp", "layers": 2, "dim": 64, "batch_norm": False}}
LENGTHS = {"loss.normalize": False, "loss.temperature": 1.0}
ROLLBACKS: tuple[Case, ...] = (
    Case("sgd", _sgd(1000.0, **AT_ONCE)),
    Case("lars", {"schedule.learning_rate": 4000.0, **AT_ONCE}),
    Case("no_batch_norm_in_the_head", _sgd(10.0, **LENGTHS, **BARE, **AT_ONCE)),
    Case("not_finite", _sgd(125.0, **LENGTHS, **AT_ONCE)),
)
