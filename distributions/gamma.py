"""Gamma distribution."""

from typing import Any

import torch
from scipy import special as scipy_special
from torch import Tensor
from torch.distributions import constraints

from .head import Head, positive
from .numerics import gammainc, of_arrays
from .univariate import UnivariateDistribution


class Gamma(UnivariateDistribution):
    """Gamma distribution of shape ``concentration`` and ``rate`` (inverse scale)."""

    support = constraints.positive

    def __init__(self, concentration: Tensor, rate: Tensor) -> None:
        self.concentration, self.rate = concentration, rate
        super().__init__(concentration, rate)

    @property
    def mean(self) -> Tensor:
        return self.concentration / self.rate

    @property
    def variance(self) -> Tensor:
        return self.concentration / self.rate.square()

    def _log_prob(self, value: Tensor) -> Tensor:
        normaliser = torch.xlogy(self.concentration, self.rate) - torch.lgamma(self.concentration)
        return normaliser + (self.concentration - 1) * value.log() - self.rate * value

    def _cdf(self, value: Tensor) -> Tensor:
        return gammainc(self.concentration, self.rate * value.clamp_min(0.0))

    def _icdf(self, level: Tensor) -> Tensor:
        return of_arrays(scipy_special.gammaincinv, self.concentration, level) / self.rate

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            draws = torch._standard_gamma(self.concentration.expand(shape)) / self.rate
            return draws.clamp_min(torch.finfo(draws.dtype).tiny)

    def crps(self, value: Tensor) -> Tensor:
        """In closed form (Jordan et al. 2019, appendix A)."""
        partial = gammainc(self.concentration + 1, self.rate * value.clamp_min(0.0))
        half = torch.full_like(self.concentration, 0.5)
        beta = torch.exp(
            torch.lgamma(half)
            + torch.lgamma(self.concentration)
            - torch.lgamma(self.concentration + 0.5)
        )
        score = value * (2 * self.cdf(value) - 1) - self.mean * (2 * partial - 1)
        return score - 1 / (self.rate * beta)


class GammaOutput(Head):
    """Gamma distribution, for positive values."""

    parameters = {"concentration": positive, "rate": positive}
    distr_cls = Gamma
    scaling = "mean"
