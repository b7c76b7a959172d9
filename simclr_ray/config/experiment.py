"""The experiment: the whole config tree, and everything that is derived from it.

Units and bounds are checked here, before anything starts. Nothing derived is stored: local batch,
steps and learning rate are functions of the *global* batch, so they mean the same on one worker and
on sixty-four. `digest` covers what changes the result and nothing else: each field says itself
whether it does (`schema.Field`).
"""

from __future__ import annotations

import math
from typing import Literal

from simclr_ray.config import loader
from simclr_ray.config.imports import permit_code
from simclr_ray.config.schema import AUTO, Config, Field, PathOrURI, identity, model_validator
from simclr_ray.config.sections.data import ColumnsConfig, DataConfig, PreparationConfig
from simclr_ray.config.sections.model import (
    AnyEncoderConfig,
    AnyHeadConfig,
    BatchNormConfig,
    ClassifierHeadConfig,
    ImportedEncoderConfig,
    InitConfig,
    LinearHeadConfig,
    MLPHeadConfig,
    NoHeadConfig,
    ResNetConfig,
    TimmConfig,
    TorchvisionConfig,
)
from simclr_ray.config.sections.running import (
    CheckpointConfig,
    EvaluationConfig,
    HealthConfig,
    KNNConfig,
    LinearConfig,
    RegistryConfig,
    ScalingConfig,
    TrackingConfig,
)
from simclr_ray.config.sections.training import (
    AdamWConfig,
    AnyLossConfig,
    AnyOptimizerConfig,
    CrossEntropyConfig,
    DCLConfig,
    DistillationConfig,
    ImportedLossConfig,
    ImportedOptimizerConfig,
    LARSConfig,
    NTLogisticConfig,
    NTXentConfig,
    ScheduleConfig,
    SGDConfig,
    SupConConfig,
    TripletConfig,
)
from simclr_ray.config.sections.views import (
    AnyViewsConfig,
    ImportedStageConfig,
    PipelineViewsConfig,
    SimCLRViewsConfig,
)
from simclr_ray.errors import ConfigError

__all__ = [
    "AdamWConfig",
    "BatchNormConfig",
    "CheckpointConfig",
    "ClassifierHeadConfig",
    "ColumnsConfig",
    "CrossEntropyConfig",
    "DCLConfig",
    "DataConfig",
    "DistillationConfig",
    "EvaluationConfig",
    "Experiment",
    "HealthConfig",
    "ImportedEncoderConfig",
    "ImportedLossConfig",
    "ImportedOptimizerConfig",
    "ImportedStageConfig",
    "InitConfig",
    "KNNConfig",
    "LARSConfig",
    "LinearConfig",
    "LinearHeadConfig",
    "MLPHeadConfig",
    "NTLogisticConfig",
    "NTXentConfig",
    "NoHeadConfig",
    "PipelineViewsConfig",
    "PreparationConfig",
    "RegistryConfig",
    "ResNetConfig",
    "SGDConfig",
    "ScalingConfig",
    "ScheduleConfig",
    "SimCLRViewsConfig",
    "SupConConfig",
    "TimmConfig",
    "TorchvisionConfig",
    "TrackingConfig",
    "TripletConfig",
]


