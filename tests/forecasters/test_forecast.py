from __future__ import annotations

import pickle
from typing import Optional

import numpy as np
import pandas as pd
import pytest
import torch
from gluonts.torch.distributions import (
    DistributionOutput,
    GammaOutput,
    ImplicitQuantileNetworkOutput,
    LaplaceOutput,
    NegativeBinomialOutput,
    NormalOutput,
    PoissonOutput,
    StudentTOutput,
)
from gluonts.torch.model.forecast import DistributionForecast
from hypothesis import given, settings
from hypothesis import strategies as st
from moecast.distributions import GaussianCopulaOutput, ParameterHead
from moecast.forecasters import Calibration
from moecast.forecasters.forecast import BatchDistribution, BatchedDistributionForecast
from scipy import stats
from torch import Tensor

HEADS = [StudentTOutput, NormalOutput, LaplaceOutput, NegativeBinomialOutput]
START = pd.Period("2024-01-01", freq="h")
WIDENED = Calibration([0.2, 0.5, 0.8], [0.4, 0.8, 0.95])


def batch_of(
    head: DistributionOutput,
    channels: Optional[int] = None,
    calibration: Optional[Calibration] = None,
    series: int = 3,
    horizon: int = 5,
    seed: int = 0,
) -> BatchDistribution:
    """Random parameters ``[series, horizon]`` or ``[series, horizon, channel]``."""
    generator = torch.Generator().manual_seed(seed)
    groups = () if channels is None else (channels,)
    parameters = ParameterHead(head)
    raw = torch.randn(series, horizon, *groups, parameters.in_features, generator=generator)
    loc = torch.randn(series, 1, *groups, generator=generator)
    scale = torch.rand(series, 1, *groups, generator=generator) + 0.5
    return BatchDistribution(head, parameters(raw), loc, scale, calibration)


def gluonts_forecast(batch: BatchDistribution, index: int) -> DistributionForecast:
    arguments = tuple(argument[index].clone() for argument in batch.distr_args)
    distribution = batch.distr_output.distribution(
        arguments, loc=batch.loc[index], scale=batch.scale[index]
    )
    return DistributionForecast(distribution, START)


