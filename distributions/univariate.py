"""What all distributions of single numbers share."""

import copy
from functools import cache
from typing import Any, Callable, ClassVar, Dict, Optional, Tuple, TypeVar, Union

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

_QUADRATURE_NODES = 8
# Between their quantiles a cdf is smooth; what lies further out has a square too small to matter.
_QUADRATURE_LEVELS = (1e-6, 1e-4, 1e-3, 0.01, 0.04, 0.1, 0.3, 0.5)
_MOMENT_NODES = 64
# What single precision can hold.
_LARGEST = 1e30

D = TypeVar("D", bound="UnivariateDistribution")


@cache
def gauss_legendre(nodes: int) -> Tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature on (0, 1), float64."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy(0.5 * points + 0.5), torch.from_numpy(0.5 * weights)


def moment_nodes(dimensions: int) -> Tuple[Tensor, Tensor]:
    """Levels and weights of an integral over a quantile function, ``[node, 1, …]``, float64.

    The levels crowd towards 0 and 1, where quantiles run off.
    """
    points, weights = gauss_legendre(_MOMENT_NODES)
    levels = points.square() * (3.0 - 2.0 * points)
    weights = weights * 6.0 * points * (1.0 - points)
    shape = (-1, *[1] * dimensions)
    return levels.reshape(shape), weights.reshape(shape)


