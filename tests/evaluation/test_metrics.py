from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from gluonts.dataset.split import split
from gluonts.ev import metrics as ev
from gluonts.model import evaluate_model
from hypothesis import given, settings
from hypothesis import strategies as st
from known_forecasters import BandPredictor
from moecast.evaluation import (
    CRPS,
    DECILES,
    GIFT_EVAL_METRICS,
    MASE,
    MSIS,
    EvaluationError,
    IntervalCoverage,
    LongHorizonMetrics,
    UnscaledSeriesWarning,
    long_horizon_metrics,
)
from moecast.evaluation.metrics import metric_score

HORIZON = 4


def evaluate(targets: list[np.ndarray], metrics: list, axis: int | None = None) -> pd.DataFrame:
    """Score the band of width 2 around 0 on the last four steps of each target."""
    start = pd.Period("2024-01-01", freq="D")
    entries = [{"start": start, "target": np.float32(target)} for target in targets]
    _, template = split(entries, offset=-HORIZON)
    return evaluate_model(
        BandPredictor(HORIZON, width=2.0),
        test_data=template.generate_instances(HORIZON),
        metrics=metrics,
        axis=axis,
        seasonality=1,
        batch_size=2,
    )


VARIED = np.array([0, 2, 1, 5, 1, -1, 3, 0.5])
CONSTANT = np.array([7, 7, 7, 7, 8, 9, 8, 9])


def test_scaled_metrics_by_hand() -> None:
    row = evaluate([VARIED], [MASE(), MSIS()]).iloc[0]
    seasonal_error = np.mean([2, 1, 4])
    assert row["MASE[0.5]"] == pytest.approx(np.mean([1, 1, 3, 0.5]) / seasonal_error)
    outside = 2 / 0.05 * np.array([0.05, 0.05, 2.05, 0])
    assert row["MSIS"] == pytest.approx(np.mean(1.9 + outside) / seasonal_error, rel=1e-5)


def test_scaled_metrics_equal_gluonts_where_every_series_varies() -> None:
    targets = [VARIED, VARIED[::-1], VARIED * 3]
    ours = evaluate(targets, [MASE(), MSIS()])
    pd.testing.assert_frame_equal(ours, evaluate(targets, [ev.MASE(), ev.MSIS()]))


