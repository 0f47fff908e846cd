"""Laplace distribution."""

import torch
from torch import Tensor

from .head import Head, positive, real
from .univariate import LocationScaleDistribution


class Laplace(LocationScaleDistribution):
    """Laplace distribution of mean ``loc`` and mean absolute deviation ``scale``."""

    @property
    def variance(self) -> Tensor:
        return (2 * self.scale.square()).expand(self.batch_shape)

    def _log_prob(self, value: Tensor) -> Tensor:
        return -self._standardise(value).abs() - torch.log(2 * self.scale)

    def _cdf(self, value: Tensor) -> Tensor:
        z = self._standardise(value)
        tail = 0.5 * torch.exp(-z.abs())
        return torch.where(z < 0, tail, 1 - tail)

    def _icdf(self, level: Tensor) -> Tensor:
        tail = torch.log(2 * torch.minimum(level, 1 - level))
        return self.loc + self.scale * torch.where(level < 0.5, tail, -tail)

    def crps(self, value: Tensor) -> Tensor:
        """In closed form (Jordan et al. 2019, appendix A)."""
        z = self._standardise(value).abs()
        return self.scale * (z + torch.exp(-z) - 0.75)


class LaplaceOutput(Head):
    """Laplace distribution."""

    parameters = {"loc": real, "scale": positive}
    distr_cls = Laplace
