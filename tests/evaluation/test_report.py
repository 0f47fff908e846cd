from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from known_forecasters import BandPredictor
from moecast.evaluation import (
    BacktestResult,
    EvaluationError,
    backtest,
    results_frame,
    results_markdown,
    results_table,
    write_results,
)
from moecast.evaluation.report import best_per_dataset
from rich.console import Console


@pytest.fixture
def results(hourly: list[dict]) -> list[BacktestResult]:
    """Two data sets, two forecasters: b is better on x, both are equal on y."""
    base = backtest(BandPredictor(6), hourly, prediction_length=6, windows=1)
    made = []
    for dataset, model, mase, coverage in (
        ("x", "a", 2.0, 0.99),
        ("x", "b", 1.0, 0.70),
        ("y", "a", 3.0, 0.80),
        ("y", "b", 3.0, np.nan),
    ):
        metrics = {"MASE[0.5]": mase, "coverage[0.8]": coverage, "extra": 1 / 3}
        made.append(replace(base, dataset=dataset, model=model, metrics=metrics))
    return made


def test_frame_has_a_row_per_result(results: list[BacktestResult]) -> None:
    frame = results_frame(results)
    assert list(frame.columns) == [
        "dataset", "horizon", "forecaster", "MASE[0.5]", "coverage[0.8]",
        "train_seconds", "predict_seconds",
    ]  # fmt: skip
    assert frame["MASE[0.5]"].tolist() == [2, 1, 3, 3]
    assert results_frame(results, ["extra"])["extra"].tolist() == [1 / 3] * 4


def test_best_is_nearest_the_nominal_level_for_coverage_and_ties_are_all_best(
    results: list[BacktestResult],
) -> None:
    best = best_per_dataset(results_frame(results))
    assert best["MASE[0.5]"].tolist() == [False, True, True, True]
    assert best["coverage[0.8]"].tolist() == [False, True, False, False]


def test_a_single_forecaster_is_not_highlighted(results: list[BacktestResult]) -> None:
    assert "**" not in results_markdown(results[:1])


def test_horizons_of_one_dataset_are_compared_apart(results: list[BacktestResult]) -> None:
    longer = [replace(result, prediction_length=12) for result in results[:2]]
    best = best_per_dataset(results_frame([*results[:2], *longer]))
    assert best["MASE[0.5]"].tolist() == [False, True, False, True]


def test_terminal_table_shows_every_name_and_highlights(results: list[BacktestResult]) -> None:
    console = Console(width=80, force_terminal=True, color_system="standard", record=True)
    with console.capture() as capture:
        console.print(results_table(results))
    text = capture.get()
    assert "\x1b[1;32m" in text
    for word in ("dataset", "forecaster", "MASE", "in 80%", "0.99", "–"):
        assert word in text


def test_csv_round_trip_keeps_every_digit(results: list[BacktestResult], tmp_path: Path) -> None:
    write_results(results, tmp_path / "r.csv")
    read = pd.read_csv(tmp_path / "r.csv")
    metrics = ["MASE[0.5]", "coverage[0.8]", "extra"]
    pd.testing.assert_frame_equal(read, results_frame(results, metrics))


def test_markdown_is_a_table_with_the_best_in_bold(
    results: list[BacktestResult], tmp_path: Path
) -> None:
    write_results(results, tmp_path / "r.md", ["MASE[0.5]"])
    lines = (tmp_path / "r.md").read_text().splitlines()
    assert lines[0].startswith("| dataset | horizon | forecaster | MASE |")
    assert lines[3].startswith("| x | 6 | b | **1** |")
    assert len({line.count("|") for line in lines}) == 1


def test_unusable_requests_are_refused(results: list[BacktestResult], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no result has the metric 'MAPE'; .*extra"):
        results_frame(results, ["MAPE"])
    with pytest.raises(EvaluationError, match="no result to report"):
        results_frame([])
    with pytest.raises(EvaluationError, match=r"r\.xlsx: .*\.csv or \.md"):
        write_results(results, tmp_path / "r.xlsx")
