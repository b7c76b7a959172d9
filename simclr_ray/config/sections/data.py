"""What is trained on, and how images become shards."""

from __future__ import annotations

from typing import Literal

from simclr_ray.config.schema import (
    Config,
    Field,
    PathOrURI,
    WhiteLevel,
    model_validator,
)

DecoderName = Literal["pillow", "turbo", "turbo_scaled"]


class ColumnsConfig(Config):
    """Which columns of a user's parquet hold what."""

    image: str = Field("image", min_length=1, description="Encoded bytes, {bytes, path}, or paths.")
    label: str = Field("label", description="Integer class; the column may be absent.")
    id: str = Field("id", description="int64 key of a row; where absent, rows are numbered.")
    group: str = Field(
        "",
        since=3,
        description="Which thing an image is of (int64 or text): view b is of another of its "
        "images; empty: both views are of one image.",
    )


class DataConfig(Config):
    """The images, and the labelled splits that the encoder is evaluated on."""

    train: PathOrURI = Field(  # which images they are, the fingerprint says
        placement=True,
        min_length=1,
        description="Parquet file or folder, local or any pyarrow.fs URI.",
    )
    eval_train: PathOrURI = Field(
        "",
        placement=True,
        description="Labelled split that kNN and probes learn from; empty: `train`.",
    )
    test: PathOrURI = Field(
        "",
        placement=True,
        description="Labelled split that is scored; empty: label-free metrics only.",
    )
    limit: int = Field(0, ge=0, description="Use the first rows only, in file order; 0 uses all.")
    columns: ColumnsConfig = ColumnsConfig()
    max_bad_fraction: float = Field(
        0.01, placement=True, ge=0, le=1, description="Share of undecodable rows that stops."
    )
    max_pixels: int = Field(50_000_000, ge=1, description="Larger images are refused undecoded.")
    white: WhiteLevel = Field(
        0,
        since=3,
        description="Value that is white in images of 9 to 16 bits: a number, or `auto` for nearly "
        "the largest of a sample; 0: the largest that their bits hold. With other channels than 1 "
        "and 3 also a list, one of each.",
    )
    channels: int = Field(
        3,
        since=3,
        ge=1,
        le=16,
        description="Of an image: 3 is RGB, 1 gray; others are those of NumPy arrays (.npy), or "
        "pages of TIFF.",
    )
    decoder: DecoderName = Field(
        "pillow",
        since=3,
        description="What decodes JPEG for training: pillow; turbo (extra), in two thirds of "
        "the time; turbo_scaled, large images at 1/2, 1/4 or 1/8 where no crop is enlarged by it, "
        "anew in each epoch.",
    )
    decoder_sha256: str = Field(
        "",
        placement=True,
        description="Of what it makes of a JPEG, which nodes agree on; filled in.",
    )
    shuffle_rows: int = Field(
        65_536, ge=1, description="Rows held by the shuffle windows together, over all workers."
    )
    shuffle_gib: float = Field(
        2.0,
        gt=0,
        description="Their encoded bytes, GiB: with large images, windows of fewer rows.",
    )
    cache_gib: float = Field(
        2.0, placement=True, ge=0, description="Decoded-row cache of one node's actors, GiB."
    )

    @model_validator(mode="after")
    def _check_channels(self) -> DataConfig:
        if not isinstance(self.white, list):
            return self
        if self.channels in (1, 3):
            raise ValueError(f"white is one number with channels={self.channels}, not a list")
        if len(self.white) != self.channels:
            raise ValueError(f"white has {len(self.white)} numbers, channels={self.channels}")
        return self


FolderLabels = Literal["auto", "folders", "none"]
FolderGroups = Literal["none", "folders"]


class PreparationConfig(Config):
    """How `prepare` turns images into shards."""

    num_images: int = Field(
        0, ge=0, description="Keep the first only; 0 keeps all, and draws 20,000 `shapes`."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Of the shuffle, and of `shapes`.")
    split: str = Field(
        "",
        description="Which of several, as PATH#SPLIT names it; empty: the only one, and train of a "
        "torchvision dataset.",
    )
    size: int = Field(32, ge=16, le=1024, description="Side of `shapes` in pixels.")
    columns: ColumnsConfig = ColumnsConfig()
    labels: FolderLabels = Field(
        "auto", description="Of a folder of images: its class folders, or none."
    )
    groups: FolderGroups = Field(
        "none", description="Of a folder of images: `folders`: those of one folder are a group."
    )
    rows_per_shard: int = Field(5000, ge=1)
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    max_pixels: int = Field(50_000_000, ge=1)
    download_folder: str = Field("", description="torchvision's files; empty: a user cache.")
