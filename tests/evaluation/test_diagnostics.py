from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any, Iterable, Iterator

import numpy as np
import pandas as pd
import pytest
from gluonts.dataset.util import forecast_start
from gluonts.ev.metrics import MSE
from gluonts.model import Forecast, Predictor
from gluonts.model.forecast import QuantileForecast
from gluonts.model.seasonal_naive import SeasonalNaivePredictor
from known_forecasters import LEVELS, BandPredictor
from moecast.evaluation import (
    CRPS,
    BacktestResult,
    Diagnostics,
    EvaluationError,
    backtest,
    relative_score,
)
from moecast.evaluation.comparison import (
    effective_experts,
    example_windows,
    explained_share,
    find_baseline,
)
from moecast.evaluation.diagnostics import FAN_LEVELS, INTERVALS
from scipy import stats

CRPS_NAME = CRPS(axis=None).name


class NormalPredictor(Predictor):
    """Forecasts a normal distribution; wider or narrower than the truth by a factor."""

    def __init__(self, prediction_length: int, width: float = 1.0) -> None:
        super().__init__(prediction_length)
        self.width = width

    def predict(self, dataset: Iterable[dict], **kwargs: object) -> Iterator[Forecast]:
        values = stats.norm.ppf(LEVELS, scale=self.width)
        for entry in dataset:
            yield QuantileForecast(
                forecast_arrays=np.repeat([*values, 0.0], self.prediction_length).reshape(
                    -1, self.prediction_length
                ),
                forecast_keys=[*map(str, LEVELS), "mean"],
                start_date=forecast_start(entry),
            )


def noise(series: int, length: int, seed: int = 0) -> list[dict]:
    values = np.random.default_rng(seed).normal(size=(series, length)).astype(np.float32)
    start = pd.Period("2024-01-01", freq="h")
    return [{"item_id": f"s{i}", "start": start, "target": v} for i, v in enumerate(values)]


def diagnosed(predictor: Any, dataset: list[dict], **settings: Any) -> BacktestResult:
    result = backtest(predictor, dataset, prediction_length=predictor.prediction_length, **settings)
    assert result.diagnostics is not None
    return result


def diagnostics_of(predictor: Any, dataset: list[dict], **settings: Any) -> Diagnostics:
    found = diagnosed(predictor, dataset, **settings).diagnostics
    assert found is not None
    return found


@pytest.mark.parametrize("missing", [0, 3])
def test_windows_add_up_to_the_metrics(hourly: list[dict], missing: int) -> None:
    if missing:
        hourly[0]["target"][-missing:] = np.nan
        hourly[1]["target"][50] = np.nan
    result = diagnosed(SeasonalNaivePredictor(12, 24), hourly, windows=3, distance=5)
    found = result.diagnostics
    assert found is not None
    crps = found.quantile_loss.sum() / found.absolute_label.sum()
    assert crps == pytest.approx(result.metrics[CRPS_NAME])
    mase = found.scaled_error.sum() / found.scaled.sum()
    assert mase == pytest.approx(result.metrics["MASE[0.5]"])
    assert found.coverage[INTERVALS.index(0.8)] == pytest.approx(result.metrics["coverage[0.8]"])
    assert found.series.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.item_ids == ("series 0", "series 1")
    assert found.pit.sum() == pytest.approx(found.observed.sum())
    if not missing:
        assert found.step_crps.mean() == pytest.approx(crps)
    assert found.step_loss.sum() == pytest.approx(found.quantile_loss.sum())


def test_channels_add_up_to_the_metrics(multivariate: list[dict]) -> None:
    result = diagnosed(BandPredictor(6, level=5.0, width=3.0), multivariate, windows=2)
    found = result.diagnostics
    assert found is not None
    crps = found.quantile_loss.sum() / found.absolute_label.sum()
    assert crps == pytest.approx(result.metrics[CRPS_NAME], rel=1e-6)
    mase = found.scaled_error.sum() / found.scaled.sum()
    assert mase == pytest.approx(result.metrics["MASE[0.5]"], rel=1e-5)
    assert found.fans.shape == (2, len(FAN_LEVELS), 6, 3)


def test_series_without_variation_have_no_scaled_error(hourly: list[dict]) -> None:
    hourly[1]["target"][:] = 3
    with pytest.warns(UserWarning, match="constant"):
        found = diagnostics_of(BandPredictor(6), hourly, windows=1)
    assert found.scaled.tolist() == [6, 0]


