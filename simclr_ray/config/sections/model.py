"""What is trained: encoder, head, batch norm."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from simclr_ray.config.components import ComponentConfig
from simclr_ray.config.imports import ImportConfig
from simclr_ray.config.schema import Config, Field, PathOrURI, model_validator


class _EncoderConfig(ComponentConfig):
    """What all encoders answer; the component is an `nn.encoders.EncoderFamily`."""

    can_recompute: ClassVar[bool] = False  # its blocks can run again in the backward pass
    is_tried: ClassVar[bool] = True  # on two images before a start: its code is not ours

    @property
    def has_fixed_size(self) -> bool:
        """Return whether it takes images of one size alone, that which it was built for."""
        return False


class ResNetConfig(_EncoderConfig):
    """The authors' ResNet: v1.5 strides, projection shortcut in every group, zero-init last BN."""

    component = "simclr_ray.nn.resnet:ResNetFamily"
    can_recompute = True
    is_tried = False

    name: Literal["resnet"] = "resnet"
    depth: Literal[10, 18, 34, 50, 101, 152, 200] = Field(50, description="10 is not in the paper.")
    width: float = Field(1.0, gt=0, le=16, description="Multiplier of every channel count.")
    stem: Literal["imagenet", "imagenet_same", "cifar", "strided"] = Field(
        "imagenet",
        description="7x7/2 and pool, the latter as torchvision or as the authors pad it; 3x3; or "
        "3x3/2 (ours, for CPUs).",
    )
    selective_kernel: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Ratio of SimCLRv2's selective kernels, with ResNet-D's stem and shortcuts "
        "(there 0.0625); 0: none.",
    )

    @model_validator(mode="after")
    def _check_kernels(self) -> ResNetConfig:
        if self.selective_kernel and (self.depth < 50 or self.stem == "strided"):
            raise ValueError("selective_kernel is for depth >= 50 and stem imagenet or cifar")
        return self


class TorchvisionConfig(_EncoderConfig):
    """Any torchvision classification backbone, its classifier removed."""

    component = "simclr_ray.nn.torchvision_models:TorchvisionFamily"

    name: Literal["torchvision"] = "torchvision"
    model: str = Field("resnet50", min_length=1, description="A name of torchvision.models.")
    stem: Literal["imagenet", "cifar", "cifar_lightly", "cifar_solo_learn"] = Field(
        "imagenet",
        since=3,
        description="Of a ResNet: 7x7/2 and pool; 3x3 and no pool, for small images; the latter "
        "without ReLU, as lightly's benchmark has it, or padded by 2, as solo-learn.",
    )
    options: dict[str, Any] = Field(
        {}, since=3, description="What it is called with: stochastic_depth_prob, dropout, …"
    )
    freeze_patch_embedding: bool = Field(
        default=False, since=3, description="As of timm: the first, patch-wise layer stays random."
    )

    @property
    def has_fixed_size(self) -> bool:
        """Return whether it is a vision transformer, whose position embeddings have one size."""
        return self.model.startswith("vit")


class TimmConfig(_EncoderConfig):
    """Any classification backbone of timm (extra `timm`), its classifier removed."""

    component = "simclr_ray.nn.timm_models:TimmFamily"
    can_recompute = True  # where there is no batch norm, which is looked at before a start

    name: Literal["timm"] = "timm"
    model: str = Field("resnet50", min_length=1, description="A name of timm.list_models().")
    options: dict[str, Any] = Field(
        {},
        description="What it is called with: drop_path_rate, global_pool, dynamic_img_size, … A "
        "vision transformer gets img_size = augment.size.",
    )
    freeze_patch_embedding: bool = Field(
        default=False,
        description="Leave the patch-wise first layer as it was drawn, for stability (MoCo v3, "
        "arXiv:2104.02057).",
    )


class ImportedEncoderConfig(ImportConfig, _EncoderConfig):
    """Your own: called with its options, it returns a module [N, 3, S, S] in [0, 1] -> [N, F]."""

    can_recompute = True  # where the module has a `recompute`, which is looked at before a start


