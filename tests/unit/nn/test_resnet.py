"""The authors' ResNet: published sizes, shortcuts, initial weights, and strides."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn

from simclr_ray.config.experiment import Experiment
from simclr_ray.nn.batchnorm import GlobalBatchNorm
from simclr_ray.nn.build import build_model
from simclr_ray.nn.heads import linear_head, mlp_head
from simclr_ray.nn.resnet import RESNET50_PARAMETERS, TRUNCATED_STD, ResNet, SelectiveKernel
from simclr_ray.nn.resnet import _Averaged as averaged


def millions(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("depth", "width", "published"),
    [  # SimCLR Fig. 7, the points' positions; the text has R50 as 24, 94 and 375
        (18, 1, 11.2), (18, 2, 44.7), (18, 4, 178.7),
        (34, 1, 21.3), (34, 2, 85.1), (34, 4, 340.4),
        (50, 1, 23.6), (50, 2, 94.0), (50, 4, 375.6),
        (101, 1, 42.6), (101, 2, 170.0),
        (152, 1, 58.3), (152, 2, 232.6),
    ],
)  # fmt: skip
def test_parameters_are_as_many_as_published(depth: int, width: int, published: float) -> None:
    with torch.device("meta"):
        encoder = ResNet(depth, width)
    assert millions(encoder) == pytest.approx(published, rel=0.005)
    assert encoder.feature_dim == (512 if depth < 50 else 2048) * width


def test_the_paper_s_resnet50_with_its_head_has_the_stated_parameters() -> None:
    model = build_model(Experiment.load("imagenet_resnet50"))
    assert sum(p.numel() for p in model.parameters()) == RESNET50_PARAMETERS


@pytest.mark.parametrize(
    ("depth", "width", "published"), [(50, 1, 35), (152, 3, 795)]
)  # README of the authors, in millions
def test_selective_kernels_have_as_many_parameters_as_published(
    depth: int, width: int, published: float
) -> None:
    with torch.device("meta"):
        encoder = ResNet(depth, width, selective_kernel=0.0625)
        classifier = nn.Linear(encoder.feature_dim, 1000)  # the published count has one
    whole = millions(encoder) + millions(classifier)
    assert min(abs(millions(encoder) - published), abs(whole - published)) < 0.01 * published


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 64), ("imagenet", 57), ("cifar", 16)])
def test_selective_kernels_change_no_shapes_and_mix_two_streams(stem: str, size: int) -> None:
    torch.manual_seed(0)
    plain = ResNet(50, 1 / 16, stem)  # type: ignore[arg-type] # parametrised text
    encoder = ResNet(50, 1 / 16, stem, selective_kernel=0.0625)  # type: ignore[arg-type] # as above
    shapes: list[list[torch.Size]] = [[], []]
    for found, network in zip(shapes, (plain, encoder), strict=True):
        for block in network.blocks:
            block.register_forward_hook(lambda _m, _i, out, into=found: into.append(out.shape))
        network(torch.rand(2, 3, size, size))
    assert shapes[0] == shapes[1]
    kernel = next(m for m in encoder.modules() if isinstance(m, SelectiveKernel))
    x = torch.rand(2, next(kernel.streams.parameters()).shape[1], 6, 6)
    kernel.eval()
    nn.init.zeros_(kernel.mix.weight)  # equal shares: the mean of the streams
    both = torch.unflatten(torch.relu(kernel.streams(x)), 1, (2, -1))
    torch.testing.assert_close(kernel(x), both.mean(1))
    with pytest.raises(ValueError, match="bottleneck"):
        ResNet(18, selective_kernel=0.0625)


def test_the_mean_before_a_shortcut_leaves_what_lies_outside_out() -> None:
    x = torch.arange(9.0).view(1, 1, 3, 3)
    same = torch.tensor([[[[2.0, 3.0, 3.5], [5.0, 6.0, 6.5], [6.5, 7.5, 8.0]]]])
    torch.testing.assert_close(averaged(1)(x), same)
    torch.testing.assert_close(averaged(2)(x), torch.tensor([[[[2.0, 3.5], [6.5, 8.0]]]]))


@pytest.mark.parametrize(("depth", "extra"), [(18, True), (34, True), (50, False), (101, False)])
def test_only_basic_depths_have_a_shortcut_that_torchvision_lacks(depth: int, extra: bool) -> None:
    with torch.device("meta"):
        ours = ResNet(depth)
        theirs = getattr(torchvision.models, f"resnet{depth}")()
        theirs.fc = nn.Identity()
    shortcut = 64 * 64 + 2 * 64 if extra else 0  # 1x1 convolution, gamma and beta
    count = sum(p.numel() for p in ours.parameters())
    assert count - sum(p.numel() for p in theirs.parameters()) == shortcut


@pytest.mark.parametrize(
    ("depth", "stem"),
    [(depth, "cifar") for depth in (10, 18, 34, 50, 101, 152, 200)]
    + [(depth, stem) for depth in (18, 50) for stem in ("imagenet", "strided")],
)
def test_each_depth_maps_tiny_images_to_finite_features_and_gradients(
    depth: int, stem: str
) -> None:
    torch.manual_seed(0)
    encoder = ResNet(depth, 1 / 16, stem)  # type: ignore[arg-type] # parametrised text
    h = encoder(torch.rand(3, 3, 16, 16))
    assert h.shape == (3, encoder.feature_dim)
    assert encoder.feature_dim == (32 if depth < 50 else 128)
    h.square().sum().backward()
    assert torch.isfinite(h).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_spatial_size_shrinks_by_32_or_by_8_for_the_cifar_stem() -> None:
    for stem, shrink in (("imagenet", 32), ("cifar", 8), ("strided", 16)):
        encoder = ResNet(18, 1 / 16, stem)  # type: ignore[arg-type] # a loop over literals
        sizes: list[int] = []
        encoder.blocks.register_forward_hook(lambda _m, _i, out, s=sizes: s.append(out.shape[2]))
        encoder(torch.rand(2, 3, 64, 64))
        assert sizes == [64 // shrink]


@pytest.mark.parametrize("depth", [18, 50])
def test_last_gammas_start_at_zero_and_all_others_at_one(depth: int) -> None:
    encoder = ResNet(depth, 1 / 16, "cifar")
    gammas = {n: m.weight for n, m in encoder.named_modules() if isinstance(m, GlobalBatchNorm)}
    last = {f"blocks.{i}.branch.{len(b.branch) - 1}.1" for i, b in enumerate(encoder.blocks)}  # type: ignore[arg-type] # ModuleList
    assert last <= set(gammas)
    for name, gamma in gammas.items():
        assert gamma.tolist() == [0.0 if name in last else 1.0] * len(gamma), name


def test_the_stride_sits_on_the_3x3_of_a_bottleneck() -> None:
    encoder = ResNet(50, 1 / 16)
    strided = [m for m in encoder.blocks.modules() if isinstance(m, nn.Conv2d) and m.stride[0] == 2]
    kernels = sorted(m.kernel_size[0] for m in strided)
    assert kernels == [1, 1, 1, 3, 3, 3]  # the 1x1 are the three projection shortcuts


def test_convolutions_start_from_a_truncated_normal_of_variance_one_over_fan_in() -> None:
    torch.manual_seed(1)
    encoder = ResNet(18)
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 50_000:
            fan_in = module.weight[0].numel()
            scaled = module.weight * fan_in**0.5
            assert scaled.std().item() == pytest.approx(1, rel=0.02), name
            assert scaled.abs().max().item() <= 2 / TRUNCATED_STD + 1e-5, name


def test_an_unknown_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="depth"):
        ResNet(42)


def test_heads_have_the_authors_layers_and_no_shift_at_the_end() -> None:
    head = mlp_head(8, 4, layers=3)
    names = [type(m).__name__ for m in head]
    assert names == ["Linear", "GlobalBatchNorm", "ReLU"] * 2 + ["Linear", "GlobalBatchNorm"]
    shapes = [tuple(m.weight.shape) for m in head if isinstance(m, nn.Linear)]
    assert shapes == [(8, 8), (8, 8), (4, 8)]
    assert all(m.bias is None for m in head if isinstance(m, nn.Linear))
    norms = [m for m in head if isinstance(m, GlobalBatchNorm)]
    assert [m.bias is None for m in norms] == [False, False, True]
    assert [type(m).__name__ for m in linear_head(8, 4)] == ["Linear", "GlobalBatchNorm"]
    assert mlp_head(8, 4, hidden=6)[0].weight.shape == (6, 8)


def test_blocks_that_run_again_give_the_same_gradient_and_move_statistics_once() -> None:
    torch.manual_seed(0)
    images = torch.rand(6, 3, 16, 16, dtype=torch.float64)
    plain, again = (ResNet(18, 0.125, "cifar").double().train() for _ in "ab")
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # zero gammas would hide the residual branches
    again.load_state_dict(plain.state_dict())
    again.recompute = True
    for encoder in (plain, again):
        encoder(images).square().sum().backward()
    for p, q in zip(plain.parameters(), again.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, again.get_buffer(name))
    assert all(m.moves_statistics for m in again.modules() if isinstance(m, GlobalBatchNorm))


NARROW = """
import torch
from torch import nn
from simclr_ray.nn.resnet import ConvNorm

torch.manual_seed(0)
for channels in range(1, 10):
    conv = ConvNorm(channels, 8, 1, 2, nn.Identity)
    conv = conv.to(memory_format=torch.channels_last)
    images = torch.randn(32, channels, 16, 16).to(memory_format=torch.channels_last)
    out = conv(images)
    given = torch.randn_like(out)
    out.backward(given)
    taken = images[:, :, ::2, ::2].double()
    expected = torch.einsum("nohw,nihw->oi", given.double(), taken)
    assert torch.allclose(conv[0].weight.grad[:, :, 0, 0].double(), expected, atol=1e-4), channels
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_few_channels_have_their_gradient_without_avx_512(threads: int) -> None:
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(  # torch's own crashes there, or never ends
        [sys.executable, "-c", NARROW], env=env, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
