"""By what it is trained: loss, optimizer, schedule."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

from simclr_ray.config.components import ComponentConfig
from simclr_ray.config.imports import ImportConfig
from simclr_ray.config.schema import Config, Field, PathOrURI, model_validator


class _LossConfig(ComponentConfig):
    """What all losses answer; the component is an `nn.losses.Loss` and gets `global_batch_size`.

    Attributes:
        heads: What its input may come from: z of a projection head, class scores of a classifier.
        targets: What it needs beside images: nothing, the labels of `data.train`, or what a
            teacher says of the images.
    """

    heads: ClassVar[tuple[Literal["projection", "classifier"], ...]] = ("projection",)
    targets: ClassVar[Literal["none", "labels", "teacher"]] = "none"

    @property
    def needs_labels(self) -> bool:
        """Return whether `data.train` must have labels."""
        return self.targets == "labels"

    @property
    def learned_temperature(self) -> float:
        """Return the τ that a layer of the model starts from and learns; 0: none."""
        return 0.0

    @property
    def fixed_temperature(self) -> float:
        """Return the τ that cosines of z are divided by, and that stays; 0: none."""
        return 0.0


class NTXentConfig(_LossConfig):
    """NT-Xent (eq. 1) over the global batch."""

    component = "simclr_ray.nn.losses:NTXentLoss"

    name: Literal["ntxent"] = "ntxent"
    temperature: float = Field(
        0.1,
        ge=1e-3,
        le=100,
        description="τ, which cosines are divided by; the paper: 0.1 to 0.5 (Table 5).",
    )
    normalize: bool = Field(default=True, description="Bring z to length 1 first (Table 5).")
    negatives: Literal["both", "other"] = Field(
        "both", description="Views of the other images that count: both, or the other one (B.10)."
    )
    learn_temperature: bool = Field(
        default=False, description="Learn τ, from `temperature` on; needs normalize."
    )

    @model_validator(mode="after")
    def _check_together(self) -> NTXentConfig:
        if self.learn_temperature and not self.normalize:
            raise ValueError("learn_temperature needs normalize: the length of z is learned anyway")
        return self

    @property
    def learned_temperature(self) -> float:
        """Return τ, where it is learned."""
        return self.temperature if self.learn_temperature else 0.0

    @property
    def fixed_temperature(self) -> float:
        """Return τ of normalised embeddings, where it is not learned."""
        return self.temperature if self.normalize and not self.learn_temperature else 0.0


class NTLogisticConfig(_LossConfig):
    """NT-Logistic of Tables 2 and 4."""

    component = "simclr_ray.nn.losses:NTLogisticLoss"

    name: Literal["ntlogistic"] = "ntlogistic"
    temperature: float = Field(0.1, ge=1e-3, le=100, description="τ, which cosines are divided by.")
    normalize: bool = Field(default=True, description="Bring z to length 1 first.")
    semi_hard: bool = Field(default=False, description="One negative an anchor (Table 4, sh).")
    negatives: Literal["both", "other"] = Field(
        "both", description="Views of the other images that count: both, or the other one (B.10)."
    )

    @property
    def fixed_temperature(self) -> float:
        """Return τ of normalised embeddings."""
        return self.temperature if self.normalize else 0.0


class TripletConfig(_LossConfig):
    """Margin triplet of Tables 2 and 4."""

    component = "simclr_ray.nn.losses:TripletLoss"

    name: Literal["triplet"] = "triplet"
    margin: float = Field(0.8, ge=0, le=100, description="m; B.10 tried 0, 0.4, 0.8, 1.6.")
    normalize: bool = Field(default=True, description="Bring z to length 1 first.")
    semi_hard: bool = Field(default=False, description="One negative an anchor (Table 4, sh).")
    negatives: Literal["both", "other"] = Field(
        "both", description="Views of the other images that count: both, or the other one (B.10)."
    )

    @model_validator(mode="after")
    def _check_margin(self) -> TripletConfig:
        if self.semi_hard and not self.margin:
            raise ValueError("semi_hard needs a margin above 0: no negative lies within 0")
        return self


class DCLConfig(_LossConfig):
    """Decoupled contrastive loss (arXiv:2110.06848): NT-Xent, its denominator negatives only."""

    component = "simclr_ray.nn.losses:DCLLoss"

    name: Literal["dcl"] = "dcl"
    temperature: float = Field(0.1, ge=1e-3, le=100, description="τ, which cosines are divided by.")
    normalize: bool = Field(default=True, description="Bring z to length 1 first.")
    sigma: float = Field(0.0, ge=0, description="σ of DCLW's weights (there 0.5); 0: DCL.")

    @property
    def fixed_temperature(self) -> float:
        """Return τ of normalised embeddings."""
        return self.temperature if self.normalize else 0.0


class SupConConfig(_LossConfig):
    """Supervised contrastive loss (arXiv:2004.11362); unlabelled images stand alone."""

    component = "simclr_ray.nn.losses:SupConLoss"
    targets = "labels"

    name: Literal["supcon"] = "supcon"
    temperature: float = Field(0.1, ge=1e-3, le=100, description="τ, which cosines are divided by.")
    normalize: bool = Field(default=True, description="Bring z to length 1 first.")

    @property
    def fixed_temperature(self) -> float:
        """Return τ of normalised embeddings."""
        return self.temperature if self.normalize else 0.0


class CrossEntropyConfig(_LossConfig):
    """Supervised training with the same encoder, views, stream and loop."""

    component = "simclr_ray.nn.supervised:CrossEntropyLoss"
    heads = ("classifier",)
    targets = "labels"

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the target that all classes have alike."
    )
    views: Literal[1, 2] = Field(1, description="Views of an image that a step classifies.")


class DistillationConfig(_LossConfig):
    """A teacher's class probabilities as targets, for images without labels (SimCLRv2 eq. 2)."""

    component = "simclr_ray.nn.supervised:DistillationLoss"
    heads = ("classifier",)
    targets = "teacher"

    name: Literal["distillation"] = "distillation"
    teacher: PathOrURI = Field(
        min_length=1, description="Run folder or checkpoint of a classifier."
    )
    sha256: str = Field("", description="Of the teacher's weights; filled in.")
    temperature: float = Field(
        1.0, ge=1e-3, le=100, description="τ; SimCLRv2 has 0.1 for a student like the teacher."
    )

    def canonical(self) -> DistillationConfig:
        """Return the config without the path where the hash says which teacher it is."""
        return self.model_copy(update={"teacher": ""}) if self.sha256 else self

    def arguments(self) -> dict[str, Any]:
        """Return τ: the teacher is asked by the worker, which hands its scores to the loss."""
        return {"temperature": self.temperature}


