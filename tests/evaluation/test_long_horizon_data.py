from __future__ import annotations

from pathlib import Path
from typing import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moecast.evaluation import (
    Borders,
    EvaluationError,
    LongHorizonDataset,
    StandardScaler,
    load_long_horizon,
)


def counting(rows: int = 100, borders: tuple[int, int, int] = (60, 75, 100)) -> LongHorizonDataset:
    """Channels `t` and `−2t` in units, whose scaler leaves them as they are."""
    values = np.stack([np.arange(rows), -2.0 * np.arange(rows)], axis=1)
    return LongHorizonDataset(
        "count",
        pd.Period("2024-01-01", freq="h"),
        ("up", "down"),
        values,
        Borders(*borders),
        StandardScaler(np.zeros(2), np.ones(2)),
    )


def test_ratio_split_is_70_10_20(hourly_csv: Path) -> None:
    dataset = load_long_horizon(hourly_csv)
    assert dataset.borders == (70, 80, 100)
    assert dataset.freq == "h"
    assert dataset.columns == ("a", "b")


def test_values_are_standardised_by_the_training_part_alone(hourly_csv: Path) -> None:
    dataset = load_long_horizon(hourly_csv)
    training = np.stack([entry["target"] for entry in dataset.training_entries()])
    np.testing.assert_allclose(training.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(training.std(axis=1), 1, atol=1e-6)
    first_after = dataset.entries(70, 71)[0]["target"][0]
    assert first_after == pytest.approx((70 - 34.5) / np.arange(70).std())


@pytest.mark.parametrize(("freq", "per_day"), [("h", 24), ("15min", 96)])
def test_ett_split_is_12_4_4_months_of_30_days(tmp_path: Path, freq: str, per_day: int) -> None:
    rows = 610 * per_day
    dates = pd.date_range("2016-07-01", periods=rows, freq=freq)
    path = tmp_path / "ETTtiny.csv"
    pd.DataFrame({"date": dates, "OT": np.arange(rows) % 7}).to_csv(path, index=False)
    dataset = load_long_horizon(path)
    assert dataset.borders == (360 * per_day, 480 * per_day, 600 * per_day)


def test_a_short_ett_file_suggests_another_split(hourly_csv: Path) -> None:
    with pytest.raises(EvaluationError, match=r"14400 rows of freq='h', but there are 100.*ratio"):
        load_long_horizon(hourly_csv, split="ett")
    assert load_long_horizon(hourly_csv, split=(50, 20, 10)).borders == (50, 70, 80)


@given(st.integers(1, 25), st.integers(1, 75), st.integers(1, 6), st.booleans())
def test_every_test_window_is_forecast(
    horizon: int, context: int, stride: int, multivariate: bool
) -> None:
    dataset = counting()
    test = dataset.test_windows(horizon, context, multivariate=multivariate, stride=stride)
    starts = range(75, 100 - horizon + 1, stride)
    assert test.windows == dataset.num_windows(horizon, stride) == len(starts)
    series = 1 if multivariate else 2
    pairs = list(test)
    assert len(pairs) == len(test) == series * len(starts)
    for number, (past, label) in enumerate(pairs):
        start = starts[number % len(starts)]
        sign = [1, -2][number // len(starts)]
        past_up, label_up = np.atleast_2d(past["target"])[0], np.atleast_2d(label["target"])[0]
        np.testing.assert_array_equal(past_up, sign * np.arange(start - context, start))
        np.testing.assert_array_equal(label_up, sign * np.arange(start, start + horizon))
        assert past["start"] == dataset.start + start - context
        assert label["start"] == dataset.start + start


def test_validation_entries_reach_back_by_the_context() -> None:
    entry = counting().validation_entries(10)[0]
    assert entry["start"] == pd.Period("2024-01-01", freq="h") + 50
    np.testing.assert_array_equal(entry["target"], np.arange(50, 75))
    assert len(counting().validation_entries()[0]["target"]) == 75


@pytest.mark.parametrize(
    ("horizon", "context", "message"),
    [(26, 10, "25 rows, fewer than prediction_length=26"), (5, 76, "context_length=76")],
)
def test_windows_that_do_not_fit_are_refused(horizon: int, context: int, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        counting().test_windows(horizon, context)


def test_borders_beyond_the_rows_are_refused() -> None:
    with pytest.raises(EvaluationError, match="do not fit 100 rows"):
        counting(borders=(60, 75, 101))


def test_scaler_round_trip_with_constant_and_missing_channels() -> None:
    values = np.stack([np.arange(10.0), np.full(10, 3.0), np.full(10, np.nan)], axis=1)
    values[2, 0] = np.nan
    scaler = StandardScaler.fit(values)
    kept = np.delete(np.arange(10.0), 2)
    np.testing.assert_allclose(scaler.mean, [kept.mean(), 3, 0])
    np.testing.assert_allclose(scaler.scale, [kept.std(), 1, 1])
    np.testing.assert_allclose(scaler.inverse_transform(scaler.transform(values)), values)


def test_real_ett_has_2785_windows_of_96(shared_file: Callable[[str], Path]) -> None:
    dataset = load_long_horizon(shared_file("ETTh1.csv"))
    assert dataset.borders == (8640, 11520, 14400)
    assert dataset.num_windows(96) == 2785
    assert dataset.num_channels == 7


def test_real_weather_is_completed_and_without_sentinels(
    shared_file: Callable[[str], Path],
) -> None:
    path = shared_file("weather.csv")
    with pytest.warns(UserWarning, match="1 timestamps repeated .* and 9 timestamps missing"):
        dataset = load_long_horizon(path)
    assert dataset.values.shape == (52_696 - 1 + 9, 21)
    assert np.isnan(dataset.values).sum() == 9 * 21 + 81
    assert dataset.freq == "10min"
    with pytest.warns(UserWarning, match="as if evenly spaced"):
        published = load_long_horizon(path, missing_values=(), irregular="keep")
    assert published.borders == (36_887, 42_157, 52_696)
    assert (published.values == -9999).sum() == 81
