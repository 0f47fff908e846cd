"""Laplace distribution."""

import torch
from torch import Tensor
from torch.distributions import constraints

from .head import Head, positive, real
from .univariate import UnivariateDistribution


class Laplace(UnivariateDistribution):
    """Laplace distribution of mean ``loc`` and mean absolute deviation ``scale``."""

    support = constraints.real
    interior = 0.0

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(loc, scale)

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        return (2 * self.scale.square()).expand(self.batch_shape)

    def _log_prob(self, value: Tensor) -> Tensor:
        return -torch.abs(value - self.loc) / self.scale - torch.log(2 * self.scale)

    def _cdf(self, value: Tensor) -> Tensor:
        z = (value - self.loc) / self.scale
        tail = 0.5 * torch.exp(-z.abs())
        return torch.where(z < 0, tail, 1 - tail)

    def _icdf(self, level: Tensor) -> Tensor:
        tail = torch.log(2 * torch.minimum(level, 1 - level))
        return self.loc + self.scale * torch.where(level < 0.5, tail, -tail)

    def crps(self, value: Tensor) -> Tensor:
        """In closed form (Jordan et al. 2019, appendix A)."""
        z = torch.abs(value - self.loc) / self.scale
        return self.scale * (z + torch.exp(-z) - 0.75)


class LaplaceOutput(Head):
    """Laplace distribution."""

    parameters = {"loc": real, "scale": positive}  # noqa: RUF012
    distr_cls = Laplace
