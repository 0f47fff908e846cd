"""Forecasts that share their batch: what one asks of the distribution is computed for all."""

from typing import Any, Dict, Optional, Tuple, Union

import numpy as np
import pandas as pd
import torch
from gluonts.model.forecast import Quantile, SampleForecast
from gluonts.torch.distributions import DistributionOutput
from gluonts.torch.model.forecast import DistributionForecast
from torch import Tensor
from torch.distributions import Distribution

from ..distributions import UnivariateDistribution
from .calibration import Calibration

_SAMPLES_FOR_QUANTILES = 1000
_SMALLEST_LEVEL = 1e-6


class BatchDistribution:
    """The predictive distributions of a batch of series.

    Parameters
    ----------
    distr_output
        The head.
    distr_args
        Its parameters, each ``[batch, horizon]`` or ``[batch, horizon, channel]``, perhaps with
        a parameter dimension behind.
    loc, scale
        ``[batch, 1]`` or ``[batch, 1, channel]``.
    calibration
        Corrects the levels at which quantiles are read.
    """

    def __init__(
        self,
        distr_output: DistributionOutput,
        distr_args: Tuple[Tensor, ...],
        loc: Tensor,
        scale: Tensor,
        calibration: Optional[Calibration] = None,
    ) -> None:
        self.distr_output = distr_output
        self.distr_args = distr_args
        self.loc = loc
        self.scale = scale
        self.calibration = calibration
        self._quantiles: Dict[float, np.ndarray] = {}
        self._mean: Optional[np.ndarray] = None
        self._samples: Optional[Tensor] = None

    def distribution(self) -> Distribution:
        # Some of GluonTS's heads scale their arguments in place.
        arguments = tuple(argument.clone() for argument in self.distr_args)
        return self.distr_output.distribution(arguments, loc=self.loc, scale=self.scale)

    def select(self, index: int) -> "BatchDistribution":
        """The distribution of one series, alone."""
        rows = slice(index, index + 1)
        return BatchDistribution(
            self.distr_output,
            tuple(argument[rows].clone() for argument in self.distr_args),
            self.loc[rows].clone(),
            self.scale[rows].clone(),
            self.calibration,
        )

    def mean(self) -> np.ndarray:
        if self._mean is None:
            self._mean = self.distribution().mean.numpy()
        return self._mean

    def quantile(self, level: float) -> np.ndarray:
        """``[batch, horizon]`` or ``[batch, horizon, channel]``."""
        if level not in self._quantiles:
            read_at = level if self.calibration is None else self.calibration(level)
            self._quantiles[level] = self._inverse_cdf(read_at)
        return self._quantiles[level]

    def _inverse_cdf(self, level: float) -> np.ndarray:
        distribution = self.distribution()
        try:
            return distribution.icdf(torch.tensor([level], dtype=self.loc.dtype)).numpy()
        except NotImplementedError:
            if self._samples is None:
                self._samples = distribution.sample(torch.Size((_SAMPLES_FOR_QUANTILES,)))
            discrete = distribution.support is not None and distribution.support.is_discrete
            interpolation = "higher" if discrete else "linear"
            return self._samples.quantile(level, dim=0, interpolation=interpolation).numpy()


class BatchedDistributionForecast(DistributionForecast):
    """One series' share of a :class:`BatchDistribution`.

    A head whose distribution has no inverse cdf gives the quantiles of 1,000 samples.

    Parameters
    ----------
    batch
        The distributions of all series of the batch.
    index
        Which of them.
    start_date, item_id, info
        As for GluonTS's ``DistributionForecast``.
    """

    def __init__(
        self,
        batch: BatchDistribution,
        index: int,
        start_date: pd.Period,
        item_id: Optional[str] = None,
        info: Optional[Dict[str, Any]] = None,
    ) -> None:
        self._batch = batch
        self._row = index
        self.prediction_length = batch.distr_args[0].shape[1]
        self.start_date = start_date
        self.item_id = item_id
        self.info = info

    @property
    def distribution(self) -> Distribution:
        """The head's distribution, before any calibration."""
        alone = self._batch.select(self._row)
        arguments = tuple(argument[0] for argument in alone.distr_args)
        return self._batch.distr_output.distribution(
            arguments, loc=alone.loc[0], scale=alone.scale[0]
        )

    @property
    def shape(self) -> torch.Size:
        distribution = self.distribution
        return distribution.batch_shape + distribution.event_shape

    @property
    def mean(self) -> np.ndarray:
        """``[horizon]`` or ``[horizon, channel]``."""
        return self._batch.mean()[self._row]

    def quantile(self, level: Union[float, str]) -> np.ndarray:
        """``[horizon]`` or ``[horizon, channel]`` at a level.

        Raises
        ------
        ValueError
            If the level lies outside (0, 1).
        """
        value = level if isinstance(level, (int, float)) else Quantile.parse(level).value
        if not 0 < value < 1:
            raise ValueError(f"level={level!r} of a quantile must lie between 0 and 1")
        return self._batch.quantile(float(value))[self._row]

    def dim(self) -> int:
        """Number of channels."""
        return 1 if self._batch.loc.dim() == 2 else self._batch.loc.shape[-1]

    def copy_dim(self, dim: int) -> "BatchedDistributionForecast":
        """The forecast of one channel."""
        alone = self._batch.select(self._row)
        channel = BatchDistribution(
            alone.distr_output,
            tuple(argument[:, :, dim] for argument in alone.distr_args),
            alone.loc[..., dim],
            alone.scale[..., dim],
            alone.calibration,
        )
        return type(self)(channel, 0, self.start_date, self.item_id, self.info)

    def to_sample_forecast(self, num_samples: int = 200) -> SampleForecast:
        """Samples: joint paths if the head joins the steps; calibrated, if the forecast is."""
        samples = self.distribution.sample(torch.Size((num_samples,)))
        if self._batch.calibration is not None:
            levels = self._batch.calibration.of(_levels(self.distribution, num_samples).numpy())
            levels = levels.clip(_SMALLEST_LEVEL, 1 - _SMALLEST_LEVEL)
            samples = self.distribution.icdf(torch.from_numpy(levels).to(samples.dtype))
        return SampleForecast(
            samples.numpy(), start_date=self.start_date, item_id=self.item_id, info=self.info
        )

    def __reduce__(self) -> Tuple[Any, ...]:
        # A pickled forecast takes its own series along, not the batch.
        alone = self._batch.select(self._row)
        return type(self), (alone, 0, self.start_date, self.item_id, self.info)


def _levels(distribution: Distribution, num_samples: int) -> Tensor:
    """Uniform numbers ``[sample, horizon(, channel)]``, as dependent as the draws are."""
    sample_shape = torch.Size((num_samples,))
    if isinstance(distribution, UnivariateDistribution):
        return distribution.sample_levels(sample_shape)
    return torch.rand(sample_shape + distribution.batch_shape)
