"""How two views are made of an image: the paper's pipeline, or any list of transformations."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from simclr_ray.config.components import ComponentConfig
from simclr_ray.config.imports import ImportConfig
from simclr_ray.config.schema import Config, Field, model_validator

MAX_STAGES: Final = 32  # that `augment.pipeline.MAX_STAGES` has draws for; it imports no config
# Transformations of images of any channels; the others are of RGB.
OF_ANY_CHANNELS: Final = frozenset(
    {"crop", "flip", "rotate", "cutout", "jitter", "blur", "solarize", "import"}
)


class SimCLRViewsConfig(ComponentConfig):
    """The paper's pipeline: crop and resize, flip, color jitter, grayscale, blur (App. A)."""

    component = "simclr_ray.augment.views:TwoViews"

    name: Literal["simclr"] = "simclr"
    size: int = Field(32, ge=8, le=4096, description="Side of a view in pixels.")
    start_size: int = Field(
        0, ge=0, description="Side in the first epoch, growing to `size`; 0: `size` throughout."
    )
    full_size_epoch_fraction: float = Field(
        0.75, gt=0, le=1, description="Share of the epochs after which views have full size."
    )
    strength: float = Field(1.0, ge=0, le=2, description="Color strength s of App. A.")
    blur: float = Field(0.5, ge=0, le=1, description="Probability of Gaussian blur.")
    min_area: float = Field(
        0.08, gt=0, le=1, description="Smallest share of the area that is cropped."
    )
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a left-right flip.")
    jitter: float = Field(0.8, ge=0, le=1, description="Probability of color jitter.")
    grayscale: float = Field(0.2, ge=0, le=1, description="Probability of dropping color.")

    @model_validator(mode="after")
    def _check_sizes(self) -> SimCLRViewsConfig:
        if self.start_size and not 8 <= self.start_size <= self.size:
            raise ValueError(
                f"start_size={self.start_size} must be 0, or between 8 and size={self.size}"
            )
        return self

    def needs_rgb(self) -> str:
        """Return which key asks for what only RGB has; grayscale at its default does nothing."""
        usual = type(self).model_fields["grayscale"].default
        return "" if self.grayscale in (0, usual) else f"grayscale={self.grayscale:g}"

    def canonical(self) -> SimCLRViewsConfig:
        """Return the config with the time of full size at its default where views do not grow."""
        usual = type(self).model_fields["full_size_epoch_fraction"].default
        return (
            self if self.start_size else self.model_copy(update={"full_size_epoch_fraction": usual})
        )

    def arguments(self) -> dict[str, Any]:
        """Return all fields but how views grow, which is said epoch by epoch (`size_at`)."""
        growth = ("start_size", "full_size_epoch_fraction")
        return {k: v for k, v in super().arguments().items() if k not in growth}

    def size_at(self, epoch: int, epochs: int) -> int:
        """Return the side of views in an epoch: linear growth, in steps (FFCV-SSL does likewise).

        Steps of 32 px, or of 4 px where `size` is at most 64.
        """
        grown = epoch / (self.full_size_epoch_fraction * epochs)
        if not self.start_size or grown >= 1:
            return self.size
        step = 4 if self.size <= 64 else 32
        return self.start_size + int((self.size - self.start_size) * grown) // step * step


class _StageConfig(ComponentConfig):
    """What all transformations have; the component is an `augment.ops.Op`."""

    p: float = Field(1.0, ge=0, le=1, description="Probability, drawn for each image.")

    def arguments(self) -> dict[str, Any]:
        """Return all fields but the probability, which is the stage's."""
        return {k: v for k, v in super().arguments().items() if k != "p"}


class CropConfig(_StageConfig):
    """Random crop, resized to `size`, and flipped; with min_area 1 the whole image, resized."""

    component = "simclr_ray.augment.pipeline:Crop"

    name: Literal["crop"] = "crop"
    min_area: float = Field(0.08, gt=0, le=1, description="Smallest share of the area.")
    max_area: float = Field(1.0, gt=0, le=1, description="Largest share of the area.")
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a left-right flip.")

    @model_validator(mode="after")
    def _check_areas(self) -> CropConfig:
        if self.min_area > self.max_area:
            raise ValueError(f"min_area={self.min_area} is above max_area={self.max_area}")
        return self


