"""Global batch normalisation: statistics over the images of all ranks, on CPU and on GPU.

SimCLR §2.1 ("Global BN"): with local statistics a network can tell positives by what shares a
device. torch's SyncBatchNorm refuses CPU tensors, so the CPU form is ours; it is built from the
fused native kernels, with one small collective in each direction, weighted by the ranks' counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _CudaSyncBatchNorm

from simclr_ray.distributed import collectives
from simclr_ray.nn.parameter_groups import PLAIN

EVAL, TRAIN = False, True  # native kernels: take the statistics that are given, or their own


class GlobalBatchNorm(nn.Module):
    """Batch norm over [N, C] or [N, C, H, W] with statistics of all ranks' rows together.

    In training mode `forward` is a collective, and so is its backward. Running variance is
    unbiased over the global count, as in torch. Statistics are float32 for lower dtypes.

    Args:
        num_features: C.
        eps: Added to the variance (authors: 1e-5).
        momentum: Weight of the new batch in the running statistics (authors: decay 0.9, so 0.1).
        shift: Learn β; the last layer of the authors' heads has none.
    """

    running_mean: Tensor
    running_var: Tensor
    update_rule = PLAIN

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, *, shift: bool = True
    ) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.moves_statistics = True  # False: a repeated pass over the same images
        self.weight = nn.Parameter(torch.ones(num_features))
        if shift:
            self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(num_features))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised per channel, same shape and dtype. Collective while training."""
        momentum = self.momentum if self.moves_statistics else 0.0
        if not (self.training and collectives.is_distributed()):
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias,
                self.training, momentum, self.eps,
            )  # fmt: skip
        bias = self.bias if self.bias is not None else torch.zeros_like(self.weight)
        if x.is_cuda:
            out: Tensor = _CudaSyncBatchNorm.apply(
                x, self.weight, bias, self.running_mean, self.running_var,
                self.eps, momentum, collectives.world_group(), collectives.world_size(),
            )  # fmt: skip
            return out
        out, mean, variance, count = _GlobalNorm.apply(x, self.weight, bias, self.eps)
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp_(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return out

    def extra_repr(self) -> str:
        """Return the arguments, for printing."""
        return f"{len(self.weight)}, eps={self.eps}, momentum={self.momentum}"


class GlobalBatchNormAct(GlobalBatchNorm):
    """Global batch norm with the activation that timm has within its layer.

    Args:
        norm: Gives parameters, statistics and settings.
        drop: Applied before the activation.
        act: The activation.
    """

    def __init__(self, norm: GlobalBatchNorm, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(len(norm.weight), norm.eps, norm.momentum)
        self.load_state_dict(norm.state_dict())
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        """Return act(drop(norm(x))). Collective while training."""
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of all global batch norms below `module` as they are."""
    norms = [m for m in module.modules() if isinstance(m, GlobalBatchNorm)]
    before = [norm.moves_statistics for norm in norms]
    for norm in norms:
        norm.moves_statistics = False
    try:
        yield
    finally:
        for norm, moved in zip(norms, before, strict=True):
            norm.moves_statistics = moved


class _GlobalNorm(torch.autograd.Function):
    """Normalise with joint statistics; the native eval-mode kernels do the passes over x."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        if x.dtype in (torch.float32, torch.float64):
            local_mean, local_variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        else:  # that kernel would return them in x's dtype, and a reduction of x.float() is slow
            _, local_mean, inverse = torch.native_batch_norm(
                x, weight, bias, None, None, TRAIN, 0.0, 0.0
            )
            # eps is 0, and of a constant the kernel gives 0
            local_variance = torch.where(inverse > 0, inverse.square().reciprocal(), 0)
        local_count = x.numel() // channels
        packed = torch.cat([local_mean, local_variance, local_mean.new_tensor([local_count])])
        gathered = collectives.all_gather_vector(packed)  # [R, 2C + 1]
        counts = gathered[:, -1:]
        count = counts.sum()
        means, variances = gathered[:, :channels], gathered[:, channels:-1]
        mean = (means * counts).sum(0) / count
        # the parallel form of Chan et al.: no cancellation of large sums
        variance = ((variances + (means - mean).square()) * counts).sum(0) / count
        out = F.batch_norm(x, mean, variance, weight, bias, eps=eps)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps  # type: ignore[attr-defined] # torch declares none
        ctx.mark_non_differentiable(mean, variance, count)
        return out, mean, variance, count

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, upstream: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance, count = ctx.saved_tensors  # type: ignore[attr-defined] # torch declares none
        eps: float = ctx.eps  # type: ignore[attr-defined] # torch declares none
        # Σ dy·x̂ and Σ dy of this rank, in one fused pass
        _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            upstream, x, weight, mean, variance, None, None, EVAL, eps, [False, True, True]
        )
        sums = collectives.all_reduce_sum(torch.cat([d_weight, d_bias]))
        shape = (1, -1, *([1] * (x.ndim - 2)))
        global_d_weight, global_d_bias = (sums / count).split(len(weight))
        inverse_std = (variance + eps).rsqrt()
        scale = weight * inverse_std
        slope = -scale * inverse_std * global_d_weight
        offset = -scale * global_d_bias - slope * mean
        # scale·(dy − mean of dy − x̂·mean of dy·x̂), as dy·scale + x·slope + offset
        if x.dtype in (torch.float32, torch.float64):
            dx = torch.addcmul(offset.view(shape), x, slope.view(shape))
            dx.addcmul_(upstream, scale.view(shape))
        else:  # mixed dtypes are slow in elementwise kernels and not in those of batch norm
            zero, one = torch.zeros_like(mean), torch.ones_like(mean)
            dx = F.batch_norm(x, zero, one, slope, offset, eps=0.0)
            dx += F.batch_norm(upstream, zero, one, scale, zero, eps=0.0)
        return dx, d_weight, d_bias, None
