"""Implicit quantiles: a small increasing network from levels to values."""

import math
from typing import Dict, Optional, Tuple

import torch
from gluonts.core.component import validated
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from .head import Head
from .numerics import softplus_relative, solve_increasing
from .univariate import UnivariateDistribution, moment_nodes

_LOGISTIC_SCALE = math.sqrt(3) / math.pi
_SMALLEST = 1e-6


class ImplicitQuantiles(UnivariateDistribution):
    """Distribution whose quantile function is an increasing network of the level's logit.

    ``Q = loc + upper · softplus(l) - lower · softplus(-l) + Σ gain · tanh(slope · (l - centre))``
    with ``l = logit(level)``: tails as a logistic distribution's, of a scale each.

    Parameters
    ----------
    loc, lower, upper
        ``[…]``; the tails' scales are positive.
    gains, slopes, centres
        ``[…, unit]``; gains and slopes are positive.
    """

    support = constraints.real
    interior = 0.0
    vector_parameters = ("gains", "slopes", "centres")

    def __init__(
        self,
        loc: Tensor,
        lower: Tensor,
        upper: Tensor,
        gains: Tensor,
        slopes: Tensor,
        centres: Tensor,
    ) -> None:
        self.loc, self.lower, self.upper = loc, lower, upper
        self.gains, self.slopes, self.centres = gains, slopes, centres
        super().__init__(loc, lower, upper, gains[..., 0])

    def _at_logit(self, logit: Tensor) -> Tuple[Tensor, Tensor]:
        """Quantile and its derivative at a logit."""
        tails = self.upper * F.softplus(logit) - self.lower * F.softplus(-logit)
        slope = self.upper * torch.sigmoid(logit) + self.lower * torch.sigmoid(-logit)
        bends = torch.tanh(self.slopes * (logit.unsqueeze(-1) - self.centres))
        quantile = self.loc + tails + (self.gains * bends).sum(dim=-1)
        rises = self.gains * self.slopes * (1 - bends.square())
        return quantile, slope + rises.sum(dim=-1)

    def quantile(self, level: Tensor) -> Tensor:
        """Quantiles, differentiable in the parameters."""
        return self._at_logit(torch.logit(level))[0]

    def _icdf(self, level: Tensor) -> Tensor:
        return self.quantile(level)

    def _logit_of(self, value: Tensor) -> Tensor:
        """The logit of the level at which a value is the quantile, float64."""
        exact = self.in_double_precision()
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        value = value.detach().to(torch.float64).expand(shape)
        bends = exact.gains.sum(dim=-1)
        slack = bends + math.log(2) * (exact.lower + exact.upper)
        reach = ((value - exact.loc).abs() + slack) / torch.minimum(exact.lower, exact.upper) + 1
        value, reach = value.flatten(), reach.flatten()
        elements = exact.flattened(shape)
        start = torch.zeros_like(value)
        tolerance = 1e-13 if self._like.dtype == torch.float64 else 1e-8
        logit = solve_increasing(
            lambda chosen: elements(chosen)._at_logit, value, -reach, reach, start, tolerance
        )
        return logit.reshape(shape)

    def _cdf(self, value: Tensor) -> Tensor:
        with torch.no_grad():
            logit = self._logit_of(value).to(self._like.dtype)
        quantile, slope = self._at_logit(logit)
        # The level solves Q(level) = value, so that its logit changes by -dQ over the slope.
        logit = logit - (quantile - quantile.detach()) / slope.detach()
        return torch.sigmoid(logit)

    def _log_prob(self, value: Tensor) -> Tensor:
        with torch.no_grad():
            logit = self._logit_of(value).to(self._like.dtype)
        quantile, slope = self._at_logit(logit)
        logit = logit - (quantile - quantile.detach()) / slope.detach()
        _, slope = self._at_logit(logit)
        return F.logsigmoid(logit) + F.logsigmoid(-logit) - slope.log()

    def _moment(self, centre: Tensor, power: int) -> Tensor:
        levels, weights = (t.to(centre.device) for t in moment_nodes(len(self.batch_shape)))
        quantiles = self.in_double_precision().quantile(levels)
        moment = (weights * (quantiles - centre.to(torch.float64)).pow(power)).sum(dim=0)
        return moment.to(self._like.dtype)

    @property
    def mean(self) -> Tensor:
        return self._moment(torch.zeros_like(self.loc), 1)

    @property
    def variance(self) -> Tensor:
        return self._moment(self.mean, 2)


class ImplicitQuantilesOutput(Head):
    """Implicit quantiles, trained at levels drawn anew at every step.

    The quantile loss at random levels has the continuous ranked probability score as its
    expectation (Dabney et al. 2018; Gouttes et al. 2021). Unlike theirs, this network increases
    with the level, so that quantiles never cross, and its weights are what the model puts out.

    Parameters
    ----------
    num_units
        Hidden units of the increasing network.
    num_levels
        Levels drawn for each value and step.
    loss, beta
        As for :class:`Head`; ``"crps"``, the default, is the quantile loss at the drawn levels.

    Raises
    ------
    ValueError
        If a number is not positive.
    """

    distr_cls = ImplicitQuantiles

    @validated()
    def __init__(
        self, num_units: int = 8, num_levels: int = 8, loss: str = "crps", beta: float = 0.0
    ) -> None:
        super().__init__(loss=loss, beta=beta)
        for name, value in (("num_units", num_units), ("num_levels", num_levels)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.num_units, self.num_levels = num_units, num_levels

    @property
    def args_dim(self) -> Dict[str, int]:
        units = self.num_units
        return {"loc": 1, "tails": 2, "gains": units, "slopes": units, "centres": units}

    def domain_map(self, *args: Tensor) -> Tuple[Tensor, ...]:
        """Location and tails ``[…]``, and the units' gains, slopes and centres ``[…, unit]``."""
        loc, tails, gains, slopes, centres = args
        scales = softplus_relative(tails).clamp_min(_SMALLEST) * _LOGISTIC_SCALE
        spread = torch.linspace(-3, 3, self.num_units, dtype=loc.dtype, device=loc.device)
        return (
            loc.squeeze(-1),
            scales[..., 0],
            scales[..., 1],
            softplus_relative(gains) / (10 * self.num_units),
            softplus_relative(slopes),
            centres + spread,
        )

    def loss(
        self,
        target: Tensor,
        distr_args: Tuple[Tensor, ...],
        loc: Optional[Tensor] = None,
        scale: Optional[Tensor] = None,
    ) -> Tensor:
        """Loss per value, same shape as ``target``."""
        if self.loss_name != "crps":
            return super().loss(target, distr_args, loc=loc, scale=scale)
        base = ImplicitQuantiles(*distr_args)
        unit = target if loc is None else target - loc
        unit = unit if scale is None else unit / scale
        offsets = torch.arange(self.num_levels, dtype=unit.dtype, device=unit.device)
        offsets = offsets.reshape(-1, *[1] * unit.dim())
        # One level in each stratum; their middles where nothing is learned, to be reproducible.
        within = torch.full((self.num_levels, *unit.shape), 0.5, dtype=unit.dtype)
        within = within.to(unit.device)
        if torch.is_grad_enabled():
            within = torch.rand_like(within)
        margin = torch.finfo(unit.dtype).eps
        levels = ((offsets + within) / self.num_levels).clamp(margin, 1 - margin)
        error = unit - base.quantile(levels)
        losses = 2 * torch.maximum(levels * error, (levels - 1) * error).mean(dim=0)
        return losses if scale is None else losses * scale
