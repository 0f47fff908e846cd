"""Backtests of any GluonTS estimator or predictor over rolling windows."""

from __future__ import annotations

import math
import re
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Iterable, Iterator, Optional, Sequence, Union

import numpy as np
import pandas as pd
from gluonts.dataset import Dataset
from gluonts.dataset.field_names import FieldName
from gluonts.dataset.split import TestData, split
from gluonts.ev.metrics import BaseMetricDefinition
from gluonts.itertools import batcher
from gluonts.model import Estimator, Forecast, Predictor, evaluate_forecasts
from gluonts.time_feature import get_seasonality

from .diagnostics import Diagnostics, DiagnosticsCollector
from .errors import EvaluationError
from .long_horizon_data import LongHorizonDataset
from .metrics import DEFAULT_METRICS, LongHorizonMetrics

_TEST_SHARE = 0.1
_MAX_WINDOWS = 20

Forecaster = Union[Estimator, Predictor]


@dataclass(frozen=True, eq=False)
class BacktestResult:
    """One forecaster on one data set.

    Parameters
    ----------
    dataset, model
        Names of the data set and the forecaster.
    freq
        pandas frequency of the series.
    prediction_length
        Horizon H.
    windows, distance
        Number of windows per series, and steps between the starts of two.
    num_series, num_variates
        Number of series and of channels in each (1 if univariate).
    metrics
        Value of each metric by its name.
    train_seconds, predict_seconds
        Wall-clock time. Forecasts that compute their quantiles when asked, as GluonTS's
        `DistributionForecast` does, do so after the time is taken.
    predictor
        The predictor evaluated: trained, or the one given.
    test_data
        The windows evaluated, pairs of input and label.
    forecasts
        One forecast per window in `test_data`'s order, if they were kept.
    diagnostics
        Scores of every window and what else the HTML report shows; None if it was not asked for,
        or if the forecasts have no quantiles.
    """

    dataset: str
    model: str
    freq: str
    prediction_length: int
    windows: int
    distance: int
    num_series: int
    num_variates: int
    metrics: dict[str, float]
    train_seconds: float
    predict_seconds: float
    predictor: Predictor
    test_data: TestData
    forecasts: Optional[tuple[Forecast, ...]] = None
    diagnostics: Optional[Diagnostics] = None


def gift_eval_windows(dataset: Dataset, prediction_length: int) -> int:
    """Number of test windows by GIFT-Eval's rule: a tenth of the shortest series, 1 to 20.

    min(20, ⌈0.1 · length of the shortest series / horizon⌉), at least 1 (Aksu et al.,
    arXiv:2410.10393). GIFT-Eval gives M4 a single window whatever its length.
    """
    shortest = min(_length(entry) for entry in dataset)
    return min(_MAX_WINDOWS, max(1, math.ceil(_TEST_SHARE * shortest / prediction_length)))


def season_length(start: pd.Period) -> int:
    """Steps per season at the frequency of `start`, as GIFT-Eval takes it from GluonTS.

    24 for hours, 12 for months, 4 for quarters, 5 for business days; 1 for days and weeks.
    """
    return get_seasonality(f"{start.freq.n}{start.freq.name}")


def forecaster_name(cls: type) -> str:
    """Name of a forecaster class in results: `DLinear` for `DLinearEstimator`."""
    return re.sub(r"(?<=.)(Estimator|Predictor)$", "", cls.__name__)


