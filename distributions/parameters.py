"""From what a network puts out to a head's parameters."""

from typing import Optional, Tuple

import torch
from gluonts.torch.distributions import DistributionOutput, Output
from torch import Tensor, nn
from torch.distributions import constraints

_PROJECTED_FEATURES = 16


class ParameterHead(nn.Module):
    """Turns the last dimension of a network's output into a head's parameters.

    A head that only needs numbers for its parameters takes them as they come, so that experts
    can be mixed before the domain map. A head with a projection network of its own (implicit
    quantiles) gets features instead.

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
        if type(distr_output).get_args_proj is not Output.get_args_proj:
            self.in_features = _PROJECTED_FEATURES
            self.projection = distr_output.get_args_proj(self.in_features)
        else:
            self.in_features = sum(distr_output.args_dim.values())

    def forward(self, raw: Tensor) -> Tuple[Tensor, ...]:
        """Parameters for ``[…, in_features]``, each ``[…]`` or ``[…, size]``."""
        if self.projection is not None:
            return self.projection(raw)
        sizes = list(self.distr_output.args_dim.values())
        return self.distr_output.domain_map(*raw.split(sizes, dim=-1))


def support_of(distr_output: Output) -> constraints.Constraint:
    """The single values a head can give a likelihood to; all real ones where it does not say."""
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
    support = support_of(distr_output)
    if support in (constraints.nonnegative_integer, constraints.nonnegative, constraints.positive):
        return "mean"
    if support is constraints.unit_interval:
        return "none"
    return "std"


def scales_parameters(distr_output: Output) -> bool:
    """Whether a head's scale acts on its parameters instead of its values, as with counts."""
    return support_of(distr_output) is constraints.nonnegative_integer


def has_cdf(distr_output: Output) -> bool:
    """Whether a head's distribution has a cdf and its inverse, as calibration needs them."""
    if not isinstance(distr_output, DistributionOutput):
        return False
    head = ParameterHead(distr_output)
    distribution = distr_output.distribution(head(torch.zeros(head.in_features)))
    try:
        distribution.icdf(distribution.cdf(distribution.sample()))
    except (NotImplementedError, AttributeError):
        return False
    return True