def test_the_pit_of_a_calibrated_forecaster_is_uniform_and_others_are_not() -> None:
    dataset = noise(20, 340)
    found = diagnostics_of(NormalPredictor(50), dataset, windows=6)
    assert found.pit.sum() == 20 * 300
    assert stats.chisquare(found.pit).pvalue > 0.01
    # Within 4 standard errors of the nominal level.
    error = np.sqrt(np.array(INTERVALS) * (1 - np.array(INTERVALS)) / found.pit.sum())
    assert (np.abs(found.coverage - INTERVALS) < 4 * error).all()
    narrow = diagnostics_of(NormalPredictor(50, width=0.5), dataset, windows=6)
    assert narrow.pit[[0, -1]].min() > 1.5 * narrow.pit[4:6].max()
    wide = diagnostics_of(NormalPredictor(50, width=2.0), dataset, windows=6)
    assert wide.pit[[0, -1]].max() < 0.5 * wide.pit[4:6].min()


def test_a_label_that_equals_several_deciles_belongs_to_the_bins_around_them(
    hourly: list[dict],
) -> None:
    for entry in hourly:
        entry["target"][:] = 7
    with pytest.warns(UserWarning, match="constant"):
        found = diagnostics_of(BandPredictor(6, level=7.0, width=0.0), hourly, windows=1)
    np.testing.assert_allclose(found.pit, np.full(10, 12 / 10))
    np.testing.assert_array_equal(found.coverage, 1.0)


def test_fans_are_the_forecasts(hourly: list[dict]) -> None:
    result = diagnosed(BandPredictor(6, level=2.0), hourly, windows=2, keep_forecasts=True)
    assert result.diagnostics is not None
    assert result.forecasts is not None
    assert result.diagnostics.drawable.tolist() == [0, 1, 2, 3]
    for fan, forecast in zip(result.diagnostics.fans, result.forecasts):
        expected = np.stack([forecast.quantile(level) for level in FAN_LEVELS])
        np.testing.assert_allclose(fan, expected, rtol=1e-6)


