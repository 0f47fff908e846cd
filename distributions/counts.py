"""Poisson, negative binomial, and both with additional zeros."""

import math
from typing import Any, Optional, Tuple

import numpy as np
import torch
from gluonts.core.component import validated
from scipy import special as scipy_special
from scipy import stats as scipy_stats
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from .head import Head, positive, real
from .numerics import betainc, of_arrays
from .univariate import UnivariateDistribution, gauss_legendre

_DIFFERENCE_NODES = 64


class CountDistribution(UnivariateDistribution):
    """Base of the distributions of counts.

    A subclass adds to its maths ``expected_distance`` and ``expected_difference``, from which the
    continuous ranked probability score follows.
    """

    support: constraints.Constraint = constraints.nonnegative_integer
    interior = 0.0

    @property
    def has_jumps(self) -> bool:
        return True

    def cdf_below(self, value: Tensor) -> Tensor:
        return self.cdf(torch.ceil(value - _slack(value)) - 1.0)

    def _cdf_of_counts(self, count: Tensor) -> Tensor:
        """Cdf at whole numbers of at least 0."""
        raise NotImplementedError

    def _cdf(self, value: Tensor) -> Tensor:
        count = torch.floor(value + _slack(value))
        return torch.where(count >= 0, self._cdf_of_counts(count.clamp_min(0.0)), 0.0)

    def expected_distance(self, value: Tensor) -> Tensor:
        """Expectation of ``|X - value|``."""
        raise NotImplementedError

    def expected_difference(self) -> Tensor:
        """Expectation of ``|X - X'|`` for two independent draws."""
        raise NotImplementedError

    def crps(self, value: Tensor) -> Tensor:
        """``E|X - value| - E|X - X'| / 2`` (Gneiting & Raftery 2007, eq. 21)."""
        return self.expected_distance(value) - 0.5 * self.expected_difference()


def _slack(value: Tensor) -> Tensor:
    """By how much a whole number may miss itself after it was scaled there and back."""
    return torch.finfo(value.dtype).eps ** 0.5 * value.abs().clamp_min(1.0)


class Poisson(CountDistribution):
    """Poisson distribution of mean ``rate``."""

    def __init__(self, rate: Tensor) -> None:
        self.rate = rate
        super().__init__(rate)

    @property
    def mean(self) -> Tensor:
        return self.rate

    @property
    def variance(self) -> Tensor:
        return self.rate

    def _log_prob(self, value: Tensor) -> Tensor:
        return torch.xlogy(value, self.rate) - self.rate - torch.lgamma(value + 1)

    def _cdf_of_counts(self, count: Tensor) -> Tensor:
        return of_arrays(scipy_special.pdtr, count, self.rate, derivatives=(None, _pdtr_slope))

    def _icdf(self, level: Tensor) -> Tensor:
        return of_arrays(_poisson_quantile, self.rate, level)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return torch.poisson(self.rate.expand(self._extended_shape(torch.Size(sample_shape))))

    def expected_distance(self, value: Tensor) -> Tensor:
        count = torch.floor(value).clamp_min(0.0)
        probability = torch.where(value >= 0, self._log_prob(count).exp(), 0.0)
        distance = (value - self.rate) * (2 * self.cdf(value) - 1)
        return distance + 2 * self.rate * probability

    def expected_difference(self) -> Tensor:
        bessel = torch.special.i0e(2 * self.rate) + torch.special.i1e(2 * self.rate)
        return 2 * self.rate * bessel


def _pdtr_slope(count: np.ndarray, rate: np.ndarray) -> np.ndarray:
    return -np.exp(scipy_special.xlogy(count, rate) - rate - scipy_special.gammaln(count + 1))


def _poisson_quantile(rate: np.ndarray, level: np.ndarray) -> np.ndarray:
    return np.maximum(scipy_stats.poisson.ppf(level, rate), 0.0)