class ImportedLossConfig(ImportConfig, _LossConfig):
    """Your own: called with its options and `global_batch_size`, it returns an `nn.losses.Loss`."""

    heads = ("projection", "classifier")

    @property
    def needs_labels(self) -> bool:
        """Return what the class says, which is imported for it."""
        return bool(getattr(self.load(), "takes_labels", False))


AnyLossConfig = Annotated[
    NTXentConfig
    | NTLogisticConfig
    | TripletConfig
    | DCLConfig
    | SupConConfig
    | CrossEntropyConfig
    | DistillationConfig
    | ImportedLossConfig,
    Field(discriminator="name"),
]


class _OptimizerConfig(ComponentConfig):
    """What all optimizers answer; the component is a `torch.optim.Optimizer` of groups, `lr=0`."""

    def arguments(self) -> dict[str, Any]:
        """Return its own fields: parameter groups have the weight decay, and the loop clips."""
        return {k: v for k, v in super().arguments().items() if k not in NOT_ITS_OWN}


NOT_ITS_OWN: Final = ("weight_decay", "clip_norm")
CLIP_NORM: Final = Field(
    0.0,
    ge=0,
    since=3,
    description="Longest gradient of all parameters together, after the average over workers; a "
    "longer one is scaled down to it; 0: none is.",
)


class LARSConfig(_OptimizerConfig):
    """LARS by the authors' rule: the rate inside the momentum buffer."""

    component = "simclr_ray.optim:LARS"

    name: Literal["lars"] = "lars"
    momentum: float = Field(0.9, ge=0, lt=1, description="Of the average of gradients.")
    weight_decay: float = Field(1e-6, ge=0, description="Not of BN and biases.")
    trust_coefficient: float = Field(
        1e-3, gt=0, description="Of a layer's rate: times its weights' norm over its gradient's."
    )
    momentum_form: Literal["authors", "outside"] = Field(
        "authors",
        description="The rate inside the momentum buffer, as the authors have it, or outside.",
    )
    clip_lr: bool = Field(
        default=False, description="A layer's rate is the global one at most (LARC)."
    )
    clip_norm: float = CLIP_NORM


class SGDConfig(_OptimizerConfig):
    """SGD with momentum; BN and biases are not decayed."""

    component = "torch.optim:SGD"

    name: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1, description="Of the average of gradients.")
    weight_decay: float = Field(5e-4, ge=0, description="Not of BN and biases.")
    nesterov: bool = Field(default=False, description="Nesterov's momentum.")
    clip_norm: float = CLIP_NORM


class AdamWConfig(_OptimizerConfig):
    """AdamW; BN and biases are not decayed."""

    component = "torch.optim:AdamW"

    name: Literal["adamw"] = "adamw"
    beta1: float = Field(0.9, ge=0, lt=1, description="Of the average of gradients.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Of the average of their squares.")
    weight_decay: float = Field(1e-4, ge=0, description="Decoupled; not of BN and biases.")
    clip_norm: float = CLIP_NORM

    def arguments(self) -> dict[str, Any]:
        """Return torch's `betas`."""
        return {"betas": (self.beta1, self.beta2)}


class ImportedOptimizerConfig(ImportConfig, _OptimizerConfig):
    """Your own: called with parameter groups, `lr=0` and its options; a `torch.optim.Optimizer`.

    Groups have `weight_decay`, and `adapt` where LARS would adapt the rate.
    """

    weight_decay: float = Field(1e-4, ge=0, description="Of groups that are decayed.")
    clip_norm: float = CLIP_NORM


AnyOptimizerConfig = Annotated[
    LARSConfig | SGDConfig | AdamWConfig | ImportedOptimizerConfig, Field(discriminator="name")
]


class ScheduleConfig(Config):
    """Linear warm-up, then cosine to zero, without restarts; a pure function of the step."""

    learning_rate: float = Field(0.3, gt=0, description="Base rate before scaling by batch.")
    scaling: Literal["linear", "sqrt", "none"] = Field(
        "linear", description="base·B/256, base·√B, or base, of the global batch B."
    )
    warmup_epochs: float = Field(10.0, ge=0, description="In which the rate rises from 0.")
    warmup_steps: int = Field(0, ge=0, description="If above 0, instead of warmup_epochs.")
    decay: Literal["cosine", "constant"] = Field(
        "cosine", description="After warm-up; with constant, a run passes through shorter ones."
    )
