from __future__ import annotations

import math
from typing import Any, Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from gluonts.core import serde
from gluonts.core.component import equals
from gluonts.model.predictor import Predictor
from gluonts.torch.distributions import (
    NegativeBinomialOutput,
    NormalOutput,
    PoissonOutput,
    StudentTOutput,
)
from gluonts.torch.model.forecast import DistributionForecast
from hypothesis import given, settings
from hypothesis import strategies as st
from moecast.forecasters import Calibration
from moecast.forecasters.calibration import calibrate, held_out_windows, transform_label
from moecast.forecasters.fields import WindowConfig
from scipy import stats

LEVELS = np.linspace(0.005, 0.995, 199)


def test_a_model_that_is_right_stays_as_it_is() -> None:
    transforms = np.random.default_rng(0).random(20000)
    calibration = Calibration.fit(transforms)
    np.testing.assert_allclose(calibration.of(LEVELS), LEVELS, atol=0.01)


@pytest.mark.parametrize("spread", [0.7, 2.0])
def test_calibrated_quantiles_cover_what_they_say(spread: float) -> None:
    """A model whose deviation is 0.7 or 2 times the truth's."""
    generator = np.random.default_rng(0)
    calibration = Calibration.fit(stats.norm.cdf(generator.normal(size=20000), scale=spread))
    fresh = generator.normal(size=20000)
    for level in (0.025, 0.1, 0.3, 0.5, 0.7, 0.9, 0.975):
        uncalibrated = stats.norm.ppf(level, scale=spread)
        calibrated = stats.norm.ppf(calibration(level), scale=spread)
        assert (fresh <= calibrated).mean() == pytest.approx(level, abs=0.012)
        if level != 0.5:
            widened = abs(calibrated) > abs(uncalibrated)
            assert widened == (spread < 1)


@pytest.mark.parametrize("count", [1, 5, 50, 173])
def test_knots_are_the_order_statistics_of_split_conformal_prediction(count: int) -> None:
    """The interval of coverage c reaches to the ceil((n + 1) c)-th smallest score.

    That is the smallest that covers a further value with probability c (Vovk et al. 2005).
    """
    transforms = np.random.default_rng(count).random(count)
    calibration = Calibration.fit(transforms)
    scores = sorted(abs(2 * transforms - 1))
    for nominal, model in zip(calibration.nominal, calibration.model):
        rank = math.ceil((count + 1) * nominal - 1e-9)
        expected = scores[rank - 1] if rank <= count else scores[-1]
        assert model == pytest.approx(min(expected, 0.998))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(1, 50))
def test_levels_stay_in_order_and_the_median_in_its_place(
    transforms: list[float], num_knots: int
) -> None:
    calibration = Calibration.fit(np.array(transforms), num_knots)
    levels = calibration.of(LEVELS)
    assert (np.diff(levels) >= 0).all()
    assert ((levels > 0) & (levels < 1)).all()
    np.testing.assert_allclose(levels + levels[::-1], 1.0, atol=1e-12)
    assert calibration(0.5) == 0.5
    assert len(calibration.nominal) == num_knots
    assert calibration.of(LEVELS.reshape(1, -1)).shape == (1, 199)


def test_gluonts_serialisation_keeps_a_calibration() -> None:
    calibration = Calibration.fit(np.random.default_rng(0).random(50) ** 2)
    copy = serde.load_json(serde.dump_json(calibration))
    assert isinstance(copy, Calibration)
    assert copy == calibration
    assert equals(copy, calibration)
    np.testing.assert_array_equal(copy.of(LEVELS), calibration.of(LEVELS))
    assert copy != Calibration.fit(np.random.default_rng(1).random(50))
    assert copy != "a calibration"


def test_the_transform_is_the_cdf_at_the_observed_values() -> None:
    loc, scale = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    distribution = NormalOutput().distribution(
        (torch.zeros(3), torch.ones(3)), loc=loc, scale=scale
    )
    transform = transform_label(distribution, np.array([0.5, np.nan, -4.0]))
    expected = stats.norm.cdf([0.5, -4.0], loc=[0.0, 2.0], scale=[1.0, 3.0])
    np.testing.assert_allclose(transform, expected, rtol=1e-5)


