"""The authors' variables give the features of their network, written here by its names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_ray import config as cfg
from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import CheckpointError, ConfigError
from simclr_ray.nn.build import build_model
from simclr_ray.nn.pretrained import foreign_weights, load_init

WIDTH = 0.125
REPEATS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class Authors:
    """The network of google-research/simclr `resnet.py`, layer for layer, as TensorFlow names it.

    A name that is not there yet is drawn, so that the first pass makes the variables.
    """

    def __init__(self, depth: int, sk_ratio: float = 0.0, *, is_small: bool = True) -> None:
        self.depth, self.sk_ratio, self.is_small = depth, sk_ratio, is_small
        self.variables: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def variable(self, name: str, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        if name not in self.variables:
            u = torch.rand(shape, generator=self.generator)
            self.variables[name] = low + (high - low) * u
        return self.variables[name]

    def name(self, kind: str) -> str:
        number = self.counts[kind]
        self.counts[kind] += 1
        return f"base_model/{kind}{f'_{number}' if number else ''}"

    def conv(self, x: Tensor, filters: int, kernel: int, stride: int) -> Tensor:
        bound = (3 / (kernel * kernel * x.shape[1])) ** 0.5
        weight = self.variable(
            f"{self.name('conv2d')}/kernel", (kernel, kernel, x.shape[1], filters), -bound, bound
        )
        return F.conv2d(x, weight.permute(3, 2, 0, 1), stride=stride, padding=(kernel - 1) // 2)

    def norm(self, x: Tensor, relu: bool = True) -> Tensor:
        name, shape = self.name("batch_normalization"), (x.shape[1],)
        gamma, beta = (self.variable(f"{name}/{p}", shape, 0.5, 1.0) for p in ("gamma", "beta"))
        mean = self.variable(f"{name}/moving_mean", shape, -0.2, 0.2)
        variance = self.variable(f"{name}/moving_variance", shape, 0.5, 2.0)
        out = F.batch_norm(x, mean, variance, gamma, beta, eps=1e-5)
        return out.relu() if relu else out

    def start(self, x: Tensor, filters: int) -> Tensor:
        if self.is_small:
            return self.norm(self.conv(x, filters, 3, 1))
        if self.sk_ratio:
            x = self.norm(self.conv(x, filters // 2, 3, 2))
            x = self.norm(self.conv(x, filters // 2, 3, 1))
            x = self.norm(self.conv(x, filters, 3, 1))
        else:
            x = self.norm(self.conv(x, filters, 7, 2))
        # 'SAME': so many that each second pixel has a window, the odd one after
        missing = [max(2 * ((side + 1) // 2) + 1 - side, 0) for side in x.shape[-2:]]
        rows, columns = ((n // 2, n - n // 2) for n in missing)
        return F.max_pool2d(F.pad(x, (*columns, *rows), value=float("-inf")), 3, 2)

    def sk_conv(self, x: Tensor, filters: int, stride: int) -> Tensor:
        both = torch.stack(self.norm(self.conv(x, 2 * filters, 3, stride)).chunk(2, 1))
        middle = max(int(filters * self.sk_ratio), 32)
        seen = both.sum(0).mean((2, 3), keepdim=True)
        mixing = self.conv(self.norm(self.conv(seen, middle, 1, 1)), 2 * filters, 1, 1)
        return (both * torch.stack(mixing.chunk(2, 1)).softmax(0)).sum(0)

    def shortcut(self, x: Tensor, filters: int, stride: int) -> Tensor:
        if not self.sk_ratio:
            return self.norm(self.conv(x, filters, 1, stride), relu=False)
        if stride > 1:  # images of even sides alone: what is padded is not seen
            x = F.avg_pool2d(x, 2, stride)
        else:  # TensorFlow's mean of what is there
            x = F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)
        return self.norm(self.conv(x, filters, 1, 1), relu=False)

    def block(self, x: Tensor, filters: int, stride: int, *, project: bool) -> Tensor:
        wide = filters if self.depth < 50 else 4 * filters
        kept = self.shortcut(x, wide, stride) if project else x
        if self.depth < 50:
            x = self.norm(self.conv(x, filters, 3, stride))
            x = self.norm(self.conv(x, filters, 3, 1), relu=False)
        else:
            x = self.norm(self.conv(x, filters, 1, 1))
            if self.sk_ratio:
                x = self.sk_conv(x, filters, stride)
            else:
                x = self.norm(self.conv(x, filters, 3, stride))
            x = self.norm(self.conv(x, wide, 1, 1), relu=False)
        return (x + kept).relu()

    def __call__(self, images: Tensor) -> Tensor:
        self.counts = {"conv2d": 0, "batch_normalization": 0}
        filters = round(64 * WIDTH)
        x = self.start(images, filters)
        for group, repeats in enumerate(REPEATS[self.depth]):
            for repeat in range(repeats):
                stride = 2 if group and not repeat else 1
                x = self.block(x, filters * 2**group, stride, project=repeat == 0)
        return x.mean((2, 3))


def experiment(weights: Path, **encoder: Any) -> Experiment:
    tree = {
        "name": "t", "data": {"train": "x"}, "augment": {"name": "simclr", "size": 32},
        "encoder": {"name": "resnet", "depth": 50, "width": WIDTH, "stem": "cifar", **encoder},
        "init": {"weights": str(weights)}, "batch_size": 8, "epochs": 1,
    }  # fmt: skip
    return cfg.validate(Experiment, tree)


def write(path: Path, authors: Authors, suffix: str = "") -> None:
    others = {
        "global_step": np.int64(3),
        "base_model/conv2d/kernel/Momentum": np.ones((3, 3, 3, 8), np.float32),
        "head_contrastive/nl_0/dense/kernel": np.ones((8, 8), np.float32),
    }
    arrays = {f"{name}{suffix}": t.numpy() for name, t in authors.variables.items()}
    given: dict[str, Any] = {**arrays, **others}
    np.savez(path, **given)


@pytest.mark.parametrize(
    ("depth", "sk_ratio", "suffix", "stem", "size"),
    [
        (18, 0.0, "", "cifar", 32),
        (50, 0.0, ":0", "cifar", 32),
        (50, 0.0625, "", "cifar", 32),
        (50, 0.0, "", "imagenet_same", 64),
        (18, 0.0, "", "imagenet_same", 66),  # 33 before the pool
        (50, 0.0625, "", "imagenet_same", 64),
    ],
)
def test_an_npz_of_the_authors_variables_gives_their_features(
    depth: int, sk_ratio: float, suffix: str, stem: str, size: int, tmp_path: Path
) -> None:
    authors = Authors(depth, sk_ratio, is_small=stem == "cifar")
    images = torch.rand(3, 3, size, size)
    expected = authors(images)
    write(tmp_path / "r.npz", authors, suffix)
    run = experiment(tmp_path / "r.npz", depth=depth, selective_kernel=sk_ratio, stem=stem)
    model = build_model(run).eval()
    load_init(model, run)
    with torch.no_grad():
        h = model.encoder(images)
    assert (h - expected).norm() < 1e-5 * expected.norm()
    line = foreign_weights(model.encoder, run).line
    assert "left out" in line
    assert "less (0, 0, 0) over (1, 1, 1)" in line


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        ({"depth": 18}, "holds conv2d_21"),
        ({"stem": "imagenet"}, "encoder.stem=imagenet_same"),
        ({"width": 0.25}, "does not fit the encoder"),
        ({"name": "torchvision", "model": "resnet50"}, "take encoder.name=resnet"),
        ({"depth": 101}, "does not fit the encoder"),
    ],
)
def test_another_network_is_refused_in_a_line(
    encoder: dict[str, Any], said: str, tmp_path: Path
) -> None:
    authors = Authors(50)
    authors(torch.rand(2, 3, 32, 32))
    write(tmp_path / "r.npz", authors)
    tree = cfg.to_tree(experiment(tmp_path / "r.npz"))
    tree["encoder"] = encoder if "name" in encoder else tree["encoder"] | encoder
    run = cfg.validate(Experiment, tree)
    with pytest.raises((CheckpointError, ConfigError), match=said):
        load_init(build_model(run), run)


def test_names_that_are_numbers_and_kernels_that_are_none_are_refused_in_a_line(
    tmp_path: Path,
) -> None:
    kernel = "base_model/conv2d/kernel"
    for name, tree, said in (
        ("numbers.pt", {0: torch.ones(3), "1": torch.ones(3)}, "does not fit the encoder"),
        ("mixed.pt", {0: torch.ones(3), kernel: {}}, "does not fit the encoder"),
        ("flat.pt", {kernel: torch.ones(3)}, r"shape \[3\], which is no kernel"),
    ):
        torch.save(tree, tmp_path / name)
        run = experiment(tmp_path / name)
        with pytest.raises((CheckpointError, ConfigError), match=said):
            load_init(build_model(run), run)


@pytest.mark.parametrize("content", ["objects", "broken", "text"])
def test_an_npz_that_would_run_code_or_is_broken_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    if content == "objects":
        given: dict[str, Any] = {"base_model/conv2d/kernel": np.array([{}], dtype=object)}
        np.savez(path, **given)
    elif content == "text":
        np.savez(path, names=np.array(["a", "b"]))
    else:
        np.savez(path, a=np.ones(1000, np.float32))
        path.write_bytes(path.read_bytes()[:500])
    run = experiment(path)
    with pytest.raises(CheckpointError, match="is no whole file of weights"):
        load_init(build_model(run), run)
