"""Frames taken in and given back."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gluonts.model.forecast import QuantileForecast, SampleForecast
from moecast.evaluation import (
    DataWarning,
    EvaluationError,
    as_pandas,
    forecasts_to_frame,
    frame_categories,
    from_long_frame,
    from_wide_frame,
    stamp_of,
)


@pytest.fixture
def long() -> pd.DataFrame:
    """Two items of 30 hours: a regular grid in order."""
    when = pd.date_range("2024-01-01", periods=30, freq="h")
    parts = [
        pd.DataFrame({"item_id": name, "timestamp": when, "target": np.arange(30.0) + offset})
        for name, offset in (("a", 0), ("b", 100))
    ]
    return pd.concat(parts, ignore_index=True)


def targets(frame: Any, **options: Any) -> list[np.ndarray]:
    return [entry["target"] for entry in from_long_frame(frame, **options)]


class PolarsLike:
    """What a Polars frame offers where pyarrow is not installed."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame

    def to_pandas(self) -> pd.DataFrame:
        raise ModuleNotFoundError("pyarrow is required")

    def iter_columns(self) -> Any:
        for name in self._frame:
            yield type(
                "Series", (), {"name": name, "to_list": lambda _, n=name: list(self._frame[n])}
            )()


class Interchange:
    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame

    def __dataframe__(self, **options: Any) -> Any:
        return self._frame.__dataframe__(**options)


@pytest.mark.parametrize("wrap", [PolarsLike, Interchange])
def test_other_libraries_frames_are_read_as_pandas_are(wrap: type, long: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(as_pandas(wrap(long)), long)
    assert np.array_equal(targets(wrap(long))[1], targets(long)[1])


def test_polars_frames_are_read_as_pandas_are(long: pd.DataFrame) -> None:
    polars = pytest.importorskip("polars")
    columns = {name: long[name].tolist() for name in long}
    for frame in (polars.DataFrame(columns), polars.LazyFrame(columns)):
        assert np.array_equal(targets(frame)[1], targets(long)[1])
    wide = polars.DataFrame({"when": columns["timestamp"][:30], "x": columns["target"][:30]})
    (entry,) = from_wide_frame(wide, timestamp="when")
    assert np.array_equal(entry["target"], np.arange(30))


def test_what_is_no_frame_is_named() -> None:
    with pytest.raises(EvaluationError, match="a list is no frame of pandas, Polars or Arrow"):
        as_pandas([1, 2])


def test_a_regular_frame_is_read_without_a_word(long: pd.DataFrame) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        from_long_frame(long)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.drop(index=[3, 4, 40]), r"3 timestamps missing in 2 items \(first .*03:00"),
        (lambda f: f[::-1], "rows out of order in 2 items"),
        (
            lambda f: f.assign(timestamp=f["timestamp"].mask(f.index == 5, f["timestamp"] + _LATE)),
            r"1 timestamps off the grid in 1 items \(first 2024-01-01 05:00:00 in item 'a'\)",
        ),
    ],
)
def test_irregular_rows_are_told_or_refused(spoil: Any, message: str, long: pd.DataFrame) -> None:
    spoiled = spoil(long)
    with pytest.warns(DataWarning, match=message):
        repaired = from_long_frame(spoiled)
    for entry, whole in zip(sorted(repaired, key=lambda e: e["item_id"]), targets(long)):
        known = ~np.isnan(entry["target"])
        assert len(entry["target"]) == 30
        assert np.array_equal(entry["target"][known], whole[known])
    with pytest.raises(EvaluationError, match=message):
        from_long_frame(spoiled, irregular="raise")


_LATE = pd.Timedelta(minutes=17)


@pytest.mark.parametrize(("duplicates", "value"), [("first", 5), ("last", 9), ("mean", 7)])
def test_repeated_rows_count_as_told(duplicates: Any, value: float, long: pd.DataFrame) -> None:
    twice = pd.concat([long, long[5:6].assign(target=9.0)], ignore_index=True)
    with pytest.raises(EvaluationError, match=r"two rows for 2024-01-01 05:00; .*duplicates="):
        from_long_frame(twice)
    first, other = targets(twice, duplicates=duplicates)
    assert first[5] == value
    assert np.array_equal(np.delete(first, 5), np.delete(np.arange(30.0), 5))
    assert np.array_equal(other, np.arange(30.0) + 100)


def test_time_zones_are_told_converted_or_refused(long: pd.DataFrame) -> None:
    zoned = long.assign(timestamp=long["timestamp"].dt.tz_localize("Asia/Tokyo"))
    as_text = long.assign(timestamp=long["timestamp"].astype(str) + "+09:00")
    for frame in (zoned, as_text):
        with pytest.warns(DataWarning, match=r"has time zones .*wall time is kept"):
            local = from_long_frame(frame)
        assert local[0]["start"] == pd.Period("2024-01-01 00:00", freq="h")
        utc = from_long_frame(frame, time_zone="utc")
        assert utc[0]["start"] == pd.Period("2023-12-31 15:00", freq="h")
        with pytest.raises(EvaluationError, match="has time zones"):
            from_long_frame(frame, time_zone="raise")


def test_a_change_of_clocks_is_regular_in_utc_only() -> None:
    utc = pd.date_range("2024-10-26 12:00", periods=30, freq="h", tz="UTC")
    local = utc.tz_convert("Europe/Berlin")
    frame = pd.DataFrame({"timestamp": local.map(str), "target": np.arange(30.0)})
    (entry,) = from_long_frame(frame, item_id=None, time_zone="utc")
    assert np.array_equal(entry["target"], np.arange(30))
    with pytest.warns(DataWarning), pytest.raises(EvaluationError, match="two rows for"):
        from_long_frame(frame, item_id=None)


