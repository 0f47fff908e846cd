"""Mixtures of any heads."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from gluonts.core.component import validated
from torch import Tensor
from torch.distributions import constraints

from .head import Head, component_head
from .numerics import smallest_count, solve_increasing
from .univariate import UnivariateDistribution, expand_trailing, shape_of


class Mixture(UnivariateDistribution):
    """A draw from one of several distributions.

    Where continuous and discrete components meet, ``log_prob`` adds densities and probabilities,
    as MOIRAI's mixture does: a density with respect to length plus the count of whole numbers.

    Parameters
    ----------
    weights_logits
        ``[…, component]``.
    components
        Distributions whose shapes broadcast with ``[…]``.
    """

    interior = 0.0
    vector_parameters = ("weights_logits", "weights")

    def __init__(
        self, weights_logits: Tensor, components: Sequence[UnivariateDistribution]
    ) -> None:
        self.weights_logits, self.weights = weights_logits, weights_logits.softmax(dim=-1)
        self.components = list(components)
        super().__init__(weights_logits[..., 0], *(shape_of(component) for component in components))

    @property
    def support(self) -> constraints.Constraint:
        discrete = all(component.is_discrete for component in self.components)
        return constraints.nonnegative_integer if discrete else constraints.real

    @property
    def has_jumps(self) -> bool:
        return any(component.has_jumps for component in self.components)

    def _average(self, values: Sequence[Tensor]) -> Tensor:
        terms = [weight * value for weight, value in zip(self.weights.unbind(dim=-1), values)]
        return sum(terms[1:], terms[0])

    @property
    def mean(self) -> Tensor:
        return self._average([component.mean for component in self.components])

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        return self._average([c.variance + (c.mean - mean).square() for c in self.components])

    def log_prob(self, value: Tensor) -> Tensor:
        logits = self.weights_logits.log_softmax(dim=-1).unbind(dim=-1)
        joint = [logit + c.log_prob(value) for logit, c in zip(logits, self.components)]
        stacked = torch.stack(torch.broadcast_tensors(*joint))
        outside = torch.isneginf(stacked).all(dim=0)
        total = torch.where(outside, 0.0, stacked).logsumexp(dim=0)
        return torch.where(outside, -torch.inf, total)

    def _cdf(self, value: Tensor) -> Tensor:
        return self._average([component.cdf(value) for component in self.components])

    def cdf_below(self, value: Tensor) -> Tensor:
        return self._average([component.cdf_below(value) for component in self.components])

    def quadrature_edges(self) -> Tensor:
        edges = [component.quadrature_edges() for component in self.components]
        return torch.cat([expand_trailing(values, self.batch_shape) for values in edges])

    def _density(self, value: Tensor) -> Tensor:
        """Derivative of the cdf between its jumps."""
        return self._average(
            [
                torch.zeros_like(value) if c.has_jumps else c.log_prob(value).exp()
                for c in self.components
            ]
        )

    def _icdf(self, level: Tensor) -> Tensor:
        exact = self.in_double_precision()
        shape = torch.broadcast_shapes(level.shape, self.batch_shape)
        level = level.to(torch.float64).expand(shape)
        # A mixture's quantile lies between those of its components.
        quantiles = [c.icdf(level).expand(shape) for c in exact.components]
        low, high = torch.stack(quantiles).aminmax(dim=0)
        start = exact._average(quantiles)
        finite = low.isfinite() & high.isfinite()
        ends = torch.where(level > 0, high, low)
        elements = exact.flattened(shape)
        level, low, high, start = (t[finite] for t in (level, low, high, start))
        numbers = finite.flatten().nonzero().squeeze(-1)

        def mixtures(chosen: Tensor) -> "Mixture":
            return elements(numbers[chosen])

        if self.has_jumps:
            low, high = low.floor() - 1, high.ceil()
            high = smallest_count(lambda chosen: mixtures(chosen).cdf, level, low, high)
            at_jump = elements(numbers).cdf_below(high) <= level
            low = torch.where(at_jump, high, high - 1)
            start = torch.where(at_jump, high, high - 0.5)
        if not self.is_discrete:
            tolerance = 1e-15 if self._like.dtype == torch.float64 else 1e-7
            high = solve_increasing(
                lambda chosen: mixtures(chosen)._value_and_slope,
                level,
                low,
                high,
                start,
                tolerance,
            )
        return ends.masked_scatter(finite, high)

    def _value_and_slope(self, value: Tensor) -> Tuple[Tensor, Tensor]:
        return self.cdf(value), self._density(value)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            draws = [c.sample(sample_shape).expand(shape) for c in self.components]
            reached = self.weights.cumsum(dim=-1)[..., :-1]
            chosen = (torch.rand((*shape, 1), device=reached.device) > reached).sum(dim=-1)
            return torch.stack(draws).gather(0, chosen.unsqueeze(0)).squeeze(0)


class MixtureOutput(Head):
    """A mixture of other heads.

    Components of counts have their parameters scaled, all others their values, so that each means
    the same as alone.

    Parameters
    ----------
    components
        Heads with a likelihood, or their names.
    loss, beta
        As for :class:`Head`; the continuous ranked probability score needs components without
        counts.

    Raises
    ------
    ValueError
        If there are fewer than two components, or one that has no likelihood.
    """

    distr_cls = Mixture

    @validated()
    def __init__(self, components: List[Any], loss: str = "nll", beta: float = 0.0) -> None:
        if len(components) < 2:
            raise ValueError(f"components={components!r} must be at least two heads")
        self.components = [
            component_head(component, f"components[{i}]", "nll")
            for i, component in enumerate(components)
        ]
        self.has_jumps = any(head.has_jumps for head in self.components)
        if self.has_jumps:
            self.losses = ("nll",)
        super().__init__(loss=loss, beta=beta)
        self.scales_parameters = any(head.scales_parameters for head in self.components)
        scalings = {head.scaling for head in self.components}
        counts = any(head.support.is_discrete for head in self.components)
        on_the_line = self.support is constraints.real and not counts
        self.scaling = "std" if on_the_line else "none" if "none" in scalings else "mean"

    @property
    def args_dim(self) -> Dict[str, int]:
        sizes = {"weights_logits": len(self.components)}
        for i, head in enumerate(self.components):
            sizes.update({f"components.{i}.{name}": n for name, n in head.args_dim.items()})
        return sizes

    @property
    def support(self) -> constraints.Constraint:
        supports = [head.support for head in self.components]
        for kinds, union in _UNIONS:
            if all(support in kinds for support in supports):
                return union
        return constraints.real

    @property
    def value_in_support(self) -> float:
        return self.components[0].value_in_support

    def _split(self, distr_args: Sequence[Tensor]) -> Tuple[Tensor, List[Tuple[Tensor, ...]]]:
        """The weights and each component's part of the arguments."""
        parts, first = [], 1
        for head in self.components:
            last = first + len(head.args_dim)
            parts.append(tuple(distr_args[first:last]))
            first = last
        return distr_args[0], parts

    def domain_map(self, *args: Tensor) -> Tuple[Tensor, ...]:
        logits, parts = self._split(args)
        mapped = [
            argument
            for head, part in zip(self.components, parts)
            for argument in head.domain_map(*part)
        ]
        return (logits, *mapped)

    def distribution(
        self,
        distr_args: Tuple[Tensor, ...],
        loc: Optional[Tensor] = None,
        scale: Optional[Tensor] = None,
    ) -> UnivariateDistribution:
        if not self.scales_parameters:
            return super().distribution(distr_args, loc=loc, scale=scale)
        return self._mixture(distr_args, loc, scale)

    def _base_distribution(self, distr_args: Tuple[Tensor, ...]) -> Mixture:
        return self._mixture(distr_args, None, None)

    def _mixture(
        self, distr_args: Tuple[Tensor, ...], loc: Optional[Tensor], scale: Optional[Tensor]
    ) -> Mixture:
        logits, parts = self._split(distr_args)
        components = [
            head.distribution(part, loc=loc, scale=scale)
            for head, part in zip(self.components, parts)
        ]
        return Mixture(logits, components)


_UNIONS = (
    ((constraints.nonnegative_integer,), constraints.nonnegative_integer),
    ((constraints.unit_interval,), constraints.unit_interval),
    ((constraints.positive, constraints.unit_interval), constraints.positive),
    (
        (
            constraints.nonnegative_integer,
            constraints.nonnegative,
            constraints.positive,
            constraints.unit_interval,
        ),
        constraints.nonnegative,
    ),
)
