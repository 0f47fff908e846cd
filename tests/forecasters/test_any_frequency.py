"""Estimators without a frequency: series of several in one dataset."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pandas as pd
import pytest
from model_cases import CONTEXT, HORIZON, MODELS, forecast_values, series, untrained
from moecast.forecasters import MoEEstimator
from moecast.forecasters.fields import WindowConfig, read_entry
from moecast.forecasters.frequencies import time_features, to_period

# Time features and candidates of patch sizes are a frequency's.
NEEDS_FREQ = {
    "mole dlinear calendar": r"router='calendar' reads time features, of which freq=None has none",
    "mole patch auto": r"patch_size='auto' needs freq, which is None: give one or several",
}


@pytest.fixture(params=[name for name in MODELS if name not in NEEDS_FREQ])
def model(request: pytest.FixtureRequest) -> str:
    """Models that need no frequency."""
    return request.param


@pytest.fixture
def make_without(model: str) -> Callable[..., MoEEstimator]:
    return lambda **settings: MODELS[model](freq=None, **settings)


def monthly() -> list[dict]:
    """The series that :func:`series` has of hours."""
    entries = series(number=2)
    for entry, start in zip(entries, ("1990-01", "2001-07")):
        entry["start"] = pd.Period(start, freq="M")
        entry["item_id"] = f"monthly {entry['item_id']}"
    return entries


def hourly_and_monthly() -> list[dict]:
    """In turn."""
    return [entry for pair in zip(series(number=2), monthly()) for entry in pair]


def test_series_of_several_frequencies_are_trained_on_together(
    make_without: Callable[..., MoEEstimator],
) -> None:
    dataset = hourly_and_monthly()
    predictor = make_without().train(dataset, dataset)
    forecasts = list(predictor.predict(dataset))
    assert [forecast.item_id for forecast in forecasts] == [entry["item_id"] for entry in dataset]
    for entry, forecast in zip(dataset, forecasts):
        assert forecast.start_date == entry["start"] + len(entry["target"])
        assert forecast.start_date.freq == entry["start"].freq
        assert forecast.index.equals(
            pd.period_range(forecast.start_date, periods=HORIZON, freq=entry["start"].freq)
        )
        assert np.isfinite(forecast.mean).all()


def test_a_frequency_moves_no_forecast(make_without: Callable[..., MoEEstimator]) -> None:
    """Only when the forecast starts is the frequency's."""
    predictor = untrained(make_without())
    np.testing.assert_array_equal(
        forecast_values(predictor, monthly()), forecast_values(predictor, series(number=2))
    )


@pytest.mark.parametrize("start", ["2024-01-01", pd.Timestamp("2024-01-01"), 7])
def test_a_start_that_is_no_period_is_refused_in_one_sentence(start: Any) -> None:
    estimator = MODELS["moirai-moe"](freq=None)
    entries = hourly_and_monthly()
    predictor = untrained(estimator)
    entries[1]["start"] = start
    for refuse in (
        lambda: estimator.train(entries),
        lambda: list(predictor.predict(entries)),
        lambda: read_entry(entries[1], 1, WindowConfig(None, HORIZON, CONTEXT)),
    ):
        with pytest.raises(ValueError, match="item 'monthly series 0'") as caught:
            refuse()
        assert str(caught.value) == (
            f"item 'monthly series 0': start={start!r} is no period, and there is no freq to make "
            "it one: give freq, or series that start with a pandas.Period"
        )
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


def test_a_context_length_must_be_given(make_without: Callable[..., MoEEstimator]) -> None:
    with pytest.raises(ValueError, match="freq=None tells no context_length: give it as a number"):
        make_without(context_length=None)


@pytest.mark.parametrize("needy", list(NEEDS_FREQ))
def test_what_a_frequency_tells_is_asked_for(needy: str) -> None:
    with pytest.raises(ValueError, match=NEEDS_FREQ[needy]):
        MODELS[needy](freq=None)


def test_periods_keep_their_frequency_and_have_no_time_features() -> None:
    for freq in ("h", "15min", "W-WED", "M", "Q-JAN"):
        period = pd.Period("2024-02-27", freq=freq)
        assert to_period(period, None) is period
    assert time_features(None) == []
