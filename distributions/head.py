"""What all heads share: from raw numbers to parameters, scaling, losses, forecasts."""

from typing import Any, Callable, ClassVar, Dict, Mapping, Optional, Tuple, Type, cast

import torch
from gluonts.core.component import validated
from gluonts.torch.distributions import DistributionOutput
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from .univariate import AffineDistribution, UnivariateDistribution

LOSSES = ("nll", "crps")

ParameterMap = Callable[[Tensor], Tensor]


def real(raw: Tensor) -> Tensor:
    """Any number."""
    return raw


def positive(raw: Tensor) -> Tensor:
    """A positive number, bounded away from 0 so that likelihoods and gradients stay finite."""
    return F.softplus(raw).clamp_min(torch.finfo(raw.dtype).eps)


def above_two(raw: Tensor) -> Tensor:
    """Degrees of freedom with which the variance exists."""
    return 2.0 + F.softplus(raw)


class Head(DistributionOutput):
    """Base of the distribution heads: a subclass states its parameters and its distribution.

    Parameters
    ----------
    loss
        ``"nll"`` trains by the negative log-likelihood, ``"crps"`` by the continuous ranked
        probability score.
    beta
        Weight each likelihood by the variance to this power (Seitzer et al. 2022); 0 does not.

    Attributes
    ----------
    parameters
        For each parameter, in order, the map from a raw number into its domain.
    distr_cls
        The distribution, constructed from the parameters.
    scales_parameters
        Whether ``loc`` and ``scale`` act on the parameters, as with counts, instead of on values.
    has_jumps
        Whether single values have a probability of their own.
    scaling
        How windows are best standardised for this head: ``"std"``, ``"mean"`` or ``"none"``.

    Raises
    ------
    ValueError
        If the loss is unknown or has no formula for this head, or ``beta`` is negative, or set
        with another loss than the likelihood.
    """

    parameters: ClassVar[Mapping[str, ParameterMap]] = {}
    distr_cls: Type[UnivariateDistribution]
    scales_parameters: bool = False
    has_jumps: bool = False
    scaling: str = "std"
    losses: Tuple[str, ...] = LOSSES

    @validated()
    def __init__(self, loss: str = "nll", beta: float = 0.0) -> None:
        super().__init__(beta=beta)
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r} is unknown: choose one of {', '.join(LOSSES)}")
        if loss not in self.losses:
            raise ValueError(
                f"loss={loss!r} cannot train {type(self).__name__} with these arguments: "
                f"use loss={self.losses[0]!r}"
            )
        if not beta >= 0:
            raise ValueError(f"beta={beta} must not be negative")
        if beta and loss != "nll":
            raise ValueError(f"beta={beta} weights likelihoods: it needs loss='nll', not {loss!r}")
        self.loss_name = loss

    @property
    def args_dim(self) -> Dict[str, int]:
        """Number of raw numbers for each parameter."""
        return dict.fromkeys(self.parameters, 1)

    @property
    def event_shape(self) -> Tuple[int, ...]:
        return ()

    @property
    def support(self) -> constraints.Constraint:
        """The values that can be given a likelihood."""
        return cast(constraints.Constraint, self.distr_cls.support)

    @property
    def value_in_support(self) -> float:
        return float(self.distr_cls.interior)

    def domain_map(self, *args: Tensor) -> Tuple[Tensor, ...]:
        """Parameters ``[…]`` from raw numbers, each ``[…, 1]``."""
        return tuple(
            into_domain(raw.squeeze(-1)) for into_domain, raw in zip(self.parameters.values(), args)
        )

    def distribution(
        self,
        distr_args: Tuple[Tensor, ...],
        loc: Optional[Tensor] = None,
        scale: Optional[Tensor] = None,
    ) -> UnivariateDistribution:
        """The distribution of these parameters, shifted by ``loc`` and stretched by ``scale``."""
        if loc is None and scale is None:
            return self._base_distribution(distr_args)
        if self.scales_parameters:
            return self._base_distribution(self._scale_parameters(distr_args, loc, scale))
        return AffineDistribution(self._base_distribution(distr_args), loc, scale)

    def _base_distribution(self, distr_args: Tuple[Tensor, ...]) -> UnivariateDistribution:
        return self.distr_cls(*distr_args)

    def _scale_parameters(
        self, distr_args: Tuple[Tensor, ...], loc: Optional[Tensor], scale: Optional[Tensor]
    ) -> Tuple[Tensor, ...]:
        raise NotImplementedError

    def loss(
        self,
        target: Tensor,
        distr_args: Tuple[Tensor, ...],
        loc: Optional[Tensor] = None,
        scale: Optional[Tensor] = None,
    ) -> Tensor:
        """Loss per value, same shape as ``target``; a CRPS has the target's unit."""
        distribution = self.distribution(distr_args, loc=loc, scale=scale)
        if self.loss_name == "crps":
            return distribution.crps(target)
        losses = -distribution.log_prob(target)
        if self.beta > 0.0:
            losses = losses * distribution.variance.detach() ** self.beta
        return losses

    def joint_loss(
        self,
        target: Tensor,
        observed: Tensor,
        distr_args: Tuple[Tensor, ...],
        loc: Optional[Tensor] = None,
        scale: Optional[Tensor] = None,
    ) -> Tensor:
        """What the loss of a window ``[batch]`` has beyond that of its values: here nothing.

        Parameters
        ----------
        target, observed
            ``[batch, time, …]``; what is not observed has no influence.
        """
        return target.new_zeros(len(target))


def component_head(head: Any, argument: str, loss: Optional[str] = None) -> Head:
    """A head to build another one from, from itself or its name.

    Parameters
    ----------
    head, argument
        As for :func:`moecast.distributions.resolve_head`.
    loss
        What it must be possible to train it by; ``None`` for anything.

    Raises
    ------
    ValueError
        If it is none of this package's, or cannot be trained so.
    """
    from .names import resolve_head  # It knows all heads, also those built from others.

    resolved = resolve_head(head, argument)
    if not isinstance(resolved, Head) or loss not in (None, *resolved.losses):
        trained = "" if loss is None else f" that loss={loss!r} can train"
        raise ValueError(
            f"{argument}={head!r} must be a head of moecast's with a distribution{trained}, "
            f"which {type(resolved).__name__} is not"
        )
    return resolved