class FlipConfig(_StageConfig):
    """Left-right flip."""

    component = "simclr_ray.augment.ops:Flip"

    name: Literal["flip"] = "flip"
    p: float = Field(0.5, ge=0, le=1, description="Probability, drawn for each image.")


class RotateConfig(_StageConfig):
    """Rotation by 90, 180 or 270 degrees."""

    component = "simclr_ray.augment.ops:Rotate"

    name: Literal["rotate"] = "rotate"


class CutoutConfig(_StageConfig):
    """A square of one gray."""

    component = "simclr_ray.augment.ops:Cutout"

    name: Literal["cutout"] = "cutout"
    side: float = Field(0.5, gt=0, le=1, description="Of the image's side.")
    fill: float = Field(0.5, ge=0, le=1, description="Gray value.")


class JitterConfig(_StageConfig):
    """Brightness, contrast, saturation and hue, in a random order."""

    component = "simclr_ray.augment.ops:Jitter"

    name: Literal["jitter"] = "jitter"
    p: float = Field(0.8, ge=0, le=1, description="Probability, drawn for each image.")
    strength: float = Field(1.0, ge=0, description="Factor of the four below.")
    brightness: float = Field(0.8, ge=0, description="Factor from 1 - this to 1 + this.")
    contrast: float = Field(0.8, ge=0, description="As of brightness, around the mean gray.")
    saturation: float = Field(0.8, ge=0, description="As of brightness, around gray.")
    hue: float = Field(0.2, ge=0, description="Of a full circle; times strength 0.5 at most.")

    @model_validator(mode="after")
    def _check_hue(self) -> JitterConfig:
        if self.hue * self.strength > 0.5:
            raise ValueError(
                f"hue={self.hue:g} times strength={self.strength:g} is above 0.5, a half turn"
            )
        return self


class GrayscaleConfig(_StageConfig):
    """Color dropped."""

    component = "simclr_ray.augment.ops:Grayscale"

    name: Literal["grayscale"] = "grayscale"
    p: float = Field(0.2, ge=0, le=1, description="Probability, drawn for each image.")


class ColorConfig(_StageConfig):
    """The paper's color distortion: jitter, then grayscale, each by chance."""

    component = "simclr_ray.augment.ops:ColorDistortion"

    name: Literal["color"] = "color"
    strength: float = Field(1.0, ge=0, le=2, description="s: ±0.8s, hue ±0.2s.")
    jitter: float = Field(0.8, ge=0, le=1, description="Probability of jitter.")
    grayscale: float = Field(0.2, ge=0, le=1, description="Probability of dropping color.")


class NoiseConfig(_StageConfig):
    """Gaussian noise."""

    component = "simclr_ray.augment.ops:Noise"

    name: Literal["noise"] = "noise"
    sigma: float = Field(0.1, ge=0, le=1, description="Standard deviation; 1 is white.")


class BlurConfig(_StageConfig):
    """Gaussian blur, its kernel a tenth of the side."""

    component = "simclr_ray.augment.ops:Blur"

    name: Literal["blur"] = "blur"
    p: float = Field(0.5, ge=0, le=1, description="Probability, drawn for each image.")
    min_sigma: float = Field(0.1, gt=0, description="Pixels.")
    max_sigma: float = Field(2.0, gt=0, description="Pixels.")
    kernel: float = Field(0.1, gt=0, le=1, description="Width, as a share of the image's side.")

    @model_validator(mode="after")
    def _check_sigmas(self) -> BlurConfig:
        if self.min_sigma > self.max_sigma:
            raise ValueError(f"min_sigma={self.min_sigma} is above max_sigma={self.max_sigma}")
        return self


class SobelConfig(_StageConfig):
    """Edges by Sobel's kernels, without color."""

    component = "simclr_ray.augment.ops:Sobel"

    name: Literal["sobel"] = "sobel"