def test_of_many_windows_a_few_fans_are_kept(
    hourly: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecast.evaluation.diagnostics._MAX_FAN_BYTES", 3 * 7 * 6 * 4)
    found = diagnostics_of(BandPredictor(6), hourly, windows=4)
    assert found.drawable.tolist() == [0, 4, 7]
    assert found.fans.shape == (3, 7, 6)
    assert set(example_windows(found).values()) <= {0, 4, 7}


def test_point_forecasts_have_no_diagnostics(hourly: list[dict]) -> None:
    class PointPredictor(Predictor):
        def predict(self, dataset: Iterable[dict], **kwargs: object) -> Iterator[Forecast]:
            for entry in dataset:
                yield QuantileForecast(
                    np.zeros((1, self.prediction_length)), forecast_start(entry), ["mean"]
                )

    result = backtest(
        PointPredictor(6), hourly, prediction_length=6, windows=1, metrics=[MSE("mean")]
    )
    assert result.diagnostics is None
    off = backtest(BandPredictor(6), hourly, prediction_length=6, windows=1, diagnose=False)
    assert off.diagnostics is None


class Routed(BandPredictor):
    """Tells of each window that expert 0 has the share `hour / 24`."""

    reports_routing = False

    def predict(self, dataset: Iterable[dict], **kwargs: object) -> Iterator[Forecast]:
        for forecast in super().predict(dataset):
            if self.reports_routing:
                share = forecast.start_date.hour / 24
                weights = {"router": np.array([share, 1 - share])}
                forecast.info = {"expert_weights": weights, "patch_size": 4}
            yield forecast
        self.expert_usage = SimpleNamespace(weight_share={"router": np.array([0.25, 0.75])})


def test_routing_is_asked_for_only_while_backtesting(hourly: list[dict]) -> None:
    predictor = Routed(6)
    found = diagnostics_of(predictor, hourly, windows=3)
    assert predictor.reports_routing is False
    hours = [start.hour for start in found.starts]
    np.testing.assert_allclose(found.expert_weights["router"][:, 0], np.array(hours) / 24)
    assert found.patch_sizes is not None
    assert found.patch_sizes.tolist() == [4] * 6
    np.testing.assert_array_equal(found.expert_share["router"], [0.25, 0.75])


def test_a_ratio_is_that_of_the_metrics_and_its_interval_a_bootstrap() -> None:
    dataset = noise(30, 100, seed=3)
    ours = diagnosed(NormalPredictor(10, width=1.6), dataset, windows=2)
    base = diagnosed(BandPredictor(10, width=1.0), dataset, windows=2)
    assert ours.diagnostics is not None
    assert base.diagnostics is not None
    score = relative_score(ours.diagnostics, base.diagnostics, draws=4000, seed=1)
    assert score.value == pytest.approx(ours.metrics[CRPS_NAME] / base.metrics[CRPS_NAME])
    assert (score.resampled, score.count) == ("series", 30)

    # Independently: series drawn by index with other random numbers, losses looked up one by one.
    generator = np.random.default_rng(99)
    loss_of = [[d.quantile_loss[d.series == i].sum() for i in range(30)] for d in
               (ours.diagnostics, base.diagnostics)]  # fmt: skip
    ratios = []
    for _ in range(4000):
        drawn = Counter(generator.integers(0, 30, size=30).tolist())
        top, bottom = (sum(loss[i] * n for i, n in drawn.items()) for loss in loss_of)
        ratios.append(top / bottom)
    expected = np.quantile(ratios, [0.025, 0.975])
    width = expected[1] - expected[0]
    np.testing.assert_allclose([score.lower, score.upper], expected, atol=0.1 * width)
    assert relative_score(ours.diagnostics, base.diagnostics, draws=4000, seed=1) == score


def test_the_order_of_series_leaves_scores_and_intervals_unchanged() -> None:
    dataset = noise(12, 100)
    scores = []
    for order in (range(12), np.random.default_rng(5).permutation(12)):
        entries = [dataset[i] for i in order]
        ours, base = (
            diagnostics_of(p, entries, windows=2)
            for p in (NormalPredictor(10), SeasonalNaivePredictor(10, 24))
        )
        scores.append([relative_score(ours, base, name) for name in ("CRPS", "MASE")])
    for one, other in zip(*scores):
        assert (one.value, one.lower, one.upper) == pytest.approx(
            (other.value, other.lower, other.upper), rel=1e-9
        )


def test_a_single_series_has_its_windows_drawn() -> None:
    dataset = noise(1, 200)
    ours = diagnostics_of(NormalPredictor(10), dataset, windows=8)
    score = relative_score(ours, diagnostics_of(BandPredictor(10), dataset, windows=8))
    assert (score.resampled, score.count) == ("windows", 8)
    assert score.lower < score.value < score.upper
    assert set(example_windows(ours)) == {"best", "median", "worst"}


def test_a_forecaster_compared_with_itself_has_ratio_1() -> None:
    own = diagnostics_of(NormalPredictor(10), noise(5, 60), windows=1)
    score = relative_score(own, own)
    assert (score.value, score.lower, score.upper) == pytest.approx((1, 1, 1))


def test_different_windows_are_not_compared() -> None:
    dataset = noise(2, 100)
    one, other = (diagnostics_of(NormalPredictor(10), dataset, windows=n) for n in (1, 2))
    with pytest.raises(EvaluationError, match="different windows"):
        relative_score(one, other)


def test_best_and_worst_series_are_those_of_least_and_most_scaled_loss() -> None:
    dataset = noise(5, 100)
    # The forecasts suit a deviation of 1; the season's error follows the series' own deviation.
    for number, entry in enumerate(dataset):
        entry["target"][-10:] += (3, 0, 6, 1, 9)[number]
    found = diagnostics_of(NormalPredictor(10), dataset, windows=1)
    assert example_windows(found) == {"best": 1, "median": 0, "worst": 4}


def test_the_baseline_is_seasonal_naive_unless_another_is_named(hourly: list[dict]) -> None:
    results = [
        diagnosed(BandPredictor(6), hourly, windows=1, model="a"),
        diagnosed(SeasonalNaivePredictor(6, 24), hourly, windows=1, model="Seasonal Naive"),
    ]
    assert find_baseline(results, None).model == "Seasonal Naive"
    assert find_baseline(results, "a").model == "a"
    assert find_baseline(results[:1], None).model == "a"
    with pytest.raises(EvaluationError, match=r"baseline='b' was not evaluated on dataset.*a, Se"):
        find_baseline(results, "b")


def test_what_a_grouping_explains() -> None:
    groups = np.repeat(np.arange(4), 50)
    weights = np.eye(4)[groups]
    assert explained_share(weights, groups) == pytest.approx(1.0)
    generator = np.random.default_rng(0)
    assert explained_share(weights, generator.permutation(groups)) < 0.05
    mixed = weights + generator.normal(size=weights.shape)
    # By hand: the between-group variance of each column of an identity is 3/16, the noise's 1.
    assert explained_share(mixed, groups) == pytest.approx(3 / 16 / (1 + 3 / 16), abs=0.06)
    assert math.isnan(explained_share(weights, np.zeros(200)))
    assert math.isnan(explained_share(weights, np.arange(200)))
    assert math.isnan(explained_share(np.ones((200, 2)), groups))


@pytest.mark.parametrize(("share", "expected"), [([0.25] * 4, 4), ([1, 0], 1), ([0.5, 0.5, 0], 2)])
def test_effective_experts(share: list[float], expected: float) -> None:
    assert effective_experts(np.array(share)) == pytest.approx(expected)
