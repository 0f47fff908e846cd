"""Metrics: GluonTS's, safe on constant series; interval coverage; those of long-horizon papers."""

from __future__ import annotations

import warnings
from collections import ChainMap
from dataclasses import dataclass
from functools import partial
from typing import Any, Mapping, Optional, Union

import numpy as np
from gluonts.ev import metrics as ev
from gluonts.ev.aggregations import Mean
from gluonts.ev.stats import absolute_scaled_error, scaled_interval_score

from .errors import EvaluationError

Axis = Optional[Union[int, tuple[int, ...]]]
Data = Mapping[str, np.ndarray]

DECILES = tuple(round(0.1 * i, 1) for i in range(1, 10))

_CHANNELS = slice(None)
# Relative deviations that are rounding and no variation.
_ROUNDING = 64 * np.finfo(np.float64).eps


class UnscaledSeriesWarning(UserWarning):
    """Series windows without a seasonal error to divide by were left out of MASE or MSIS."""


@dataclass
class MaskedMean(Mean):
    """Mean over what is not masked; NaN where everything is.

    GluonTS's `Mean` loses the mask where it does not aggregate over series (axis 0).
    """

    partial_result: Any = None
    n: Any = None

    def step(self, values: np.ndarray) -> None:
        """Add `values` [series, ...], masked or not."""
        total = np.ma.filled(np.ma.sum(values, axis=self.axis), 0.0)
        count = np.asarray(np.ma.count(values, axis=self.axis))
        if self.axis is None or 0 in self.axis:
            first = self.partial_result is None
            self.partial_result = total if first else self.partial_result + total
            self.n = count if first else self.n + count
        else:
            self.partial_result = [*(self.partial_result or []), _ratio(total, count)]

    def get(self) -> np.ndarray:
        """The mean, without the aggregated axes."""
        if isinstance(self.partial_result, list):
            return np.concatenate(self.partial_result)
        return _ratio(self.partial_result, self.n)


def _ratio(total: Any, count: Any) -> np.ndarray:
    total, count = np.asarray(total, dtype=np.float64), np.asarray(count)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


@dataclass
class ScaledMetric(ev.DirectMetric):
    """A metric in units of the seasonal error, over the series windows that have one.

    The seasonal error is zero where the history is constant and NaN where it is not longer than a
    season. Such windows are masked; `get` warns once how many there were.
    """

    num_series: int = 0
    num_unscaled: int = 0

    def update(self, data: Data) -> ScaledMetric:
        """Add a batch of labels [series, (channels,) time] and forecasts."""
        scale = np.asarray(data["seasonal_error"])
        unscaled = ~(np.isfinite(scale) & (scale > 0))
        self.num_series += scale.size
        self.num_unscaled += int(unscaled.sum())
        usable = {"seasonal_error": np.where(unscaled, 1.0, scale)}
        values = self.stat(ChainMap(usable, data))  # type: ignore[arg-type]
        mask = np.ma.getmaskarray(values) | unscaled
        self.aggregate.step(np.ma.array(np.ma.getdata(values), mask=mask))
        return self

    def get(self) -> np.ndarray:
        """The aggregated metric; NaN if no series window has a seasonal error."""
        if self.num_unscaled:
            warnings.warn(
                f"{self.num_unscaled} of {self.num_series} series windows have a history that is "
                "constant or not longer than a season; MASE and MSIS leave them out.",
                UnscaledSeriesWarning,
                stacklevel=1,
            )
        return super().get()


@dataclass
class MASE(ev.BaseMetricDefinition):
    """Mean absolute scaled error (Hyndman and Koehler, 2006), finite on constant series.

    `gluonts.ev.metrics.MASE` divides by zero there (gluonts #3097).
    """

    forecast_type: str = "0.5"

    def __call__(self, axis: Axis = None) -> ScaledMetric:
        return ScaledMetric(
            name=f"MASE[{self.forecast_type}]",
            stat=partial(absolute_scaled_error, forecast_type=self.forecast_type),
            aggregate=MaskedMean(axis=axis),
        )


