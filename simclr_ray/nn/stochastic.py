"""Dropout and stochastic depth whose masks are a pure function of (seed, step, id, view, layer).

torch's layers draw from one generator, so that what an image loses hangs on how many images the
rank holds: one process and two would train different networks, and gradient caching a third. Here
each image has its own mask, by `augment.philox` in torch's integers, the same on CPU and GPU.
`key_draws` puts these layers in place of torch's, torchvision's and timm's; the loop says by
`draw_for` whose images pass next.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_ray.augment.philox import MULTIPLIERS, ROUNDS, STREAMS, WEYL
from simclr_ray.errors import ConfigError

LOW: Final = 0xFFFFFFFF
# A word of the key is the stream in 8 bits, the view in 8, the layer in 16.
VIEW_SHIFT, LAYER_SHIFT, MAX_LAYERS = 8, 16, 2**16
USE_SHIFT: Final = 28  # above the blocks of words of one use
WHOLE_BATCH: Final = -1  # the id by which a layer draws once for all images


class DropoutKeys(NamedTuple):
    """What masks of a forward pass are drawn by: its images and views, in the order of its rows.

    Attributes:
        seed: Of the run, 32 bits.
        step: Global step, below 2³².
        ids: int64 [m], on the device of the model.
        views: int64 [m]: 0 of view a, 1 of view b.
    """

    seed: int
    step: int
    ids: Tensor
    views: Tensor

    @classmethod
    def of_views(cls, seed: int, step: int, ids: Tensor, num_views: int) -> DropoutKeys:
        """Return the keys of a pass of all views one after the other, each of the same images."""
        views = torch.arange(num_views, device=ids.device).repeat_interleave(len(ids))
        return cls(seed, step, ids.repeat(num_views), views)


def keyed_words(keys: DropoutKeys, layer: int, num: int, use: int = 0) -> Tensor:
    """Return `num` 32-bit words for each row, as `augment.philox` makes them: int64 [m, num].

    Args:
        keys: Of the images that pass.
        layer: Number of the layer, below 2¹⁶.
        num: Words a row, at most 2³⁰.
        use: How often the layer has drawn by these keys before.
    """
    ids = keys.ids[:, None]
    c2 = torch.arange(-(-num // 4), device=ids.device)[None]  # [1, blocks]
    c2 = c2 + ((use << USE_SHIFT) & LOW)
    c0, c1, c3 = ids & LOW, (ids >> 32) & LOW, torch.full_like(c2, keys.step)
    k0 = keys.seed
    k1 = ((keys.views << VIEW_SHIFT) + STREAMS["layers"] + (layer << LAYER_SHIFT))[:, None]
    first, second = (int(m) for m in MULTIPLIERS)
    for _ in range(ROUNDS):
        p0, p1 = (
            c0 * first,
            c2 * second,
        )  # int64 wraps modulo 2⁶⁴, which leaves the bits as they are
        c0, c1, c2, c3 = (
            ((p1 >> 32) & LOW) ^ c1 ^ k0,
            p1 & LOW,
            ((p0 >> 32) & LOW) ^ c3 ^ k1,
            p0 & LOW,
        )
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    shape = (len(ids), c2.shape[1])
    return torch.stack([c.expand(shape) for c in (c0, c1, c2, c3)], -1).flatten(1)[:, :num]


class KeyedLayer(nn.Module, ABC):
    """A layer that drops by keyed masks; without keys it draws as the layer that it replaces.

    Args:
        p: Probability to drop.
        layer: Its number in the model.

    Attributes:
        keys: Of the images that pass, set by `draw_for`; they hold until the next, since activation
            checkpointing runs the layer again within the backward pass.
        uses: How often it has drawn since: in the forward pass, and again within the backward pass.
            A layer may stand in two branches, as torchvision's Swin has it, and draws for each.
    """

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        self.p, self.layer = p, layer
        self.keys: DropoutKeys | None = None
        self.uses = [0, 0]

    def forward(self, x: Tensor) -> Tensor:
        """Return x [k·m, ...], what is dropped at 0, while training; else x itself.

        k rows in a run belong to one image, as windows of attention do.
        """
        if not self.training or self.p == 0:
            return x
        if self.keys is None:
            return self.unkeyed(x)
        if len(x) % max(1, len(self.keys.ids)):
            raise RuntimeError(
                f"{len(x)} rows are of no whole number for {len(self.keys.ids)} images"
            )
        return x * self.factor(self.keys, x)

    @abstractmethod
    def factor(self, keys: DropoutKeys, x: Tensor) -> Tensor:
        """Return what x is multiplied by, broadcastable to it and of its dtype."""

    @abstractmethod
    def unkeyed(self, x: Tensor) -> Tensor:
        """Return x as the layer that this one replaces would have it."""

    def kept(
        self, keys: DropoutKeys, num: int, dtype: torch.dtype, *, scaled: bool = True
    ) -> Tensor:
        """Return 1/(1 − p) where a number is kept and 0 where it is not: [m, num]."""
        # as torch.utils.checkpoint asks whether it recomputes
        again = torch._C._current_graph_task_id() != -1
        use, self.uses[again] = self.uses[again], self.uses[again] + 1
        kept = keyed_words(keys, self.layer, num, use) >= round(self.p * 2**32)
        return kept.to(dtype).mul_(1.0 / (1.0 - self.p) if scaled and self.p < 1 else 1.0)

    def extra_repr(self) -> str:
        """Return the arguments, for printing."""
        return f"p={self.p:g}, layer={self.layer}"


class KeyedDropout(KeyedLayer):
    """Dropout of single numbers, or of whole channels [N, C, ...] as torch's `Dropout2d`."""

    def __init__(self, p: float, layer: int, *, channels: bool = False) -> None:
        super().__init__(p, layer)
        self.channels = channels

    def factor(self, keys: DropoutKeys, x: Tensor) -> Tensor:
        """Return one factor for each number or each channel."""
        # one number for each that is drawn
        dropped = x.reshape(*x.shape[:2], -1)[..., 0] if self.channels else x
        factor = self.kept(keys, dropped.numel() // len(keys.ids), x.dtype).reshape(dropped.shape)
        return factor.view(*factor.shape, *([1] * (x.ndim - dropped.ndim)))

    def unkeyed(self, x: Tensor) -> Tensor:
        """Return torch's dropout of x."""
        return (
            torch.feature_dropout(x, self.p, train=True) if self.channels else F.dropout(x, self.p)
        )


class KeyedDropPath(KeyedLayer):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): a residual branch is left out.

    Args:
        p: Probability to leave it out.
        layer: Its number in the model.
        scaled: Divide what is kept by 1 − p.
        whole_batch: Draw once for all images of a view, torchvision's mode `batch`.
    """

    def __init__(
        self, p: float, layer: int, *, scaled: bool = True, whole_batch: bool = False
    ) -> None:
        super().__init__(p, layer)
        self.scaled, self.whole_batch = scaled, whole_batch

    def factor(self, keys: DropoutKeys, x: Tensor) -> Tensor:
        """Return one factor for each image."""
        if self.whole_batch:
            keys = keys._replace(ids=torch.full_like(keys.ids, WHOLE_BATCH))
        kept = self.kept(keys, 1, x.dtype, scaled=self.scaled)  # [m, 1]
        kept = kept.expand(-1, len(x) // len(keys.ids)).reshape(-1)
        return kept.view(-1, *([1] * (x.ndim - 1)))

    def unkeyed(self, x: Tensor) -> Tensor:
        """Return torchvision's stochastic depth of x."""
        shape = [1 if self.whole_batch else len(x), *([1] * (x.ndim - 1))]
        kept = x.new_empty(shape).bernoulli_(1 - self.p)
        return x * (kept.div_(1 - self.p) if self.scaled and self.p < 1 else kept)


