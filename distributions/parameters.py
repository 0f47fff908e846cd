"""How networks and training use any head, whether of this package or not."""

from typing import Optional, Tuple

import torch
from gluonts.torch.distributions import DistributionOutput, Output
from torch import Tensor, nn
from torch.distributions import constraints

from .head import Head

_PROJECTED_FEATURES = 16
_STEPS_OF_A_SHIFT = (-4.0, -1.0, 1.0, 4.0)
_TOLERANCE_OF_A_SHIFT = 0.05


class ParameterHead(nn.Module):
    """Turns the last dimension of a network's output into a head's parameters.

    A head that only needs numbers for its parameters takes them as they come, so that experts
    can be mixed before the domain map. A head with a projection network of its own (GluonTS's
    implicit quantiles) gets features instead.

    Parameters
    ----------
    distr_output
        The head.

    Attributes
    ----------
    in_features
        Size of the last dimension that the network must deliver.
    """

    def __init__(self, distr_output: Output) -> None:
        super().__init__()
        self.distr_output = distr_output
        self.projection: Optional[nn.Module] = None
        self._sizes = list(distr_output.args_dim.values())
        if type(distr_output).get_args_proj is not Output.get_args_proj:
            self.in_features = _PROJECTED_FEATURES
            self.projection = distr_output.get_args_proj(self.in_features)
        else:
            self.in_features = sum(self._sizes)

    def forward(self, raw: Tensor) -> Tuple[Tensor, ...]:
        """Parameters for ``[…, in_features]``, each ``[…]`` or ``[…, size]``."""
        if self.projection is not None:
            return self.projection(raw)
        if raw.dtype in (torch.bfloat16, torch.float16):
            # Tails need more digits, and some of their functions know no half precision.
            raw = raw.float()
        return self.distr_output.domain_map(*raw.split(self._sizes, dim=-1))

    def location_direction(self) -> Tensor:
        """The change of raw parameters ``[in_features]`` that shifts the forecast by one.

        0 for heads that cannot be shifted, as those of counts and of positive numbers, and those
        with a projection of their own.
        """
        nowhere = torch.zeros(self.in_features)
        if self.projection is not None:
            return nowhere
        with torch.inference_mode(False), torch.enable_grad():
            raw = torch.zeros(self.in_features, requires_grad=True)
            try:
                level = self._level(raw)
            except NotImplementedError:  # The head does not know its mean.
                return nowhere
            if not level.requires_grad:
                return nowhere
            (gradient,) = torch.autograd.grad(level, raw)
            direction = gradient / gradient.square().sum()
            steps = torch.tensor(_STEPS_OF_A_SHIFT)
            shifted = self._level(steps.unsqueeze(-1) * direction)
        exact = torch.allclose(shifted, level + steps, atol=_TOLERANCE_OF_A_SHIFT)
        return direction if exact else nowhere

    def _level(self, raw: Tensor) -> Tensor:
        """The forecast's mean ``[…]``; of heads without a distribution, that of their values."""
        distr_args = self(raw)
        if isinstance(self.distr_output, DistributionOutput):
            return self.distr_output.distribution(distr_args).mean
        (values,) = distr_args
        return values.mean(dim=-1) if values.dim() == raw.dim() else values


def support_of(distr_output: Output) -> constraints.Constraint:
    """The single values a head can give a likelihood to; all real ones where it does not say."""
    if isinstance(distr_output, Head):
        return distr_output.support
    support = getattr(getattr(distr_output, "distr_cls", None), "support", None)
    if isinstance(support, constraints.Constraint) and support.event_dim == 0:
        return support
    return constraints.real


def scaling_for(distr_output: Output) -> str:
    """The window scaling that a head's support allows.

    Returns
    -------
    str
        ``"std"`` where any real number may come, ``"mean"`` (no shift) where only non-negative
        numbers or counts may, ``"none"`` where the support is bounded.
    """
    if isinstance(distr_output, Head):
        return distr_output.scaling
    support = support_of(distr_output)
    if support in (constraints.nonnegative_integer, constraints.nonnegative, constraints.positive):
        return "mean"
    if support is constraints.unit_interval:
        return "none"
    return "std"


def scales_parameters(distr_output: Output) -> bool:
    """Whether a head's scale acts on its parameters instead of its values, as with counts."""
    if isinstance(distr_output, Head):
        return distr_output.scales_parameters
    return support_of(distr_output) is constraints.nonnegative_integer


def has_cdf(distr_output: Output) -> bool:
    """Whether a head's distribution has a cdf and its inverse, as calibration needs them."""
    if isinstance(distr_output, Head) or not isinstance(distr_output, DistributionOutput):
        return isinstance(distr_output, Head)
    head = ParameterHead(distr_output)
    distribution = distr_output.distribution(head(torch.zeros(head.in_features)))
    try:
        distribution.icdf(distribution.cdf(torch.tensor(distr_output.value_in_support)))
    except (NotImplementedError, AttributeError):
        return False
    return True


def window_loss(
    distr_output: Output,
    target: Tensor,
    observed: Tensor,
    distr_args: Tuple[Tensor, ...],
    loc: Tensor,
    scale: Tensor,
) -> Tensor:
    """A head's loss per window ``[batch]``, mean over the observed values of the horizon.

    It is taken on the scale of the window, which for likelihoods changes it by a constant, so
    that large series do not drown the others.

    Parameters
    ----------
    target, observed
        ``[batch, horizon, channel]``; what is not observed has no influence.
    distr_args
        The head's parameters, each ``[batch, horizon, channel]`` or with one more dimension.
    loc, scale
        Location and scale of the windows, ``[batch, 1, channel]``.
    """
    window: Tuple[Optional[Tensor], Optional[Tensor]] = (loc, scale)
    if not scales_parameters(distr_output):
        target = (target - loc) / scale
        window = (None, None)
    missing = observed == 0
    target = target.masked_fill(missing, distr_output.value_in_support)
    if not isinstance(distr_output, Head):
        # Some of GluonTS's heads scale their arguments in place.
        distr_args = tuple(argument.clone() for argument in distr_args)
    losses = distr_output.loss(target, distr_args, *window)
    if scales_parameters(distr_output) and getattr(distr_output, "loss_name", "nll") == "crps":
        losses = losses / scale
    total = losses.flatten(1).masked_fill(missing.flatten(1), 0.0).sum(dim=1)
    if isinstance(distr_output, Head):
        total = total + distr_output.joint_loss(target, observed, distr_args, *window)
    return total / observed.flatten(1).sum(dim=1).clamp_min(1.0)
