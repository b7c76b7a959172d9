"""The experiment: the whole config tree, and everything that is derived from it.

Units and bounds are checked here, before anything starts. Nothing derived is stored: local batch,
steps and learning rate are functions of the *global* batch (design, load-bearing 1), so they mean
the same on one worker and on sixty-four. `digest` covers what changes the result and nothing else.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from simclr_ray import config as cfg
from simclr_ray.config import Config, Field
from simclr_ray.errors import ConfigError, Mistake

# What changes where or how a run runs, but not what it computes.
PLACEMENT = ("name", "storage", "scaling", "tracking", "checkpoint", "evaluation", "register_as")
# `data.train` is where the pictures lie; which they are, the fingerprint says.
DATA_PLACEMENT = ("train", "cache_gib", "bank", "test", "max_bad_share")


class Columns(Config):
    """Which columns of a user's parquet hold what."""

    image: str = Field("image", min_length=1, description="Encoded bytes, {bytes, path}, or paths.")
    label: str = Field("label", description="Integer class; the column may be absent.")
    id: str = Field("id", description="int64 key of a row; where absent, rows are numbered.")


class Data(Config):
    """The pictures, and the labelled splits that judge the encoder."""

    train: str = Field(
        min_length=1, description="Parquet file or folder, local or any pyarrow.fs URI."
    )
    bank: str = Field(
        "", description="Labelled split that kNN and probes learn from; empty: `train`."
    )
    test: str = Field(
        "", description="Labelled split that is scored; empty: label-free metrics only."
    )
    limit: int = Field(0, ge=0, description="Use the first rows only, in file order; 0 uses all.")
    columns: Columns = Columns()
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="Share of undecodable rows that stops."
    )
    max_pixels: int = Field(50_000_000, ge=1, description="Larger images are refused undecoded.")
    shuffle_rows: int = Field(
        65_536, ge=1, description="Rows held by the shuffle windows together."
    )
    cache_gib: float = Field(2.0, ge=0, description="Decoded-row cache of one node's actors, GiB.")


class Preparation(Config):
    """How `prepare` turns pictures into shards."""

    num_images: int = Field(0, ge=0, description="Keep the first only; 0 keeps all.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of the shuffle, and of `shapes`.")
    split: str = Field("train", min_length=1, description="Of a torchvision dataset.")
    size: int = Field(32, ge=16, le=1024, description="Side of `shapes` in pixels.")
    columns: Columns = Columns()
    rows_per_shard: int = Field(5000, ge=1)
    max_bad_share: float = Field(0.01, ge=0, le=1)
    max_pixels: int = Field(50_000_000, ge=1)
    download_folder: str = Field("", description="torchvision's files; empty: a user cache.")


class SimCLRViews(Config):
    """The paper's pipeline: crop and resize, flip, colour jitter, grayscale, blur (App. A)."""

    name: Literal["simclr"] = "simclr"
    size: int = Field(32, ge=8, description="Side of a view in pixels.")
    strength: float = Field(1.0, ge=0, le=2, description="Colour strength s of App. A.")
    blur: float = Field(0.5, ge=0, le=1, description="Probability of Gaussian blur.")
    min_area: float = Field(
        0.08, gt=0, le=1, description="Smallest share of the area that is cropped."
    )
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a left-right flip.")
    jitter: float = Field(0.8, ge=0, le=1, description="Probability of colour jitter.")
    grayscale: float = Field(0.2, ge=0, le=1, description="Probability of dropping colour.")


class ResNetEncoder(Config):
    """The authors' ResNet: v1.5 strides, projection shortcut in every group, zero-init last BN."""

    name: Literal["resnet"] = "resnet"
    depth: Literal[10, 18, 34, 50, 101, 152, 200] = Field(50, description="10 is not in the paper.")
    width: float = Field(1.0, gt=0, le=16, description="Multiplier of every channel count.")
    stem: Literal["imagenet", "cifar", "strided"] = Field(
        "imagenet", description="7x7/2 and pool; 3x3; or 3x3/2 (ours, for CPUs)."
    )


class TorchvisionEncoder(Config):
    """Any torchvision classification backbone, its classifier removed."""

    name: Literal["torchvision"] = "torchvision"
    model: str = Field("resnet50", min_length=1, description="A name of torchvision.models.")


class NoHead(Config):
    """z = h."""

    name: Literal["none"] = "none"


class LinearHead(Config):
    """One dense layer and BN without shift, as in the authors' code."""

    name: Literal["linear"] = "linear"
    dim: int = Field(128, ge=1, description="Width of z.")


class MLPHead(Config):
    """Dense-BN-ReLU layers as wide as h (or `hidden`), then dense and BN without shift."""

    name: Literal["mlp"] = "mlp"
    layers: int = Field(2, ge=2, le=8, description="Dense layers; the paper has 2, its code 3.")
    dim: int = Field(128, ge=1, description="Width of z.")
    hidden: int = Field(0, ge=0, description="Width of the hidden layers; 0: as wide as h.")


