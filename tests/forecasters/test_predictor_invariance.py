"""Properties that hold for any weights: what may and what may not move a forecast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_cases import (
    DISTRIBUTION_MODELS,
    EQUAL_TOKENS_MODELS,
    FEATURES,
    HORIZON,
    LEVELS,
    STEPWISE_MODELS,
    Factory,
    forecast_values,
    series,
    untrained,
)
from moecast.forecasters import MoEPredictor

LEAD_TIME = 2


def with_batch_size(predictor: MoEPredictor, batch_size: int) -> MoEPredictor:
    return type(predictor)(network=predictor.network, batch_size=batch_size)


def difficult(channels: int | None = None) -> list[dict]:
    """Eight series with gaps, shorter than the context, shorter than the horizon, constant."""
    entries = series(number=8, channels=channels)
    for entry, length in zip(entries[:3], (1, HORIZON - 1, 10)):
        entry["target"] = entry["target"][..., :length]
    entries[3]["target"][..., -7:-2] = np.nan
    entries[4]["target"][..., -80:] = np.nan
    entries[5]["target"][...] = 3.0
    entries[6]["target"][..., :100] = np.nan
    return entries


@pytest.mark.usefixtures("draws_are_medians")
@pytest.mark.parametrize("channels", [None, 2])
def test_forecast_does_not_depend_on_batch_mates(
    make_estimator: Factory, channels: int | None
) -> None:
    predictor = untrained(make_estimator(target_dim=channels or 1))
    entries = difficult(channels)
    alone = np.concatenate([forecast_values(predictor, [entry]) for entry in entries])
    for batch_size in (1, 3, 8, 50):
        together = forecast_values(with_batch_size(predictor, batch_size), entries)
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("draws_are_medians")
def test_forecasts_keep_the_order_of_the_series(predictor: MoEPredictor) -> None:
    entries = difficult()
    forwards = forecast_values(with_batch_size(predictor, 3), entries)
    backwards = forecast_values(with_batch_size(predictor, 3), entries[::-1])
    np.testing.assert_allclose(forwards, backwards[::-1], rtol=1e-4, atol=1e-4)
    names = [forecast.item_id for forecast in predictor.predict(entries[::-1])]
    assert names == [entry["item_id"] for entry in entries[::-1]]
    assert len(np.unique(forwards[:, 2], axis=0)) == len(entries)


@pytest.mark.parametrize(("factor", "shift"), [(7.0, -30.0), (0.01, 5.0)])
def test_forecast_follows_scale_and_shift(
    make_estimator: Factory, factor: float, shift: float
) -> None:
    predictor = untrained(make_estimator(scaling="std"))
    entries = series(number=3)
    mapped = [{**entry, "target": factor * entry["target"] + shift} for entry in entries]
    expected = factor * forecast_values(predictor, entries) + shift
    spread = np.ptp(expected, axis=(1, 2))[:, np.newaxis, np.newaxis]
    error = np.abs(forecast_values(predictor, mapped) - expected)
    assert (error < 1e-4 * (spread + np.abs(expected))).all()


def test_forecast_follows_scale_where_nothing_shifts(make_estimator: Factory) -> None:
    predictor = untrained(make_estimator(scaling="mean"))
    entries = series("positive", number=3)
    mapped = [{**entry, "target": 50 * entry["target"]} for entry in entries]
    np.testing.assert_allclose(
        forecast_values(predictor, mapped), 50 * forecast_values(predictor, entries), rtol=1e-3
    )


@pytest.mark.parametrize("lead_time", [0, LEAD_TIME])
def test_nothing_after_its_time_matters(make_estimator: Factory, lead_time: int) -> None:
    """Covariates beyond the horizon, and past covariates beyond the history."""
    predictor = untrained(make_estimator(**FEATURES, lead_time=lead_time))
    entries = series(features=True, beyond=lead_time + HORIZON)
    later = []
    for entry in entries:
        known, past = entry["feat_dynamic_real"], entry["past_feat_dynamic_real"]
        later.append(
            {
                **entry,
                "feat_dynamic_real": np.concatenate([known, np.full((2, 9), 1e6)], axis=1),
                "past_feat_dynamic_real": np.concatenate([past, np.full((1, 9), 1e6)], axis=1),
            }
        )
    np.testing.assert_array_equal(
        forecast_values(predictor, later), forecast_values(predictor, entries)
    )


@pytest.mark.parametrize("model", STEPWISE_MODELS)
def test_covariates_during_the_lead_time_do_not_count_as_the_horizons(
    make_estimator: Factory,
) -> None:
    predictor = untrained(make_estimator(**FEATURES, lead_time=LEAD_TIME))
    entries = series(features=True, beyond=LEAD_TIME + HORIZON)
    changed = []
    for entry in entries:
        known = entry["feat_dynamic_real"].copy()
        known[:, len(entry["target"]) : len(entry["target"]) + LEAD_TIME] = 1e3
        changed.append({**entry, "feat_dynamic_real": known})
    np.testing.assert_array_equal(
        forecast_values(predictor, changed), forecast_values(predictor, entries)
    )


@pytest.mark.parametrize("model", STEPWISE_MODELS)
def test_one_step_of_a_covariate_moves_that_step_most(make_estimator: Factory) -> None:
    predictor = untrained(make_estimator(num_feat_dynamic_real=2))
    entries = series(features=True, beyond=HORIZON)
    for step in range(HORIZON):
        changed = []
        for entry in entries:
            known = entry["feat_dynamic_real"].copy()
            known[:, len(entry["target"]) + step] += 3
            changed.append({**entry, "feat_dynamic_real": known})
        change = forecast_values(predictor, changed) - forecast_values(predictor, entries)
        size = np.abs(change).mean(axis=(0, 1))
        assert size.argmax() == step
        assert size[step] > 0


def test_history_before_what_the_network_reads_does_not_matter(make_estimator: Factory) -> None:
    predictor = untrained(make_estimator())
    entries = series()
    window = predictor.network.window
    # The choice of a patch size reads a context one horizon earlier.
    read = window.context_length + HORIZON
    changed = [{**entry, "target": entry["target"].copy()} for entry in entries]
    for entry in changed:
        entry["target"][:-read] *= -100
    np.testing.assert_array_equal(
        forecast_values(predictor, changed), forecast_values(predictor, entries)
    )
    for entry in changed:
        entry["target"][-window.context_length] += 100
    assert not np.array_equal(
        forecast_values(predictor, changed), forecast_values(predictor, entries)
    )


def test_difficult_series_get_finite_forecasts(predictor: MoEPredictor) -> None:
    entries = difficult()
    values = forecast_values(predictor, entries)
    assert values.shape == (len(entries), 1 + len(LEVELS), HORIZON)
    assert np.isfinite(values).all()


@pytest.mark.usefixtures("draws_are_medians")
def test_context_without_values_is_forecast_near_the_last_one(predictor: MoEPredictor) -> None:
    entries = []
    for level in (50.0, 5000.0):
        (entry,) = series(number=1)
        entry["target"] = np.full_like(entry["target"], level)
        entry["target"][-predictor.network.window.context_length - 5 :] = np.nan
        entries.append(entry)
    low, high = forecast_values(predictor, entries)[:, 2]
    np.testing.assert_allclose(high, 100 * low, rtol=1e-3)
    assert (np.abs(low) < 500).all()


@pytest.mark.parametrize("level", [0.0, 1e-12, 1.0, -300.0, 1e9])
def test_constant_series_get_finite_forecasts(predictor: MoEPredictor, level: float) -> None:
    (entry,) = series(number=1)
    entry["target"] = np.full_like(entry["target"], level)
    values = forecast_values(predictor, [entry])
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= 100 * max(abs(level), 1.0)


def test_gaps_are_not_zeros(predictor: MoEPredictor) -> None:
    """A gap in a level series changes little; the same steps at zero change much."""
    (entry,) = series(number=1)
    entry["target"] = entry["target"] + 1000
    gappy, zeroed = entry["target"].copy(), entry["target"].copy()
    gappy[-9:-5], zeroed[-9:-5] = np.nan, 0.0
    full, gap, zero = forecast_values(
        predictor, [{**entry, "target": target} for target in (entry["target"], gappy, zeroed)]
    )
    assert np.abs(gap - full).max() < 30 < np.abs(zero - full).max()


def test_predicting_twice_gives_the_same(predictor: MoEPredictor) -> None:
    np.testing.assert_array_equal(
        forecast_values(predictor, series()), forecast_values(predictor, series())
    )


@pytest.mark.parametrize("model", DISTRIBUTION_MODELS)
def test_predicting_leaves_the_generators_alone(predictor: MoEPredictor) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    for forecast in predictor.predict(series()):
        forecast.quantile(0.9)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_predicting_nothing_gives_nothing(predictor: MoEPredictor) -> None:
    assert list(predictor.predict([])) == []


def test_predict_takes_a_generator(predictor: MoEPredictor) -> None:
    values = forecast_values(predictor, (entry for entry in series()))
    np.testing.assert_array_equal(values, forecast_values(predictor, series()))


def test_expert_usage_is_that_of_the_last_prediction(predictor: MoEPredictor) -> None:
    entries = series(number=6)
    list(predictor.predict(entries))
    usage = predictor.expert_usage
    assert usage.weight_share
    list(predictor.predict(entries[:1]))
    assert predictor.expert_usage is not usage
    for name, share in usage.weight_share.items():
        assert share.sum() == pytest.approx(1.0, abs=1e-5)
        assert (share >= 0).all()
        chosen = usage.chosen_share[name]
        assert chosen.shape == share.shape
        assert chosen.sum() >= 1 - 1e-6
        assert (chosen <= 1).all()


# Elsewhere, series of smaller patches have more tokens, and count for more.
@pytest.mark.parametrize("model", EQUAL_TOKENS_MODELS)
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_expert_usage_is_the_mean_over_series(make_estimator: Factory, batch_size: int) -> None:
    predictor = with_batch_size(untrained(make_estimator()), batch_size)
    entries = series(number=6)
    single = []
    for entry in entries:
        list(predictor.predict([entry]))
        single.append(predictor.expert_usage.weight_share)
    list(predictor.predict(entries))
    for name, share in predictor.expert_usage.weight_share.items():
        expected = np.mean([shares[name] for shares in single], axis=0)
        np.testing.assert_allclose(share, expected, atol=1e-5)


def test_autocast_forecasts_nearly_the_same(predictor: MoEPredictor) -> None:
    torch.manual_seed(0)
    expected = np.stack([f.quantile(0.5) for f in predictor.predict(series())])
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = np.stack([f.quantile(0.5) for f in predictor.predict(series())])
    assert np.isfinite(found).all()
    assert np.abs(found - expected).mean() < 0.25 * expected.std()