def backtest(
    forecaster: Forecaster,
    dataset: Dataset,
    *,
    prediction_length: int,
    windows: Optional[int] = None,
    distance: Optional[int] = None,
    metrics: Sequence[BaseMetricDefinition] = DEFAULT_METRICS,
    seasonality: Optional[int] = None,
    validate: bool = False,
    batch_size: int = 512,
    keep_forecasts: bool = False,
    diagnose: bool = True,
    dataset_name: str = "dataset",
    model: Optional[str] = None,
) -> BacktestResult:
    """Train on what precedes the test windows, forecast each of them, and score the forecasts.

    The last window ends with each series. Missing labels are not scored, and a forecast with NaN
    is an error, as in GIFT-Eval.

    Parameters
    ----------
    forecaster
        An estimator, which is trained on every series up to its first test window, or a predictor.
    dataset
        Entries with targets [T] or [D, T]; iterated several times, so no generator.
    prediction_length
        Horizon H, the one the forecaster was made with.
    windows
        Number of windows per series, by default `gift_eval_windows`.
    distance
        Steps between the starts of two windows, by default H: the windows do not overlap.
    metrics
        Definitions from `gluonts.ev.metrics` or `moecast.evaluation`, aggregated over series,
        channels and steps.
    seasonality
        Steps per season for MASE and MSIS, by default `season_length` of the frequency.
    validate
        Train up to one horizon earlier, and give the estimator the series up to the first test
        window as validation data.
    batch_size
        Windows scored at a time.
    keep_forecasts
        Keep every forecast in the result.
    diagnose
        Gather the result's `diagnostics`, in the same pass; they need the quantiles that CRPS and
        MSIS need. A predictor that can report routing does so meanwhile.
    dataset_name, model
        Names in the result; `model` is by default the forecaster's class name without
        its ending Estimator or Predictor.

    Raises
    ------
    EvaluationError
        The data set is empty, a series is too short for the windows, a setting is below 1, the
        forecaster has another horizon, or it gives too few forecasts.
    """
    entry = next(iter(dataset), None)
    if entry is None:
        raise EvaluationError(f"{dataset_name}: there is no series in it; check the data.")
    if windows is None:
        windows = gift_eval_windows(dataset, max(prediction_length, 1))
    distance = prediction_length if distance is None else distance
    for name, value in (
        ("prediction_length", prediction_length),
        ("windows", windows),
        ("distance", distance),
    ):
        if value < 1:
            raise EvaluationError(f"{name}={value} must be at least 1.")
    _check_horizon(forecaster, prediction_length)
    reach = prediction_length + (windows - 1) * distance
    _check_lengths(dataset, reach + prediction_length * validate)

    before, template = split(dataset, offset=-reach)
    test_data = template.generate_instances(prediction_length, windows, distance)
    if validate:
        training, _ = split(dataset, offset=-reach - prediction_length)
        predictor, train_seconds = _fit(forecaster, training, before)
    else:
        predictor, train_seconds = _fit(forecaster, before, None)

    if seasonality is None:
        seasonality = season_length(entry[FieldName.START])
    collector = None
    if diagnose:
        collector = DiagnosticsCollector(
            len(test_data), windows, prediction_length, _num_variates(entry), seasonality
        )
    with _routing_reported(predictor, diagnose):
        forecasts = _Forecasts(
            predictor.predict(test_data.input), len(test_data), keep=keep_forecasts
        )
        # Entering the context lets `UnscaledSeriesWarning` appear again, once for all metrics.
        with warnings.catch_warnings():
            values = evaluate_forecasts(
                _diagnosed(map(_Remembering, forecasts), test_data, collector),
                test_data=test_data,
                metrics=metrics,
                batch_size=batch_size,
                seasonality=seasonality,
            )
    usage = getattr(predictor, "expert_usage", None)
    return BacktestResult(
        dataset=dataset_name,
        model=forecaster_name(type(forecaster)) if model is None else model,
        freq=entry[FieldName.START].freqstr,
        prediction_length=prediction_length,
        windows=windows,
        distance=distance,
        num_series=len(dataset),
        num_variates=_num_variates(entry),
        metrics=values.iloc[0].astype(float).to_dict(),
        train_seconds=train_seconds,
        predict_seconds=forecasts.seconds,
        predictor=predictor,
        test_data=test_data,
        forecasts=forecasts.kept,
        diagnostics=None
        if collector is None
        else collector.get(getattr(usage, "weight_share", None)),
    )


def long_horizon(
    forecaster: Forecaster,
    dataset: LongHorizonDataset,
    *,
    prediction_length: int,
    context_length: Optional[int] = None,
    multivariate: bool = False,
    stride: int = 1,
    forecast_type: str = "mean",
    batch_size: int = 256,
    model: Optional[str] = None,
) -> BacktestResult:
    """Evaluate as long-horizon papers do: every window of the test part, on the standardised scale.

    An estimator is trained on the training part, with the validation part as validation data.

    Parameters
    ----------
    forecaster
        A GluonTS estimator or predictor.
    dataset
        The data with their splits.
    prediction_length
        Horizon H, the one the forecaster was made with.
    context_length
        Rows that the forecaster sees before each window. By default all from the first one, which
        a forecaster with lags may need; giving it follows the papers and is faster.
    multivariate
        Forecast all channels as one series instead of each on its own.
    stride
        Rows between the starts of two windows; the papers use 1.
    forecast_type
        Which point of the forecast is scored: `"mean"`, `"median"` or a quantile such as `"0.5"`.
    batch_size
        Windows scored at a time.
    model
        Name in the result, by default as in `backtest`.

    Returns
    -------
    BacktestResult
        With the metrics of `long_horizon_metrics`.

    Raises
    ------
    EvaluationError
        The windows do not fit the data, the forecaster has another horizon, or its forecasts are
        too few or have NaN.
    """
    _check_horizon(forecaster, prediction_length)
    test_data = dataset.test_windows(
        prediction_length, context_length, multivariate=multivariate, stride=stride
    )
    predictor, train_seconds = _fit(
        forecaster,
        dataset.training_entries(multivariate=multivariate),
        dataset.validation_entries(context_length, multivariate=multivariate),
    )
    forecasts = _Forecasts(predictor.predict(test_data.input), len(test_data))
    pairs = zip(forecasts, test_data.label)
    metrics = LongHorizonMetrics(prediction_length, dataset.num_channels)
    channels = [slice(None)] if multivariate else _single_channels(dataset.num_channels)
    for channel in channels:
        for batch in batcher(islice(pairs, test_data.windows), batch_size):
            shape = (len(batch), prediction_length, -1)
            metrics.update(
                np.stack([forecast[forecast_type] for forecast, _ in batch]).reshape(shape),
                np.stack([label[FieldName.TARGET].T for _, label in batch]).reshape(shape),
                channel,
            )
    return BacktestResult(
        dataset=dataset.name,
        model=forecaster_name(type(forecaster)) if model is None else model,
        freq=dataset.freq,
        prediction_length=prediction_length,
        windows=test_data.windows,
        distance=stride,
        num_series=1 if multivariate else dataset.num_channels,
        num_variates=dataset.num_channels if multivariate else 1,
        metrics=metrics.get(),
        train_seconds=train_seconds,
        predict_seconds=forecasts.seconds,
        predictor=predictor,
        test_data=test_data,
    )


