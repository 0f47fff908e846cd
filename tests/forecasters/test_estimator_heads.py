"""Every head on every model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import torch
from gluonts.core.component import equals
from gluonts.core.serde import dump_json, load_json
from gluonts.dataset.split import split
from gluonts.ev.metrics import MSIS, MeanWeightedSumQuantileLoss
from gluonts.evaluation import Evaluator, make_evaluation_predictions
from gluonts.model import evaluate_model
from gluonts.model.predictor import Predictor
from model_cases import (
    DISTRIBUTION_MODELS,
    HEADS,
    HORIZON,
    LEVELS,
    MODELS,
    NOT_FOR_PATHS,
    PATH_MODELS,
    Factory,
    forecast_values,
    series,
)
from moecast.forecasters import MoEPredictor

WITHOUT_DISTRIBUTION = (
    "quantile(0.1, 0.5, 0.9)",
    "gluonts quantile",
    "gluonts implicit quantiles",
    "point",
)
DECILES = [level / 10 for level in range(1, 10)]

PredictorOf = Callable[[str, str], MoEPredictor]


@pytest.fixture(params=list(HEADS))
def head(request: pytest.FixtureRequest, model: str) -> str:
    if model in PATH_MODELS and request.param in NOT_FOR_PATHS:
        with pytest.raises(ValueError, match="cannot be drawn"):
            MODELS[model](distr_output=HEADS[request.param][0])
        pytest.skip("this head has no paths, and the estimator says so")
    return request.param


@pytest.fixture(scope="module")
def predictor_with_head() -> PredictorOf:
    @functools.cache
    def train(model: str, head: str) -> MoEPredictor:
        head_setting, kind = HEADS[head]
        return MODELS[model](distr_output=head_setting).train(series(kind), series(kind))

    return train


def check_forecasts(values: np.ndarray, dataset: list[dict], head: str) -> None:
    kind = HEADS[head][1]
    assert np.isfinite(values).all()
    spread = np.diff(values[:, 1:], axis=1)
    assert (spread >= 0).all()
    assert spread.any() == (head != "point")
    if kind != "real" and not head.startswith("mixture(student_t"):
        assert (values >= 0).all()
    if kind == "counts" and not head.startswith("mixture(student_t"):
        np.testing.assert_array_equal(values[:, 1:], np.round(values[:, 1:]))
    for entry, medians in zip(dataset, values[:, 2]):
        distance = abs(medians.mean() - entry["target"].mean())
        assert distance < 3 * entry["target"].std()


def test_head_trains_and_forecasts(model: str, head: str, predictor_with_head: PredictorOf) -> None:
    dataset = series(HEADS[head][1])
    values = forecast_values(predictor_with_head(model, head), dataset)
    assert values.shape == (len(dataset), 1 + len(LEVELS), HORIZON)
    check_forecasts(values, dataset, head)


def test_head_trains_and_forecasts_many_channels(make_estimator: Factory, head: str) -> None:
    head_setting, kind = HEADS[head]
    dataset = series(kind, channels=2)
    predictor = make_estimator(distr_output=head_setting, target_dim=2).train(dataset)
    values = forecast_values(predictor, dataset)
    assert values.shape == (len(dataset), 1 + len(LEVELS), HORIZON, 2)
    check_forecasts(values, dataset, head)


def test_head_survives_the_model_folder(
    model: str, head: str, predictor_with_head: PredictorOf, tmp_path: Path
) -> None:
    predictor = predictor_with_head(model, head)
    predictor.serialize(tmp_path)
    copy = Predictor.deserialize(tmp_path)
    assert copy == predictor
    dataset = series(HEADS[head][1])
    np.testing.assert_array_equal(
        forecast_values(copy, dataset), forecast_values(predictor, dataset)
    )


def test_head_survives_in_the_estimator(make_estimator: Factory, head: str) -> None:
    estimator = make_estimator(distr_output=HEADS[head][0])
    assert equals(load_json(dump_json(estimator)), estimator)


def test_evaluator_takes_every_head(
    model: str, head: str, predictor_with_head: PredictorOf
) -> None:
    dataset = series(HEADS[head][1])
    forecasts, truth = make_evaluation_predictions(dataset, predictor_with_head(model, head))
    metrics, _ = Evaluator(num_workers=0)(truth, forecasts)
    for name in ("MSE", "MASE", "MSIS", "mean_wQuantileLoss"):
        assert np.isfinite(metrics[name]), name


def test_evaluate_model_takes_every_head(
    model: str, head: str, predictor_with_head: PredictorOf
) -> None:
    _, template = split(series(HEADS[head][1]), offset=-2 * HORIZON)
    test_data = template.generate_instances(HORIZON, windows=2)
    metrics = evaluate_model(
        predictor_with_head(model, head),
        test_data=test_data,
        metrics=[MSIS(), MeanWeightedSumQuantileLoss(DECILES)],
        axis=None,
    )
    assert np.isfinite(metrics.to_numpy()).all()


@pytest.mark.parametrize("model", DISTRIBUTION_MODELS)
@pytest.mark.parametrize("head", [name for name in HEADS if name not in WITHOUT_DISTRIBUTION])
def test_samples_follow_the_quantiles(
    model: str, head: str, predictor_with_head: PredictorOf
) -> None:
    torch.manual_seed(0)
    dataset = series(HEADS[head][1], number=1)
    (forecast,) = predictor_with_head(model, head).predict(dataset)
    samples = forecast.to_sample_forecast(2000).samples
    assert samples.shape == (2000, HORIZON)
    for level in LEVELS:
        quantile = forecast.quantile(level)
        assert ((samples <= quantile).mean(axis=0) > level - 0.08).all()
        assert ((samples >= quantile).mean(axis=0) > 1 - level - 0.08).all()


@pytest.mark.parametrize("model", DISTRIBUTION_MODELS)
def test_point_forecast_is_its_mean_and_every_quantile(
    model: str, predictor_with_head: PredictorOf
) -> None:
    for forecast in predictor_with_head(model, "point").predict(series()):
        for level in LEVELS:
            np.testing.assert_array_equal(forecast.quantile(level), forecast.mean)