class Experiment(Config):
    """Everything that one pretraining run is: typed, frozen, checked as a whole.

    Made by `load` from a preset or YAML file and `key.path=value` overrides; or in Python from
    keyword arguments, one a section. `simclr-ray config PRESET` prints a whole one, each field's
    bound and unit stand beside it in `config/sections`. Settings of the paper (Chen et al. 2020,
    arXiv:2002.05709) and of the authors' code are in the presets, their differences in
    `docs/paper_ledger.md`.

    Attributes:
        name: First part of the run's name: letters, digits, `_`, `.`, `-`.
        seed: Of weights, order and views; 0 to 2³² − 1.
        data: Images to train on, labelled splits to evaluate with, columns, shuffling, caches
            (GiB).
        augment: How two views are made: `simclr` (App. A) or a `pipeline` of transformations; sizes
            in pixels, probabilities in [0, 1].
        encoder: `resnet` of the authors, or a `torchvision` or `timm` backbone; F features out.
        head: Projection g: `none`, `linear`, `mlp`; or `classifier` for the supervised losses.
        init: Weights to begin with; empty: random.
        batch_norm: Images with joint statistics, and the momentum.
        loss: `ntxent`, `ntlogistic`, `triplet`, `dcl`, `supcon`, `cross_entropy`, `distillation`.
        optimizer: `lars`, `sgd` or `adamw`, without the rate.
        schedule: Base learning rate, its scaling by the global batch, warm-up, decay.
        batch_size: N, images in the global batch over all workers; 2N views.
        epochs: Passes over `data.train`, at least 1.
        precision: `float64`, `float32`, or `bf16` autocast; the loss is float32 at least.
        compress_gradients: Send gradients between workers as bf16.
        evaluation: Protocols while training and after, and their settings.
        checkpoint: How often state is written, and how many are kept.
        scaling: Workers, CPUs, GPUs, data actors, restarts: where it runs, never what it computes.
        health: What follows where the encoder has collapsed.
        tracking: MLflow's store, experiment and logging.
        registry: Registered model to become a version of, and the alias to move.
        storage: Folder or URI that holds the runs.

    Raises:
        ConfigError: A key or value is wrong; one issue for each, with path, value, what is allowed
            and the nearest valid name (from `load`; direct construction raises pydantic's
            `ValidationError`).

    Examples:
        >>> from simclr_ray.config.experiment import Experiment
        >>> experiment = Experiment.load(
        ...     "cifar10_cpu", "data.train=cifar/train", "batch_size=512", "scaling.num_workers=4"
        ... )
        >>> experiment.local_batch_size(rank=0), experiment.steps_per_epoch(num_rows=50_000)
        (128, 97)
        >>> Experiment.load("cifar10_cpu", "data.train=cifar/train", "loss.temp=0.5")
        Traceback (most recent call last):
            ...
        simclr_ray.errors.ConfigError: loss.temp: unknown key (did you mean 'temperature'?)...
    """

    name: str = Field(
        placement=True,
        min_length=1,
        max_length=200,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Of the run; its folder's begins with it.",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="Of weights, views, the order of images, and probes."
    )
    data: DataConfig
    augment: AnyViewsConfig = SimCLRViewsConfig()
    encoder: AnyEncoderConfig = ResNetConfig()
    head: AnyHeadConfig = MLPHeadConfig()
    init: InitConfig = InitConfig()
    batch_norm: BatchNormConfig = BatchNormConfig()
    loss: AnyLossConfig = NTXentConfig()
    optimizer: AnyOptimizerConfig = LARSConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch_size: int = Field(
        256, ge=2, description="Images in the global batch N, over all workers."
    )
    epochs: int = Field(100, ge=1, le=1_000_000, description="Passes over the images.")
    precision: Literal["float64", "float32", "bf16"] = Field(
        "float32", description="Of the network; bf16 by autocast. The loss is float32 at least."
    )
    compress_gradients: bool = Field(
        default=False,
        description="Send gradients between workers as bf16: half the traffic, rounded; "
        "the one option whose result depends on the number of workers.",
    )
    evaluation: EvaluationConfig = Field(EvaluationConfig(), placement=True)
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), placement=True)
    scaling: ScalingConfig = Field(ScalingConfig(), placement=True)
    health: HealthConfig = Field(HealthConfig(), placement=True)
    tracking: TrackingConfig = Field(TrackingConfig(), placement=True)
    registry: RegistryConfig = Field(RegistryConfig(), placement=True)
    storage: PathOrURI = Field(
        "runs", placement=True, min_length=1, description="Folder or URI that holds the runs."
    )

    @model_validator(mode="after")
    def _check_frozen(self) -> Experiment:
        head = self.classifier
        if self.init.freeze and not (
            self.init.weights and head and not head.layers and self.loss.name == "cross_entropy"
        ):
            raise ValueError(
                "init.freeze needs init.weights, head.name=classifier without layers, and "
                "loss.name=cross_entropy: `simclr-ray model finetune --frozen` sets them"
            )
        return self

    @model_validator(mode="after")
    def _check_together(self) -> Experiment:
        if self.batch_size < self.scaling.max_workers:
            raise ValueError(
                f"batch_size is global: {self.batch_size} images cannot be shared by "
                f"{self.scaling.max_workers} workers; raise batch_size or lower scaling.num_workers"
            )
        if 0 < self.evaluation.size < 8 or (
            self.encoder.has_fixed_size
            and {self.evaluation_size, self.augment.start_size or self.augment.size}
            != {self.augment.size}
        ):
            raise ValueError(
                f"evaluation.size={self.evaluation.size} must be 0 or at least 8, and for vit it "
                f"and augment.start_size augment.size={self.augment.size}, the only one it takes"
            )
        if ("classifier" if self.classifier else "projection") not in self.loss.heads:
            raise ValueError(
                f"loss.name={self.loss.name} does not go with head.name={self.head.name}: "
                "a classifier and cross_entropy or distillation belong together"
            )
        needs_rgb = self.augment.needs_rgb() if self.data.channels != 3 else ""
        if needs_rgb:
            channels = f"data.channels={self.data.channels}"
            raise ValueError(f"augment: {needs_rgb} is for RGB, not for {channels}")
        if self.compress_gradients and self.precision == "float64":
            raise ValueError("compress_gradients rounds to 8 bits; precision=float64 is for exact")
        if self.scaling.color_augment_on == "worker" and not isinstance(
            self.augment, SimCLRViewsConfig
        ):
            raise ValueError("scaling.color_augment_on=worker is for augment.name=simclr")
        if self.data.decoder == "turbo_scaled" and not isinstance(self.augment, SimCLRViewsConfig):
            raise ValueError("data.decoder=turbo_scaled is for augment.name=simclr")
        if self.scaling.recompute_activations and not self.encoder.can_recompute:
            raise ValueError(
                f"scaling.recompute_activations: encoder.name={self.encoder.name} has no blocks "
                "that can run again; resnet has"
            )
        group_size = self.batch_norm.group_size
        if group_size and (self.batch_size % group_size or group_size < self.scaling.max_workers):
            raise ValueError(
                f"batch_norm.group_size={group_size} must divide batch_size={self.batch_size} "
                f"and be no less than scaling.num_workers={self.scaling.max_workers}"
            )
        return self

    @classmethod
    def load(cls, source: str, *overrides: str, allow_code: bool = False) -> Experiment:
        """Return the preset or YAML file `source` with overrides applied, checked as a whole.

        Args:
            source: A preset's name (`simclr-ray config` lists them), or the path of a YAML file.
            overrides: `key.path=value`, the value in YAML 1.2: `epochs=10`, `loss.name=dcl`,
                `data.test=` for empty. Setting a section's `name` drops the other variant's keys.
            allow_code: Permit the code that the file names by `name: import`; what overrides name
                is permitted by them.

        Raises:
            ConfigError: `source` does not exist or is not YAML, an override has another form, or a
                key or value is wrong, or the file names code; all issues at once.
        """
        tree, shown = loader.read_tree(source)
        whole = loader.apply_overrides(tree, overrides, cls)
        permit_code(whole, tree, shown, allow_code=allow_code)
        return loader.validate(cls, whole, shown)

    def check_num_workers(self) -> Experiment:
        """Return the experiment; raise `ConfigError` for `auto`, which asks one machine."""
        if self.scaling.num_workers == AUTO:
            problem = f"is {AUTO}, which asks one machine; a cluster and a study take a number"
            raise ConfigError.of("scaling.num_workers", problem)
        return self

    def digest(self) -> str:
        """Return 16 hex digits over everything that changes the trained weights, and only that."""
        return loader.digest_of(identity(self))

    def canonical(self) -> Experiment:
        """Return the experiment with settings that have no effect at their defaults.

        `batch_norm.group_size` of the whole batch is 0, which means the same. Without color there
        is no grayscale to draw.
        """
        update: dict[str, Config] = {}
        if self.num_groups == 1:
            update["batch_norm"] = self.batch_norm.model_copy(update={"group_size": 0})
        if self.data.channels != 3 and isinstance(self.augment, SimCLRViewsConfig):
            update["augment"] = self.augment.model_copy(update={"grayscale": 0.0})
        return self.model_copy(update=update) if update else self

    @property
    def evaluation_size(self) -> int:
        """Return the side in pixels of the views that are evaluated and embedded."""
        return self.evaluation.size or self.augment.size

    @property
    def takes_labels(self) -> bool:
        """Return whether training needs the labels of `data.train`."""
        return self.loss.needs_labels

    @property
    def classifier(self) -> ClassifierHeadConfig | None:
        """Return the head where it is a classifier."""
        return self.head if isinstance(self.head, ClassifierHeadConfig) else None

    @property
    def distillation(self) -> DistillationConfig | None:
        """Return the loss where a teacher gives its targets."""
        return self.loss if isinstance(self.loss, DistillationConfig) else None

    def local_batch_size(self, rank: int) -> int:
        """Return the images of rank `rank`: they differ by at most one between ranks."""
        n, workers = self.batch_size, self.scaling.max_workers
        return (rank + 1) * n // workers - rank * n // workers

    @property
    def num_groups(self) -> int:
        """Return in how many groups a step's images pass the model; above 1: gradient caching."""
        return self.batch_size // (self.batch_norm.group_size or self.batch_size)

    def peak_learning_rate(self) -> float:
        """Return the rate after warm-up, scaled by the global batch (App. B.1)."""
        base = self.schedule.learning_rate
        factor = {"linear": self.batch_size / 256, "sqrt": math.sqrt(self.batch_size), "none": 1.0}
        return base * factor[self.schedule.scaling]

    def steps_per_epoch(self, num_rows: int) -> int:
        """Return whole global batches in an epoch of `num_rows`; the rest is dropped."""
        return num_rows // self.batch_size

    def total_steps(self, num_rows: int) -> int:
        """Return the steps of the whole run."""
        return self.epochs * self.steps_per_epoch(num_rows)

    def warmup_steps(self, num_rows: int) -> int:
        """Return the steps of linear warm-up: `warmup_epochs·N // B`, as the authors have it."""
        if self.schedule.warmup_steps:
            return self.schedule.warmup_steps
        return int(self.schedule.warmup_epochs * num_rows // self.batch_size)
