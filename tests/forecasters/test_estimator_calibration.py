"""Forecasts whose quantiles are calibrated on held-out windows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from gluonts.model.predictor import Predictor
from model_cases import (
    DISTRIBUTION_MODELS,
    HORIZON,
    MODELS,
    PATH_MODELS,
    QUIET,
    Factory,
    forecast_values,
    series,
)

WINDOWS = 3


@pytest.fixture(params=DISTRIBUTION_MODELS)
def model(request: pytest.FixtureRequest) -> str:
    """Models whose forecasts are distributions of each step."""
    return request.param


@pytest.mark.parametrize("path_model", PATH_MODELS)
def test_paths_cannot_be_calibrated(path_model: str) -> None:
    with pytest.raises(ValueError, match=r"calibration_windows=1 .* drawn as paths"):
        MODELS[path_model](calibration_windows=1)


def series_with_other_end(noise: float, noise_at_the_end: float) -> list[dict]:
    """Series whose calibration windows are noisier, or calmer, than what is trained on."""
    generator = np.random.default_rng(5)
    entries = series(number=12, length=160)
    for entry in entries:
        length = len(entry["target"])
        spread = np.full(length, noise)
        spread[-WINDOWS * HORIZON :] = noise_at_the_end
        entry["target"] = (spread * generator.normal(size=length)).astype(np.float32)
    return entries


def widths(predictor, entries: list[dict]) -> tuple[float, float]:
    """Mean width of the 80% interval, as forecast and as the head alone has it."""
    calibrated, uncalibrated = [], []
    for forecast in predictor.predict(entries):
        calibrated.append(forecast.quantile(0.9) - forecast.quantile(0.1))
        low, high = (forecast.distribution.icdf(torch.tensor([q])) for q in (0.1, 0.9))
        uncalibrated.append((high - low).numpy())
    return float(np.mean(calibrated)), float(np.mean(uncalibrated))


@pytest.mark.parametrize(("at_the_end", "direction"), [(6.0, 1), (0.1, -1)])
def test_intervals_change_in_the_direction_of_what_they_missed(
    make_estimator: Factory, at_the_end: float, direction: int
) -> None:
    entries = series_with_other_end(1.0, at_the_end)
    estimator = make_estimator(calibration_windows=WINDOWS, num_batches_per_epoch=10)
    calibrated, uncalibrated = widths(estimator.train(entries), entries)
    assert direction * np.log(calibrated / uncalibrated) > np.log(1.3)


def test_calibrated_intervals_cover_what_is_like_the_calibration_windows(
    make_estimator: Factory,
) -> None:
    """Noise that the head underestimates, because it is trained before the noise begins."""
    entries = series_with_other_end(1.0, 3.0)
    history = [{**entry, "target": entry["target"][:-HORIZON]} for entry in entries]
    labels = np.stack([entry["target"][-HORIZON:] for entry in entries])

    def coverage(windows: int) -> float:
        predictor = make_estimator(calibration_windows=windows).train(history)
        values = forecast_values(predictor, history)
        return float(((values[:, 1] <= labels) & (labels <= values[:, 3])).mean())

    plain, calibrated = coverage(0), coverage(WINDOWS - 1)
    assert plain < 0.75
    assert calibrated > plain + 0.05
    assert calibrated > 0.75


def test_median_and_order_stay(make_estimator: Factory) -> None:
    entries = series_with_other_end(1.0, 6.0)
    predictor = make_estimator(calibration_windows=WINDOWS).train(entries)
    values = forecast_values(predictor, entries)
    assert (np.diff(values[:, 1:], axis=1) > 0).all()
    calibration, predictor.calibration = predictor.calibration, None
    np.testing.assert_allclose(forecast_values(predictor, entries)[:, 2], values[:, 2], rtol=1e-5)
    assert calibration is not None


def test_calibration_survives_the_model_folder(make_estimator: Factory, tmp_path: Path) -> None:
    entries = series_with_other_end(1.0, 6.0)
    predictor = make_estimator(calibration_windows=WINDOWS).train(entries)
    predictor.serialize(tmp_path)
    copy = Predictor.deserialize(tmp_path)
    assert copy.calibration == predictor.calibration
    assert copy.calibration is not None
    assert copy == predictor
    np.testing.assert_array_equal(
        forecast_values(copy, entries), forecast_values(predictor, entries)
    )


def test_samples_are_calibrated(make_estimator: Factory) -> None:
    entries = series_with_other_end(1.0, 6.0)
    predictor = make_estimator(calibration_windows=WINDOWS).train(entries)
    torch.manual_seed(0)
    forecast = next(predictor.predict(entries))
    samples = forecast.to_sample_forecast(4000).samples
    for level in (0.1, 0.9):
        below = (samples <= forecast.quantile(level)).mean(axis=0)
        np.testing.assert_allclose(below, level, atol=0.03)


class SeenTargets(pl.Callback):
    """Whether each training, in turn, was shown values above 50."""

    def __init__(self) -> None:
        self.large: list[bool] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.large.append(False)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.large[-1] |= bool((batch["past_target"] > 50).any())
        self.large[-1] |= bool((batch["future_target"] > 50).any())


def test_calibration_windows_are_held_out_first_and_trained_on_then(
    make_estimator: Factory,
) -> None:
    entries = series_with_other_end(1.0, 1.0)
    for entry in entries:
        entry["target"][-WINDOWS * HORIZON :] += 100.0
    seen = SeenTargets()
    estimator = make_estimator(
        calibration_windows=WINDOWS,
        trainer_kwargs={**QUIET, "max_epochs": 2, "callbacks": [seen]},
    )
    estimator.train(entries)
    assert seen.large == [False, True]


def test_series_too_short_to_hold_out_are_not_calibrated_on(
    make_estimator: Factory, caplog: pytest.LogCaptureFixture
) -> None:
    estimator = make_estimator(calibration_windows=2)
    shortest = estimator.context_length + 2 * HORIZON - 1
    entries = [{**entry, "target": entry["target"][:shortest]} for entry in series()]
    with caplog.at_level(logging.WARNING, "moecast"):
        predictor = estimator.train(entries)
    assert predictor.calibration is None
    assert "calibration_windows=2" in caplog.text


def test_discrete_head_can_be_calibrated(make_estimator: Factory) -> None:
    entries = series("counts", number=8)
    estimator = make_estimator(distr_output="negative_binomial", calibration_windows=2)
    values = forecast_values(estimator.train(entries), entries)
    assert np.isfinite(values).all()
    assert (values >= 0).all()


def test_multivariate_forecasts_can_be_calibrated(make_estimator: Factory) -> None:
    entries = series(channels=2)
    predictor = make_estimator(target_dim=2, calibration_windows=2).train(entries)
    assert predictor.calibration is not None
    assert forecast_values(predictor, entries).shape[-1] == 2
