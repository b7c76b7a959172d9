"""The sections of an experiment's config tree: fields, units and bounds.

What holds between sections, and everything that is derived, is in `experiment`.
"""

from __future__ import annotations

from typing import Literal

from simclr_ray.config import Config, Field, model_validator


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
        65_536, ge=1, description="Rows held by the shuffle windows together, over all workers."
    )
    shuffle_gib: float = Field(
        2.0,
        gt=0,
        description="Their encoded bytes, GiB: with large pictures, windows of fewer rows.",
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
    first_size: int = Field(
        0, ge=0, description="Side in the first epoch, growing to `size`; 0: `size` throughout."
    )
    full_size_at: float = Field(
        0.75, gt=0, le=1, description="Share of the epochs after which views have full size."
    )
    strength: float = Field(1.0, ge=0, le=2, description="Colour strength s of App. A.")
    blur: float = Field(0.5, ge=0, le=1, description="Probability of Gaussian blur.")
    min_area: float = Field(
        0.08, gt=0, le=1, description="Smallest share of the area that is cropped."
    )
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a left-right flip.")
    jitter: float = Field(0.8, ge=0, le=1, description="Probability of colour jitter.")
    grayscale: float = Field(0.2, ge=0, le=1, description="Probability of dropping colour.")

    @model_validator(mode="after")
    def _check_sizes(self) -> SimCLRViews:
        if self.first_size and not 8 <= self.first_size <= self.size:
            raise ValueError(
                f"first_size={self.first_size} must be 0, or between 8 and size={self.size}"
            )
        return self

    def size_at(self, epoch: int, epochs: int) -> int:
        """Return the side of views in an epoch: linear growth, in steps (FFCV-SSL does likewise).

        Steps of 32 px, or of 4 px where `size` is at most 64.
        """
        grown = epoch / (self.full_size_at * epochs)
        if not self.first_size or grown >= 1:
            return self.size
        step = 4 if self.size <= 64 else 32
        return self.first_size + int((self.size - self.first_size) * grown) // step * step


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
    colour_on: Literal["data", "worker"] = Field(
        "data", description="Where colour and blur run: data actors, or the worker's device."
    )
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
