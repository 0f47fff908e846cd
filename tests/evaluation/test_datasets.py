from __future__ import annotations

import json
from pathlib import Path
from typing import Callable

import numpy as np
import pandas as pd
import pytest
from gluonts.dataset.common import ListDataset
from gluonts.dataset.jsonl import JsonLinesWriter
from moecast.evaluation import (
    EvaluationError,
    from_long_frame,
    load_jsonl,
    load_long_csv,
    load_m4,
    load_monash,
    load_wide,
)


def test_wide_file_gives_one_entry_per_column(hourly_csv: Path) -> None:
    first, second = load_wide(hourly_csv)
    assert (first["item_id"], second["item_id"]) == ("a", "b")
    assert first["start"] == pd.Period("2024-01-01 00:00", freq="h")
    assert first["target"].dtype == np.float32
    np.testing.assert_array_equal(second["target"], -np.arange(100))


def test_wide_file_as_one_multivariate_entry(hourly_csv: Path) -> None:
    (entry,) = load_wide(hourly_csv, multivariate=True, columns=["b", "a"])
    assert entry["item_id"] == "tiny"
    assert entry["target"].shape == (2, 100)
    np.testing.assert_array_equal(entry["target"][1], np.arange(100))


@pytest.fixture
def irregular_csv(tmp_path: Path) -> Path:
    """Hours 0–4 and 6–9, hour 3 twice, and a missing-value sentinel at hour 1."""
    hours = [0, 1, 2, 3, 3, 4, 6, 7, 8, 9]
    dates = pd.Timestamp("2024-01-01") + pd.to_timedelta(hours, unit="h")
    path = tmp_path / "irregular.csv"
    frame = pd.DataFrame({"date": dates, "x": np.arange(10.0)})
    frame.loc[1, "x"] = -9999
    frame.to_csv(path, index=False)
    return path


def test_irregular_dates_are_completed_with_a_warning(irregular_csv: Path) -> None:
    message = r"irregular\.csv: 1 timestamps repeated .*03:00:00\) and 1 timestamps missing .*05:00"
    with pytest.warns(UserWarning, match=message):
        (entry,) = load_wide(irregular_csv)
    nan = np.nan
    np.testing.assert_array_equal(entry["target"], [0, nan, 2, 3, 5, nan, 6, 7, 8, 9])


def test_irregular_dates_are_kept_on_request(irregular_csv: Path) -> None:
    with pytest.warns(UserWarning, match="as if evenly spaced"):
        (entry,) = load_wide(irregular_csv, irregular="keep", missing_values=())
    np.testing.assert_array_equal(entry["target"], [0, -9999, 2, 3, 4, 5, 6, 7, 8, 9])


def test_irregular_dates_are_refused_on_request(irregular_csv: Path) -> None:
    with pytest.raises(EvaluationError, match=r"not a regular grid of freq='h'.*'reindex'"):
        load_wide(irregular_csv, irregular="raise")


def test_a_text_column_is_named_with_its_value(tmp_path: Path) -> None:
    path = tmp_path / "bikes.csv"
    path.write_text("date,weather\n2020-01-01,clear\n2020-01-02,mist\n2020-01-03,mist\n")
    with pytest.raises(EvaluationError, match=r"bikes\.csv: column 'weather' holds 'clear'"):
        load_wide(path)


