from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from known_forecasters import BandPredictor
from moecast.evaluation import BacktestResult, EvaluationError, backtest, plot_forecasts


@pytest.fixture
def result(hourly: list[dict]) -> BacktestResult:
    return backtest(
        BandPredictor(6, level=2.0, width=4.0),
        hourly,
        prediction_length=6,
        windows=5,
        keep_forecasts=True,
    )


def visible(figure) -> list:
    return [axis for axis in figure.axes if axis.get_visible()]


def test_a_panel_shows_history_label_median_and_fans(
    result: BacktestResult, hourly: list[dict]
) -> None:
    figure = plot_forecasts(result.forecasts, result.test_data, history_length=10, max_windows=1)
    (axis,) = visible(figure)
    observed, median = axis.lines[:2]
    np.testing.assert_allclose(observed.get_ydata(), hourly[0]["target"][-40:-24])
    np.testing.assert_allclose(median.get_ydata(), np.full(6, 2.0))
    assert median.get_xdata()[0] == observed.get_xdata()[10]

    fans = [fan.get_paths()[0].vertices[:, 1] for fan in axis.collections]
    heights = [(vertices.min(), vertices.max()) for vertices in fans]
    np.testing.assert_allclose(heights, [(0.1, 3.9), (0.4, 3.6), (1.0, 3.0)], atol=0.01)


def test_windows_are_spread_over_the_test_data(result: BacktestResult) -> None:
    figure = plot_forecasts(result.forecasts, result.test_data, max_windows=4, columns=3)
    titles = [axis.get_title() for axis in visible(figure)]
    assert titles == ["series 0", "series 0", "series 1", "series 1"]


def test_several_forecasters_stand_side_by_side(result: BacktestResult) -> None:
    both = {"one": result.forecasts, "two": result.forecasts}
    figure = plot_forecasts(both, result.test_data, max_windows=2)
    titles = [axis.get_title() for axis in visible(figure)]
    assert titles == ["series 0 · one", "series 0 · two", "series 1 · one", "series 1 · two"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    expected = ["observed", "median forecast", "95% interval", "80% interval", "50% interval"]
    assert labels == expected


def test_multivariate_forecasts_have_a_panel_per_channel(
    multivariate: list[dict], tmp_path: Path
) -> None:
    result = backtest(
        BandPredictor(6), multivariate, prediction_length=6, windows=1, keep_forecasts=True
    )
    path = tmp_path / "new" / "plot.png"
    figure = plot_forecasts(result.forecasts, result.test_data, max_channels=2, path=path)
    assert [axis.get_title() for axis in visible(figure)] == ["m [0]", "m [1]"]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_missing_forecasts_are_reported(result: BacktestResult) -> None:
    with pytest.raises(EvaluationError, match="keep_forecasts=True"):
        plot_forecasts((), result.test_data)


def test_levels_are_checked(result: BacktestResult) -> None:
    with pytest.raises(EvaluationError, match="intervals: 95"):
        plot_forecasts(result.forecasts, result.test_data, intervals=[95])


def test_missing_matplotlib_names_the_extra(
    result: BacktestResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EvaluationError, match=r"pip install 'moecast\[plots\]'"):
        plot_forecasts(result.forecasts, result.test_data)
