"""Incremental quantile spline: a quantile function of straight pieces between exponential tails."""

import math
from typing import Any, Dict, List, Optional, Tuple

import torch
from gluonts.core.component import validated
from scipy import special as scipy_special
from torch import Tensor
from torch.distributions import constraints

from .head import Head
from .numerics import softplus_relative
from .univariate import UnivariateDistribution

_SMALLEST = 1e-4


class QuantileSpline(UnivariateDistribution):
    """Distribution with a piecewise linear quantile function and exponential tails.

    Like the incremental spline quantile functions of Park et al. (2022), with one spline over all
    knots: levels, heights and therefore quantiles are in order by construction.

    Parameters
    ----------
    levels
        Levels of the knots ``[…, knot]``, ascending within (0, 1).
    heights
        Quantiles at the knots ``[…, knot]``, ascending.
    lower_tail, upper_tail
        Mean excess of the tails ``[…]``.
    """

    support = constraints.real
    interior = 0.0
    vector_parameters = ("levels", "heights")

    def __init__(
        self, levels: Tensor, heights: Tensor, lower_tail: Tensor, upper_tail: Tensor
    ) -> None:
        self.levels, self.heights = levels, heights
        self.lower_tail, self.upper_tail = lower_tail, upper_tail
        super().__init__(lower_tail, levels[..., 0], heights[..., 0])

    def _piece(self, knots: Tensor, at: Tensor) -> Tuple[Tensor, ...]:
        """Levels and heights at the ends of the piece that holds ``at``, measured by ``knots``."""
        number = knots.shape[-1]
        index = (at.unsqueeze(-1) >= knots).sum(dim=-1).clamp(1, number - 1).unsqueeze(-1)
        ends = []
        for values in (self.levels, self.heights):
            values = values.expand(*index.shape[:-1], number)
            ends += [values.gather(-1, index - 1), values.gather(-1, index)]
        return tuple(end.squeeze(-1) for end in ends)

    def _cdf(self, value: Tensor) -> Tensor:
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        begin, end, bottom, top = self._piece(self.heights, value)
        inner = begin + (end - begin) * ((value - bottom) / (top - bottom)).clamp(0.0, 1.0)
        below = ((value - self.heights[..., 0]) / self.lower_tail).clamp_max(0.0)
        above = ((self.heights[..., -1] - value) / self.upper_tail).clamp_max(0.0)
        low = self.levels[..., 0] * torch.exp(below)
        high = 1 - (1 - self.levels[..., -1]) * torch.exp(above)
        return torch.where(below < 0, low, torch.where(above < 0, high, inner))

    def _log_prob(self, value: Tensor) -> Tensor:
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        begin, end, bottom, top = self._piece(self.heights, value)
        inner = torch.log((end - begin) / (top - bottom))
        below = ((value - self.heights[..., 0]) / self.lower_tail).clamp_max(0.0)
        above = ((self.heights[..., -1] - value) / self.upper_tail).clamp_max(0.0)
        low = torch.log(self.levels[..., 0] / self.lower_tail) + below
        high = torch.log1p(-self.levels[..., -1]) - self.upper_tail.log() + above
        return torch.where(below < 0, low, torch.where(above < 0, high, inner))

    def _icdf(self, level: Tensor) -> Tensor:
        level = level.expand(torch.broadcast_shapes(level.shape, self.batch_shape))
        begin, end, bottom, top = self._piece(self.levels.to(level.dtype), level)
        inner = bottom + (top - bottom) * ((level - begin) / (end - begin)).clamp(0.0, 1.0)
        first, last = self.levels[..., 0], self.levels[..., -1]
        low = self.lower_tail * torch.log(level / first).clamp_max(0.0)
        high = self.upper_tail * torch.log((1 - level) / (1 - last)).clamp_max(0.0)
        return torch.where(
            level < first,
            self.heights[..., 0] + low,
            torch.where(level > last, self.heights[..., -1] - high, inner),
        )

    @property
    def mean(self) -> Tensor:
        first, last = self.levels[..., 0], 1 - self.levels[..., -1]
        middle = 0.5 * (self.heights[..., 1:] + self.heights[..., :-1])
        pieces = (middle * self.levels.diff(dim=-1)).sum(dim=-1)
        low = first * (self.heights[..., 0] - self.lower_tail)
        return pieces + low + last * (self.heights[..., -1] + self.upper_tail)

    @property
    def variance(self) -> Tensor:
        centred = self.heights - self.mean.unsqueeze(-1)
        low, high = centred[..., :-1], centred[..., 1:]
        squares = (low.square() + low * high + high.square()) / 3
        pieces = (squares * self.levels.diff(dim=-1)).sum(dim=-1)
        tails = torch.zeros_like(pieces)
        for share, distance, excess in (
            (self.levels[..., 0], -centred[..., 0], self.lower_tail),
            (1 - self.levels[..., -1], centred[..., -1], self.upper_tail),
        ):
            tails = tails + share * ((distance + excess).square() + excess.square())
        return pieces + tails

    def crps(self, value: Tensor) -> Tensor:
        """In closed form, as an integral over the levels (Gasthaus et al. 2019, eq. 8).

        With quantile function Q and ``a`` the cdf at the value, it is
        ``value (2 a - 1) + 2 ∫ Q over (a, 1) - 2 ∫ u Q(u) over (0, 1)``.
        """
        with torch.no_grad():
            at = self.cdf(value)  # The score is stationary in it.
        levels, heights = self.levels, self.heights
        first, last = levels[..., 0], 1 - levels[..., -1]
        begin, end = levels[..., :-1], levels[..., 1:]
        slope = heights.diff(dim=-1) / (end - begin)
        start = torch.minimum(torch.maximum(at.unsqueeze(-1), begin), end)
        middle = heights[..., :-1] + slope * (0.5 * (start + end) - begin)
        beyond = ((end - start) * middle).sum(dim=-1)
        # Of a piece from b to e with heights h + s (u - b), the integral of u times its height.
        squares, cubes = (end.square() - begin.square()) / 2, (end.pow(3) - begin.pow(3)) / 3
        weighted = ((heights[..., :-1] - slope * begin) * squares + slope * cubes).sum(dim=-1)
        # Kept off 0, where x log x has no derivative.
        tiny = torch.finfo(at.dtype).tiny
        rest = torch.minimum((1 - at).clamp_min(tiny), last)
        high = rest * (heights[..., -1] + self.upper_tail)
        beyond = beyond + high - self.upper_tail * torch.xlogy(rest, rest / last)
        part = torch.minimum(at.clamp_min(tiny), first)
        low = heights[..., 0] - self.lower_tail
        partial = part * low + self.lower_tail * torch.xlogy(part, part / first)
        beyond = beyond + first * low - partial
        weighted = weighted + 0.5 * first.square() * (heights[..., 0] - 0.5 * self.lower_tail)
        top = heights[..., -1] + self.upper_tail
        squared = 0.5 * last.square() * (heights[..., -1] + 0.5 * self.upper_tail)
        weighted = weighted + last * top - squared
        return value * (2 * at - 1) + 2 * beyond - 2 * weighted