def test_a_missing_column_lists_those_there_are(hourly_csv: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no column 'when'; choose among 'date', 'a', 'b'"):
        load_wide(hourly_csv, timestamp="when")


def test_monash_rows_lose_only_their_trailing_blanks(tmp_path: Path) -> None:
    path = tmp_path / "monash.csv"
    path.write_text(
        "series_name,start_timestamp,V1,V2,V3,V4\n"
        "T1,1979-01-01 00-00-00,1,,3,\nT2,1985-02-01 00-00-00,4,5,6,7\n"
    )
    first, second = load_monash(path, freq="MS")
    np.testing.assert_array_equal(first["target"], np.float32([1, np.nan, 3]))
    assert first["start"] == pd.Period("1979-01", freq="M")
    assert (second["item_id"], second["start"]) == ("T2", pd.Period("1985-02", freq="M"))


def test_a_monash_row_without_values_is_named(tmp_path: Path) -> None:
    path = tmp_path / "monash.csv"
    path.write_text("series_name,start_timestamp,V1\nT1,2000-01-01,1\nT2,2000-01-01,\n")
    with pytest.raises(EvaluationError, match=r"monash\.csv: series 'T2' has no value"):
        load_monash(path, freq="D")


def test_m4_test_values_follow_their_own_series(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('"V1","V2","V3"\n"H1","1","2"\n"H2","3",\n')
    (tmp_path / "test.csv").write_text('"V1","V2"\n"H2","30"\n"H1","10"\n')
    first, second = load_m4(tmp_path / "train.csv", tmp_path / "test.csv", freq="h")
    np.testing.assert_array_equal(first["target"], [1, 2, 10])
    np.testing.assert_array_equal(second["target"], [3, 30])
    assert first["start"].freqstr == "h"


def test_m4_files_of_different_series_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("V1,V2\nH1,1\n")
    (tmp_path / "test.csv").write_text("V1,V2\nD1,1\n")
    with pytest.raises(EvaluationError, match=r"test\.csv: series 'D1' is in only one"):
        load_m4(tmp_path / "train.csv", tmp_path / "test.csv", freq="h")


@pytest.fixture
def long_frame() -> pd.DataFrame:
    """Items b (3 days, one of them missing, unsorted) and a (3 days)."""
    rows = [
        ("b", "2024-01-04", 4.0, 0.4, "red", 7),
        ("b", "2024-01-01", 1.0, 0.1, "red", 7),
        ("a", "2024-01-01", 10.0, 1.0, "blue", 8),
        ("b", "2024-01-02", 2.0, 0.2, "red", 7),
        ("a", "2024-01-02", 20.0, 2.0, "blue", 8),
        ("a", "2024-01-03", 30.0, 3.0, "blue", 8),
    ]
    names = ["item_id", "timestamp", "target", "price", "colour", "size"]
    return pd.DataFrame(rows, columns=names)


def test_long_frame_is_sorted_and_completed(long_frame: pd.DataFrame) -> None:
    before = long_frame.copy()
    b, a = from_long_frame(
        long_frame,
        feat_dynamic_real=["price"],
        feat_static_cat=["colour"],
        feat_static_real=["size"],
        fill_features=0.0,
    )
    assert (b["item_id"], a["item_id"]) == ("b", "a")
    assert b["start"] == pd.Period("2024-01-01", freq="D")
    np.testing.assert_array_equal(b["target"], np.float32([1, 2, np.nan, 4]))
    np.testing.assert_array_equal(b["feat_dynamic_real"], np.float32([[0.1, 0.2, 0, 0.4]]))
    np.testing.assert_array_equal([b["feat_static_cat"], a["feat_static_cat"]], [[1], [0]])
    np.testing.assert_array_equal(a["feat_static_real"], [8])
    pd.testing.assert_frame_equal(long_frame, before)


def test_future_rows_hold_only_known_features(long_frame: pd.DataFrame) -> None:
    (a,) = from_long_frame(
        long_frame[long_frame["item_id"] == "a"],
        feat_dynamic_real=["price"],
        past_feat_dynamic_real=["size"],
        future_length=1,
    )
    assert a["target"].shape == (2,)
    assert a["feat_dynamic_real"].shape == (1, 3)
    assert a["past_feat_dynamic_real"].shape == (1, 2)


def test_duplicate_rows_name_item_and_time(long_frame: pd.DataFrame) -> None:
    twice = pd.concat([long_frame, long_frame.iloc[[3]]])
    with pytest.raises(EvaluationError, match="item 'b': two rows for 2024-01-02"):
        from_long_frame(twice)


def test_a_feature_without_value_names_item_and_time(long_frame: pd.DataFrame) -> None:
    with pytest.raises(EvaluationError, match=r"item 'b': feature 'price' .*2024-01-03"):
        from_long_frame(long_frame, past_feat_dynamic_real=["price"])


def test_a_static_column_that_varies_is_refused(long_frame: pd.DataFrame) -> None:
    with pytest.raises(EvaluationError, match="item 'b': static column 'price' has 3 values"):
        from_long_frame(long_frame, feat_static_real=["price"])


def test_a_frame_without_item_column_is_one_series(long_frame: pd.DataFrame) -> None:
    rows = long_frame[long_frame["item_id"] == "a"].drop(columns="item_id")
    (entry,) = from_long_frame(rows, item_id=None, freq="D")
    assert entry["item_id"] == "target"
    np.testing.assert_array_equal(entry["target"], [10, 20, 30])


def test_long_csv_equals_its_frame(long_frame: pd.DataFrame, tmp_path: Path) -> None:
    long_frame.to_csv(tmp_path / "long.csv", index=False)
    from_file = load_long_csv(tmp_path / "long.csv")
    for read, given in zip(from_file, from_long_frame(long_frame), strict=True):
        assert read["start"] == given["start"]
        np.testing.assert_array_equal(read["target"], given["target"])


@pytest.mark.parametrize("use_gzip", [True, False])
@pytest.mark.parametrize("which", ["hourly", "multivariate"])
def test_json_lines_round_trip(
    which: str, use_gzip: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    entries = request.getfixturevalue(which)
    entries[0]["target"][..., 3] = np.nan
    JsonLinesWriter(use_gzip=use_gzip).write_to_folder(entries, tmp_path)
    (tmp_path / "metadata.json").write_text('{"freq": "h"}')
    (file,) = (path for path in tmp_path.iterdir() if path.name != "metadata.json")
    for path in (tmp_path, file):
        for read, written in zip(load_jsonl(path, freq=entries[0]["start"].freqstr), entries):
            assert (read["item_id"], read["start"]) == (written["item_id"], written["start"])
            assert read["target"].dtype == np.float32
            np.testing.assert_array_equal(read["target"], written["target"])


def test_json_lines_agree_with_gluonts_list_dataset(tmp_path: Path) -> None:
    line = {"start": "2024-01-01", "target": [1, 2, 3], "feat_static_cat": [2], "extra": "kept"}
    (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n")
    (read,) = load_jsonl(tmp_path / "x.jsonl", freq="D")
    (expected,) = ListDataset([line], freq="D")
    assert read["start"] == expected["start"]
    assert (read["item_id"], read["extra"]) == ("0", "kept")
    np.testing.assert_array_equal(read["feat_static_cat"], expected["feat_static_cat"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no line"),
        ("{nonsense\n", "json line 0"),
        ('{"start": "2024-01-01"}\n', "target"),
        ('{"start": "someday", "target": [1]}\n', "start"),
    ],
)
def test_bad_json_lines_are_reported_by_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(EvaluationError, match=rf"bad\.json: .*{message}"):
        load_jsonl(tmp_path / "bad.json", freq="D")


def test_no_json_lines_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no JSON lines file"):
        load_jsonl(tmp_path, freq="D")


def test_real_wide_files(shared_file: Callable[[str], Path]) -> None:
    hospital = load_monash(shared_file("hospital.csv"), freq="M")
    assert len(hospital) == 767
    assert {len(entry["target"]) for entry in hospital} == {84}
    tourism = load_monash(shared_file("tourism_monthly_monash.csv"), freq="M")
    assert len(tourism) == 366
    assert not any(np.isnan(entry["target"]).any() for entry in tourism)
    m4 = load_m4(shared_file("m4_hourly_train.csv"), shared_file("m4_hourly_test.csv"), freq="h")
    assert (len(m4), {len(entry["target"]) for entry in m4}) == (414, {748, 1008})


def test_real_single_series(shared_file: Callable[[str], Path]) -> None:
    (passengers,) = load_wide(shared_file("AirPassengers.csv"), timestamp="Date")
    assert (passengers["start"], len(passengers["target"])) == (pd.Period("1949-01", "M"), 144)
    (co2,) = load_wide(shared_file("co2.csv"))
    assert co2["start"].freqstr == "W-SAT"
    assert np.isnan(co2["target"]).sum() == 59
