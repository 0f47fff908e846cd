from __future__ import annotations

import warnings
from pathlib import Path
from typing import Callable

import numpy as np
import pandas as pd
import pytest
from gluonts.ev.metrics import MAE
from gluonts.model import evaluate_model
from gluonts.model.seasonal_naive import SeasonalNaivePredictor
from gluonts.torch import DLinearEstimator
from hypothesis import given
from hypothesis import strategies as st
from known_forecasters import BandPredictor, RecordingEstimator, SilentPredictor
from moecast.evaluation import (
    GIFT_EVAL_METRICS,
    EvaluationError,
    UnscaledSeriesWarning,
    backtest,
    gift_eval_windows,
    load_long_horizon,
    long_horizon,
    long_horizon_metrics,
    season_length,
)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=3), st.integers(1, 100))
def test_windows_are_a_tenth_of_the_shortest_series(lengths: list[int], horizon: int) -> None:
    entries = [{"target": np.zeros(length)} for length in lengths]
    windows = gift_eval_windows(entries, horizon)
    assert 1 <= windows <= 20
    tenth = min(lengths) / 10
    if windows < 20:
        assert windows * horizon >= tenth - 1e-9
    if windows > 1:
        assert (windows - 1) * horizon < tenth


@pytest.mark.parametrize(
    ("freq", "expected"),
    [("h", 24), ("2h", 12), ("15min", 96), ("10min", 144), ("D", 1), ("W-SUN", 1), ("M", 12)],
)
def test_season_lengths(freq: str, expected: int) -> None:
    assert season_length(pd.Period("2024-01-01", freq=freq)) == expected


def test_metrics_equal_gluonts_evaluate_model(hourly: list[dict]) -> None:
    predictor = SeasonalNaivePredictor(12, 24)
    result = backtest(
        predictor, hourly, prediction_length=12, windows=3, distance=5, seasonality=24
    )
    expected = evaluate_model(
        predictor, test_data=result.test_data, metrics=GIFT_EVAL_METRICS, seasonality=24
    )
    for name, value in expected.iloc[0].items():
        assert result.metrics[name] == pytest.approx(value)
    assert (result.model, result.freq, result.num_series) == ("SeasonalNaive", "h", 2)


def test_windows_end_with_each_series_and_training_ends_before_them(hourly: list[dict]) -> None:
    estimator = RecordingEstimator(10)
    result = backtest(estimator, hourly, prediction_length=10, windows=3, distance=4)
    held_out = 10 + 2 * 4
    for entry, seen in zip(hourly, estimator.training, strict=True):
        np.testing.assert_array_equal(seen["target"], entry["target"][:-held_out])
    assert estimator.validation is None
    labels = [label["target"] for label in result.test_data.label]
    assert len(labels) == 6
    np.testing.assert_array_equal(labels[2], hourly[0]["target"][-10:])
    np.testing.assert_array_equal(labels[3], hourly[1]["target"][-18:-8])


def test_validation_holds_out_one_more_horizon(hourly: list[dict]) -> None:
    estimator = RecordingEstimator(10)
    backtest(estimator, hourly, prediction_length=10, windows=2, validate=True)
    assert [len(entry["target"]) for entry in estimator.training] == [170, 210]
    assert [len(entry["target"]) for entry in estimator.validation or []] == [180, 220]


def test_the_default_number_of_windows_is_gift_evals(hourly: list[dict]) -> None:
    assert backtest(BandPredictor(7), hourly, prediction_length=7).windows == 3


def test_multivariate_forecasts_are_scored_over_all_channels(multivariate: list[dict]) -> None:
    result = backtest(
        BandPredictor(6, level=5.0), multivariate, prediction_length=6, windows=2, metrics=[MAE()]
    )
    label = multivariate[0]["target"][:, -12:]
    assert result.metrics["MAE[0.5]"] == pytest.approx(np.abs(label - 5).mean())
    assert (result.num_variates, result.num_series) == (3, 1)


def test_missing_labels_are_not_scored(hourly: list[dict]) -> None:
    hourly[0]["target"][-3:] = np.nan
    result = backtest(BandPredictor(6), hourly, prediction_length=6, windows=1, metrics=[MAE()])
    labels = np.r_[hourly[0]["target"][-6:-3], hourly[1]["target"][-6:]]
    assert result.metrics["MAE[0.5]"] == pytest.approx(np.abs(labels).mean(), rel=1e-6)