class NegativeBinomial(CountDistribution):
    """Negative binomial distribution of mean ``total_count · exp(logits)``.

    Parameters
    ----------
    total_count
        Number of failures to wait for, any positive number: the smaller, the more dispersed.
    logits
        Log-odds of a success.
    real_valued
        Whether the likelihood, by gamma functions, is stated for all non-negative numbers.
    """

    def __init__(self, total_count: Tensor, logits: Tensor, real_valued: bool = False) -> None:
        self.total_count, self.logits = total_count, logits
        if real_valued:
            self.support = constraints.nonnegative
        super().__init__(total_count, logits)

    @property
    def mean(self) -> Tensor:
        return self.total_count * self.logits.exp()

    @property
    def variance(self) -> Tensor:
        return self.mean / torch.sigmoid(-self.logits)

    def _log_prob(self, value: Tensor) -> Tensor:
        choices = torch.lgamma(self.total_count + value) - torch.lgamma(value + 1)
        choices = choices - torch.lgamma(self.total_count)
        failures = self.total_count * F.logsigmoid(-self.logits)
        return choices + failures + value * F.logsigmoid(self.logits)

    def _failure(self) -> Tensor:
        return torch.sigmoid(-self.logits.to(torch.float64))

    def _cdf_of_counts(self, count: Tensor) -> Tensor:
        count = count.to(torch.float64)
        probability = betainc(self.total_count.to(torch.float64), count + 1, self._failure())
        return probability.to(self._like.dtype)

    def _icdf(self, level: Tensor) -> Tensor:
        return of_arrays(_negative_binomial_quantile, self.total_count, self._failure(), level)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            return torch.poisson(
                torch._standard_gamma(self.total_count.expand(shape)) * self.logits.exp()
            )

    def expected_distance(self, value: Tensor) -> Tensor:
        below = torch.floor(value) - 1.0
        # The part of the mean that lies up to a count follows the law with one more failure.
        larger = NegativeBinomial(self.total_count + 1, self.logits)
        distance = value * (2 * self.cdf(value) - 1) + self.mean * (1 - 2 * larger.cdf(below))
        return distance

    def expected_difference(self) -> Tensor:
        """From the characteristic function φ, as ``∫ (1 - |φ(t)|²) / (1 - cos t) dt / π``."""
        total_count, logits = self.total_count.to(torch.float64), self.logits.to(torch.float64)
        squared = 4 * logits.exp() / torch.sigmoid(-logits)
        deviation = (0.25 * total_count * squared).sqrt()
        points, weights = gauss_legendre(_DIFFERENCE_NODES)
        total = torch.zeros_like(deviation)
        # tan(t / 2) = tan(angle) / deviation makes the integrand smooth for any dispersion.
        for angle, weight in zip((points * math.pi / 2).tolist(), weights.tolist()):
            half_tangent = (math.tan(angle) / deviation).square()
            exponent = total_count * torch.log1p(squared * half_tangent / (1 + half_tangent))
            total = total - weight * torch.expm1(-exponent) / math.sin(angle) ** 2
        return (0.5 * deviation * total).to(self._like.dtype)


def _negative_binomial_quantile(
    total_count: np.ndarray, failure: np.ndarray, level: np.ndarray
) -> np.ndarray:
    return np.maximum(scipy_stats.nbinom.ppf(level, total_count, failure), 0.0)