class BatchNorm(Config):
    """Batch normalisation over all workers."""

    images: int = Field(
        0,
        ge=0,
        description="Images with joint statistics; 0: the global batch. Below it, gradient "
        "caching: a step takes the memory of so many.",
    )
    momentum: float = Field(0.1, gt=0, le=1, description="PyTorch's momentum; 1 - TF's decay.")


class NTXent(Config):
    """NT-Xent (eq. 1) over the global batch."""

    name: Literal["ntxent"] = "ntxent"
    temperature: float = Field(0.1, ge=1e-3, le=100, description="τ.")
    normalize: bool = Field(default=True, description="l2-normalise z (Table 5).")


class LARSOptimizer(Config):
    """LARS by the authors' rule: the rate inside the momentum buffer."""

    name: Literal["lars"] = "lars"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-6, ge=0)
    trust_coefficient: float = Field(1e-3, gt=0)
    momentum_form: Literal["authors", "outside"] = "authors"
    clip_lr: bool = False


class SGDOptimizer(Config):
    """SGD with momentum; BN and biases are not decayed."""

    name: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    nesterov: bool = False


class AdamWOptimizer(Config):
    """AdamW; BN and biases are not decayed."""

    name: Literal["adamw"] = "adamw"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)


class Schedule(Config):
    """Linear warm-up, then cosine to zero, without restarts; a pure function of the step."""

    learning_rate: float = Field(0.3, gt=0, description="Base rate before scaling by batch.")
    scaling: Literal["linear", "sqrt", "none"] = Field(
        "linear", description="base·B/256, base·√B, or base, of the global batch B."
    )
    warmup_epochs: float = Field(10.0, ge=0)
    warmup_steps: int = Field(0, ge=0, description="If above 0, instead of warmup_epochs.")


class KNN(Config):
    """Weighted cosine kNN on h: weight exp(cos/τ)."""

    k: int = Field(200, ge=1)
    temperature: float = Field(0.1, gt=0)


class Linear(Config):
    """Logistic regression on frozen h."""

    epochs: int = Field(60, ge=1)
    batch_size: int = Field(256, ge=1)
    learning_rate: float = Field(0.1, gt=0, description="Per 256 samples; Nesterov SGD, cosine.")


class Evaluation(Config):
    """When and how the encoder is judged."""

    every_epochs: int = Field(
        1, ge=0, description="kNN (or label-free metrics) while training; 0: never."
    )
    size: int = Field(0, ge=0, description="Side of the views it judges; 0: augment.size.")
    bank_limit: int = Field(5_000, ge=0, description="Bank rows used while training; 0: all.")
    test_limit: int = Field(2_000, ge=0, description="Test rows used while training; 0: all.")
    knn: KNN = KNN()
    linear: Linear = Linear()
    batch_size: int = Field(512, ge=1, description="Images per forward pass.")


class Checkpointing(Config):
    """When state is written, and how many are kept."""

    every_epochs: int = Field(1, ge=1)
    every_steps: int = Field(0, ge=0, description="Also within an epoch; 0: at epoch ends only.")
    keep: int = Field(2, ge=1)


class Scaling(Config):
    """Where it runs; never what it computes."""

    num_workers: int = Field(1, ge=1, description="Data-parallel workers.")
    cpus_per_worker: float = Field(0.5, gt=0, description="Logical CPUs a worker reserves.")
    gpus_per_worker: float = Field(0.0, ge=0)
    threads_per_worker: int = Field(
        0, ge=0, description="torch threads; 0: the node's cores shared."
    )
    data_actors_per_worker: int = Field(
        1, ge=1, description="Decode actors, each its own pipeline."
    )
    cpus_per_data_actor: float = Field(0.5, gt=0)
    data_resource: str = Field(
        "", description="Custom Ray resource that marks nodes for data actors."
    )
    recompute_activations: bool = Field(
        default=False, description="Encoder blocks run again in the backward pass: less memory."
    )
    max_failures: int = Field(3, ge=0, description="Restarts from the last checkpoint.")
    collective_timeout_s: float = Field(1800.0, gt=0)


class Tracking(Config):
    """MLflow."""

    uri: str = Field("", description="Tracking URI; empty: sqlite in `storage`.")
    experiment: str = Field("simclr-ray", min_length=1)
    log_every_steps: int = Field(10, ge=1)
    system_metrics: bool = True


class Registration(Config):
    """The registered model; an empty `name` registers nothing."""

    name: str = ""
    alias: str = Field(
        "newest", min_length=1, description="Alias that is moved to the new version."
    )


