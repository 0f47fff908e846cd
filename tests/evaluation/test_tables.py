from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moecast.evaluation.errors import EvaluationError
from moecast.evaluation.tables import Grid, infer_freq, parse_times, period_freq, read_csv

FREQS = ["h", "15min", "10min", "D", "W-SUN", "W-FRI", "MS", "QS"]


@pytest.mark.parametrize(
    ("alias", "expected"),
    [("MS", "M"), ("ME", "M"), ("h", "h"), ("15min", "15min"), ("QS", "Q-DEC")],
)
def test_period_freq_accepts_start_and_end_aliases(alias: str, expected: str) -> None:
    assert period_freq(alias) == expected


def test_period_freq_names_an_unknown_frequency() -> None:
    with pytest.raises(EvaluationError, match="freq='fortnight'"):
        period_freq("fortnight")


@pytest.mark.parametrize("freq", FREQS)
def test_frequency_is_inferred_from_a_shuffled_series_with_gaps_and_repeats(freq: str) -> None:
    times = pd.date_range("2021-01-01", periods=200, freq=freq)
    kept = np.r_[0:50, 53:120, 121:200, 130, 130]
    shuffled = times[np.random.default_rng(0).permutation(kept)]
    assert infer_freq(shuffled, "x") == period_freq(freq)


def test_too_few_times_ask_for_freq() -> None:
    with pytest.raises(EvaluationError, match=r"two\.csv.*2 distinct timestamps.*give freq"):
        infer_freq(pd.DatetimeIndex(["2021-01-01", "2021-01-02", "2021-01-02"]), "two.csv")


@given(
    st.sampled_from(FREQS),
    st.lists(st.integers(0, 60), min_size=1, max_size=40),
)
def test_grid_places_each_row_at_its_period(freq: str, steps: list[int]) -> None:
    times = pd.date_range("2021-01-01", periods=61, freq=freq)[steps]
    grid = Grid.locate(times, period_freq(freq), "x")
    values = np.arange(len(steps), dtype=float)[:, None]
    placed = grid.place(values)

    assert placed.shape == (max(steps) - min(steps) + 1, 1)
    assert grid.start == times.min().to_period(period_freq(freq))
    for position, value in enumerate(placed[:, 0]):
        step = position + min(steps)
        if step in steps:
            assert value == steps.index(step)
        else:
            assert np.isnan(value)
    assert len(grid.missing) == grid.length - len(set(steps))
    assert set(grid.repeated) == {s - min(steps) for s in steps if steps.count(s) > 1}


def test_times_between_grid_points_are_refused() -> None:
    times = pd.DatetimeIndex(["2021-01-01 00:00", "2021-01-01 00:15", "2021-01-01 00:20"])
    with pytest.raises(EvaluationError, match=r"1 timestamps, first 2021-01-01 00:20:00"):
        Grid.locate(times, "15min", "x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2000-01-02 03-04-05", "2000-01-02 03:04:05"),
        ("19580329", "1958-03-29"),
        ("1949-02", "1949-02-01"),
        ("2016-07-01 00:15:00", "2016-07-01 00:15"),
        ("3/14/2020", "2020-03-14"),
    ],
)
def test_dates_of_common_files_are_read(text: str, expected: str) -> None:
    assert parse_times(pd.Series([text]), "x")[0] == pd.Timestamp(expected)


def test_a_bad_date_is_quoted() -> None:
    with pytest.raises(EvaluationError, match=r"f\.csv: column 'when' holds 'noon'"):
        parse_times(pd.Series(["2020-01-01", "noon"], name="when"), "f.csv")


def test_csv_survives_byte_order_mark_crlf_and_latin_1(tmp_path) -> None:
    path = tmp_path / "odd.csv"
    path.write_bytes(b"\xef\xbb\xbfdate, SWDR (W/m\xb2)\r\n2020-01-01,1.5\r\n")
    frame = read_csv(path)
    assert list(frame.columns) == ["date", "SWDR (W/m\ufffd)"]
    assert frame.iloc[0, 1] == 1.5


@pytest.mark.parametrize("content", ["", 'a,b\n"1,2\n3'])
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path, content: str) -> None:
    path = tmp_path / "broken.csv"
    path.write_text(content)
    with pytest.raises(EvaluationError, match=r"broken\.csv: not a CSV table"):
        read_csv(path)