def key_draws(model: nn.Module) -> None:
    """Put keyed layers in place of torch's dropout, torchvision's and timm's stochastic depth.

    In place; layers that drop nothing stay. Attention that draws its dropout within a fused kernel
    is told to draw it by its layer (timm's `fused_attn`); what draws otherwise is found by
    `first_unkeyed_draw`.
    """
    drops = [
        (parent, name, make)
        for parent in model.modules()
        for name, child in parent.named_children()
        if (make := _keyed_form(child)) is not None
    ]
    assert len(drops) < MAX_LAYERS
    for layer, (parent, name, make) in enumerate(drops):
        setattr(parent, name, make(layer=layer))
        if name == "attn_drop" and getattr(parent, "fused_attn", False):
            parent.fused_attn = False  # type: ignore[assignment] # a plain attribute


def _keyed_form(module: Any) -> Callable[..., KeyedLayer] | None:
    """Return what makes the keyed layer in place of `module`; None where there is none."""
    kind = type(module)
    if kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d) and module.p:
        return partial(KeyedDropout, module.p, channels=kind is not nn.Dropout)
    if kind is _class_of("torchvision.ops", "StochasticDepth") and module.p:
        return partial(KeyedDropPath, module.p, whole_batch=module.mode == "batch")
    if kind is _class_of("timm.layers", "DropPath") and module.drop_prob:
        return partial(KeyedDropPath, module.drop_prob, scaled=bool(module.scale_by_keep))
    return None


