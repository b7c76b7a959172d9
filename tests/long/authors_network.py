"""The authors' ResNet by TensorFlow's operations: its checkpoint as `.npz`, images and features.

    python authors_network.py FOLDER

Written after google-research/simclr `resnet.py`, with its names of variables. Run by
`test_authors_released.py` in an environment with TensorFlow.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

WIDTH = 0.25
REPEATS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
CASES = {"r18": (18, 0.0), "r50": (50, 0.0), "r50_sk": (50, 0.0625)}
v1: Any = tf.compat.v1


class Network:
    """Layers in the order in which the authors make them; weights and statistics are drawn."""

    def __init__(self, depth: int, sk_ratio: float) -> None:
        self.depth, self.sk_ratio = depth, sk_ratio
        self.counts: dict[str, int] = {}

    def variable(
        self, layer: str, name: str, shape: tuple[int, ...], low: float, high: float
    ) -> Any:
        with v1.variable_scope(f"base_model/{layer}", reuse=v1.AUTO_REUSE):
            return v1.get_variable(
                name, shape, initializer=v1.random_uniform_initializer(low, high)
            )

    def name(self, kind: str) -> str:
        number = self.counts.get(kind, 0)
        self.counts[kind] = number + 1
        return f"{kind}_{number}" if number else kind

    def conv(self, x: Any, filters: int, kernel: int, stride: int) -> Any:
        inputs = int(x.shape[-1])
        bound = (3 / (kernel * kernel * inputs)) ** 0.5
        weight = self.variable(
            self.name("conv2d"), "kernel", (kernel, kernel, inputs, filters), -bound, bound
        )
        if stride > 1:  # their `fixed_padding`
            before = (kernel - 1) // 2
            around = [before, kernel - 1 - before]
            x = tf.pad(x, [[0, 0], around, around, [0, 0]])
        return tf.nn.conv2d(x, weight, stride, "SAME" if stride == 1 else "VALID")

    def norm(self, x: Any, *, relu: bool = True) -> Any:
        layer, shape = self.name("batch_normalization"), (int(x.shape[-1]),)
        gamma, beta = (self.variable(layer, part, shape, 0.5, 1.0) for part in ("gamma", "beta"))
        mean = self.variable(layer, "moving_mean", shape, -0.2, 0.2)
        variance = self.variable(layer, "moving_variance", shape, 0.5, 2.0)
        out = tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-5)
        return tf.nn.relu(out) if relu else out

    def sk_conv(self, x: Any, filters: int, stride: int) -> Any:
        both = tf.stack(tf.split(self.norm(self.conv(x, 2 * filters, 3, stride)), 2, axis=3))
        seen = tf.reduce_mean(tf.reduce_sum(both, 0), [1, 2], keepdims=True)
        middle = max(int(filters * self.sk_ratio), 32)
        mixing = self.conv(self.norm(self.conv(seen, middle, 1, 1)), 2 * filters, 1, 1)
        weights = tf.nn.softmax(tf.stack(tf.split(mixing, 2, axis=3)), axis=0)
        return tf.reduce_sum(both * weights, 0)

    def shortcut(self, x: Any, filters: int, stride: int) -> Any:
        if not self.sk_ratio:
            return self.norm(self.conv(x, filters, 1, stride), relu=False)
        if stride > 1:
            x = tf.nn.avg_pool2d(tf.pad(x, [[0, 0], [0, 1], [0, 1], [0, 0]]), 2, stride, "VALID")
        else:
            x = tf.nn.avg_pool2d(x, 2, 1, "SAME")
        return self.norm(self.conv(x, filters, 1, 1), relu=False)

    def block(self, x: Any, filters: int, stride: int, *, project: bool) -> Any:
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
        return tf.nn.relu(x + kept)

    def __call__(self, x: Any) -> Any:
        filters = round(64 * WIDTH)
        if self.sk_ratio:
            for outputs, stride in ((filters // 2, 2), (filters // 2, 1), (filters, 1)):
                x = self.norm(self.conv(x, outputs, 3, stride))
        else:
            x = self.norm(self.conv(x, filters, 7, 2))
        x = tf.nn.max_pool2d(x, 3, 2, "SAME")
        for group, repeats in enumerate(REPEATS[self.depth]):
            for repeat in range(repeats):
                stride = 2 if group and not repeat else 1
                x = self.block(x, filters * 2**group, stride, project=repeat == 0)
        return tf.reduce_mean(x, [1, 2])


def main(folder: Path) -> None:
    """Write `NAME.npz` and `NAME-features.npy` of each network, for `images.npy` [N, H, W, 3]."""
    images = np.load(folder / "images.npy")
    for name, (depth, sk_ratio) in CASES.items():
        with tf.Graph().as_default(), v1.Session() as session:
            v1.set_random_seed(0)
            features = Network(depth, sk_ratio)(tf.constant(images))
            v1.train.get_or_create_global_step()
            session.run(v1.global_variables_initializer())
            path = v1.train.Saver().save(session, str(folder / f"{name}.ckpt"))
            np.save(folder / f"{name}-features.npy", session.run(features))
        names = [variable for variable, _ in tf.train.list_variables(path)]
        stored: dict[str, Any] = {n: tf.train.load_variable(path, n) for n in names}
        np.savez(folder / f"{name}.npz", **stored)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
