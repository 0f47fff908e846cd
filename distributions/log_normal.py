"""Log-normal distribution."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from .head import Head, positive, real
from .numerics import log_ndtr
from .univariate import UnivariateDistribution


class LogNormal(UnivariateDistribution):
    """Distribution of a positive number whose logarithm is normal."""

    support = constraints.positive

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(loc, scale)

    @property
    def mean(self) -> Tensor:
        return torch.exp(self.loc + 0.5 * self.scale.square())

    @property
    def variance(self) -> Tensor:
        return torch.expm1(self.scale.square()) * self.mean.square()

    def _standardise(self, value: Tensor) -> Tensor:
        return (value.log() - self.loc) / self.scale

    def _log_prob(self, value: Tensor) -> Tensor:
        z = self._standardise(value)
        constant = value.log() + self.scale.log() + 0.5 * math.log(2 * math.pi)
        return -0.5 * z.square() - constant

    def _cdf(self, value: Tensor) -> Tensor:
        inside = value > 0
        return torch.where(
            inside, torch.special.ndtr(self._standardise(torch.where(inside, value, 1.0))), 0.0
        )

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            normal = torch.randn(shape, dtype=self._like.dtype, device=self._like.device)
            return _bounded_exp(self.loc + self.scale * normal)

    def _icdf(self, level: Tensor) -> Tensor:
        return torch.exp(self.loc + self.scale * torch.special.ndtri(level))

    def crps(self, value: Tensor) -> Tensor:
        """In closed form (Jordan et al. 2019, appendix A)."""
        inside = torch.where(value > 0, value, 1.0)
        log_mean = self.loc + 0.5 * self.scale.square()
        partial = _bounded_exp(log_mean + log_ndtr(self._standardise(inside) - self.scale))
        partial = torch.where(value > 0, partial, 0.0)
        spread = _bounded_exp(log_mean + log_ndtr(-self.scale / math.sqrt(2)))
        return value * (2 * self.cdf(value) - 1) - 2 * (partial - spread)


def _bounded_exp(exponent: Tensor) -> Tensor:
    """The exponential, held where single precision would become infinite."""
    return exponent.clamp_max(80.0).exp()


class LogNormalOutput(Head):
    """Log-normal distribution, for positive values of many magnitudes."""

    parameters = {"loc": real, "scale": positive}
    distr_cls = LogNormal
    scaling = "mean"
