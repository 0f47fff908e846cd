"""Normal distribution between bounds."""

import math
from typing import Optional, Tuple

import numpy as np
import torch
from gluonts.core.component import validated
from scipy import special as scipy_special
from torch import Tensor
from torch.distributions import constraints

from .head import Head, positive, real
from .numerics import log_ndtr, of_arrays
from .univariate import UnivariateDistribution, moment_nodes

# Beyond so many deviations there is no probability left; stands for an infinite bound.
_FAR = 1e4
_CANCELLATION = -5.0


class TruncatedNormal(UnivariateDistribution):
    """Normal distribution given that it lies between two bounds.

    Parameters
    ----------
    loc, scale
        Mean and standard deviation before the truncation.
    lower, upper
        The bounds; infinite for none.
    """

    def __init__(self, loc: Tensor, scale: Tensor, lower: float, upper: float) -> None:
        self.loc, self.scale = loc, scale
        self.lower, self.upper = lower, upper
        super().__init__(loc, scale)
        begin, end = (lower - loc) / scale, (upper - loc) / scale
        if math.isinf(lower):
            begin = end.detach().clamp_max(0.0) - _FAR
        if math.isinf(upper):
            end = begin.detach().clamp_min(0.0) + _FAR
        # Above the mean the mirrored law is computed, because lower tails are exact.
        self.mirrored = begin > 0
        self.begin = torch.where(self.mirrored, -end, begin)
        self.end = torch.where(self.mirrored, -begin, end)
        self.log_below = log_ndtr(self.begin)
        self.log_mass = _log_difference(log_ndtr(self.end), self.log_below)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.interval(self.lower, self.upper)

    @property
    def interior(self) -> float:  # type: ignore[override]
        return _inside(self.lower, self.upper)

    def _moments(self) -> Tuple[Tensor, Tensor]:
        """Mean and variance of the standardised, perhaps mirrored law (Johnson et al. 1994)."""
        begin, end = self.begin.to(torch.float64), self.end.to(torch.float64)
        log_mass = _log_difference(log_ndtr(end), log_ndtr(begin))
        constant = 0.5 * math.log(2 * math.pi) + log_mass
        at_begin = torch.exp(-0.5 * begin.square() - constant)
        at_end = torch.exp(-0.5 * end.square() - constant)
        mean = at_begin - at_end
        variance = 1 + begin * at_begin - end * at_end - mean.square()
        # Far from the mean before the truncation these formulas cancel.
        levels, weights = (t.to(begin.device) for t in moment_nodes(begin.dim()))
        quantiles = of_arrays(_quantile, begin, end, levels)
        mean_far = (weights * quantiles).sum(dim=0)
        variance_far = (weights * (quantiles - mean_far).square()).sum(dim=0)
        far = end < _CANCELLATION
        return torch.where(far, mean_far, mean), torch.where(far, variance_far, variance)

    @property
    def mean(self) -> Tensor:
        mean, _ = self._moments()
        moved = self.loc + self.scale * torch.where(self.mirrored, -mean, mean)
        return moved.to(self._like.dtype)

    @property
    def variance(self) -> Tensor:
        _, variance = self._moments()
        return (self.scale.square() * variance).to(self._like.dtype)

    def _log_prob(self, value: Tensor) -> Tensor:
        z = (value - self.loc) / self.scale
        constant = self.scale.log() + 0.5 * math.log(2 * math.pi)
        return -0.5 * z.square() - constant - self.log_mass

    def _cdf(self, value: Tensor) -> Tensor:
        z = (value - self.loc) / self.scale
        z = torch.where(self.mirrored, -z, z)
        z = torch.minimum(torch.maximum(z, self.begin), self.end)
        probability = torch.exp(_log_difference(log_ndtr(z), self.log_below) - self.log_mass)
        return torch.where(self.mirrored, 1 - probability, probability).clamp(0.0, 1.0)

    def _icdf(self, level: Tensor) -> Tensor:
        asked = level.to(torch.float64)
        level = torch.where(self.mirrored, 1 - asked, asked)
        z = of_arrays(_quantile, self.begin.to(torch.float64), self.end.to(torch.float64), level)
        z = torch.where(self.mirrored, -z, z)
        quantile = (self.loc + self.scale * z).clamp(self.lower, self.upper)
        quantile = torch.where(asked <= 0, self.lower, quantile)
        return torch.where(asked >= 1, self.upper, quantile)


def _log_difference(larger: Tensor, smaller: Tensor) -> Tensor:
    """``log(exp(larger) - exp(smaller))``."""
    apart = (larger - smaller).clamp_min(torch.finfo(larger.dtype).tiny)
    return larger + torch.log(-torch.expm1(-apart))


def _quantile(begin: np.ndarray, end: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Of the standard normal distribution between two bounds, by logarithms of its lower tail."""
    below, up_to_end = scipy_special.log_ndtr(begin), scipy_special.log_ndtr(end)
    log_mass = up_to_end + np.log(-np.expm1(below - up_to_end))
    z = scipy_special.ndtri_exp(np.logaddexp(below, np.log(level) + log_mass))
    return np.clip(np.where(level >= 1, end, z), begin, end)


def _inside(lower: float, upper: float) -> float:
    return lower if math.isfinite(lower) else upper if math.isfinite(upper) else 0.0


class TruncatedNormalOutput(Head):
    """Normal distribution between bounds that the data cannot cross.

    Parameters
    ----------
    lower, upper
        The bounds, in the target's unit; ``None`` for no bound.
    loss, beta
        As for :class:`Head`.

    Raises
    ------
    ValueError
        If the upper bound is not above the lower one, or both are missing.
    """

    parameters = {"loc": real, "scale": positive}
    distr_cls = TruncatedNormal
    scales_parameters = True

    @validated()
    def __init__(
        self,
        lower: Optional[float] = 0.0,
        upper: Optional[float] = None,
        loss: str = "nll",
        beta: float = 0.0,
    ) -> None:
        super().__init__(loss=loss, beta=beta)
        self.lower = -math.inf if lower is None else lower
        self.upper = math.inf if upper is None else upper
        if not self.lower < self.upper:
            raise ValueError(f"lower={lower} must be less than upper={upper}")
        if math.isinf(self.lower) and math.isinf(self.upper):
            raise ValueError("lower=None and upper=None leave nothing to truncate: use 'normal'")

    @property
    def support(self) -> constraints.Constraint:
        return constraints.interval(self.lower, self.upper)

    @property
    def value_in_support(self) -> float:
        return _inside(self.lower, self.upper)

    def _base_distribution(self, distr_args: Tuple[Tensor, ...]) -> TruncatedNormal:
        loc, scale = distr_args
        return TruncatedNormal(loc, scale, self.lower, self.upper)

    def _scale_parameters(
        self, distr_args: Tuple[Tensor, ...], loc: Optional[Tensor], scale: Optional[Tensor]
    ) -> Tuple[Tensor, ...]:
        mean, deviation = distr_args
        if scale is not None:
            mean, deviation = mean * scale, deviation * scale
        return mean if loc is None else mean + loc, deviation
