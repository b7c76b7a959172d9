"""NT-Xent over the global batch, exact, without a gradient collective and without the matrix.

SimCLR (Chen et al. 2020, arXiv:2002.05709) eq. 1. With all z (2N rows) and all row
log-sum-exps gathered, the gradient of the *global* mean with respect to a rank's own rows is
local arithmetic. Write s_ij = z_i·z_j/τ, p_ij = exp(s_ij − lse_i). Row i's own term gives
Σ_j p_ij z_j − z_pos(i); as a column of row j it gives Σ_j p_ji z_i's partner, and s is symmetric,
so p_ji = exp(s_ij − lse_j) comes from the same tile:

    dL/dz_i = 1/(2N·τ) · [ Σ_j (p_ij + p_ji) z_j − 2 z_pos(i) ]

Tiles are recomputed in the backward pass, so no 2N x 2N matrix is ever held.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_ray import dist

TILE_ROWS = 512  # a 512 x 2048 float32 tile is 4 MiB: it stays in a core's share of L3
TILE_COLUMNS = 2048


class NTXentLoss(nn.Module):
    """The normalised temperature-scaled cross entropy of the global batch (SimCLR eq. 1).

    Contract. The value is R/(2N) times the sum over this rank's own anchors: its own mean when
    ranks hold equally many images, and the paper's L when averaged over ranks. The gradient to
    z1, z2 is R times that of the global mean, so gradients must afterwards be *averaged* over
    ranks, as DDP does. The authors' code returns twice this value.

    Args:
        temperature: τ > 0.
        normalize: Divide each z by its l2 norm first (Table 5 has both).
        global_batch_size: N, when ranks hold the batch plan's shares of it; 0: counts are
            exchanged at each call, which on GPU waits for the device.
    """

    def __init__(
        self, temperature: float = 0.1, *, normalize: bool = True, global_batch_size: int = 0
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature = temperature
        self.normalize = normalize
        self.global_batch_size = global_batch_size

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Return the loss, a float32 scalar (float64 for float64 input). Collective: two gathers.

        Args:
            z1: [n, D], this rank's projections of view 1, not normalised, any float dtype.
            z2: [n, D], those of view 2, row by row the same images.

        Raises:
            ValueError: The shapes differ or are not [n, D].
        """
        with torch.autocast(z1.device.type, enabled=False):
            z = _prepare(z1, z2, normalize=self.normalize)  # [2n, D]
            counts = self._counts(len(z1), z.device)
            loss: Tensor = _NTXent.apply(z, self.temperature, counts)
        return loss

    def _counts(self, local: int, device: torch.device) -> list[int]:
        if not self.global_batch_size:
            return dist.row_counts(local, device)
        ranks = range(dist.world_size())
        shares = [dist.share(self.global_batch_size, r, dist.world_size()) for r in ranks]
        return [last - first for first, last in shares]


class ContrastiveMetrics(NamedTuple):
    """What the authors log beside the loss, from view 1 against all of view 2."""

    accuracy: Tensor  # scalar in [0, 1]
    entropy: Tensor  # scalar, nats


