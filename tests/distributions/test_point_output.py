from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from gluonts.core import serde
from moecast.distributions import PointOutput
from torch import Tensor


@pytest.mark.parametrize("loss", ["mse", "mae"])
def test_the_loss_is_the_error_in_units_of_the_scale(loss: str) -> None:
    target = torch.tensor([[3.0, 10.0], [-1.0, 0.0]])
    prediction = torch.tensor([[0.5, 0.0], [1.0, 2.0]])
    loc, scale = torch.tensor([[1.0], [-2.0]]), torch.tensor([[2.0], [0.5]])
    error = np.array([[0.5, 4.5], [1.0, 2.0]])
    expected = error**2 if loss == "mse" else error
    head = PointOutput(loss)
    computed = head.loss(target, (prediction,), loc=loc, scale=scale)
    np.testing.assert_allclose(computed, expected, rtol=1e-6)
    plain = head.loss(target, (prediction,))
    difference = (target - prediction).numpy()
    np.testing.assert_allclose(plain, difference**2 if loss == "mse" else abs(difference))


def test_squared_error_is_what_torch_says() -> None:
    target, prediction = torch.randn(2, 3, 4)
    expected = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(PointOutput().loss(target, (prediction,)).mean(), expected)


@pytest.mark.parametrize("loss", ["MSE", "huber", ""])
def test_unknown_losses_are_refused(loss: str) -> None:
    with pytest.raises(ValueError, match=f"loss='{loss}' is unknown: choose one of mse, mae"):
        PointOutput(loss)


def test_serialisation_keeps_the_loss() -> None:
    copy = serde.load_json(serde.dump_json(PointOutput("mae")))
    assert isinstance(copy, PointOutput)
    assert copy.loss_name == "mae"


def test_a_forecast_is_one_sample_on_the_targets_scale() -> None:
    start = pd.Period("2024-01-01", freq="h")
    batch = {
        "past_target": torch.zeros(2, 3),
        "forecast_start": [start, start + 5],
        "item_id": ["a", "b"],
        "info": [None, {"x": 1}],
    }

    def network(past_target: Tensor) -> tuple:
        points = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        loc, scale = torch.tensor([[10.0], [0.0]]), torch.tensor([[2.0], [0.5]])
        return (points,), loc, scale

    generator = PointOutput().forecast_generator
    forecasts = list(generator([batch], network, ["past_target"], None, None))
    np.testing.assert_allclose(forecasts[0].mean, [12.0, 14.0, 16.0])
    np.testing.assert_allclose(forecasts[1].mean, [2.0, 2.5, 3.0])
    for forecast in forecasts:
        for level in (0.1, 0.5, 0.9):
            np.testing.assert_array_equal(forecast.quantile(level), forecast.mean)
    assert [forecast.start_date for forecast in forecasts] == [start, start + 5]
    assert [forecast.item_id for forecast in forecasts] == ["a", "b"]
    assert [forecast.info for forecast in forecasts] == [None, {"x": 1}]
