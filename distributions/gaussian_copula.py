"""Low-rank Gaussian copula over the horizon: joint sample paths from any marginal head."""

from typing import Any, Dict, Optional, Tuple

import torch
from gluonts.core.component import validated
from torch import Tensor
from torch.distributions import constraints

from .head import Head, component_head
from .univariate import UnivariateDistribution, probability_transform

_MARGIN = 1e-6


class GaussianCopula(UnivariateDistribution):
    """Marginal distributions whose draws are joined along time by a Gaussian copula.

    All but sampling is that of the marginals. The copula's correlation matrix is that of
    ``V η + ε`` with η and ε standard normal (Salinas et al. 2019, section 3, over time instead of
    over series).

    Parameters
    ----------
    marginals
        ``[…, time, …]``.
    factors
        V, ``[…, time, …, rank]``.
    time_dim
        Which dimension of the marginals is time.
    """

    vector_parameters = ("factors",)

    def __init__(self, marginals: UnivariateDistribution, factors: Tensor, time_dim: int) -> None:
        self.marginals, self.factors, self.time_dim = marginals, factors, time_dim
        super().__init__(marginals._like, factors[..., 0])

    @property
    def support(self) -> constraints.Constraint:
        return self.marginals.support

    @property
    def has_jumps(self) -> bool:
        return self.marginals.has_jumps

    @property
    def mean(self) -> Tensor:
        return self.marginals.mean

    @property
    def variance(self) -> Tensor:
        return self.marginals.variance

    def log_prob(self, value: Tensor) -> Tensor:
        """Of each value by itself; :func:`copula_log_density` joins them."""
        return self.marginals.log_prob(value)

    def cdf(self, value: Tensor) -> Tensor:
        return self.marginals.cdf(value)

    def cdf_below(self, value: Tensor) -> Tensor:
        return self.marginals.cdf_below(value)

    def icdf(self, value: Tensor) -> Tensor:
        return self.marginals.icdf(value)

    def crps(self, value: Tensor) -> Tensor:
        return self.marginals.crps(value)

    def sample_levels(self, sample_shape: Any = ()) -> Tensor:
        """Uniform numbers ``sample_shape + batch_shape``, joined along time; float64."""
        with torch.no_grad():
            factors = self.factors.to(torch.float64)
            shape = (*torch.Size(sample_shape), *factors.shape)
            common = list(shape)
            common[self.time_dim - factors.dim()] = 1
            common_noise = torch.randn(common, dtype=factors.dtype, device=factors.device)
            own_noise = torch.randn(shape[:-1], dtype=factors.dtype, device=factors.device)
            draws = (factors * common_noise).sum(dim=-1) + own_noise
            levels = torch.special.ndtr(draws / _deviation(factors))
            return levels.clamp(_MARGIN, 1 - _MARGIN)


def _deviation(factors: Tensor) -> Tensor:
    return (1 + factors.square().sum(dim=-1)).sqrt()


def copula_log_density(scores_TB: Tensor, factors_TBR: Tensor) -> Tensor:
    """Log-density of a low-rank Gaussian copula at normal scores, by Woodbury's identity.

    Parameters
    ----------
    scores_TB
        Normal scores of the values ``[time, …]``; 0 where nothing is observed.
    factors_TBR
        ``[time, …, rank]``; 0 there too, which takes these steps out of the matrix.

    Returns
    -------
    Tensor
        ``[…]``.
    """
    deviation = _deviation(factors_TBR)
    scaled = scores_TB * deviation
    rank = factors_TBR.shape[-1]
    gram = torch.einsum("t...r,t...s->...rs", factors_TBR, factors_TBR)
    gram = gram + torch.eye(rank, dtype=gram.dtype, device=gram.device)
    projected = (factors_TBR * scaled.unsqueeze(-1)).sum(dim=0).unsqueeze(-1)
    cholesky = torch.linalg.cholesky(gram)
    explained = torch.linalg.solve_triangular(cholesky, projected, upper=False)
    log_determinant = 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
    squares = (scores_TB.square() - scaled.square()).sum(dim=0)
    quadratic = squares + explained.square().sum(dim=(-2, -1))
    return 0.5 * (quadratic - log_determinant) + deviation.log().sum(dim=0)