def test_forecasts_are_kept_in_order_on_request(hourly: list[dict]) -> None:
    predictor = BandPredictor(6)
    assert backtest(predictor, hourly, prediction_length=6, windows=1).forecasts is None
    result = backtest(predictor, hourly, prediction_length=6, windows=2, keep_forecasts=True)
    starts = [label["start"] for label in result.test_data.label]
    assert [forecast.start_date for forecast in result.forecasts or ()] == starts


def test_a_constant_series_warns_once_at_every_backtest(hourly: list[dict]) -> None:
    hourly[1]["target"][:] = 3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UnscaledSeriesWarning)
        for count in (1, 2):
            result = backtest(BandPredictor(6), hourly, prediction_length=6, windows=1)
            assert np.isfinite(list(result.metrics.values())).all()
            assert len(caught) == count
    assert "1 of 2 series windows" in str(caught[0].message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction_length": 8}, "Band.*forecasts 6 steps, but prediction_length=8"),
        ({"prediction_length": 6, "windows": 34}, "'series 0' has 200 values.*need 204"),
        ({"prediction_length": 6, "windows": 0}, "windows=0 must be at least 1"),
        ({"prediction_length": 6, "distance": 0}, "distance=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict, message: str, hourly: list[dict]
) -> None:
    with pytest.raises(EvaluationError, match=message):
        backtest(BandPredictor(6), hourly, **settings)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no series"):
        backtest(BandPredictor(6), [], prediction_length=6)


def test_a_predictor_with_too_few_forecasts_is_refused(hourly: list[dict]) -> None:
    with pytest.raises(EvaluationError, match="gave 0 forecasts for 2 windows"):
        backtest(SilentPredictor(6), hourly, prediction_length=6, windows=1)


@pytest.mark.parametrize("multivariate", [False, True])
def test_long_horizon_scores_every_window_on_the_standardised_scale(
    hourly_csv: Path, multivariate: bool
) -> None:
    dataset = load_long_horizon(hourly_csv)
    estimator = RecordingEstimator(5)
    result = long_horizon(
        estimator,
        dataset,
        prediction_length=5,
        context_length=8,
        multivariate=multivariate,
        batch_size=7,
    )
    scaled = dataset.scaler.transform(dataset.values)
    starts = range(80, 100 - 5 + 1)
    label = np.stack([scaled[start : start + 5] for start in starts])
    level = result.predictor.level  # type: ignore[attr-defined]
    expected = long_horizon_metrics(np.full_like(label, level), label)
    assert result.metrics == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert result.windows == len(starts) == 16

    lengths = {entry["target"].shape[-1] for entry in estimator.training}
    assert lengths == {70}
    assert {entry["target"].shape[-1] for entry in estimator.validation or []} == {8 + 10}


def test_long_horizon_of_seasonal_naive_by_hand(hourly_csv: Path) -> None:
    dataset = load_long_horizon(hourly_csv)
    result = long_horizon(
        SeasonalNaivePredictor(3, 1), dataset, prediction_length=3, context_length=4
    )
    step = 1 / dataset.scaler.scale[0]
    assert result.metrics["MAE"] == pytest.approx(2 * step, rel=1e-5)
    assert result.metrics["MSE"] == pytest.approx(14 / 3 * step**2, rel=1e-5)
    assert result.metrics["CORR"] == pytest.approx(1, rel=1e-5)


def test_dlinear_beats_a_flat_forecast_on_real_data(
    shared_file: Callable[[str], Path], tmp_path: Path
) -> None:
    dataset = load_long_horizon(shared_file("ETTh1.csv"))
    trainer = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(tmp_path),
    }
    estimator = DLinearEstimator(
        24, context_length=96, num_batches_per_epoch=40, trainer_kwargs=trainer
    )
    common = {"prediction_length": 24, "context_length": 96, "stride": 96}
    trained = long_horizon(estimator, dataset, **common)
    flat = long_horizon(BandPredictor(24), dataset, **common)
    assert trained.metrics["MSE"] < 0.7 * flat.metrics["MSE"]
    assert trained.metrics["CORR"] > 0.5
