"""Standardisation of each window by what was observed in its context."""

from typing import Tuple

import torch
from torch import Tensor, nn

SCALINGS = ("std", "regularised_std", "mean", "none")

_RELATIVE_FLOOR = 1e-6
_ABSOLUTE_FLOOR = 1e-8
_ADDED_VARIANCE = 1e-5


class WindowScaler(nn.Module):
    """Location and scale of a window from the values observed in its context.

    Parameters
    ----------
    scaling
        ``"std"`` subtracts the mean and divides by the standard deviation, ``"mean"`` divides by
        the mean absolute value, ``"none"`` leaves the values as they are. ``"regularised_std"``
        is MOIRAI's: as ``"std"``, in double precision, of the sample variance plus 1e-5.

    Raises
    ------
    ValueError
        If ``scaling`` is none of these.
    """

    def __init__(self, scaling: str) -> None:
        super().__init__()
        if scaling not in SCALINGS:
            raise ValueError(f"scaling={scaling!r} is unknown: choose one of {', '.join(SCALINGS)}")
        self.scaling = scaling

    def forward(
        self, past_target: Tensor, past_observed_values: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Standardise a batch of contexts.

        Parameters
        ----------
        past_target, past_observed_values
            ``[batch, time, channel]``; where nothing is observed, the filled-in values count.

        Returns
        -------
        past_target_scaled, loc, scale
            ``[batch, time, channel]`` and twice ``[batch, 1, channel]``. The scale of a constant
            window is its level, so that a forecast's spread stays within reach of the data.
        """
        loc, scale = self.moments(past_target, past_observed_values)
        return (past_target - loc) / scale, loc, scale

    def moments(self, past_target: Tensor, past_observed_values: Tensor) -> Tuple[Tensor, Tensor]:
        """Location and scale, see :meth:`forward`."""
        if self.scaling == "none":
            return torch.zeros_like(past_target[:, :1]), torch.ones_like(past_target[:, :1])
        if self.scaling == "regularised_std":
            return _regularised_moments(past_target, past_observed_values)
        count = past_observed_values.sum(dim=1, keepdim=True)
        weights = torch.where(count > 0, past_observed_values / count, 1.0 / past_target.shape[1])
        if self.scaling == "std":
            loc = (past_target * weights).sum(dim=1, keepdim=True)
            level = loc.abs()
            scale = ((past_target - loc).square() * weights).sum(dim=1, keepdim=True).sqrt()
        else:
            level = (past_target.abs() * weights).sum(dim=1, keepdim=True)
            loc, scale = torch.zeros_like(level), level
        floor = (_RELATIVE_FLOOR * level).clamp_min(_ABSOLUTE_FLOOR)
        fallback = torch.where(level > _ABSOLUTE_FLOOR, level, 1.0)
        return loc, torch.where(scale > floor, scale, fallback)


def _regularised_moments(values: Tensor, observed: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and deviation ``[batch, 1, channel]``, the variance of at least 1e-5."""
    exact, weights = values.to(torch.float64), observed.to(torch.float64)
    count = weights.sum(dim=1, keepdim=True)
    loc = (exact * weights).sum(dim=1, keepdim=True) / count.clamp_min(1.0)
    loc = torch.where(count > 0, loc, exact.mean(dim=1, keepdim=True))
    squares = ((exact - loc).square() * weights).sum(dim=1, keepdim=True)
    scale = (squares / (count - 1.0).clamp_min(1.0) + _ADDED_VARIANCE).sqrt()
    return loc.to(values.dtype), scale.to(values.dtype)