class GaussianCopulaOutput(Head):
    """Joins the steps of the horizon of any other head, so that samples are whole paths.

    The marginals are trained by their own loss, as without a copula; the copula by its likelihood
    at their probability integral transforms (inference functions for margins, Joe & Xu 1996).
    Quantiles of sums or maxima over the horizon are to be read from samples.

    Parameters
    ----------
    marginal
        Any other head with a distribution, or its name.
    rank
        Rank of the correlation matrix beside its diagonal.

    Raises
    ------
    ValueError
        If ``rank`` is not positive, or the marginal has no distribution of its own.
    """

    distr_cls = GaussianCopula

    @validated()
    def __init__(self, marginal: Any = "student_t", rank: int = 8) -> None:
        self.marginal = component_head(marginal, "marginal")
        self.losses = self.marginal.losses
        super().__init__(loss=self.marginal.loss_name)
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1")
        self.rank = rank
        self.scales_parameters = self.marginal.scales_parameters
        self.has_jumps = self.marginal.has_jumps
        self.scaling = self.marginal.scaling

    @property
    def args_dim(self) -> Dict[str, int]:
        return {"factors": self.rank, **self.marginal.args_dim}

    @property
    def support(self) -> constraints.Constraint:
        return self.marginal.support

    @property
    def value_in_support(self) -> float:
        return self.marginal.value_in_support

    def domain_map(self, *args: Tensor) -> Tuple[Tensor, ...]:
        factors, *marginal = args
        return (factors, *self.marginal.domain_map(*marginal))

    def distribution(
        self,
        distr_args: Tuple[Tensor, ...],
        loc: Optional[Tensor] = None,
        scale: Optional[Tensor] = None,
    ) -> GaussianCopula:
        """The joint distribution of ``[time]``, ``[batch, time]`` or ``[batch, time, channel]``.

        Of two dimensions the first is time if ``loc`` or ``scale`` is ``[1, channel]``.
        """
        factors, *marginal = distr_args
        marginals = self.marginal.distribution(tuple(marginal), loc=loc, scale=scale)
        shape = factors.shape[:-1]
        window = loc if loc is not None else scale
        time_dim = min(1, len(shape) - 1)
        if len(shape) == 2 and window is not None and window.shape == (1, shape[1]):
            time_dim = 0 if shape[0] > 1 else 1
        return GaussianCopula(marginals, factors, time_dim)

    def loss(
        self,
        target: Tensor,
        distr_args: Tuple[Tensor, ...],
        loc: Optional[Tensor] = None,
        scale: Optional[Tensor] = None,
    ) -> Tensor:
        """The marginals' loss per value, same shape as ``target``."""
        return self.marginal.loss(target, tuple(distr_args[1:]), loc=loc, scale=scale)

    def joint_loss(
        self,
        target: Tensor,
        observed: Tensor,
        distr_args: Tuple[Tensor, ...],
        loc: Optional[Tensor] = None,
        scale: Optional[Tensor] = None,
    ) -> Tensor:
        """Negative log-likelihood of the copula, per window ``[batch]``.

        Parameters
        ----------
        target, observed
            ``[batch, time, …]``; what is not observed has no influence.
        """
        factors, *marginal = distr_args
        with torch.no_grad():
            marginals = self.marginal.distribution(tuple(marginal), loc=loc, scale=scale)
            levels = probability_transform(marginals, target).clamp(_MARGIN, 1 - _MARGIN)
            scores = torch.special.ndtri(levels).to(factors.dtype) * observed
        known = factors * observed.unsqueeze(-1)
        density = copula_log_density(scores.transpose(0, 1), known.transpose(0, 1))
        return -density.flatten(1).sum(dim=1) if density.dim() > 1 else -density