class UnivariateDistribution(Distribution):
    """Base of the distributions: a subclass states its maths within its support.

    A subclass implements ``_log_prob``, ``_cdf`` and ``_icdf`` (or overrides the public methods),
    ``mean`` and ``variance``. Shared are what lies outside the support, the gradient of the
    inverse cdf, sampling by it, and the continuous ranked probability score by quadrature.

    Parameters
    ----------
    parameters
        Tensors whose shapes broadcast to ``batch_shape``.
    """

    arg_constraints: ClassVar[Dict[str, constraints.Constraint]] = {}
    has_rsample = False

    # The parameters with one more dimension than ``batch_shape``.
    vector_parameters: Tuple[str, ...] = ()

    # Levels where the quantile function is not smooth.
    breaks: Tuple[float, ...] = ()

    # A value within the support, at which likelihoods outside are computed and thrown away.
    interior: Union[float, Tensor] = 1.0

    @property
    def support(self) -> constraints.Constraint:
        """The values that have a density or probability."""
        raise NotImplementedError

    def __init__(self, *parameters: Tensor) -> None:
        shape = torch.broadcast_shapes(*(parameter.shape for parameter in parameters))
        self._like = parameters[0]
        super().__init__(shape, validate_args=False)

    @property
    def is_discrete(self) -> bool:
        """Whether all values are whole numbers."""
        return bool(self.support.is_discrete)

    @property
    def has_jumps(self) -> bool:
        """Whether single values have a probability of their own."""
        return self.is_discrete

    def _log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _cdf(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _icdf(self, level: Tensor) -> Tensor:
        raise NotImplementedError

    def log_prob(self, value: Tensor) -> Tensor:
        """Logarithm of the density or probability; ``-inf`` outside the support."""
        if self.support is constraints.real:
            return self._log_prob(value)
        inside = self.support.check(value)
        logarithm = self._log_prob(torch.where(inside, value, self.interior))
        return torch.where(inside, logarithm, -torch.inf)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of this value or less."""
        return self._cdf(value)

    def cdf_below(self, value: Tensor) -> Tensor:
        """Probability of less than this value."""
        return self.cdf(torch.ceil(value) - 1.0) if self.is_discrete else self.cdf(value)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantiles at levels in [0, 1], whose shape broadcasts with ``batch_shape``.

        Raises
        ------
        ValueError
            If a level lies outside.
        """
        level = torch.as_tensor(value, device=self._like.device)
        if not ((level >= 0) & (level <= 1)).all():
            raise ValueError("levels of quantiles must lie in [0, 1]")
        with torch.no_grad():
            quantile = self._icdf(level).to(self._like.dtype)
        if self.has_jumps or not (torch.is_grad_enabled() and self._depends_on_a_gradient()):
            return quantile
        # The quantile x solves F(x) = level, so that dx = -dF / f at x.
        change = self.cdf(quantile)
        density = self.log_prob(quantile).exp().detach()
        return quantile - (change - change.detach()) / density

    def _depends_on_a_gradient(self) -> bool:
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return any(tensor.requires_grad for tensor in tensors)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``sample_shape + batch_shape``."""
        with torch.no_grad():
            return self.icdf(self.sample_levels(sample_shape))

    def sample_levels(self, sample_shape: Any = ()) -> Tensor:
        """Uniform numbers ``sample_shape + batch_shape``, float64, as dependent as draws are."""
        shape = self._extended_shape(torch.Size(sample_shape))
        level = torch.rand(shape, dtype=torch.float64, device=self._like.device)
        return level.clamp_min(torch.finfo(torch.float64).tiny)

    def crps(self, value: Tensor) -> Tensor:
        """Continuous ranked probability score, differentiable in the parameters.

        The integral of ``(F(x) - 1{x >= value})²`` (Gneiting & Raftery 2007, eq. 20), by
        Gauss-Legendre quadrature between quantiles and the value.
        """
        if self.has_jumps:
            raise NotImplementedError(f"{type(self).__name__} has no CRPS in closed form")
        with torch.no_grad():
            value = value.to(torch.float64).expand(
                torch.broadcast_shapes(self.batch_shape, value.shape)
            )
            edges = self.in_double_precision().quadrature_edges().clamp(-_LARGEST, _LARGEST)
            edges = torch.cat([expand_trailing(edges, value.shape), value.unsqueeze(0)])
            edges = edges.sort(dim=0).values
            widths = edges.diff(dim=0)
            points, weights = (
                t.to(value.device).reshape(-1, *[1] * edges.dim())
                for t in gauss_legendre(_QUADRATURE_NODES)
            )
            nodes = (edges[:-1] + widths * points).to(self._like.dtype)
            weights = (widths * weights).to(self._like.dtype)
            reached = (edges[:-1] >= value).to(self._like.dtype)
        return (weights * (self.cdf(nodes) - reached).square()).sum(dim=(0, 1))

    def quadrature_edges(self) -> Tensor:
        """Values ``[edge, …]`` between which the cdf is smooth, and beyond which it is 0 or 1."""
        levels = {*_QUADRATURE_LEVELS, *self.breaks}
        both = sorted(levels | {1.0 - level for level in levels})
        tensor = torch.tensor(both, dtype=torch.float64, device=self._like.device)
        return self.icdf(tensor.reshape(-1, *[1] * len(self.batch_shape)))

    def in_double_precision(self: D) -> D:
        """The same distribution, its parameters float64 and without gradients."""

        def convert(value: Any) -> Any:
            if isinstance(value, UnivariateDistribution):
                return value.in_double_precision()
            if isinstance(value, list):
                return [convert(item) for item in value]
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.detach().to(torch.float64)
            return value

        clone = copy.copy(self)
        clone.__dict__ = {name: convert(value) for name, value in vars(self).items()}
        return clone

    def flattened(self: D, shape: torch.Size) -> Callable[[Tensor], D]:
        """From the numbers of elements to their distributions alone, in one dimension.

        Parameters
        ----------
        shape
            That of all the elements, with which ``batch_shape`` broadcasts.
        """

        def convert(name: str, value: Any, elements: Tensor) -> Any:
            if isinstance(value, UnivariateDistribution):
                return value.flattened(shape)(elements)
            if isinstance(value, list):
                return [convert(name, item, elements) for item in value]
            if not isinstance(value, Tensor):
                return value
            if name in self.vector_parameters:
                return value.expand(*shape, value.shape[-1]).reshape(-1, value.shape[-1])[elements]
            return value.expand(shape).flatten()[elements]

        def select(elements: Tensor) -> D:
            clone = copy.copy(self)
            clone.__dict__ = {n: convert(n, value, elements) for n, value in vars(self).items()}
            clone._batch_shape = elements.shape
            return clone

        return select

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch_shape={list(self.batch_shape)})"


class LocationScaleDistribution(UnivariateDistribution):
    """Base of the distributions on the real line around a mean ``loc``.

    Parameters
    ----------
    loc, scale
        Mean, and unit of the distance from it.
    """

    support = constraints.real
    interior = 0.0

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(loc, scale)

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self.batch_shape)

    def _standardise(self, value: Tensor) -> Tensor:
        return (value - self.loc) / self.scale


class _AffineSupport(constraints.Constraint):
    """The values that a shift and a factor make of those of another support."""

    def __init__(self, base: constraints.Constraint, loc: Tensor, scale: Tensor) -> None:
        self.base, self.loc, self.scale = base, loc, scale
        super().__init__()

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        return self.base.is_discrete

    def check(self, value: Tensor) -> Tensor:
        return self.base.check((value - self.loc) / self.scale)


class AffineDistribution(UnivariateDistribution):
    """``scale · X + loc``.

    Parameters
    ----------
    base
        The distribution of X.
    loc, scale
        Broadcast with it; ``None`` for 0 and 1. The scale is positive.
    """

    def __init__(
        self, base: UnivariateDistribution, loc: Optional[Tensor], scale: Optional[Tensor]
    ) -> None:
        self.base = base
        self.loc = base._like.new_zeros(()) if loc is None else loc
        self.scale = base._like.new_ones(()) if scale is None else scale
        super().__init__(base._like, self.loc, self.scale, shape_of(base))

    @property
    def support(self) -> constraints.Constraint:
        if self.base.support is constraints.real:
            return constraints.real
        return _AffineSupport(self.base.support, self.loc, self.scale)

    @property
    def has_jumps(self) -> bool:
        return self.base.has_jumps

    @property
    def mean(self) -> Tensor:
        return self.base.mean * self.scale + self.loc

    @property
    def variance(self) -> Tensor:
        return self.base.variance * self.scale.square()

    def _standardise(self, value: Tensor) -> Tensor:
        return (value - self.loc) / self.scale

    def log_prob(self, value: Tensor) -> Tensor:
        logarithm = self.base.log_prob(self._standardise(value))
        return logarithm if self.is_discrete else logarithm - self.scale.log()

    def cdf(self, value: Tensor) -> Tensor:
        return self.base.cdf(self._standardise(value))

    def cdf_below(self, value: Tensor) -> Tensor:
        return self.base.cdf_below(self._standardise(value))

    def icdf(self, value: Tensor) -> Tensor:
        return self.base.icdf(value) * self.scale + self.loc

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.base.sample(sample_shape) * self.scale + self.loc

    def crps(self, value: Tensor) -> Tensor:
        return self.base.crps(self._standardise(value)) * self.scale

    def quadrature_edges(self) -> Tensor:
        return self.base.quadrature_edges() * self.scale + self.loc


def expand_trailing(tensor: Tensor, shape: torch.Size) -> Tensor:
    """``[n, …]`` as ``[n, *shape]``."""
    missing = len(shape) + 1 - tensor.dim()
    return tensor.reshape(-1, *[1] * missing, *tensor.shape[1:]).expand(-1, *shape)


def shape_of(distribution: UnivariateDistribution) -> Tensor:
    """A tensor of a distribution's shape that takes no memory."""
    return torch.empty(distribution.batch_shape, device="meta")


def probability_transform(distribution: Distribution, value: Tensor) -> Tensor:
    """Cdf at values, uniform in (0, 1) if the distribution is right.

    Where a value has a probability of its own, it is drawn uniformly from the jump (Czado et al.
    2009).
    """
    transform = distribution.cdf(value)
    if isinstance(distribution, UnivariateDistribution):
        if not distribution.has_jumps:
            return transform
        below = distribution.cdf_below(value)
    elif distribution.support is not None and distribution.support.is_discrete:
        below = torch.where(value >= 1, distribution.cdf((value - 1).clamp_min(0)), 0.0)
    else:
        return transform
    return below + torch.rand_like(below) * (transform - below)
