"""Losses that are sums over pairs of views, tile by tile, exact over the global batch.

Every anchor i of the 2N views has a term L_i of the products s_ij = z_i·z_j. Write
c_ij = ∂L_i/∂s_ij. s is symmetric, so

    dL/dz_i = 1/(2N) · Σ_j (c_ij + c_ji) z_j

and c_ji follows from s_ij and the `row_stats` of row j: its log-sum-exp, its positive, the negative
that it has chosen. As with NT-Xent (`ntxent`) these are gathered after z, and each rank has the
exact gradient of the global mean for its own rows without a collective in the backward pass. An
anchor's partner, the other view of its image, is always a row of the same rank.

Rows are interleaved: views 1 and 2 of image k are rows 2k and 2k + 1, so with x = i XOR j, x is 0
for a row and itself, 1 for partners, and odd for different views. No 2N x 2N matrix is held.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from simclr_ray.distributed import collectives
from simclr_ray.nn.ntxent import interleave, strips


def loss(
    z1: Tensor,
    z2: Tensor,
    pair_loss: PairLoss,
    counts: list[int],
    *,
    normalize: bool = True,
    wide: bool = False,
    labels: Tensor | None = None,
) -> Tensor:
    """Return R/(2N) times the sum of `pair_loss` over this rank's anchors. Collective: gathers.

    Args:
        z1: [n, D].
        z2: [n, D].
        pair_loss: L_i.
        counts: n of each rank.
        normalize: Divide each z by its l2 norm first.
        wide: Compute in float64 (see `ntxent`).
        labels: int64 [n], for `Supervised`; below 0: none.
    """
    classes = _classes(labels, counts) if labels is not None else None
    return _Pairwise.apply(z1, z2, pair_loss, normalize, wide, counts, classes)  # type: ignore[no-any-return] # torch's


class Tile(NamedTuple):
    """Some of this rank's rows against some of all rows."""

    rows: slice  # of the rank's
    columns: slice  # of all
    s: Tensor  # [t, c]
    x: Tensor  # int32 [t, c], i XOR j


class Pairs(NamedTuple):
    """This rank's rows among all."""

    z: Tensor  # [2n, D]
    gathered: Tensor  # [2N, D]
    first: int  # z is gathered[first : first + 2n]
    classes: Tensor | None  # int64 [2N]

    def tiles(self) -> Iterator[Tile]:
        """Yield all pairs, a tile at a time."""
        number = torch.arange(len(self.gathered), dtype=torch.int32, device=self.z.device)
        for rows in strips(0, len(self.z)):
            for columns in strips(0, len(self.gathered)):
                s = self.z[rows] @ self.gathered[columns].T
                yield Tile(rows, columns, s, number[self.own(rows), None] ^ number[columns])

    def own(self, rows: slice) -> slice:
        """Return the places of the rank's `rows` among all."""
        return slice(self.first + rows.start, self.first + rows.stop)

    def positives(self) -> Tensor:
        """Return s of each row and its partner: [2n]."""
        return (self.z[0::2] * self.z[1::2]).sum(1).repeat_interleave(2)


class RowTerms(NamedTuple):
    """What a `PairLoss` gives for this rank's rows."""

    values: Tensor  # [2n], L_i
    positive_grad: Tensor  # [2n], −∂L_i/∂s_i,partner(i), so far as `grad_rows` leaves it out
    row_stats: Tensor  # [2n, S], what other ranks need of a row