class QuantileSplineOutput(Head):
    """Quantile function of straight pieces, trained by its continuous ranked probability score.

    Where a network says 0, the knots are those of the standard normal distribution.

    Parameters
    ----------
    quantiles
        Levels of the fixed knots, in ascending order, at least two.
    num_pieces
        Pieces between two fixed knots, whose levels are learned.
    loss
        The score; the density jumps at the knots, so that its gradient would mislead.

    Raises
    ------
    ValueError
        If the levels are not ascending within (0, 1), or ``num_pieces`` is not positive.
    """

    distr_cls = QuantileSpline
    losses = ("crps",)

    @validated()
    def __init__(
        self,
        quantiles: Optional[List[float]] = None,
        num_pieces: int = 2,
        loss: str = "crps",
    ) -> None:
        super().__init__(loss=loss)
        self.quantiles = checked_levels(quantiles or _DEFAULT_LEVELS)
        if len(self.quantiles) < 2 or sorted(set(self.quantiles)) != self.quantiles:
            raise ValueError(f"quantiles={quantiles} must be at least two levels, ascending")
        if num_pieces < 1:
            raise ValueError(f"num_pieces={num_pieces} must be at least 1")
        self.num_pieces = num_pieces

    @property
    def args_dim(self) -> Dict[str, int]:
        pieces = (len(self.quantiles) - 1) * self.num_pieces
        return {"loc": 1, "increments": pieces, "positions": pieces, "tails": 2}

    def domain_map(self, *args: Tensor) -> Tuple[Tensor, ...]:
        """Levels and heights of the knots ``[…, knot]``, and the two tails ``[…]``."""
        loc, increments, positions, tails = args
        fixed = torch.tensor(self.quantiles, dtype=loc.dtype, device=loc.device)
        pieces = (len(self.quantiles) - 1, self.num_pieces)
        share = positions.unflatten(-1, pieces).softmax(dim=-1).clamp_min(1e-3)
        share = (share / share.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
        width = fixed.diff().unsqueeze(-1)
        levels = (fixed[:-1].unsqueeze(-1) + width * share).flatten(-2)
        levels = torch.cat([fixed[:1].expand_as(loc), levels], dim=-1)
        typical = torch.special.ndtri(fixed).diff() / self.num_pieces
        growth = softplus_relative(increments.unflatten(-1, pieces)).clamp_min(_SMALLEST)
        heights = (growth * typical.unsqueeze(-1)).flatten(-2).cumsum(dim=-1)
        heights = torch.cat([torch.zeros_like(loc), heights], dim=-1)
        middle = len(self.quantiles) // 2 * self.num_pieces
        offset = torch.special.ndtri(fixed[len(self.quantiles) // 2])
        heights = heights - heights[..., middle : middle + 1] + loc + offset
        typical_tails = loc.new_tensor(
            [_typical_tail(self.quantiles[0]), _typical_tail(1 - self.quantiles[-1])]
        )
        excess = softplus_relative(tails).clamp_min(_SMALLEST) * typical_tails
        return levels, heights, excess[..., 0], excess[..., 1]


_DEFAULT_LEVELS = [0.025, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.975]


def _typical_tail(level: float) -> float:
    """Mean excess with which an exponential tail is as steep as the standard normal's."""
    z = float(scipy_special.ndtri(level))
    return level * math.sqrt(2 * math.pi) * math.exp(0.5 * z * z)


def checked_levels(levels: Any) -> List[float]:
    """Levels of quantiles, as numbers.

    Raises
    ------
    ValueError
        If there are none, or one outside (0, 1).
    """
    levels = [float(level) for level in levels]
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"quantiles={levels} must be levels between 0 and 1")
    return levels
