"""Generalised Pareto tails spliced to the body of another distribution."""

from typing import Any, Dict, Tuple

import torch
from gluonts.core.component import validated
from torch import Tensor
from torch.distributions import constraints

from .head import Head, component_head
from .univariate import UnivariateDistribution, gauss_legendre

_BODY_NODES = 48
_SMALLEST_SHAPE, _LARGEST_SHAPE = 1e-3, 0.45


def tail_shape(raw: Tensor) -> Tensor:
    """Shape of a generalised Pareto tail with a variance."""
    return _SMALLEST_SHAPE + (_LARGEST_SHAPE - _SMALLEST_SHAPE) * torch.sigmoid(raw)


class ParetoTails(UnivariateDistribution):
    """A body up to its outer quantiles, and generalised Pareto tails beyond.

    After the peaks-over-threshold model (Pickands 1975), as spliced by Ehrlich et al. (2021); here
    the density is continuous, which fixes the tails' scales and without which the gradient of the
    likelihood would lack what moves over the thresholds.

    Parameters
    ----------
    body
        A continuous distribution on the real line.
    lower_shape, upper_shape
        Of the tails, in (0, 0.5): the larger, the heavier.
    tail_mass
        Probability of each tail.
    """

    support = constraints.real
    interior = 0.0

    def __init__(
        self,
        body: UnivariateDistribution,
        lower_shape: Tensor,
        upper_shape: Tensor,
        tail_mass: float,
    ) -> None:
        self.body, self.tail_mass = body, tail_mass
        self.breaks = (tail_mass,)
        self.lower_shape, self.upper_shape = lower_shape, upper_shape
        levels = torch.tensor([tail_mass, 1 - tail_mass], dtype=body._like.dtype)
        self.lower, self.upper = (body.icdf(level) for level in levels.to(body._like.device))
        self.lower_scale = tail_mass * (-body.log_prob(self.lower)).exp()
        self.upper_scale = tail_mass * (-body.log_prob(self.upper)).exp()
        super().__init__(self.lower, lower_shape)

    def _excess(self, value: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which tail a value is in, its distance from it, and that tail's scale and shape."""
        is_low = value < self.lower
        distance = torch.where(is_low, self.lower - value, value - self.upper)
        scale = torch.where(is_low, self.lower_scale, self.upper_scale)
        shape = torch.where(is_low, self.lower_shape, self.upper_shape)
        return is_low, distance, scale, shape

    def _log_prob(self, value: Tensor) -> Tensor:
        _, distance, scale, shape = self._excess(value)
        outside = distance > 0
        beyond = torch.log1p(shape * distance.clamp_min(0.0) / scale)
        tail = torch.log(self.tail_mass / scale) - (1 + 1 / shape) * beyond
        inside = torch.where(outside, self.body.mean.detach(), value)
        return torch.where(outside, tail, self.body.log_prob(inside))

    def _cdf(self, value: Tensor) -> Tensor:
        is_low, distance, scale, shape = self._excess(value)
        survival = torch.exp(-torch.log1p(shape * distance.clamp_min(0.0) / scale) / shape)
        tail = torch.where(is_low, self.tail_mass * survival, 1 - self.tail_mass * survival)
        inside = torch.where(distance > 0, self.body.mean.detach(), value)
        return torch.where(distance > 0, tail, self.body.cdf(inside))

    def _icdf(self, level: Tensor) -> Tensor:
        mass = self.tail_mass
        body = self.body.icdf(level.clamp(mass, 1 - mass))
        low = _pareto_excess(level / mass, self.lower_scale, self.lower_shape)
        high = _pareto_excess((1 - level) / mass, self.upper_scale, self.upper_shape)
        return torch.where(
            level < mass, self.lower - low, torch.where(level > 1 - mass, self.upper + high, body)
        )

    def _body_moment(self, centre: Tensor) -> Tuple[Tensor, Tensor]:
        """Integrals of the body's quantiles and of their squared distance from the centre."""
        points, weights = gauss_legendre(_BODY_NODES)
        inner = 1 - 2 * self.tail_mass
        shape = (-1, *[1] * len(self.batch_shape))
        points, weights = points.to(centre.device), weights.to(centre.device) * inner
        quantiles = self.body.icdf((self.tail_mass + inner * points).reshape(shape))
        weights = weights.to(quantiles.dtype).reshape(shape)
        return (weights * quantiles).sum(0), (weights * (quantiles - centre).square()).sum(0)

    @property
    def mean(self) -> Tensor:
        body, _ = self._body_moment(self.lower)
        low = self.lower - self.lower_scale / (1 - self.lower_shape)
        high = self.upper + self.upper_scale / (1 - self.upper_shape)
        return body + self.tail_mass * (low + high)

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        _, body = self._body_moment(mean)
        tails = torch.zeros_like(mean)
        for distance, scale, shape in (
            (mean - self.lower, self.lower_scale, self.lower_shape),
            (self.upper - mean, self.upper_scale, self.upper_shape),
        ):
            first = scale / (1 - shape)
            second = 2 * first * scale / (1 - 2 * shape)
            tails = tails + distance.square() + 2 * distance * first + second
        return body + self.tail_mass * tails


def _pareto_excess(survival: Tensor, scale: Tensor, shape: Tensor) -> Tensor:
    """Excess over the threshold that is survived with this probability."""
    return scale / shape * torch.expm1(-shape * survival.clamp_max(1.0).log())


class ParetoTailsOutput(Head):
    """Generalised Pareto tails spliced to a body, for extremes that the body's tails miss.

    Parameters
    ----------
    body
        A head on the real line, or its name.
    tail_mass
        Probability of each tail.
    loss, beta
        As for :class:`Head`.

    Raises
    ------
    ValueError
        If ``tail_mass`` lies outside (0, 0.5), or the body is not on the real line.
    """

    distr_cls = ParetoTails

    @validated()
    def __init__(
        self,
        body: Any = "normal",
        tail_mass: float = 0.05,
        loss: str = "nll",
        beta: float = 0.0,
    ) -> None:
        super().__init__(loss=loss, beta=beta)
        if not 0 < tail_mass < 0.5:
            raise ValueError(f"tail_mass={tail_mass} must lie between 0 and 0.5")
        self.body = component_head(body, "body", "nll")
        if self.body.support is not constraints.real or self.body.scales_parameters:
            raise ValueError(
                f"body={body!r} must be a continuous head on the real line, such as 'normal'"
            )
        self.tail_mass = tail_mass

    @property
    def args_dim(self) -> Dict[str, int]:
        tails = ("lower_shape", "upper_shape")
        body = {f"body.{name}": size for name, size in self.body.args_dim.items()}
        return {**dict.fromkeys(tails, 1), **body}

    def domain_map(self, *args: Tensor) -> Tuple[Tensor, ...]:
        lower_shape, upper_shape, *body = args
        shapes = (tail_shape(raw.squeeze(-1)) for raw in (lower_shape, upper_shape))
        return (*shapes, *self.body.domain_map(*body))

    def _base_distribution(self, distr_args: Tuple[Tensor, ...]) -> ParetoTails:
        lower_shape, upper_shape, *body = distr_args
        base = self.body.distribution(tuple(body))
        return ParetoTails(base, lower_shape, upper_shape, self.tail_mass)
