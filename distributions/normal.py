"""Normal distributions: free, and with a fixed scale."""

import math
from typing import Any, Tuple

import torch
from gluonts.core.component import validated
from torch import Tensor

from .head import Head, positive, real
from .univariate import LocationScaleDistribution


class Normal(LocationScaleDistribution):
    """Normal distribution of mean ``loc`` and standard deviation ``scale``."""

    @property
    def variance(self) -> Tensor:
        return self.scale.square().expand(self.batch_shape)

    def _log_prob(self, value: Tensor) -> Tensor:
        z = self._standardise(value)
        return -0.5 * (z.square() + math.log(2 * math.pi)) - self.scale.log()

    def _cdf(self, value: Tensor) -> Tensor:
        return torch.special.ndtr(self._standardise(value))

    def _icdf(self, level: Tensor) -> Tensor:
        return self.loc + self.scale * torch.special.ndtri(level)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            normal = torch.randn(shape, dtype=self._like.dtype, device=self._like.device)
            return self.loc + self.scale * normal

    def crps(self, value: Tensor) -> Tensor:
        """In closed form (Gneiting et al. 2005, eq. 5)."""
        z = self._standardise(value)
        density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
        score = z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi)
        return self.scale * score


class NormalOutput(Head):
    """Normal distribution."""

    parameters = {"loc": real, "scale": positive}
    distr_cls = Normal


class NormalFixedScaleOutput(Head):
    """Normal distribution whose scale is given, not learned: a narrow peak within a mixture.

    Parameters
    ----------
    scale
        Standard deviation, in units of the window's scale.
    loss
        As for :class:`Head`.

    Raises
    ------
    ValueError
        If ``scale`` is not positive.
    """

    parameters = {"loc": real}
    distr_cls = Normal

    @validated()
    def __init__(self, scale: float = 1e-3, loss: str = "nll") -> None:
        super().__init__(loss=loss)
        if not scale > 0:
            raise ValueError(f"scale={scale} must be positive")
        self.scale = scale

    def _base_distribution(self, distr_args: Tuple[Tensor, ...]) -> Normal:
        (loc,) = distr_args
        return Normal(loc, torch.full_like(loc, self.scale))