AnyEncoderConfig = Annotated[
    ResNetConfig | TorchvisionConfig | TimmConfig | ImportedEncoderConfig,
    Field(discriminator="name"),
]


class EncoderSection(Config):
    """An encoder's config alone, as an encoder folder stores it."""

    encoder: AnyEncoderConfig


class NoHeadConfig(ComponentConfig):
    """z = h."""

    component = "simclr_ray.nn.heads:no_head"

    name: Literal["none"] = "none"


class LinearHeadConfig(ComponentConfig):
    """One dense layer and BN without shift, as in the authors' code."""

    component = "simclr_ray.nn.heads:linear_head"

    name: Literal["linear"] = "linear"
    dim: int = Field(128, ge=1, description="Width of z.")
    batch_norm: bool = Field(default=True, description="Without it, dense layers have a bias.")


class MLPHeadConfig(ComponentConfig):
    """Dense-BN-ReLU layers as wide as h (or `hidden`), then dense and BN without shift."""

    component = "simclr_ray.nn.heads:mlp_head"

    name: Literal["mlp"] = "mlp"
    layers: int = Field(2, ge=2, le=8, description="Dense layers; the paper has 2, its code 3.")
    dim: int = Field(128, ge=1, description="Width of z.")
    hidden: int = Field(0, ge=0, description="Width of the hidden layers; 0: as wide as h.")
    batch_norm: bool = Field(default=True, description="Without it, dense layers have a bias.")


class ClassifierHeadConfig(ComponentConfig):
    """Class scores from h, or from hidden layers as an mlp head has them (SimCLRv2 keeps one)."""

    component = "simclr_ray.nn.heads:classifier_head"

    name: Literal["classifier"] = "classifier"
    num_classes: int = Field(0, ge=0, description="K; 0: as many as the training labels have.")
    layers: int = Field(
        0, ge=0, le=8, description="Hidden layers below; with `init.weights`, its head's first."
    )
    hidden: int = Field(0, ge=0, description="Their width; 0: as wide as h.")
    batch_norm: bool = Field(default=True, description="Without it, hidden layers have a bias.")


AnyHeadConfig = Annotated[
    NoHeadConfig | LinearHeadConfig | MLPHeadConfig | ClassifierHeadConfig,
    Field(discriminator="name"),
]


class InitConfig(Config):
    """Where the weights come from."""

    weights: PathOrURI = Field(
        "",
        description="A run folder, a checkpoint in one, a state dict of torchvision, timm, lightly "
        "or solo-learn (.pth, .ckpt, .safetensors, …), or a Hugging Face folder; empty: random.",
    )
    mean: list[float] = Field(
        [],
        since=3,
        description="Of each channel in [0, 1], which the images of these weights had taken off; "
        "[]: as the folder or the model says, else ImageNet's; needed for an encoder of your own "
        "and a stem for small images, which say nothing. [0, 0, 0] with std [1, 1, 1]: none.",
    )
    std: list[float] = Field([], since=3, description="Likewise what they were divided by.")
    freeze: bool = Field(
        default=False,
        since=3,
        description="Leave the encoder as it is, and fit a classifier on its features at once.",
    )
    sha256: str = Field("", description="Of the weights; filled in.")

    @model_validator(mode="after")
    def _check_statistics(self) -> InitConfig:
        if len(self.mean) != len(self.std) or any(value <= 0 for value in self.std):
            raise ValueError("mean and std have one number a channel each, those of std above 0")
        return self

    def canonical(self) -> InitConfig:
        """Return the config without the path where the hash says which weights they are."""
        if not self.weights and not self.sha256:
            return InitConfig()
        return self.model_copy(update={"weights": ""}) if self.sha256 else self


class BatchNormConfig(Config):
    """Batch normalisation over all workers."""

    group_size: int = Field(
        0,
        ge=0,
        description="Images with joint statistics; 0: the global batch. Below it, gradient "
        "caching: a step takes the memory of so many.",
    )
    momentum: float = Field(0.1, gt=0, le=1, description="PyTorch's momentum; 1 - TF's decay.")