@dataclass
class MSIS(ev.BaseMetricDefinition):
    """Mean scaled interval score (Makridakis et al., M4, 2020), finite on constant series.

    Parameters
    ----------
    alpha
        One minus the interval's level; the quantiles α/2 and 1 − α/2 are scored.
    """

    alpha: float = 0.05

    def __call__(self, axis: Axis = None) -> ScaledMetric:
        return ScaledMetric(
            name="MSIS",
            stat=partial(scaled_interval_score, alpha=self.alpha),
            aggregate=MaskedMean(axis=axis),
        )


@dataclass
class IntervalCoverage(ev.BaseMetricDefinition):
    """Share of labels inside the central interval of a level, ends included.

    `gluonts.ev.metrics.Coverage` is the share below one quantile.

    Parameters
    ----------
    level
        Nominal coverage between 0 and 1, such as 0.8 for the quantiles 0.1 to 0.9.
    """

    level: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise EvaluationError(f"level={self.level} must lie between 0 and 1.")

    def __call__(self, axis: Axis = None) -> ev.DirectMetric:
        lower, upper = interval_quantiles(self.level)
        return ev.DirectMetric(
            name=f"coverage[{self.level}]",
            stat=partial(_inside, lower=str(lower), upper=str(upper)),
            aggregate=MaskedMean(axis=axis),
        )


def interval_quantiles(level: float) -> tuple[float, float]:
    """Quantile levels at the ends of the central interval of `level`: 0.8 gives 0.1 and 0.9."""
    return round((1 - level) / 2, 10), round((1 + level) / 2, 10)


def _inside(data: Data, lower: str, upper: str) -> np.ndarray:
    label = np.ma.masked_invalid(data["label"])
    return ((label >= data[lower]) & (label <= data[upper])).astype(float)


CRPS = ev.MeanWeightedSumQuantileLoss(DECILES)
"""The continuous ranked probability score: quantile loss over the deciles, divided by Σ|label|."""

GIFT_EVAL_METRICS: tuple[ev.BaseMetricDefinition, ...] = (
    ev.MSE(forecast_type="mean"),
    ev.MSE(forecast_type="0.5"),
    ev.MAE(),
    MASE(),
    ev.MAPE(),
    ev.SMAPE(),
    MSIS(),
    ev.RMSE(),
    ev.NRMSE(),
    ev.ND(),
    CRPS,
)
"""The eleven metrics of GIFT-Eval (Aksu et al., arXiv:2410.10393), in its order."""

DEFAULT_METRICS: tuple[ev.BaseMetricDefinition, ...] = (*GIFT_EVAL_METRICS, IntervalCoverage(0.8))