class SolarizeConfig(_StageConfig):
    """What is above the threshold, inverted."""

    component = "simclr_ray.augment.ops:Solarize"

    name: Literal["solarize"] = "solarize"
    p: float = Field(0.2, ge=0, le=1, description="Probability, drawn for each image.")
    threshold: float = Field(0.5, ge=0, le=1, description="In [0, 1]; what is above is inverted.")


class EqualizeConfig(_StageConfig):
    """Histogram equalised."""

    component = "simclr_ray.augment.ops:Equalize"

    name: Literal["equalize"] = "equalize"
    p: float = Field(0.2, ge=0, le=1, description="Probability, drawn for each image.")


class AutoAugmentConfig(_StageConfig):
    """torchvision's AutoAugment."""

    component = "simclr_ray.augment.ops:AutoAugment"

    name: Literal["autoaugment"] = "autoaugment"
    policy: Literal["imagenet", "cifar10", "svhn"] = Field(
        "imagenet", description="Which of AutoAugment's policies."
    )


class ImportedStageConfig(ImportConfig, _StageConfig):
    """Your own: called with its options, it returns an `augment.ops.Op`."""


AnyStageConfig = Annotated[
    CropConfig
    | FlipConfig
    | RotateConfig
    | CutoutConfig
    | JitterConfig
    | GrayscaleConfig
    | ColorConfig
    | NoiseConfig
    | BlurConfig
    | SobelConfig
    | SolarizeConfig
    | EqualizeConfig
    | AutoAugmentConfig
    | ImportedStageConfig,
    Field(discriminator="name"),
]


class PipelineViewsConfig(Config):
    """Views by lists of transformations, in order: `shared` first, then each view's own (§3)."""

    name: Literal["pipeline"] = "pipeline"
    size: int = Field(32, ge=8, le=4096, description="Side of a view in pixels.")
    shared: list[AnyStageConfig] = Field(
        default=[], description="Stages whose outcome both views share, such as one crop of both."
    )
    a: list[AnyStageConfig] = Field(
        default=[CropConfig()], description="Stages of view a after these."
    )
    symmetric: bool = Field(
        default=True, description="View b has the stages of a, drawn anew; else those of `b`."
    )
    b: list[AnyStageConfig] = Field(default=[], description="Stages of view b, if not symmetric.")

    @model_validator(mode="after")
    def _check_stages(self) -> PipelineViewsConfig:
        for own in (self.a, self.stages_of_b):
            stages = [*self.shared, *own]
            if not stages or stages[0].name != "crop" or stages[0].p < 1:
                raise ValueError(
                    "each view must begin with crop, its p 1: `shared` and `a` (or `b`) together "
                    f"are {[stage.name for stage in stages]}"
                )
            if len(stages) > MAX_STAGES:
                raise ValueError(f"a view can have {MAX_STAGES} stages at most, got {len(stages)}")
        if self.b and self.symmetric:
            raise ValueError("b has stages, so symmetric must be false")
        return self

    @property
    def stages_of_b(self) -> list[AnyStageConfig]:
        """Return the stages of view b after the shared ones."""
        return self.a if self.symmetric else self.b

    def needs_rgb(self) -> str:
        """Return which stage asks for what only RGB has, if one does."""
        for stage in (*self.shared, *self.a, *self.b):
            if stage.name not in OF_ANY_CHANNELS:
                return f"stage {stage.name}"
            if isinstance(stage, JitterConfig) and (stage.saturation or stage.hue):
                return f"jitter with saturation={stage.saturation:g} and hue={stage.hue:g}"
        return ""

    @property
    def start_size(self) -> int:
        """Return 0: these views do not grow."""
        return 0

    def size_at(self, epoch: int, epochs: int) -> int:  # noqa: ARG002 - as of the paper's pipeline
        """Return the side of views in an epoch."""
        return self.size


AnyViewsConfig = Annotated[SimCLRViewsConfig | PipelineViewsConfig, Field(discriminator="name")]