@pytest.mark.parametrize("head", ["poisson", "negative_binomial"])
def test_counts_from_the_right_distribution_transform_uniformly(head: str) -> None:
    torch.manual_seed(0)
    if head == "poisson":
        distribution = PoissonWithCdf(torch.full((20000,), 1.3))
    else:
        arguments = torch.full((20000,), 2.0), torch.full((20000,), -0.5)
        distribution = NegativeBinomialOutput().distribution(arguments)
    label = distribution.sample().numpy()
    assert (label == 0).mean() > 0.2
    transform = transform_label(distribution, label)
    assert ((transform >= 0) & (transform <= 1)).all()
    assert stats.kstest(transform, "uniform").pvalue > 0.01
    # Each value stays within its own jump.
    cdf = distribution.cdf(torch.from_numpy(label)).numpy()
    assert (transform <= cdf + 1e-6).all()
    below = distribution.cdf((torch.from_numpy(label) - 1).clamp_min(0)).numpy()
    assert (transform >= np.where(label > 0, below, 0) - 1e-6).all()


class PoissonWithCdf(torch.distributions.Poisson):
    def cdf(self, value: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(stats.poisson.cdf(value.numpy(), self.rate.numpy()))


class FixedForecasts(Predictor):
    """A normal of fixed spread about the last value of the target."""

    def __init__(self, prediction_length: int, spread: float, channels: int) -> None:
        super().__init__(prediction_length)
        self.spread = spread
        self.channels = channels

    def predict(self, dataset: Any, **kwargs: Any) -> Iterator[DistributionForecast]:
        for entry in dataset:
            last = torch.from_numpy(np.atleast_2d(entry["target"])[:, -1])
            shape = (self.prediction_length,) if self.channels == 1 else (self.prediction_length, 2)
            loc = last.expand(shape)
            distribution = NormalOutput().distribution(
                (torch.zeros(shape), torch.ones(shape)),
                loc=loc,
                scale=torch.tensor(self.spread),
            )
            yield DistributionForecast(distribution, entry["start"] + entry["target"].shape[-1])


@pytest.mark.parametrize("channels", [1, 2])
def test_calibrating_reads_the_forecasts_own_errors(channels: int) -> None:
    config = WindowConfig("h", 1, 2, target_dim=channels)
    generator = np.random.default_rng(0)
    walk = np.cumsum(generator.normal(size=(channels, 600)), axis=1)
    walk[:, ::50] = np.nan
    target = walk[0] if channels == 1 else walk
    dataset = [{"start": pd.Period("2024", freq="h"), "target": target}] * 2
    held_out = [
        (entry, label)
        for entry, label in held_out_windows(dataset, config, 500)
        if np.isfinite(np.atleast_2d(entry["target"])[:, -1]).all()
    ]
    calibration = calibrate(FixedForecasts(1, 1.0, channels), held_out)
    np.testing.assert_allclose(calibration.of(LEVELS), LEVELS, atol=0.03)
    narrow = calibrate(FixedForecasts(1, 0.5, channels), held_out)
    expected = stats.norm.cdf(2 * stats.norm.ppf([0.1, 0.3, 0.7, 0.9]))
    np.testing.assert_allclose(narrow.of(np.array([0.1, 0.3, 0.7, 0.9])), expected, atol=0.03)


def test_student_ts_tails_survive_single_precision() -> None:
    distribution = StudentTOutput().distribution(
        (torch.full((4,), 3.0), torch.zeros(4), torch.ones(4))
    )
    transform = transform_label(distribution, np.array([-3e3, -1.0, 1.0, 3e3]))
    expected = stats.t.cdf([-3e3, -1.0, 1.0, 3e3], df=3)
    np.testing.assert_allclose(transform, expected, atol=1e-6)
    assert PoissonOutput().distribution((torch.ones(2),)).support.is_discrete
