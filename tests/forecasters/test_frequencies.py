from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from gluonts.time_feature import time_features_from_frequency_str
from moecast.forecasters.frequencies import (
    granularity,
    parse_frequency,
    same_frequency,
    time_features,
    to_period,
)
from pandas.tseries import offsets


@pytest.mark.parametrize(
    ("aliases", "offset", "unit"),
    [
        (("H", "h", "1h"), offsets.Hour(1), "hour"),
        (("2H", "2h"), offsets.Hour(2), "hour"),
        (("T", "min"), offsets.Minute(1), "minute"),
        (("10T", "10min"), offsets.Minute(10), "minute"),
        (("90min", "1.5h"), offsets.Minute(90), "minute"),
        (("S", "s"), offsets.Second(1), "second"),
        (("L", "ms"), offsets.Milli(1), "millisecond"),
        (("D",), offsets.Day(1), "day"),
        (("B",), offsets.BusinessDay(1), "day"),
        (("W", "W-SUN"), offsets.Week(weekday=6), "week"),
        (("W-WED",), offsets.Week(weekday=2), "week"),
        (("M", "ME"), offsets.MonthEnd(1), "month"),
        (("3M", "3ME"), offsets.MonthEnd(3), "month"),
        (("MS",), offsets.MonthBegin(1), "month"),
        (("Q", "QE", "Q-DEC", "QE-DEC"), offsets.QuarterEnd(startingMonth=12), "quarter"),
        (("Q-JAN", "QE-JAN"), offsets.QuarterEnd(startingMonth=1), "quarter"),
        (("QS", "QS-JAN"), offsets.QuarterBegin(startingMonth=1), "quarter"),
        (("Y", "A", "YE", "A-DEC", "Y-DEC", "YE-DEC"), offsets.YearEnd(month=12), "year"),
        (("2A-JUN", "2YE-JUN"), offsets.YearEnd(2, month=6), "year"),
        (("AS", "YS", "AS-JAN"), offsets.YearBegin(month=1), "year"),
    ],
)
@pytest.mark.filterwarnings("error::FutureWarning")
def test_old_and_new_aliases_mean_the_same(
    aliases: tuple[str, ...], offset: offsets.BaseOffset, unit: str
) -> None:
    for alias in aliases:
        assert parse_frequency(alias) == offset
        assert granularity(alias) == unit
        assert same_frequency(alias, offset)


@pytest.mark.parametrize("freq", ["", "bogus", "SM", "BQE", "bh", "5", "h-MON", "0h", "-1h", "-2D"])
def test_what_no_series_can_have_is_refused(freq: str) -> None:
    with pytest.raises(ValueError, match=f"freq='{freq}' is no frequency .*use a pandas alias"):
        parse_frequency(freq)


def test_same_frequency_needs_unit_and_multiple_but_no_anchor() -> None:
    assert same_frequency("W-MON", pd.Period("2024-01-01", freq="W-SUN").freq)
    assert same_frequency("QS", pd.Period("2024-01-01", freq="Q-JAN").freq)
    assert not same_frequency("h", offsets.Hour(2))
    assert not same_frequency("h", offsets.Minute(1))
    assert not same_frequency("M", offsets.QuarterEnd(startingMonth=12))


@pytest.mark.parametrize(
    ("start", "freq", "expected"),
    [
        ("2024-01-01 05:00", "H", pd.Period("2024-01-01 05:00", freq="h")),
        (pd.Timestamp("2024-01-01 05:00"), "2h", pd.Period("2024-01-01 05:00", freq="2h")),
        (np.datetime64("2024-01-01"), "D", pd.Period("2024-01-01", freq="D")),
        ("2024-01-03", "W-WED", pd.Period("2024-01-03", freq="W-WED")),
        ("2024-01-31", "M", pd.Period("2024-01", freq="M")),
        ("2024-01-31", "ME", pd.Period("2024-01", freq="M")),
        ("2024-01-01", "MS", pd.Period("2024-01", freq="M")),
        ("2024-01-01", "3M", pd.Period("2024-01", freq="3M")),
        ("2024-02-01", "QS", pd.Period("2024Q1", freq="Q-DEC")),
        ("2024-12-31", "A", pd.Period("2024", freq="Y-DEC")),
        ("2024-01-01", "YS", pd.Period("2024", freq="Y-DEC")),
    ],
)
def test_starts_become_periods(start: Any, freq: str, expected: pd.Period) -> None:
    period = to_period(start, freq)
    assert period == expected
    assert period.freq == expected.freq


@pytest.mark.parametrize(
    ("start", "freq", "period_freq"),
    [("2024-01-31", "Q-JAN", "Q-JAN"), ("2024-03-31", "YE-MAR", "Y-MAR")],
)
def test_a_fiscal_years_end_is_kept(start: str, freq: str, period_freq: str) -> None:
    """A value labelled with the end of its quarter or year lies in a period that ends there."""
    period = to_period(start, freq)
    assert period == pd.Period(start, freq=period_freq)
    assert period.end_time.normalize() == pd.Timestamp(start)


def test_a_period_stays_what_it_is() -> None:
    period = pd.Period("2024-01-03", freq="W-WED")
    assert to_period(period, "W-SUN") is period


@pytest.mark.parametrize(
    ("start", "freq", "message"),
    [
        (pd.Period("2024", freq="D"), "h", r"start=2024-01-01 has frequency 'D', not freq='h': r"),
        (pd.Period("2024", freq="2h"), "h", "has frequency '2h', not freq='h': resample"),
        ("yesterday-ish", "h", "start='yesterday-ish' is no point in time"),
        (object, "h", "is no point in time"),
    ],
)
def test_unusable_starts_are_refused(start: Any, freq: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_period(start, freq)


@pytest.mark.filterwarnings("ignore:Period.*B:FutureWarning")
@pytest.mark.parametrize("freq", ["h", "H", "15min", "D", "B", "W-WED", "M", "MS", "Q-JAN", "s"])
def test_time_features_are_gluonts_own(freq: str) -> None:
    new = {"H": "h", "M": "ME", "Q-JAN": "QE-JAN"}.get(freq, freq)
    index = pd.period_range(to_period("2024-02-27", freq), periods=40)
    features, expected = time_features(freq), time_features_from_frequency_str(new)
    assert len(features) == len(expected) > 0
    for ours, theirs in zip(features, expected):
        values = np.asarray(ours(index))
        np.testing.assert_array_equal(values, theirs(index))
        assert (np.abs(values) <= 0.5).all()


def test_hourly_time_features_are_moles() -> None:
    """Ni et al. 2024: hour/23, weekday/6, (day-1)/30, (day of year-1)/365, each minus a half."""
    index = pd.PeriodIndex([pd.Period("2024-03-05 17:00", freq="h")])
    values = [feature(index)[0] for feature in time_features("h")]
    assert values == pytest.approx([17 / 23 - 0.5, 1 / 6 - 0.5, 4 / 30 - 0.5, 64 / 365 - 0.5])


@pytest.mark.parametrize("freq", ["Y", "ms", "us", "ns"])
def test_no_time_features(freq: str) -> None:
    assert time_features(freq) == []