class LongHorizonMetrics:
    """Point metrics over windows that arrive in batches; two passes over the data are not needed.

    `long_horizon_metrics` describes the metrics. Memory is that of one window.

    Parameters
    ----------
    prediction_length
        Horizon H.
    num_channels
        Number of channels D.
    """

    def __init__(self, prediction_length: int, num_channels: int) -> None:
        shape = (prediction_length, num_channels)
        self._count = np.zeros(shape)
        self._nonzero = np.zeros(shape)
        self._absolute = np.zeros(shape)
        self._squared = np.zeros(shape)
        self._absolute_relative = np.zeros(shape)
        self._squared_relative = np.zeros(shape)
        # Mean, and sums of products of deviations, of (label, forecast): merged batch by batch
        # (Chan, Golub and LeVeque, 1983), because sums of squares cancel.
        self._mean = np.zeros((2, *shape))
        self._moment = np.zeros((2, 2, *shape))

    def update(
        self, forecast: np.ndarray, label: np.ndarray, channels: slice = _CHANNELS
    ) -> LongHorizonMetrics:
        """Add windows.

        Parameters
        ----------
        forecast, label
            [windows, horizon, channels]; a missing label is NaN and left out.
        channels
            Which channels these are; all by default.

        Raises
        ------
        EvaluationError
            The shapes differ, or the forecast has NaN.
        """
        forecast, label = np.asarray(forecast, np.float64), np.asarray(label, np.float64)
        expected = self._count[:, channels].shape
        if forecast.shape != label.shape or label.shape[1:] != expected:
            raise EvaluationError(
                f"forecast {forecast.shape} and label {label.shape} must both be [windows, "
                f"{expected[0]}, {expected[1]}]."
            )
        if np.isnan(forecast).any():
            raise EvaluationError("the forecast has NaN; the forecaster must fill missing values.")
        valid = np.isfinite(label)
        error = np.where(valid, forecast - label, 0.0)
        nonzero = valid & (label != 0)
        relative = np.divide(error, label, out=np.zeros_like(error), where=nonzero)
        self._count[:, channels] += valid.sum(axis=0)
        self._nonzero[:, channels] += nonzero.sum(axis=0)
        self._absolute[:, channels] += np.abs(error).sum(axis=0)
        self._squared[:, channels] += np.square(error).sum(axis=0)
        self._absolute_relative[:, channels] += np.abs(relative).sum(axis=0)
        self._squared_relative[:, channels] += np.square(relative).sum(axis=0)
        self._merge_moments(forecast, label, valid, channels)
        return self

    def _merge_moments(
        self, forecast: np.ndarray, label: np.ndarray, valid: np.ndarray, channels: slice
    ) -> None:
        added = valid.sum(axis=0)
        total = self._count[:, channels]
        pair = np.where(valid, np.stack([label, forecast]), 0.0)
        mean = pair.sum(axis=1) / np.maximum(added, 1)
        deviation = np.where(valid, pair - mean[:, None], 0.0)
        shift = mean - self._mean[:, :, channels]
        share = added / np.maximum(total, 1)
        self._moment[..., channels] += np.einsum("inhd,jnhd->ijhd", deviation, deviation)
        self._moment[..., channels] += shift[:, None] * shift * (total - added) * share
        self._mean[:, :, channels] += shift * share

    def get(self) -> dict[str, float]:
        """The metrics over all windows so far; NaN where there is nothing to average."""
        count = self._count.sum()
        nonzero = self._nonzero.sum()
        mse = float(_ratio(self._squared.sum(), count))
        label_mean = _ratio((self._mean[0] * self._count).sum(), count)
        label_spread = (
            self._moment[0, 0] + self._count * np.square(self._mean[0] - label_mean)
        ).sum()
        variation = np.stack([self._moment[0, 0], self._moment[1, 1]])
        rounding = self._count * np.square(_ROUNDING * self._mean)
        varies = (variation > rounding).all(axis=0)
        correlation = self._moment[0, 1][varies] / np.sqrt(variation.prod(axis=0)[varies])
        return {
            "MAE": float(_ratio(self._absolute.sum(), count)),
            "MSE": mse,
            "RMSE": float(np.sqrt(mse)),
            "MAPE": float(_ratio(self._absolute_relative.sum(), nonzero)),
            "MSPE": float(_ratio(self._squared_relative.sum(), nonzero)),
            "CORR": float(_ratio(correlation.sum(), correlation.size)),
            "RSE": float(np.sqrt(_ratio(self._squared.sum(), label_spread))),
        }


def long_horizon_metrics(forecast: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """The point metrics of long-horizon papers, over all windows, steps and channels.

    MAE, MSE, RMSE; MAPE and MSPE as fractions of the label, over labels that are not zero; RSE, the
    root of the squared error relative to that of the labels' overall mean; CORR, Pearson's
    correlation over the windows at each step and channel, averaged over those where both vary (Lai
    et al., LSTNet, SIGIR 2018). The code published with Informer and Autoformer divides by
    √Σ(uv)² instead of √(Σu² Σv²) in CORR; this is the correlation proper.

    Parameters
    ----------
    forecast, label
        [windows, horizon, channels], usually standardised; a missing label is NaN and left out.

    Raises
    ------
    EvaluationError
        The shapes differ or are not three-dimensional, or the forecast has NaN.
    """
    shape: tuple[int, ...] = np.shape(label)
    if len(shape) != 3:
        raise EvaluationError(f"label {shape} must be [windows, horizon, channels].")
    return LongHorizonMetrics(shape[1], shape[2]).update(forecast, label).get()


def metric_score(name: str, value: float) -> float:
    """`value` of the metric `name` on a scale where less is better; NaN stays NaN.

    Coverage is best at its nominal level, CORR where it is greatest, all others where least.
    """
    if name.startswith("coverage["):
        return abs(value - float(name[len("coverage[") : -1]))
    return -value if name == "CORR" else value
