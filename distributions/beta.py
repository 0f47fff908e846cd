"""Beta distribution."""

from typing import Any

import torch
from scipy import special as scipy_special
from torch import Tensor
from torch.distributions import constraints

from .head import Head, positive
from .numerics import betainc, of_arrays
from .univariate import UnivariateDistribution


class Beta(UnivariateDistribution):
    """Beta distribution; ``concentration1`` draws towards 1, ``concentration0`` towards 0."""

    support = constraints.unit_interval
    interior = 0.5

    def __init__(self, concentration1: Tensor, concentration0: Tensor) -> None:
        self.concentration1, self.concentration0 = concentration1, concentration0
        super().__init__(concentration1, concentration0)

    @property
    def mean(self) -> Tensor:
        return self.concentration1 / (self.concentration1 + self.concentration0)

    @property
    def variance(self) -> Tensor:
        total = self.concentration1 + self.concentration0
        return self.mean * (1 - self.mean) / (total + 1)

    def _log_prob(self, value: Tensor) -> Tensor:
        # Shares of exactly 0 and 1 are common, and must not have an infinite likelihood.
        margin = torch.finfo(self._like.dtype).eps
        value = value.clamp(margin, 1 - margin)
        powers = torch.xlogy(self.concentration1 - 1, value)
        powers = powers + torch.xlogy(self.concentration0 - 1, 1 - value)
        return powers - _log_beta(self.concentration1, self.concentration0)

    def _cdf(self, value: Tensor) -> Tensor:
        return betainc(self.concentration1, self.concentration0, value.clamp(0.0, 1.0))

    def _icdf(self, level: Tensor) -> Tensor:
        concentrations = self.concentration1, self.concentration0
        return of_arrays(scipy_special.betaincinv, *concentrations, level)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            concentrations = self.concentration1.expand(shape), self.concentration0.expand(shape)
            draws = torch._sample_dirichlet(torch.stack(concentrations, dim=-1))
            return draws[..., 0]

    def crps(self, value: Tensor) -> Tensor:
        """In closed form (Jordan et al. 2019, appendix A)."""
        one, zero = self.concentration1, self.concentration0
        partial = betainc(one + 1, zero, value.clamp(0.0, 1.0))
        difference = torch.exp(_log_beta(2 * one, 2 * zero) - 2 * _log_beta(one, zero)) / one
        score = value * (2 * self.cdf(value) - 1)
        return score + self.mean * (1 - 2 * partial - 2 * difference)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


class BetaOutput(Head):
    """Beta distribution, for shares between 0 and 1."""

    parameters = {"concentration1": positive, "concentration0": positive}
    distr_cls = Beta
    scaling = "none"