def _class_of(module: str, name: str) -> Any:
    """Return a class of a module that is loaded; None where nobody has imported it."""
    return getattr(sys.modules.get(module), name, None)


def keyed_layers(model: nn.Module) -> list[KeyedLayer]:
    """Return the keyed layers of a model."""
    return [module for module in model.modules() if isinstance(module, KeyedLayer)]


def draw_for(layers: Iterable[KeyedLayer], keys: DropoutKeys | None) -> None:
    """Have keyed layers draw by these keys from now on; None: as torch does."""
    for layer in layers:
        layer.keys, layer.uses = keys, [0, 0]


def first_unkeyed_draw(encoder: nn.Module, images: Tensor) -> str:
    """Return the name of the first layer that draws from torch's own generator; empty: none does.

    Args:
        encoder: On CPU; it is run once in training mode, without a gradient. Its buffers may move.
        images: What it takes, [m, 3, S, S] on CPU.
    """
    keys = DropoutKeys(0, 0, torch.arange(len(images)), torch.zeros(len(images), dtype=torch.int64))
    drawing: list[str] = []
    training = encoder.training
    draw_for(keyed_layers(encoder), keys)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _watched(encoder, drawing):
            encoder.train()(images)
    finally:
        draw_for(keyed_layers(encoder), None)
        encoder.train(training)
    return drawing[0] if drawing else ""


@contextmanager
def _watched(encoder: nn.Module, drawing: list[str]) -> Iterator[None]:
    """Add to `drawing` the modules in whose forward the generator moves, the innermost first."""
    before: dict[str, Tensor] = {}

    def enter(name: str, module: nn.Module, args: Any) -> None:  # noqa: ARG001 - torch's signature
        before[name] = torch.get_rng_state()

    def leave(name: str, module: nn.Module, args: Any, out: Any) -> None:  # noqa: ARG001
        if not torch.equal(before.pop(name), torch.get_rng_state()):
            drawing.append(f"{name or 'the encoder'} ({type(module).__name__})")

    handles = []
    for name, module in encoder.named_modules():
        handles.append(module.register_forward_pre_hook(partial(enter, name)))
        handles.append(module.register_forward_hook(partial(leave, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_draws(encoder: nn.Module, images: Tensor) -> None:
    """Refuse an encoder that draws otherwise than by keyed layers, each image by itself.

    Args:
        encoder: On CPU; it is run in training mode, without a gradient. Its buffers may move.
        images: Two or more that it takes, [m, 3, S, S] on CPU.

    Raises:
        ConfigError: It does; the layer is named.
    """
    drawing = first_unkeyed_draw(encoder, images)
    if drawing:
        problem = (
            f"{drawing} draws random numbers of its own while training, which would depend on the "
            "number of workers; use nn.Dropout or torchvision.ops.StochasticDepth as a layer, or "
            "set that probability to 0"
        )
        raise ConfigError.of("encoder", problem)
    if keyed_layers(encoder) and not _draws_by_image(encoder, images):
        problem = (
            "its dropout or stochastic depth sees rows that are not one image after the other, so "
            "that masks would depend on the number of workers; set that probability to 0"
        )
        raise ConfigError.of("encoder", problem)


@torch.no_grad()
def _draws_by_image(encoder: nn.Module, images: Tensor) -> bool:
    """Return whether each image keeps its features when the rows of a pass change places."""
    training = encoder.training
    for module in encoder.modules():  # statistics of a batch would join its images
        module.training = isinstance(module, KeyedLayer)
    ids = torch.arange(len(images))
    try:
        outputs = []
        for order in (ids, ids.flip(0)):
            draw_for(keyed_layers(encoder), DropoutKeys(0, 0, order, torch.zeros_like(order)))
            outputs.append(encoder(images[order])[order])
    finally:
        draw_for(keyed_layers(encoder), None)
        encoder.train(training)
    first, second = outputs
    return torch.allclose(first, second, rtol=1e-3, atol=1e-4 * float(first.abs().max()))