@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("head", HEADS)
def test_forecasts_equal_gluonts_distribution_forecast(
    head: type[DistributionOutput], channels: Optional[int]
) -> None:
    batch = batch_of(head(), channels)
    for index in range(3):
        ours = BatchedDistributionForecast(batch, index, START, "a", {"b": 1})
        theirs = gluonts_forecast(batch, index)
        # Twice, because some heads change their parameters in place.
        for _ in range(2):
            for level in (0.025, 0.1, 0.5, 0.9, 0.975):
                quantile = ours.quantile(level)
                assert quantile.shape == ((5,) if channels is None else (5, channels))
                np.testing.assert_allclose(quantile, theirs.quantile(level), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(ours.quantile("p90"), ours.quantile(0.9))
        np.testing.assert_array_equal(ours.median, ours.quantile(0.5))
        assert tuple(ours.shape) == tuple(theirs.shape)
        assert ours.prediction_length == theirs.prediction_length == 5
        assert ours.index.equals(pd.period_range(START, periods=5, freq="h"))
        if channels is None:
            expected = pd.Series(ours.quantile(0.9), index=theirs.index)
            pd.testing.assert_series_equal(ours.quantile_ts(0.9), expected)
        assert (ours.item_id, ours.info) == ("a", {"b": 1})
        value = torch.tensor([3.0]).expand(theirs.shape)
        torch.testing.assert_close(ours.distribution.cdf(value), theirs.distribution.cdf(value))


@pytest.mark.parametrize("head", [*HEADS, PoissonOutput])
@settings(deadline=None, max_examples=10)
@given(levels=st.lists(st.floats(0.001, 0.999), min_size=2, max_size=6), calibrated=st.booleans())
def test_quantiles_are_in_order(
    head: type[DistributionOutput], levels: list[float], calibrated: bool
) -> None:
    calibrated = calibrated and head is not PoissonOutput
    batch = batch_of(head(), calibration=WIDENED if calibrated else None)
    forecast = BatchedDistributionForecast(batch, 1, START)
    quantiles = np.stack([forecast.quantile(level) for level in sorted(levels)])
    assert np.isfinite(quantiles).all()
    assert (np.diff(quantiles, axis=0) >= 0).all()


@pytest.mark.parametrize("channels", [None, 2])
def test_pickling_a_forecast_takes_its_own_series_only(channels: Optional[int]) -> None:
    small = batch_of(StudentTOutput(), channels, WIDENED, series=2)
    large = batch_of(StudentTOutput(), channels, WIDENED, series=500)
    # What was asked before is not taken along, either.
    large.quantile(0.3)
    sizes = [
        len(pickle.dumps(BatchedDistributionForecast(batch, 1, START))) for batch in (small, large)
    ]
    assert sizes[0] == pytest.approx(sizes[1], abs=64)
    forecast = BatchedDistributionForecast(large, 123, START, "a", {"b": 1})
    copy = pickle.loads(pickle.dumps(forecast))
    for level in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(copy.quantile(level), forecast.quantile(level), rtol=1e-6)
    np.testing.assert_allclose(copy.mean, forecast.mean, rtol=1e-6)
    assert (copy.start_date, copy.item_id, copy.info) == (START, "a", {"b": 1})
    again = pickle.loads(pickle.dumps(copy))
    np.testing.assert_array_equal(again.quantile(0.9), copy.quantile(0.9))


def test_calibration_changes_levels_and_nothing_else() -> None:
    plain, calibrated = (batch_of(NormalOutput(), calibration=c) for c in (None, WIDENED))
    ours = BatchedDistributionForecast(calibrated, 0, START)
    theirs = BatchedDistributionForecast(plain, 0, START)
    np.testing.assert_array_equal(ours.quantile(0.5), theirs.quantile(0.5))
    np.testing.assert_array_equal(ours.mean, theirs.mean)
    # Nominal coverage 0.8 is the model's 0.95.
    np.testing.assert_allclose(ours.quantile(0.9), theirs.quantile(0.975), rtol=1e-6)
    np.testing.assert_allclose(ours.quantile(0.1), theirs.quantile(0.025), rtol=1e-6)


def test_samples_are_calibrated_too() -> None:
    torch.manual_seed(0)
    batch = batch_of(NormalOutput(), calibration=WIDENED)
    forecast = BatchedDistributionForecast(batch, 2, START, "a", {"b": 1})
    samples = forecast.to_sample_forecast(20000)
    assert samples.samples.shape == (20000, 5)
    for level in (0.1, 0.25, 0.5, 0.75, 0.9):
        below = (samples.samples <= forecast.quantile(level)).mean(axis=0)
        np.testing.assert_allclose(below, level, atol=0.015)
    assert (samples.start_date, samples.item_id, samples.info) == (START, "a", {"b": 1})


@pytest.mark.parametrize("draw", [0.0, 2.0**-24, 1 - 2.0**-24])
def test_calibrated_samples_are_finite_whatever_is_drawn(
    draw: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``torch.rand`` gives multiples of 2^-24 in [0, 1); among millions of samples, all of them."""
    batch = batch_of(NormalOutput(), calibration=Calibration([0.975], [0.998]))
    forecast = BatchedDistributionForecast(batch, 0, START)
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.full(tuple(shape[0]), draw))
    assert np.isfinite(forecast.to_sample_forecast(2).samples).all()


@pytest.mark.parametrize("channels", [None, 2])
def test_heads_without_an_inverse_cdf_give_the_quantiles_of_samples(
    channels: Optional[int],
) -> None:
    torch.manual_seed(0)
    batch = batch_of(PoissonOutput(), channels)
    batch.distr_args = tuple(20 * argument + 5 for argument in batch.distr_args)
    rate = batch.distr_args[0] * batch.scale
    for level in (0.1, 0.5, 0.9):
        quantiles = batch.quantile(level)
        assert quantiles.shape == rate.shape
        expected = stats.poisson.ppf(level, rate.numpy())
        np.testing.assert_allclose(quantiles, expected, atol=3.0)
        assert np.array_equal(batch.quantile(level), quantiles)


def test_continuous_heads_without_an_inverse_cdf_do_so_too() -> None:
    torch.manual_seed(0)
    batch = batch_of(GammaOutput())
    concentration, rate = (argument.numpy() for argument in batch.distr_args)
    standard = stats.gamma.ppf(0.5, concentration, scale=1 / rate)
    expected = batch.loc.numpy() + batch.scale.numpy() * standard
    np.testing.assert_allclose(batch.quantile(0.5), expected, rtol=0.1, atol=0.2)


def test_heads_that_draw_one_sample_at_a_time_mix_no_series() -> None:
    """Of implicit quantiles, one forward pass gives one sample whatever number is asked for."""
    torch.manual_seed(0)
    head = ImplicitQuantileNetworkOutput()

    def of(values: Tensor) -> BatchDistribution:
        taus = torch.full_like(values, 0.5)
        return BatchDistribution(head, (values, taus), torch.zeros(3, 1), torch.ones(3, 1))

    values = torch.arange(15.0).reshape(3, 5)
    try:
        quantile = of(values).quantile(0.5)
    except (NotImplementedError, ValueError):
        return
    assert quantile.shape == (3, 5)
    np.testing.assert_allclose(quantile, values)


def test_a_selected_series_shares_no_memory_with_its_batch() -> None:
    batch = batch_of(NormalOutput())
    alone = batch.select(1)
    expected = batch.quantile(0.3)[1].copy()
    for tensor in (*batch.distr_args, batch.loc, batch.scale):
        tensor.fill_(99.0)
    np.testing.assert_allclose(alone.quantile(0.3)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("calibration", [None, Calibration([0.5], [0.9])])
def test_samples_of_a_copula_are_joint_paths(calibration: Optional[Calibration]) -> None:
    torch.manual_seed(0)
    head = GaussianCopulaOutput("normal", rank=1)
    factors = torch.full((1, 5, 1), 10.0)
    arguments = (factors, torch.zeros(1, 5), torch.ones(1, 5))
    loc, scale = torch.full((1, 1), 3.0), torch.full((1, 1), 2.0)
    batch = BatchDistribution(head, arguments, loc, scale, calibration)
    forecast = BatchedDistributionForecast(batch, 0, START)
    samples = forecast.to_sample_forecast(2000).samples
    assert np.corrcoef(samples.T).min() > 0.95
    for level in (0.25, 0.5, 0.75):
        below = (samples <= forecast.quantile(level)).mean(axis=0)
        np.testing.assert_allclose(below, level, atol=0.05)


@pytest.mark.parametrize("level", [0, 1, -0.1, 1.5])
def test_levels_outside_0_and_1_are_refused(level: float) -> None:
    head = NormalOutput()
    arguments = torch.zeros(1, 2), torch.ones(1, 2)
    batch = BatchDistribution(head, arguments, torch.zeros(1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match=f"level={level} of a quantile must lie between 0 and 1"):
        BatchedDistributionForecast(batch, 0, START).quantile(level)
