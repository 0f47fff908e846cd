"""Training and forecasting on a GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import HORIZON, PATH_MODELS, QUIET, Factory, forecast_values, series, untrained
from moecast.distributions.univariate import AffineDistribution

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.on_cuda,
]


def test_forecasts_are_those_of_the_processor(
    make_estimator: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, also from graphs that were recorded two batches before."""

    # The one draw that is the same on both.
    def sample(distribution: AffineDistribution, shape: tuple[int, ...] = ()) -> torch.Tensor:
        return distribution.mean.expand(*shape, *distribution.batch_shape)

    monkeypatch.setattr(AffineDistribution, "sample", sample)
    predictor, dataset = untrained(make_estimator()), series(number=6)
    predictor.to("cpu")
    expected = forecast_values(predictor, dataset)
    predictor.to("cuda")
    for _ in range(3):
        found = forecast_values(predictor, dataset)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_trained_there_and_read_here(
    model: str, make_estimator: Factory, precision: str, tmp_path: Path
) -> None:
    past = [{**entry, "target": entry["target"][:-HORIZON]} for entry in series()]
    future = np.stack([entry["target"][-HORIZON:] for entry in series()])
    trainer = {**QUIET, "accelerator": "gpu", "precision": precision, "max_epochs": 8}
    estimator = make_estimator(trainer_kwargs=trainer)
    predictor = estimator.train(past)
    found = forecast_values(predictor, past)
    before = forecast_values(untrained(estimator), past)
    errors = [np.abs(values[:, 2] - future).mean() for values in (found, before)]
    assert errors[0] < errors[1]
    predictor.serialize(tmp_path)
    copy = type(predictor).deserialize(tmp_path, device="cpu")
    if model not in PATH_MODELS:  # Those draw other numbers on another device.
        np.testing.assert_allclose(forecast_values(copy, past), found, rtol=1e-3, atol=1e-3)