class PairLoss(ABC):
    """L_i. `scale` divides s: τ, or 1."""

    def __init__(self, scale: float, *, other_view_only: bool = False) -> None:
        self.scale, self.other_view_only = scale, other_view_only

    @abstractmethod
    def terms(self, pairs: Pairs) -> RowTerms:
        """Return the terms of this rank's rows."""

    @abstractmethod
    def grad_rows(self, pairs: Pairs, row_stats: Tensor) -> Tensor:
        """Return Σ_j (c_ij + c_ji) z_j of this rank's rows, [2n, D], by all rows' stats."""

    def negative(self, x: Tensor) -> Tensor:
        """Return which pairs are an anchor and a negative of it: bool [t, c]."""
        return (x > 1) & (x & 1 == 1) if self.other_view_only else x > 1

    def num_negatives(self, pairs: Pairs) -> int:
        """Return the negatives of an anchor."""
        others = len(pairs.gathered) - 2
        return max(1, others // 2 if self.other_view_only else others)


class _Dense(PairLoss):
    """A `PairLoss` whose pairs all count: one weight for each."""

    @abstractmethod
    def weights(self, tile: Tile, pairs: Pairs, row_stats: Tensor) -> Tensor:
        """Return c_ij + c_ji, partners left out as `RowTerms.positive_grad` says: [t, c]."""

    def grad_rows(self, pairs: Pairs, row_stats: Tensor) -> Tensor:
        """Return the sum over all tiles."""
        out = torch.zeros_like(pairs.z)
        for tile in pairs.tiles():
            weights = self.weights(tile, pairs, row_stats)
            out[tile.rows].addmm_(weights, pairs.gathered[tile.columns])
        return out


class Softmax(_Dense):
    """−w·u⁺ + log Σ exp(u), u = s/τ: NT-Xent, and DCL whose sum leaves the positive out.

    Args:
        scale: τ.
        other_view_only: The sum is over the positive and the negatives of the other view.
        decoupled: The sum is over negatives alone.
        sigma: Above 0, w = 2 − N·softmax(s⁺/σ) over the images (DCLW), taken as constant; else 1.
    """

    def __init__(
        self,
        scale: float,
        *,
        other_view_only: bool = False,
        decoupled: bool = False,
        sigma: float = 0.0,
    ) -> None:
        super().__init__(scale, other_view_only=other_view_only)
        self.decoupled, self.sigma = decoupled, sigma

    def terms(self, pairs: Pairs) -> RowTerms:
        """Return the terms of this rank's rows."""
        lse = pairs.z.new_full((len(pairs.z),), float("-inf"))
        for tile in pairs.tiles():
            lse[tile.rows] = torch.logaddexp(lse[tile.rows], self._logits(tile).logsumexp(1))
        w = self._weights_of_positives(pairs)
        values = lse - w * pairs.positives() / self.scale
        if not self.decoupled:
            values.clamp_(min=0)  # rounding alone puts a row below
        return RowTerms(values, w / self.scale, lse[:, None])

    def weights(self, tile: Tile, pairs: Pairs, row_stats: Tensor) -> Tensor:
        """Return c_ij + c_ji: [t, c]."""
        u, lse = self._logits(tile), row_stats[:, 0]
        p = (u - lse[pairs.own(tile.rows), None]).exp_()
        return p.add_(u.sub_(lse[tile.columns]).exp_()).div_(self.scale)

    def _logits(self, tile: Tile) -> Tensor:
        """Return u, −∞ for what is no part of the sum."""
        summed = self.negative(tile.x)
        if not self.decoupled:
            summed |= tile.x == 1
        return tile.s.div_(self.scale).masked_fill_(~summed, float("-inf"))

    def _weights_of_positives(self, pairs: Pairs) -> Tensor:
        if not self.sigma:
            return pairs.z.new_ones(len(pairs.z))
        positives = (pairs.gathered[0::2] * pairs.gathered[1::2]).sum(1)  # [N]
        weights = 2 - len(positives) * F.softmax(positives / self.sigma, dim=0)
        return weights.repeat_interleave(2)[pairs.own(slice(0, len(pairs.z)))]


class Supervised(_Dense):
    """log Σ exp(u) − mean of u over the views of the same class (SupCon)."""

    def terms(self, pairs: Pairs) -> RowTerms:
        """Return the terms of this rank's rows."""
        lse = pairs.z.new_full((len(pairs.z),), float("-inf"))
        sums, counts = torch.zeros_like(lse), torch.zeros_like(lse)
        for tile in pairs.tiles():
            same = self._same(tile, pairs)
            u = tile.s.div_(self.scale)
            sums[tile.rows] += u.masked_fill(~same, 0).sum(1)
            counts[tile.rows] += same.sum(1)
            u.masked_fill_(tile.x == 0, float("-inf"))
            lse[tile.rows] = torch.logaddexp(lse[tile.rows], u.logsumexp(1))
        values = (lse - sums / counts).clamp_(min=0)  # as in `Softmax`
        return RowTerms(values, torch.zeros_like(lse), torch.stack([lse, 1 / counts], 1))

    def weights(self, tile: Tile, pairs: Pairs, row_stats: Tensor) -> Tensor:
        """Return c_ij + c_ji: [t, c]."""
        own = pairs.own(tile.rows)
        u = tile.s.div_(self.scale).masked_fill_(tile.x == 0, float("-inf"))
        p = (u - row_stats[own, 0, None]).exp_() + (u - row_stats[tile.columns, 0]).exp_()
        label_weight = row_stats[own, 1, None] + row_stats[tile.columns, 1]
        return p.sub_(label_weight * self._same(tile, pairs)).div_(self.scale)

    @staticmethod
    def _same(tile: Tile, pairs: Pairs) -> Tensor:
        assert pairs.classes is not None
        own = pairs.classes[pairs.own(tile.rows), None]
        return (own == pairs.classes[tile.columns]) & (tile.x > 0)


class Logistic(_Dense):
    """softplus(−u⁺) + mean over negatives of softplus(u) (NT-Logistic)."""

    def terms(self, pairs: Pairs) -> RowTerms:
        """Return the terms of this rank's rows."""
        positive = pairs.positives() / self.scale
        sums = torch.zeros_like(positive)
        for tile in pairs.tiles():
            each = F.softplus(tile.s.div_(self.scale))
            sums[tile.rows] += each.masked_fill_(~self.negative(tile.x), 0).sum(1)
        values = F.softplus(-positive) + sums / self.num_negatives(pairs)
        positive_grad = torch.sigmoid(-positive) / self.scale
        return RowTerms(values, positive_grad, positive.new_empty(len(positive), 0))

    def weights(self, tile: Tile, pairs: Pairs, row_stats: Tensor) -> Tensor:  # noqa: ARG002 - nothing
        """Return c_ij + c_ji: [t, c]."""
        weight = 2 / (self.num_negatives(pairs) * self.scale)
        w = tile.s.div_(self.scale).sigmoid_().mul_(weight)
        return w.masked_fill_(~self.negative(tile.x), 0)


class Triplet(_Dense):
    """Mean over negatives of max(s − s⁺ + m, 0)."""

    def __init__(self, margin: float, *, other_view_only: bool = False) -> None:
        super().__init__(1.0, other_view_only=other_view_only)
        self.margin = margin

    def terms(self, pairs: Pairs) -> RowTerms:
        """Return the terms of this rank's rows."""
        positive = pairs.positives()
        sums, active = torch.zeros_like(positive), torch.zeros_like(positive)
        for tile in pairs.tiles():
            over = tile.s - positive[tile.rows, None] + self.margin
            over.clamp_(min=0).masked_fill_(~self.negative(tile.x), 0)
            sums[tile.rows] += over.sum(1)
            active[tile.rows] += (over > 0).sum(1)
        count = self.num_negatives(pairs)
        return RowTerms(sums / count, active / count, positive[:, None])

    def weights(self, tile: Tile, pairs: Pairs, row_stats: Tensor) -> Tensor:
        """Return c_ij + c_ji: [t, c]."""
        over = tile.s + self.margin
        w = (over > row_stats[pairs.own(tile.rows), 0, None]).to(tile.s.dtype)
        w += over > row_stats[tile.columns, 0]
        return w.masked_fill_(~self.negative(tile.x), 0).div_(self.num_negatives(pairs))


class _Mined(PairLoss):
    """A `PairLoss` with one negative an anchor, whose row number is among `row_stats`.

    A row knows the number of the negative that it has chosen (−1: none) and ∂L_i/∂s of it. Floats
    hold row numbers exactly up to 2²⁴.
    """

    margin: float | None = None  # negatives further below the positive do not count

    def terms(self, pairs: Pairs) -> RowTerms:
        """Return the terms of this rank's rows."""
        positive = pairs.positives()
        best = torch.full_like(positive, float("-inf"))
        chosen = torch.full_like(positive, -1)
        for tile in pairs.tiles():
            most = positive[tile.rows, None]
            fits = self.negative(tile.x) & (tile.s < most)
            if self.margin is not None:
                fits &= tile.s > most - self.margin
            value, place = tile.s.masked_fill_(~fits, float("-inf")).max(1)
            nearer = value > best[tile.rows]
            place = (place + tile.columns.start).to(chosen.dtype)
            chosen[tile.rows] = torch.where(nearer, place, chosen[tile.rows])
            best[tile.rows] = torch.where(nearer, value, best[tile.rows])
        has_negative = chosen >= 0
        negative = best.masked_fill(~has_negative, 0)
        values, positive_grad, negative_grad = self.mined(positive, negative, has_negative)
        return RowTerms(values, positive_grad, torch.stack([chosen, negative_grad], 1))

    @abstractmethod
    def mined(
        self, positive: Tensor, negative: Tensor, has_negative: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return L_i, −∂L_i/∂s⁺ and ∂L_i/∂s⁻ where there `has_negative`: [2n] each."""

    def grad_rows(self, pairs: Pairs, row_stats: Tensor) -> Tensor:
        """Return what the chosen negatives and those that chose these rows add."""
        chosen, weight = row_stats[:, 0].long(), row_stats[:, 1:]
        own = pairs.own(slice(0, len(pairs.z)))
        out = pairs.gathered[chosen[own].clamp(min=0)] * weight[own]  # weight 0 where none
        # the anchors that have chosen one of this rank's rows; others add 0 to row 0
        here = chosen - pairs.first
        mine = ((here >= 0) & (here < len(pairs.z)))[:, None]
        added = torch.where(mine, weight * pairs.gathered, 0)
        return out.index_add_(0, here.clamp(0, len(pairs.z) - 1), added)


class MinedLogistic(_Mined):
    """softplus(−u⁺), and softplus(u) of the most similar negative below the positive."""

    def mined(
        self, positive: Tensor, negative: Tensor, has_negative: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return L_i, −∂L_i/∂s⁺ and ∂L_i/∂s⁻: [2n] each."""
        u, v = positive / self.scale, negative / self.scale
        values = F.softplus(-u) + F.softplus(v) * has_negative
        return values, torch.sigmoid(-u) / self.scale, torch.sigmoid(v) * has_negative / self.scale


class MinedTriplet(_Mined):
    """s⁻ − s⁺ + m of the most similar negative that is within the margin below the positive."""

    def __init__(self, margin: float, *, other_view_only: bool = False) -> None:
        super().__init__(1.0, other_view_only=other_view_only)
        self.margin = margin

    def mined(
        self, positive: Tensor, negative: Tensor, has_negative: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return L_i, −∂L_i/∂s⁺ and ∂L_i/∂s⁻: [2n] each."""
        assert self.margin is not None
        active = has_negative.to(positive.dtype)
        return (negative - positive + self.margin) * active, active, active


class _Pairwise(torch.autograd.Function):
    """Autograd function: the terms of a `PairLoss` forward, its weights backward."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        z1: Tensor,
        z2: Tensor,
        pair_loss: PairLoss,
        normalize: bool,  # noqa: FBT001 - autograd passes by position
        wide: bool,  # noqa: FBT001
        counts: list[int],
        classes: Tensor | None,
    ) -> Tensor:
        z, norms = interleave(z1, z2, normalize=normalize, wide=wide)
        row_counts = [2 * count for count in counts]
        gathered = collectives.all_gather_rows(z, row_counts)
        if len(gathered) < 4:
            raise ValueError("one image has no negatives; the global batch must hold two or more")
        pairs = Pairs(z, gathered, sum(row_counts[: collectives.rank()]), classes)
        values, positive_grad, row_stats = pair_loss.terms(pairs)
        all_row_stats = collectives.all_gather_rows(row_stats, row_counts)  # [2N, S]
        ctx.save_for_backward(norms, positive_grad, all_row_stats)
        ctx.rest = (pair_loss, pairs, z1.dtype, z2.dtype)  # type: ignore[attr-defined] # torch declares none
        loss = values.sum() * (collectives.world_size() / len(gathered))
        return loss if z1.dtype == torch.float64 else loss.float()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, upstream: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        norms, positive_grad, row_stats = ctx.saved_tensors  # type: ignore[attr-defined] # torch declares none
        pair_loss, pairs, *dtypes = ctx.rest  # type: ignore[attr-defined] # torch declares none
        z = pairs.z
        with torch.autocast(z.device.type, enabled=False):  # whoever calls backward
            gradient = pair_loss.grad_rows(pairs, row_stats)
        partners = z.view(-1, 2, z.shape[1]).flip(1).reshape_as(z)
        both = positive_grad.view(-1, 2).sum(1).repeat_interleave(2)[:, None]
        gradient -= both * partners
        gradient *= upstream * (collectives.world_size() / len(pairs.gathered))
        if len(norms):  # through z / ‖z‖
            gradient = (gradient - z * (z * gradient).sum(1, keepdim=True)) / norms
        views = gradient.view(-1, 2, z.shape[1])
        return views[:, 0].to(dtypes[0]), views[:, 1].to(dtypes[1]), *[None] * 5


def _classes(labels: Tensor, counts: list[int]) -> Tensor:
    """Return the class of all rows, one of its own if unlabelled: int64 [2N]. Collective."""
    all_labels = collectives.all_gather_rows(labels, counts)  # [N]
    alone = -1 - torch.arange(len(all_labels), device=labels.device)
    return torch.where(all_labels < 0, alone, all_labels).repeat_interleave(2)
