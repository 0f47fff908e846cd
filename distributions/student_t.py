"""Student's t distribution, its likelihood and gradient written out."""

import math
from typing import Any, Optional, Tuple

import numpy as np
import torch
from scipy import special as scipy_special
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import constraints

from .head import Head, above_two, positive, real
from .numerics import of_arrays
from .univariate import UnivariateDistribution


class _NegativeLogLikelihood(torch.autograd.Function):
    """Of a value under Student's t, with its derivatives written out.

    With ``z = (value - loc) / scale`` it is ``ln Γ(df / 2) - ln Γ((df + 1) / 2) + ln(df π) / 2 +
    ln scale + (df + 1) / 2 · ln(1 + z² / df)``. All tensors have one shape.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, df: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        z = (value - loc) / scale
        ratio = z.square() / df
        tail = torch.log1p(ratio)
        above = 0.5 * (df + 1.0)
        ctx.save_for_backward(df, scale, z, ratio, tail, above)
        constant = torch.lgamma(0.5 * df) - torch.lgamma(above)
        return constant + torch.log((math.pi * df).sqrt() * scale) + above * tail

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Optional[Tensor], ...]:
        df, scale, z, ratio, tail, above = ctx.saved_tensors
        pull = 2.0 * above / (df + df * ratio)
        by_scale = gradient / scale
        d_loc = by_scale * pull * -z
        d_scale = by_scale + d_loc * z
        slope = torch.digamma(0.5 * df) - torch.digamma(above) + (1.0 - pull * z.square()) / df
        d_df = 0.5 * gradient * (slope + tail)
        d_value = -d_loc if ctx.needs_input_grad[0] else None
        return d_value, d_df, d_loc, d_scale


def _standard_density(df: np.ndarray, z: np.ndarray) -> np.ndarray:
    constant = scipy_special.gammaln((df + 1) / 2) - scipy_special.gammaln(df / 2)
    tail = (df + 1) / 2 * np.log1p(z * z / df)
    return np.exp(constant - 0.5 * np.log(df * np.pi) - tail)


class StudentT(UnivariateDistribution):
    """Student's t distribution with ``df`` degrees of freedom around ``loc``."""

    support = constraints.real
    interior = 0.0

    def __init__(self, df: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.df, self.loc, self.scale = df, loc, scale
        super().__init__(df, loc, scale)

    @property
    def mean(self) -> Tensor:
        """Where it exists, for more than one degree of freedom."""
        return torch.where(self.df > 1, self.loc, torch.nan).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Infinite up to two degrees of freedom."""
        finite = self.df > 2
        df = torch.where(finite, self.df, 3.0)
        spread = self.scale.square() * df / (df - 2)
        return torch.where(finite, spread, torch.inf).expand(self.batch_shape)

    def _log_prob(self, value: Tensor) -> Tensor:
        tensors = value, self.df, self.loc, self.scale
        if len({tensor.shape for tensor in tensors}) > 1:
            tensors = torch.broadcast_tensors(*tensors)
        return -_NegativeLogLikelihood.apply(*tensors)

    def _cdf(self, value: Tensor) -> Tensor:
        z = (value - self.loc) / self.scale
        return of_arrays(scipy_special.stdtr, self.df, z, derivatives=(None, _standard_density))

    def _icdf(self, level: Tensor) -> Tensor:
        return self.loc + self.scale * of_arrays(scipy_special.stdtrit, self.df, level)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            df = self.df.expand(shape)
            normal = torch.randn(shape, dtype=df.dtype, device=df.device)
            return self.loc + self.scale * normal * torch.rsqrt(
                torch._standard_gamma(df / 2) * 2 / df
            )

    def crps(self, value: Tensor) -> Tensor:
        """In closed form, for more than one degree of freedom (Jordan et al. 2019, appendix A)."""
        df = self.df
        z = (value - self.loc) / self.scale
        density = torch.exp(self._log_prob(value)) * self.scale
        betas = (
            torch.lgamma(df - 0.5)
            - torch.lgamma(df)
            - 2 * (torch.lgamma(df / 2) - torch.lgamma((df + 1) / 2))
        )
        # B(1/2, df - 1/2) / B(1/2, df / 2)², in which one factor Γ(1/2) = √π is left.
        difference = 2 * df.sqrt() * torch.exp(betas) / math.sqrt(math.pi)
        score = z * (2 * self.cdf(value) - 1) + (2 * density * (df + z.square()) - difference) / (
            df - 1
        )
        return self.scale * score


class StudentTOutput(Head):
    """Student's t distribution of more than two degrees of freedom."""

    parameters = {"df": above_two, "loc": real, "scale": positive}
    distr_cls = StudentT
