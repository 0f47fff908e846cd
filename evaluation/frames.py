"""Frames of other libraries taken in, and forecasts given back as a frame."""

from __future__ import annotations

from typing import Any, Iterable, Literal, Sequence, Union

import numpy as np
import pandas as pd
from gluonts.model.forecast import Forecast, SampleForecast

from .errors import EvaluationError

Stamp = Union[Literal["start", "end"], pd.Timedelta]


def as_pandas(frame: Any) -> pd.DataFrame:
    """`frame` as a pandas frame.

    Parameters
    ----------
    frame
        A pandas frame, which is returned as it is, one with a method `to_pandas`, such as a Polars
        frame or an Arrow table, or one with the interchange protocol `__dataframe__`. Polars
        frames need no pyarrow.

    Raises
    ------
    EvaluationError
        It is none of them.
    """
    if isinstance(frame, pd.DataFrame):
        return frame
    if hasattr(frame, "collect") and hasattr(frame, "collect_schema"):
        frame = frame.collect()
    if hasattr(frame, "to_pandas"):
        try:
            return frame.to_pandas()
        except ImportError:
            # Polars converts through pyarrow, which need not be installed.
            if hasattr(frame, "iter_columns"):
                return pd.DataFrame({c.name: c.to_list() for c in frame.iter_columns()})
    if hasattr(frame, "__dataframe__"):
        return pd.api.interchange.from_dataframe(frame)
    raise EvaluationError(
        f"frame: a {type(frame).__name__} is no frame of pandas, Polars or Arrow; convert it to a "
        "pandas.DataFrame."
    )


def stamp_of(times: pd.DatetimeIndex, freq: str) -> Stamp:
    """Where within their period of `freq` the timestamps of data lie.

    Returns
    -------
    "start", "end" or pandas.Timedelta
        First moment, last day, or the time since the first moment that most of them have where
        periods are shorter than a week; `"start"` where there is no rule.
    """
    periods = times.to_period(freq)
    since = times - periods.start_time
    if not since.any():
        return "start"
    if (times == periods.end_time.normalize()).all():
        return "end"
    usual = since.value_counts()
    return pd.Timedelta(usual.index[0]) if 2 * usual.iloc[0] > len(times) else "start"


def forecasts_to_frame(
    forecasts: Iterable[Forecast],
    quantiles: Sequence[float] = (0.1, 0.5, 0.9),
    *,
    item_id: str = "item_id",
    timestamp: str = "timestamp",
    stamp: Stamp = "start",
) -> pd.DataFrame:
    """Forecasts as a long frame, ready to be joined with the data they continue.

    Parameters
    ----------
    forecasts
        Forecasts of any GluonTS predictor.
    quantiles
        Levels between 0 and 1.
    item_id, timestamp
        Names of the columns of items and timestamps.
    stamp
        Where within their period the timestamps lie, as `stamp_of` finds it in the data.

    Returns
    -------
    pandas.DataFrame
        One row per item and step: item_id, timestamp (datetime64), mean, and a column for each
        quantile named by its level, such as `0.1`; for multivariate forecasts a row per channel,
        too, and behind the timestamp a column `channel` that counts from 0.

    Raises
    ------
    EvaluationError
        A level does not lie between 0 and 1.
    """
    for level in quantiles:
        if not 0 < level < 1:
            raise EvaluationError(f"quantiles: {level} does not lie between 0 and 1.")
    names = [f"{level:g}" for level in quantiles]
    parts = []
    for forecast in forecasts:
        columns = [_mean(forecast), *(forecast.quantile(level) for level in quantiles)]
        # [step, channel, column]
        values = np.stack([np.asarray(column) for column in columns], axis=-1)
        channels = values.shape[1] if values.ndim == 3 else 1
        times = _timestamps(forecast.start_date, forecast.prediction_length, stamp)
        part = pd.DataFrame(values.reshape(-1, len(columns)), columns=["mean", *names])
        part.insert(0, item_id, forecast.item_id)
        part.insert(1, timestamp, times.repeat(channels))
        if values.ndim == 3:
            part.insert(2, "channel", np.tile(np.arange(channels), len(times)))
        parts.append(part)
    if not parts:
        return pd.DataFrame(columns=[item_id, timestamp, "mean", *names])
    return pd.concat(parts, ignore_index=True)


def _mean(forecast: Forecast) -> np.ndarray:
    if isinstance(forecast, SampleForecast):
        return forecast.samples.mean(axis=0)
    return forecast.mean


def _timestamps(start: pd.Period, length: int, stamp: Stamp) -> pd.DatetimeIndex:
    periods = pd.period_range(start, periods=length, freq=start.freq)
    if isinstance(stamp, str):
        return periods.start_time if stamp == "start" else periods.end_time.normalize()
    return periods.start_time + stamp
