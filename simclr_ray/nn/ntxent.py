"""The streaming core of NT-Xent, exact, without a gradient collective and without the matrix.

SimCLR (Chen et al. 2020, arXiv:2002.05709) eq. 1. Write s_ij = z_i·z_j/τ and
p_ij = exp(s_ij − lse_i), 0 for i = j. As an anchor, row i contributes Σ_j p_ij z_j − z_pos(i) to
its own gradient; as a column of row j, p_ji z_j, and as its partner −z_pos(i) again. s is
symmetric, so p_ji = exp(s_ij − lse_j) comes from the same number:

    dL/dz_i = 1/(2N·τ) · [ Σ_j (p_ij + p_ji) z_j − 2 z_pos(i) ]

So with all z (2N rows) and then all row log-sum-exps gathered, the gradient of the *global* mean
with respect to a rank's own rows is local arithmetic: gathers forward, no collective backward.

Tiles of s are made, used and forgotten, forward and again backward, so no 2N x 2N matrix is ever
held. Among a rank's own rows a tile above the diagonal also serves its mirror image, which halves
products and exponentials. Where 1/τ bounds s (normalised z) one shift serves all rows. Where
nothing bounds s, float32 has no digits left behind its point from 2²⁴ on: such z are taken as
float64 (`wide`), which costs twice the time on a CPU and more on most GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simclr_ray.distributed import collectives

TILE = 1024  # a 1024 x 1024 float32 tile is 4 MiB: it stays in a core's share of L3
LARGEST_SHIFT = 40.0  # exp(−2·40) is still a normal float32


class NTXentFunction(torch.autograd.Function):
    """Autograd function of NT-Xent, in tiles. Rows are interleaved: views of an image adjoin."""

    @staticmethod
    def forward(  # noqa: D102 - autograd's
        ctx: torch.autograd.function.FunctionCtx,
        z1: Tensor,
        z2: Tensor,
        temperature: float,
        normalize: bool,  # noqa: FBT001 - autograd passes by position
        wide: bool,  # noqa: FBT001
        counts: list[int],
    ) -> Tensor:
        z, norms = interleave(z1, z2, normalize=normalize, wide=wide)
        row_counts = [2 * count for count in counts]
        gathered = collectives.all_gather_rows(
            z, row_counts
        )  # [2N, D], this rank's rows in one piece
        first = sum(row_counts[: collectives.rank()])
        shift = 1 / temperature if normalize and 1 / temperature <= LARGEST_SHIFT else None
        sweep = _Sweep(z, gathered, first, temperature, shift)
        lse = sweep.log_sum_exp()  # [2n]
        all_lse = collectives.all_gather_rows(lse[:, None], row_counts).squeeze(1)  # [2N]
        aligned = (z[0::2] * z[1::2]).sum(1) / temperature  # [n]
        ctx.save_for_backward(z, norms, gathered, all_lse)
        ctx.rest = (first, temperature, shift, z1.dtype, z2.dtype)  # type: ignore[attr-defined] # torch declares none
        # row by row: two large sums would cancel. A loss is never below 0, but rounding may be
        each = (lse.view(-1, 2).sum(1) - 2 * aligned).clamp_(min=0)
        loss = each.sum() * (collectives.world_size() / len(gathered))
        return loss if z1.dtype == torch.float64 else loss.float()

    @staticmethod
    @once_differentiable
    def backward(  # noqa: D102 - autograd's
        ctx: torch.autograd.function.FunctionCtx, upstream: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        z, norms, gathered, all_lse = ctx.saved_tensors  # type: ignore[attr-defined] # torch declares none
        first, temperature, shift, *dtypes = ctx.rest  # type: ignore[attr-defined] # torch declares none
        with torch.autocast(z.device.type, enabled=False):  # whoever calls backward
            gradient = _Sweep(z, gathered, first, temperature, shift).gradient(all_lse)
        pairs, partners = gradient.view(-1, 2, z.shape[1]), z.view(-1, 2, z.shape[1])
        pairs[:, 0].sub_(partners[:, 1], alpha=2)
        pairs[:, 1].sub_(partners[:, 0], alpha=2)
        gradient.mul_(upstream * (collectives.world_size() / (len(gathered) * temperature)))
        if len(norms):  # through z / ‖z‖, in strips
            for rows in strips(0, len(z)):
                along = (z[rows] * gradient[rows]).sum(1, keepdim=True)
                gradient[rows].sub_(z[rows] * along).div_(norms[rows])
        return pairs[:, 0].to(dtypes[0]), pairs[:, 1].to(dtypes[1]), None, None, None, None


class _Sweep(NamedTuple):
    """Tiles of s: of a rank's own rows the upper triangle, and own rows against all others."""

    z: Tensor  # [2n, D], this rank's rows
    gathered: Tensor  # [2N, D]
    first: int  # z is gathered[first : first + 2n]
    temperature: float
    shift: float | None  # subtracted from s before exp; None: s has no bound

    def log_sum_exp(self) -> Tensor:
        """Return log Σ_j≠i exp(s_ij) of this rank's rows: [2n]."""
        lse = self.z.new_full((len(self.z),), 0.0 if self.shift is not None else float("-inf"))
        for rows, columns, mirrored in self._tiles():
            tile = self._tile(rows, columns)
            if self.shift is not None:  # sums of exp(s − shift) until the end
                tile.exp_()
                lse[rows] += tile.sum(1)
                if mirrored:
                    lse[self._own(columns)] += tile.sum(0)
                continue
            lse[rows] = torch.logaddexp(lse[rows], tile.logsumexp(1))
            if mirrored:
                mirror = self._own(columns)
                lse[mirror] = torch.logaddexp(lse[mirror], tile.logsumexp(0))
        return lse if self.shift is None else lse.log_().add_(self.shift)

    def gradient(self, all_lse: Tensor) -> Tensor:
        """Return Σ_j (p_ij + p_ji) z_j of this rank's rows: [2n, D]."""
        out = torch.zeros_like(self.z)
        # with one shift, p_ij + p_ji = exp(s_ij − shift)·(w_i + w_j)
        weights = None if self.shift is None else (self.shift - all_lse).exp_()
        for rows, columns, mirrored in self._tiles():
            tile = self._tile(rows, columns)
            own = slice(self.first + rows.start, self.first + rows.stop)
            if weights is not None:
                p = tile.exp_().mul_(weights[own, None] + weights[columns])
            else:
                p = (tile - all_lse[own, None]).clamp_(max=0).exp_()
                p += tile.sub_(all_lse[columns]).clamp_(max=0).exp_()
            out[rows].addmm_(p, self.gathered[columns])
            if mirrored:
                out[self._own(columns)].addmm_(p.T, self.z[rows])
        return out

    def _own(self, columns: slice) -> slice:
        """Return the rows of z that columns of this rank's part of `gathered` are."""
        return slice(columns.start - self.first, columns.stop - self.first)

    def _tile(self, rows: slice, columns: slice) -> Tensor:
        """Return s − shift of a tile, −inf where a row meets itself."""
        scaled = self.z[rows] / self.temperature
        right = self.gathered[columns].T
        if self.shift is None:
            tile = scaled @ right
        else:
            tile = torch.addmm(scaled.new_full((), -self.shift), scaled, right)
        if columns.start == self.first + rows.start:
            tile.fill_diagonal_(float("-inf"))
        return tile

    def _tiles(self) -> Iterator[tuple[slice, slice, bool]]:
        """Yield rows of z, columns of `gathered`, and whether the tile's mirror is wanted too."""
        own, stop = len(self.z), self.first + len(self.z)
        for rows in strips(0, own):
            for columns in strips(self.first + rows.start, stop):
                yield rows, columns, columns.start > self.first + rows.start
            for columns in [*strips(0, self.first), *strips(stop, len(self.gathered))]:
                yield rows, columns, False


def strips(start: int, stop: int) -> list[slice]:
    """Return [start, stop) cut into pieces of TILE."""
    return [slice(i, min(i + TILE, stop)) for i in range(start, stop, TILE)]


def interleave(
    z1: Tensor, z2: Tensor, *, normalize: bool, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """Return [2n, D], z1 in even rows, and [2n, 1] norms or [0]; float32, or float64 if `wide`."""
    n, dim = z1.shape
    dtype = torch.float64 if wide or z1.dtype == torch.float64 else torch.float32
    pairs = torch.empty(n, 2, dim, dtype=dtype, device=z1.device)
    pairs[:, 0], pairs[:, 1] = z1, z2
    z = pairs.view(2 * n, dim)
    if not normalize:
        return z, z.new_empty(0)
    norms = torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_(min=1e-12)
    return z.div_(norms), norms