def test_items_of_another_frequency_are_named(long: pd.DataFrame) -> None:
    days = pd.date_range("2024-01-01", periods=10, freq="D")
    daily = pd.DataFrame({"item_id": "slow", "timestamp": days, "target": 1.0})
    mixed = pd.concat([long, daily])
    with pytest.raises(EvaluationError, match="item 'slow': its rows are typically 24 steps"):
        from_long_frame(mixed)
    # Told the frequency, one may mean that the hours between have no value.
    with pytest.warns(DataWarning, match="missing"):
        assert len(targets(mixed, freq="h")[2]) == 9 * 24 + 1


def test_last_rows_without_a_target_are_the_future(long: pd.DataFrame) -> None:
    frame = long.assign(price=long.index.to_numpy(dtype=float))
    frame.loc[[27, 28, 29, 59], "target"] = np.nan
    frame.loc[3, "target"] = np.nan
    a, b = from_long_frame(frame, feat_dynamic_real=["price"], future_length="empty")
    assert [len(a["target"]), len(b["target"])] == [27, 29]
    assert np.isnan(a["target"][3])
    assert a["feat_dynamic_real"].shape == b["feat_dynamic_real"].shape == (1, 30)


def test_categories_of_another_frame_keep_their_ranks(long: pd.DataFrame) -> None:
    frame = long.assign(shop=long["item_id"].map({"a": "north", "b": "south"}))
    categories = frame_categories(frame, ["shop"])
    assert categories == {"shop": ["north", "south"]}
    south = frame[frame["item_id"] == "b"]
    options: dict[str, Any] = {"feat_static_cat": ["shop"], "categories": categories}
    assert from_long_frame(south, **options)[0]["feat_static_cat"].tolist() == [1]
    west = south.assign(shop="west")
    with pytest.raises(EvaluationError, match="'west', which is none of the known"):
        from_long_frame(west, **options)


def test_a_wide_frame_is_read_by_its_index_or_a_column() -> None:
    index = pd.date_range("2024-01-31", periods=24, freq="ME")
    frame = pd.DataFrame({"x": np.arange(24.0), "y": np.arange(24.0) * 2}, index=index)
    by_index = from_wide_frame(frame)
    by_column = from_wide_frame(frame.rename_axis("when").reset_index(), timestamp="when")
    by_period = from_wide_frame(frame.set_axis(index.to_period()))
    for entries in (by_index, by_column, by_period):
        assert [entry["item_id"] for entry in entries] == ["x", "y"]
        assert entries[0]["start"] == pd.Period("2024-01", freq="M")
        assert np.array_equal(entries[1]["target"], np.arange(24) * 2)
    (both,) = from_wide_frame(frame, multivariate=True)
    assert both["target"].shape == (2, 24)
    with pytest.raises(EvaluationError, match="its index is of int64, not of timestamps"):
        from_wide_frame(frame.reset_index(drop=True))


@pytest.mark.parametrize(
    ("times", "freq", "stamp"),
    [
        (pd.date_range("2024-01-01", periods=5, freq="h"), "h", "start"),
        (pd.date_range("2024-01-31", periods=5, freq="ME"), "M", "end"),
        (pd.date_range("2024-01-05", periods=5, freq="W-FRI"), "W-FRI", "end"),
        (pd.date_range("2024-01-01 00:30", periods=5, freq="h"), "h", pd.Timedelta(minutes=30)),
        (pd.date_range("2024-01-01 06:00", periods=5, freq="D"), "D", pd.Timedelta(hours=6)),
    ],
)
def test_forecasts_are_dated_where_the_data_lie(
    times: pd.DatetimeIndex, freq: str, stamp: Any
) -> None:
    assert stamp_of(times, freq) == stamp
    start = times[-1].to_period(freq) + 1
    forecast = SampleForecast(np.zeros((2, 3)), start)
    step = times[-1] - times[-2]
    dated = forecasts_to_frame([forecast], stamp=stamp)["timestamp"]
    if freq != "M":
        assert list(dated) == [times[-1] + step * (i + 1) for i in range(3)]
    else:
        assert dated[0] == pd.Timestamp("2024-06-30")


def test_forecasts_become_rows_of_items_steps_and_channels() -> None:
    samples = np.random.default_rng(0).normal(size=(50, 3, 2))
    start = pd.Period("2024-01-01", freq="D")
    frame = forecasts_to_frame(
        [SampleForecast(samples, start, item_id="x"), SampleForecast(samples + 1, start, "y")],
        [0.25, 0.5],
        item_id="who",
        timestamp="when",
    )
    assert list(frame.columns) == ["who", "when", "channel", "mean", "0.25", "0.5"]
    assert len(frame) == 2 * 3 * 2
    row = frame[(frame["who"] == "x") & (frame["when"] == "2024-01-02") & (frame["channel"] == 1)]
    assert row["mean"].item() == pytest.approx(samples[:, 1, 1].mean())
    assert row["0.5"].item() == pytest.approx(np.sort(samples[:, 1, 1])[24:26].mean(), abs=0.1)


def test_forecasts_of_quantiles_keep_them() -> None:
    forecast = QuantileForecast(
        np.array([[1.0, 2.0], [3.0, 4.0]]), pd.Period("2024-01", freq="M"), ["0.1", "0.5"], "x"
    )
    frame = forecasts_to_frame([forecast], [0.1, 0.5])
    assert frame[["0.1", "0.5"]].to_numpy().tolist() == [[1, 3], [2, 4]]
    with pytest.raises(EvaluationError, match=r"1\.5 does not lie between 0 and 1"):
        forecasts_to_frame([forecast], [1.5])