@torch.no_grad()
def contrastive_metrics(
    z1: Tensor, z2: Tensor, temperature: float, *, normalize: bool = True
) -> ContrastiveMetrics:
    """Return accuracy and entropy of picking a view's partner among the N of the other view.

    As the authors log them: N-way, without the 2N − 2 negatives of the own view; means over the
    global batch. Arguments as for `NTXentLoss.forward`. Collective.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z = _prepare(z1, z2, normalize=normalize)
        counts = dist.row_counts(len(z1), z.device)
        others = dist.all_gather_rows(z[len(z1) :], counts)  # [N, D]
        first = sum(counts[: dist.rank()])
        sums = z.new_zeros(2)
        for start in range(0, len(z1), TILE_ROWS):
            rows = z[start : min(start + TILE_ROWS, len(z1))]
            logits = rows @ others.T / temperature  # [t, N]
            labels = torch.arange(first + start, first + start + len(rows), device=z.device)
            log_p = F.log_softmax(logits, dim=1)
            sums[0] += (logits.argmax(1) == labels).sum()
            sums[1] -= (log_p.exp() * log_p).sum()
        accuracy, entropy = dist.all_reduce_sum(sums) / sum(counts)
    return ContrastiveMetrics(accuracy, entropy)


def _prepare(z1: Tensor, z2: Tensor, *, normalize: bool) -> Tensor:
    """Return [2n, D] in float32 or float64, all of view 1 first."""
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must both be [n, D], got {[*z1.shape]} and {[*z2.shape]}")
    z = torch.cat([z1, z2])
    z = z if z.dtype == torch.float64 else z.float()
    return F.normalize(z, dim=1, eps=1e-12) if normalize else z


class _NTXent(torch.autograd.Function):
    """The streaming core on this rank's prepared rows."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, z: Tensor, temperature: float, counts: list[int]
    ) -> Tensor:
        n, total = len(z) // 2, sum(counts)
        # [2N, D]: all ranks' view 1, then all ranks' view 2
        everyone = _gather_views(z.detach(), counts)
        first = sum(counts[: dist.rank()])
        mine = torch.arange(first, first + n, device=z.device)
        own = torch.cat([mine, mine + total])  # [2n], where this rank's rows stand in `everyone`
        positive = (own + total) % (2 * total)
        rows = z.detach() / temperature
        lse = _row_log_sum_exp(rows, everyone, own)  # [2n]
        aligned = (rows * everyone[positive]).sum(1)
        all_lse = _gather_views(lse[:, None], counts).squeeze(1)  # [2N]
        ctx.save_for_backward(z, everyone, lse, all_lse, own, positive)
        ctx.temperature, ctx.total = temperature, total  # type: ignore[attr-defined]
        return (lse - aligned).sum() * (dist.world_size() / (2 * total))

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, upstream: Tensor
    ) -> tuple[Tensor, None, None]:
        z, everyone, lse, all_lse, own, positive = ctx.saved_tensors  # type: ignore[attr-defined]
        temperature, total = ctx.temperature, ctx.total  # type: ignore[attr-defined]
        gradient = everyone[positive].mul_(-2.0)
        rows = z / temperature
        for i in range(0, len(rows), TILE_ROWS):
            for j in range(0, len(everyone), TILE_COLUMNS):
                tile, columns = _tile(rows, everyone, own, (i, j))
                p = (tile - lse[i : i + len(tile), None]).exp_()  # p_ij, and then + p_ji
                p += tile.sub_(all_lse[j : j + len(columns)]).exp_()
                gradient[i : i + len(tile)].addmm_(p, columns)
        scale = dist.world_size() / (2 * total * temperature)
        return gradient.mul_(upstream * scale), None, None


def _gather_views(rows: Tensor, counts: list[int]) -> Tensor:
    """Return all ranks' rows of view 1, then of view 2: [2N, C] for [2n, C]. One collective."""
    side_by_side = torch.cat(rows.chunk(2), dim=1)  # [n, 2C]
    return torch.cat(dist.all_gather_rows(side_by_side, counts).chunk(2, dim=1))


def _row_log_sum_exp(rows: Tensor, everyone: Tensor, own: Tensor) -> Tensor:
    """Return log Σ_j≠own exp(row·z_j) of each row, streamed over column tiles: [2n]."""
    lse = rows.new_full((len(rows),), float("-inf"))
    for i in range(0, len(rows), TILE_ROWS):
        for j in range(0, len(everyone), TILE_COLUMNS):
            tile, _ = _tile(rows, everyone, own, (i, j))
            lse[i : i + len(tile)] = torch.logaddexp(lse[i : i + len(tile)], tile.logsumexp(1))
    return lse


def _tile(
    rows: Tensor, everyone: Tensor, own: Tensor, start: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return s of one tile with each row's similarity to itself at −inf, and its columns' z."""
    i, j = start
    columns = everyone[j : j + TILE_COLUMNS]
    tile = rows[i : i + TILE_ROWS] @ columns.T  # [t, c]
    at_self = torch.arange(j, j + len(columns), device=rows.device) == own[i : i + len(tile), None]
    return tile.masked_fill_(at_self, float("-inf")), columns