def test_a_constant_series_is_left_out_with_one_warning() -> None:
    alone = evaluate([VARIED, VARIED], [MASE(), MSIS()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UnscaledSeriesWarning)
        together = evaluate([VARIED, CONSTANT, VARIED], [MASE(), MSIS()])
    pd.testing.assert_frame_equal(together, alone)
    assert [str(warning.message)[:21] for warning in caught] == ["1 of 3 series windows"]


def test_a_constant_series_is_nan_among_per_series_values() -> None:
    with pytest.warns(UnscaledSeriesWarning):
        rows = evaluate([VARIED, CONSTANT], [MASE(), MSIS()], axis=1)
    assert np.isfinite(rows.iloc[0]).all()
    assert rows.iloc[1].isna().all()


def test_only_constant_series_give_nan_rather_than_infinity() -> None:
    with pytest.warns(UnscaledSeriesWarning, match="2 of 2"):
        row = evaluate([CONSTANT, CONSTANT], [MASE(), MSIS()]).iloc[0]
    assert row.isna().all()


def test_a_history_not_longer_than_a_season_is_left_out() -> None:
    with pytest.warns(UnscaledSeriesWarning, match="1 of 2"):
        row = evaluate([VARIED, VARIED[-5:]], [MASE()]).iloc[0]
    alone = evaluate([VARIED], [MASE()]).iloc[0]
    assert row["MASE[0.5]"] == pytest.approx(alone["MASE[0.5]"])


def test_unmasked_labels_do_not_bring_infinity_back() -> None:
    data = {
        "label": np.array([[1.0, 2.0], [1.0, 2.0]]),
        "0.5": np.zeros((2, 2)),
        "seasonal_error": np.array([[0.0], [0.5]]),
    }
    with pytest.warns(UnscaledSeriesWarning):
        assert MASE()(axis=None).update(data).get() == 3.0
    with np.errstate(divide="ignore"):
        assert np.isinf(ev.MASE()(axis=None).update(data).get())


@given(
    st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.sampled_from([0.5, 0.8, 0.95]),
)
@settings(max_examples=25, deadline=None)
def test_coverage_is_the_share_of_observed_labels_inside(
    labels: list[float], missing: list[bool], level: float
) -> None:
    observed = np.where(missing, np.nan, labels)
    row = evaluate([np.r_[VARIED, observed]], [IntervalCoverage(level)]).iloc[0]
    inside = np.abs(np.float32(observed[~np.isnan(observed)])) <= level
    # Quantiles between the ones forecast are interpolated, hence not exact at the ends.
    near = np.isclose(np.abs(np.float32(labels)), level, atol=1e-6).any()
    if not near:
        expected = inside.mean() if len(inside) else np.nan
        np.testing.assert_allclose(row[f"coverage[{level}]"], expected)


def test_coverage_level_is_checked() -> None:
    with pytest.raises(EvaluationError, match="level=80"):
        IntervalCoverage(80)


def test_crps_by_hand() -> None:
    label = VARIED[HORIZON:]
    losses = [
        np.sum(2 * np.abs((label - (2 * q - 1)) * ((2 * q - 1 >= label) - q))) for q in DECILES
    ]
    row = evaluate([VARIED], [CRPS]).iloc[0]
    expected = np.mean(losses) / np.abs(label).sum()
    assert row["mean_weighted_sum_quantile_loss"] == pytest.approx(expected)


def test_gift_eval_has_its_eleven_names() -> None:
    assert [metric(axis=None).name for metric in GIFT_EVAL_METRICS] == [
        "MSE[mean]",
        "MSE[0.5]",
        "MAE[0.5]",
        "MASE[0.5]",
        "MAPE[0.5]",
        "sMAPE[0.5]",
        "MSIS",
        "RMSE[mean]",
        "NRMSE[mean]",
        "ND[0.5]",
        "mean_weighted_sum_quantile_loss",
    ]


def reference_metrics(forecast: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """The definitions, written out over whole arrays; NaN labels are left out."""
    error = forecast - label
    valid = ~np.isnan(label)
    relative = (error / np.where(label == 0, np.nan, label))[valid]
    correlations = []
    for step, channel in np.ndindex(label.shape[1:]):
        keep = valid[:, step, channel]
        pair = np.stack([label[keep, step, channel], forecast[keep, step, channel]])
        if keep.sum() > 1 and (pair.std(axis=1) > 1e-9).all():
            correlations.append(np.corrcoef(pair)[0, 1])
    squared = np.nansum(error**2)
    return {
        "MAE": np.nanmean(np.abs(error)),
        "MSE": np.nanmean(error**2),
        "RMSE": np.sqrt(np.nanmean(error**2)),
        "MAPE": np.nanmean(np.abs(relative)),
        "MSPE": np.nanmean(relative**2),
        "CORR": np.mean(correlations),
        "RSE": np.sqrt(squared / np.nansum((label - np.nanmean(label)) ** 2)),
    }


@given(st.integers(0, 10**6), st.floats(-1e4, 1e4), st.booleans())
@settings(max_examples=30, deadline=None)
def test_long_horizon_metrics_equal_their_definitions(
    seed: int, offset: float, with_gaps: bool
) -> None:
    generator = np.random.default_rng(seed)
    label = generator.normal(size=(9, 3, 2)) + offset
    forecast = label + generator.normal(size=label.shape)
    if with_gaps:
        label[generator.random(label.shape) < 0.2] = np.nan
        label[0, 0, 0] = 0.0
    expected = reference_metrics(forecast, label)
    found = long_horizon_metrics(forecast, label)
    assert found == pytest.approx(expected, rel=1e-6)


def test_batches_and_channels_in_any_order_give_the_same_metrics() -> None:
    generator = np.random.default_rng(3)
    label, forecast = generator.normal(100, 1, size=(2, 10, 4, 3))
    streamed = LongHorizonMetrics(4, 3)
    for channel in (2, 0, 1):
        for rows in (slice(6, 10), slice(0, 1), slice(1, 6)):
            part = slice(channel, channel + 1)
            streamed.update(forecast[rows, :, part], label[rows, :, part], part)
    assert streamed.get() == pytest.approx(long_horizon_metrics(forecast, label), rel=1e-9)


def test_perfect_and_reversed_forecasts() -> None:
    label = np.random.default_rng(4).normal(size=(8, 2, 2))
    perfect = long_horizon_metrics(label, label)
    assert perfect["CORR"] == pytest.approx(1)
    assert {perfect[name] for name in ("MAE", "MSE", "RMSE", "MAPE", "MSPE", "RSE")} == {0.0}
    assert long_horizon_metrics(-label, label)["CORR"] == pytest.approx(-1)


def test_forecasting_the_mean_has_rse_one_and_no_correlation() -> None:
    label = np.random.default_rng(5).normal(size=(8, 2, 2))
    found = long_horizon_metrics(np.full_like(label, label.mean()), label)
    assert found["RSE"] == pytest.approx(1)
    assert np.isnan(found["CORR"])


def test_shapes_and_nan_forecasts_are_refused() -> None:
    label = np.zeros((5, 3, 2))
    with pytest.raises(EvaluationError, match=r"\(5, 2, 2\) and label \(5, 3, 2\)"):
        long_horizon_metrics(np.zeros((5, 2, 2)), label)
    with pytest.raises(EvaluationError, match="windows, horizon, channels"):
        long_horizon_metrics(label[0], label[0])
    with pytest.raises(EvaluationError, match="forecast has NaN"):
        long_horizon_metrics(label * np.nan, label)


def test_scores_put_the_better_value_lower() -> None:
    assert metric_score("CORR", 0.9) < metric_score("CORR", 0.1)
    assert metric_score("coverage[0.8]", 0.79) < metric_score("coverage[0.8]", 1.0)
    assert metric_score("MASE[0.5]", 0.5) < metric_score("MASE[0.5]", 1.5)