class ZeroInflated(CountDistribution):
    """Zero with a probability of its own, otherwise a draw from a distribution of counts.

    Parameters
    ----------
    base
        The distribution of counts, which may itself give zeros.
    gate_logits
        Log-odds of the additional zeros.
    """

    def __init__(self, base: CountDistribution, gate_logits: Tensor) -> None:
        self.base, self.gate_logits = base, gate_logits
        super().__init__(gate_logits, base._like)

    @property
    def _inflation(self) -> Tensor:
        return torch.sigmoid(self.gate_logits)

    @property
    def _rest(self) -> Tensor:
        return torch.sigmoid(-self.gate_logits)

    @property
    def mean(self) -> Tensor:
        return self._rest * self.base.mean

    @property
    def variance(self) -> Tensor:
        return self._rest * (self.base.variance + self._inflation * self.base.mean.square())

    def _log_prob(self, value: Tensor) -> Tensor:
        count = F.logsigmoid(-self.gate_logits) + self.base._log_prob(value)
        zero = torch.logaddexp(F.logsigmoid(self.gate_logits), count)
        return torch.where(value == 0, zero, count)

    def _cdf_of_counts(self, count: Tensor) -> Tensor:
        return self._inflation + self._rest * self.base._cdf_of_counts(count)

    def _icdf(self, level: Tensor) -> Tensor:
        rest = (level.to(torch.float64) - self._inflation) / self._rest
        return self.base._icdf(rest.clamp(0.0, 1.0))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            draws = self.base.sample(sample_shape)
            return torch.where(torch.rand_like(draws) < self._inflation, 0.0, draws)

    def expected_distance(self, value: Tensor) -> Tensor:
        distance = self.base.expected_distance(value)
        return self._inflation * value.abs() + self._rest * distance

    def expected_difference(self) -> Tensor:
        one_is_zero = 2 * self._inflation * self._rest * self.base.mean
        return one_is_zero + self._rest.square() * self.base.expected_difference()


class CountOutput(Head):
    """Base of the heads of counts, whose parameters are scaled instead of their values."""

    scales_parameters = True
    has_jumps = True
    scaling = "mean"


class PoissonOutput(CountOutput):
    """Poisson distribution, for counts as dispersed as their mean."""

    parameters = {"rate": positive}
    distr_cls = Poisson

    def _scale_parameters(
        self, distr_args: Tuple[Tensor, ...], loc: Optional[Tensor], scale: Optional[Tensor]
    ) -> Tuple[Tensor, ...]:
        (rate,) = distr_args
        return (rate if scale is None else rate * scale,)


class NegativeBinomialOutput(CountOutput):
    """Negative binomial distribution, for counts more dispersed than their mean.

    Parameters
    ----------
    loss, beta
        As for :class:`Head`.
    real_valued
        State the likelihood for all non-negative numbers and scale values instead of parameters,
        as MOIRAI does with the negative binomial of its mixture.
    """

    parameters = {"total_count": positive, "logits": real}
    distr_cls = NegativeBinomial

    @validated()
    def __init__(self, loss: str = "nll", beta: float = 0.0, real_valued: bool = False) -> None:
        super().__init__(loss=loss, beta=beta)
        self.real_valued = real_valued
        self.scales_parameters = not real_valued

    @property
    def support(self) -> constraints.Constraint:
        return constraints.nonnegative if self.real_valued else constraints.nonnegative_integer

    def _base_distribution(self, distr_args: Tuple[Tensor, ...]) -> NegativeBinomial:
        total_count, logits = distr_args
        return NegativeBinomial(total_count, logits, self.real_valued)

    def _scale_parameters(
        self, distr_args: Tuple[Tensor, ...], loc: Optional[Tensor], scale: Optional[Tensor]
    ) -> Tuple[Tensor, ...]:
        total_count, logits = distr_args
        return total_count, logits if scale is None else logits + scale.log()


class ZeroInflatedNegativeBinomialOutput(CountOutput):
    """Negative binomial distribution with additional zeros, for intermittent demand."""

    parameters = {**NegativeBinomialOutput.parameters, "gate_logits": real}
    distr_cls = ZeroInflated

    def _base_distribution(self, distr_args: Tuple[Tensor, ...]) -> ZeroInflated:
        total_count, logits, gate_logits = distr_args
        return ZeroInflated(NegativeBinomial(total_count, logits), gate_logits)

    def _scale_parameters(
        self, distr_args: Tuple[Tensor, ...], loc: Optional[Tensor], scale: Optional[Tensor]
    ) -> Tuple[Tensor, ...]:
        total_count, logits, gate_logits = distr_args
        return total_count, logits if scale is None else logits + scale.log(), gate_logits