class Experiment(Config):
    """Everything that one pretraining run is."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(0, ge=0, lt=2**32)
    data: Data
    augment: SimCLRViews = SimCLRViews()
    encoder: Annotated[ResNetEncoder | TorchvisionEncoder, Field(discriminator="name")] = (
        ResNetEncoder()
    )
    head: Annotated[NoHead | LinearHead | MLPHead, Field(discriminator="name")] = MLPHead()
    batch_norm: BatchNorm = BatchNorm()
    loss: NTXent = NTXent()
    optimizer: Annotated[
        LARSOptimizer | SGDOptimizer | AdamWOptimizer, Field(discriminator="name")
    ] = LARSOptimizer()
    schedule: Schedule = Schedule()
    batch_size: int = Field(
        256, ge=2, description="Images in the global batch N, over all workers."
    )
    epochs: int = Field(100, ge=1)
    precision: Literal["float64", "float32", "bf16"] = "float32"
    compress_gradients: bool = Field(
        default=False, description="Send gradients between workers as bf16: half the traffic."
    )
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpointing = Checkpointing()
    scaling: Scaling = Scaling()
    tracking: Tracking = Tracking()
    register_as: Registration = Registration()
    storage: str = Field("runs", min_length=1, description="Folder or URI that holds the runs.")

    @cfg.model_validator(mode="after")
    def _check_together(self) -> Experiment:
        if self.batch_size < self.scaling.num_workers:
            raise ValueError(
                f"batch_size is global: {self.batch_size} images cannot be shared by "
                f"{self.scaling.num_workers} workers; raise batch_size or lower scaling.num_workers"
            )
        fixed = isinstance(self.encoder, TorchvisionEncoder) and self.encoder.model.startswith(
            "vit"
        )
        if 0 < self.evaluation.size < 8 or (fixed and self.evaluation_size != self.augment.size):
            raise ValueError(
                f"evaluation.size={self.evaluation.size} must be 0 or at least 8, and for vit "
                f"augment.size={self.augment.size}, the only one that it takes"
            )
        if self.scaling.recompute_activations and not isinstance(self.encoder, ResNetEncoder):
            raise ValueError("scaling.recompute_activations is for encoder.name=resnet")
        images = self.batch_norm.images
        if images and (self.batch_size % images or images < self.scaling.num_workers):
            raise ValueError(
                f"batch_norm.images={images} must divide batch_size={self.batch_size} and be no "
                f"less than scaling.num_workers={self.scaling.num_workers}"
            )
        return self

    @classmethod
    def load(cls, source: str, *overrides: str) -> Experiment:
        """Return the preset or YAML file `source` with `key.path=value` overrides applied."""
        text, shown = cfg.read_source(source)
        tree = cfg.parse_yaml(text, shown)
        if not isinstance(tree, dict):
            raise ConfigError([Mistake(shown, f"holds {type(tree).__name__}, not keys and values")])
        return cfg.validate(cls, cfg.apply_overrides(tree, overrides, cls))

    def digest(self) -> str:
        """Return 16 hex digits over everything that changes the trained weights, and only that."""
        tree = {k: v for k, v in cfg.to_tree(self).items() if k not in PLACEMENT}
        tree["data"] = {k: v for k, v in tree["data"].items() if k not in DATA_PLACEMENT}
        if self.num_groups == 1:
            tree["batch_norm"] = {**tree["batch_norm"], "images": 0}  # the same by another name
        return cfg.digest_of(tree)

    def run_name(self, fingerprint: str) -> str:
        """Return the name under which a run on these pictures is stored.

        The same command on the same pictures continues the run; anything that changes the result
        starts another.
        """
        identity = cfg.digest_of({"experiment": self.digest(), "data": fingerprint})
        return f"{self.name}-{identity[:8]}"

    def absolute(self) -> Experiment:
        """Return the experiment with local paths made absolute: workers have other folders."""
        data = self.data.model_copy(
            update={
                key: absolute_path(getattr(self.data, key)) for key in ("train", "bank", "test")
            }
        )
        storage = absolute_path(self.storage)
        return self.model_copy(update={"data": data, "storage": storage})

    @property
    def evaluation_size(self) -> int:
        """Return the side in pixels of the views that are judged and embedded."""
        return self.evaluation.size or self.augment.size

    def local_batch_size(self, rank: int) -> int:
        """Return the images of rank `rank`: they differ by at most one between ranks."""
        n, workers = self.batch_size, self.scaling.num_workers
        return (rank + 1) * n // workers - rank * n // workers

    @property
    def num_groups(self) -> int:
        """Return the groups that a step's images pass the model in; above 1: gradient caching."""
        return self.batch_size // (self.batch_norm.images or self.batch_size)

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


def absolute_path(where: str) -> str:
    """Return a local path made absolute; URIs and empty text as they are."""
    return where if "://" in where or not where else str(Path(where).expanduser().resolve())