class _Remembering:
    """A forecast whose quantiles and mean are computed once.

    Each metric asks for them anew, the quantile loss twice, and a `DistributionForecast` inverts
    its distribution every time: GIFT-Eval's metrics would ask 30 times for 12 arrays.
    """

    def __init__(self, forecast: Forecast) -> None:
        self._forecast = forecast
        self._values: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._values:
            self._values[name] = self._forecast[name]
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forecast, name)


class _Forecasts:
    """Forecasts passed through once: counted, timed and, if asked for, kept."""

    def __init__(self, forecasts: Iterable[Forecast], expected: int, *, keep: bool = False) -> None:
        self._forecasts = iter(forecasts)
        self._expected = expected
        self._count = 0
        self._kept: Optional[list[Forecast]] = [] if keep else None
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Forecast]:
        return self

    def __next__(self) -> Forecast:
        started = time.perf_counter()
        forecast = next(self._forecasts, None)
        self.seconds += time.perf_counter() - started
        if forecast is None:
            if self._count < self._expected:
                raise EvaluationError(
                    f"the predictor gave {self._count} forecasts for {self._expected} windows; it "
                    "must give one per entry, in order."
                )
            raise StopIteration
        self._count += 1
        if self._kept is not None:
            self._kept.append(forecast)
        return forecast

    @property
    def kept(self) -> Optional[tuple[Forecast, ...]]:
        return None if self._kept is None else tuple(self._kept)


def _diagnosed(
    forecasts: Iterable[Any], test_data: TestData, collector: Optional[DiagnosticsCollector]
) -> Iterator[Any]:
    """The forecasts, each shown to the collector first."""
    if collector is None:
        yield from forecasts
        return
    for forecast, (past, label) in zip(forecasts, test_data):
        collector.add(past, label, forecast)
        yield forecast


@contextmanager
def _routing_reported(predictor: Any, wanted: bool) -> Iterator[None]:
    """Let each forecast tell which experts made it, where the predictor can."""
    before = getattr(predictor, "reports_routing", None)
    if before is None or not wanted:
        yield
        return
    predictor.reports_routing = True
    try:
        yield
    finally:
        predictor.reports_routing = before


def _fit(
    forecaster: Forecaster, training: Any, validation: Optional[Any]
) -> tuple[Predictor, float]:
    if isinstance(forecaster, Estimator):
        started = time.perf_counter()
        predictor = forecaster.train(training, validation_data=validation)
        return predictor, time.perf_counter() - started
    if not hasattr(forecaster, "predict"):
        raise EvaluationError(
            f"{type(forecaster).__name__} is neither a GluonTS Estimator nor a Predictor."
        )
    return forecaster, 0.0


def _check_horizon(forecaster: Forecaster, prediction_length: int) -> None:
    own = getattr(forecaster, "prediction_length", prediction_length)
    if own != prediction_length:
        raise EvaluationError(
            f"{type(forecaster).__name__} forecasts {own} steps, but prediction_length="
            f"{prediction_length} was asked for; make both equal."
        )


def _check_lengths(dataset: Dataset, held_out: int) -> None:
    for number, entry in enumerate(dataset):
        if _length(entry) <= held_out:
            item = entry.get(FieldName.ITEM_ID, number)
            raise EvaluationError(
                f"series {item!r} has {_length(entry)} values, of which the test windows need "
                f"{held_out} and the history at least one; ask for fewer windows, a shorter "
                "horizon, or leave the series out."
            )


def _length(entry: dict[str, Any]) -> int:
    return int(np.shape(entry[FieldName.TARGET])[-1])


def _num_variates(entry: dict[str, Any]) -> int:
    shape = np.shape(entry[FieldName.TARGET])
    return int(shape[0]) if len(shape) == 2 else 1


def _single_channels(count: int) -> list[slice]:
    return [slice(channel, channel + 1) for channel in range(count)]
