"""Quantile regression whose quantiles never cross."""

from typing import List, Tuple

from gluonts.core.component import validated
from gluonts.torch.distributions import QuantileOutput as GluonTSQuantileOutput
from torch import Tensor

from .quantile_spline import checked_levels


class QuantileOutput(GluonTSQuantileOutput):
    """Chosen quantiles, trained by the quantile loss and sorted.

    GluonTS's head, whose forecasts interpolate between the quantiles, with its outputs put in
    order (Chernozhukov et al. 2010). Only the quantiles are known: there is no distribution to
    sample from or to calibrate.

    Parameters
    ----------
    quantiles
        Their levels, in any order.

    Raises
    ------
    ValueError
        If there are none, or one outside (0, 1).
    """

    @validated()
    def __init__(self, quantiles: List[float]) -> None:
        super().__init__(quantiles=sorted(set(checked_levels(quantiles))))

    def domain_map(self, *args: Tensor) -> Tuple[Tensor, ...]:
        (outputs,) = args
        return (outputs.sort(dim=-1).values,)
