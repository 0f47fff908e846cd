"""What GluonTS's own tests ask of an estimator, for every model."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from gluonts.core.component import equals
from gluonts.core.serde import dump_json, load_json
from gluonts.dataset.split import split
from gluonts.ev.metrics import MASE, MSIS, MeanWeightedSumQuantileLoss
from gluonts.evaluation import Evaluator, MultivariateEvaluator, make_evaluation_predictions
from gluonts.model import evaluate_model
from gluonts.model.forecast import SampleForecast
from model_cases import (
    FEATURES,
    FREQ,
    HEADS,
    HORIZON,
    LEVELS,
    MODELS,
    PATH_MODELS,
    QUIET,
    STEPWISE_MODELS,
    Factory,
    forecast_values,
    same_weights,
    series,
    untrained,
)
from moecast.forecasters import MoEPredictor

DECILES = [level / 10 for level in range(1, 10)]
METRICS = [MSIS(), MASE(), MeanWeightedSumQuantileLoss(quantile_levels=DECILES)]


class WithoutLength:
    """A dataset that can only be iterated, again and again."""

    def __init__(self, entries: list[dict]) -> None:
        self.entries = entries
        self.passes = 0

    def __iter__(self) -> Iterator[dict]:
        self.passes += 1
        yield from self.entries


@pytest.mark.parametrize("validates", [False, True])
def test_trained_model_forecasts_every_series(make_estimator: Factory, validates: bool) -> None:
    dataset = series()
    estimator = make_estimator()
    predictor = estimator.train(dataset, validation_data=dataset if validates else None)
    forecasts = list(predictor.predict(dataset))
    assert len(forecasts) == len(dataset)
    for entry, forecast in zip(dataset, forecasts):
        assert forecast.start_date == entry["start"] + len(entry["target"])
        assert forecast.prediction_length == HORIZON
        values = np.stack([forecast.mean, *(forecast.quantile(level) for level in LEVELS)])
        assert values.shape == (1 + len(LEVELS), HORIZON)
        assert np.isfinite(values).all()
        assert (np.diff(values[1:], axis=0) > 0).all()


def test_forecast_index_covers_the_horizon(predictor: MoEPredictor) -> None:
    (entry,) = series(number=1)
    (forecast,) = predictor.predict([entry])
    first = entry["start"] + len(entry["target"])
    assert forecast.index.equals(pd.period_range(first, periods=HORIZON, freq=first.freq))
    assert forecast.mean_ts.index.equals(forecast.index)


def test_training_brings_the_forecast_nearer(make_estimator: Factory) -> None:
    history = [{**entry, "target": entry["target"][:-HORIZON]} for entry in series()]
    labels = np.stack([entry["target"][-HORIZON:] for entry in series()])
    estimator = make_estimator(num_batches_per_epoch=30)

    def error(predictor: MoEPredictor) -> float:
        return float(np.abs(forecast_values(predictor, history)[:, 2] - labels).mean())

    assert error(estimator.train(history)) < 0.8 * error(untrained(estimator))


def test_features_and_stray_fields(make_estimator: Factory) -> None:
    estimator = make_estimator(**FEATURES)
    predictor = estimator.train(series(features=True), series(features=True))
    forecasts = forecast_values(predictor, series(features=True, beyond=HORIZON))
    assert np.isfinite(forecasts).all()


@pytest.mark.parametrize(
    "field", ["feat_dynamic_real", "past_feat_dynamic_real", "feat_static_real", "feat_static_cat"]
)
def test_every_feature_moves_the_forecast(make_estimator: Factory, field: str) -> None:
    predictor = untrained(make_estimator(**FEATURES))
    entries = series(features=True, beyond=HORIZON, number=1)
    changed = np.array(entries[0][field])
    changed = {"feat_static_cat": 1 - changed, "feat_static_real": changed + 1}.get(field, -changed)
    before = forecast_values(predictor, entries)
    after = forecast_values(predictor, [{**entries[0], field: changed}])
    assert np.abs(after - before).max() > 1e-3


def test_multivariate_forecasts_have_a_column_per_channel(make_estimator: Factory) -> None:
    dataset = series(channels=3)
    predictor = make_estimator(target_dim=3).train(dataset, dataset)
    for forecast in predictor.predict(dataset):
        assert forecast.mean.shape == (HORIZON, 3)
        for level in LEVELS:
            assert forecast.quantile(level).shape == (HORIZON, 3)


def test_multivariate_channels_keep_their_order(make_estimator: Factory) -> None:
    levels = np.array([-1000.0, 0.0, 1000.0])
    dataset = series(channels=3)
    for entry in dataset:
        entry["target"] = entry["target"] + levels[:, np.newaxis].astype(np.float32)
    predictor = make_estimator(target_dim=3).train(dataset)
    medians = forecast_values(predictor, dataset)[:, 2]
    assert np.abs(medians - levels).max() < 200


@pytest.mark.parametrize("channels", [None, 2])
def test_evaluate_model(make_estimator: Factory, channels: int | None) -> None:
    dataset = series(channels=channels)
    training, template = split(dataset, offset=-HORIZON)
    predictor = make_estimator(target_dim=channels or 1).train(list(training))
    table = evaluate_model(
        predictor,
        test_data=template.generate_instances(HORIZON),
        metrics=METRICS,
        seasonality=24,
    )
    assert table.shape == (1, len(METRICS))
    assert np.isfinite(table.to_numpy()).all()


def test_evaluator(make_estimator: Factory) -> None:
    predictor = make_estimator().train(series())
    forecasts, truth = make_evaluation_predictions(series(), predictor)
    metrics, items = Evaluator(quantiles=DECILES, num_workers=0)(truth, forecasts)
    assert len(items) == len(series())
    for name in ("MSIS", "MASE", "mean_wQuantileLoss", "Coverage[0.9]"):
        assert np.isfinite(metrics[name]), name


def test_multivariate_evaluator(make_estimator: Factory) -> None:
    predictor = make_estimator(target_dim=2).train(series(channels=2))
    forecasts, truth = make_evaluation_predictions(series(channels=2), predictor)
    evaluator = MultivariateEvaluator(quantiles=DECILES, num_workers=0)
    metrics, _ = evaluator(truth, forecasts)
    for name in ("MSIS", "0_MASE", "1_MASE", "mean_wQuantileLoss"):
        assert np.isfinite(metrics[name]), name
    assert metrics["0_abs_error"] != metrics["1_abs_error"]


@pytest.mark.parametrize("info", [None, {"source": "meter", "deep": [1, 2]}, "a note"])
def test_item_id_and_info_survive(model: str, predictor: MoEPredictor, info: Any) -> None:
    entries = [{**entry, "info": info} for entry in series(number=3)]
    forecasts = list(predictor.predict(entries))
    assert [forecast.item_id for forecast in forecasts] == [entry["item_id"] for entry in entries]
    sizes = predictor.network.patch_sizes
    for forecast in forecasts:
        expected = {} if info is None else info if isinstance(info, dict) else {"info": info}
        if len(sizes) == 1:
            # GluonTS's sample forecasts take a mapping only.
            as_mapping = model in PATH_MODELS and info is not None
            assert forecast.info == (expected if as_mapping else info)
            continue
        assert forecast.info["patch_size"] in sizes
        rest = {key: value for key, value in forecast.info.items() if key != "patch_size"}
        assert rest == expected
    assert all(entry["info"] == info for entry in entries)


# Forecasts that are samples: paths, and those of a head that draws as it computes.
SAMPLES = {
    "paths": lambda: MODELS["moirai-moe paths"](num_samples=3),
    "drawing head": lambda: MODELS["mole rmlp"](
        distr_output=HEADS["gluonts implicit quantiles"][0]
    ),
}


@pytest.mark.parametrize("kind", list(SAMPLES))
@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (None, None),
        ({"source": "meter", "deep": [1, 2]}, {"source": "meter", "deep": [1, 2]}),
        ("a note", {"info": "a note"}),
        (["two", "notes"], {"info": ["two", "notes"]}),
    ],
    ids=str,
)
def test_info_of_samples_is_a_mapping(kind: str, info: Any, expected: Any) -> None:
    entries = [{**entry, "info": info} for entry in series(number=2)]
    for forecast in untrained(SAMPLES[kind]()).predict(entries):
        assert isinstance(forecast, SampleForecast)
        assert forecast.info == expected


def test_entries_are_left_as_they_were(make_estimator: Factory) -> None:
    entries = series(features=True, beyond=HORIZON)
    entries[0]["target"][3:6] = np.nan
    copies = pickle.dumps(entries)
    predictor = make_estimator(**FEATURES).train(entries, entries)
    list(predictor.predict(entries))
    assert pickle.dumps(entries) == copies


def test_train_from_goes_on_from_the_weights(
    make_estimator: Factory, predictor: MoEPredictor
) -> None:
    still = make_estimator(lr=1e-12, weight_decay=0.0).train_from(predictor, series())
    ours, theirs = still.network.state_dict(), predictor.network.state_dict()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6, msg=name)
    before = pickle.dumps({name: tensor.numpy() for name, tensor in theirs.items()})
    moved = make_estimator().train_from(predictor, series(), series())
    assert not same_weights(moved.network, predictor.network)
    after = predictor.network.state_dict()
    assert pickle.dumps({name: tensor.numpy() for name, tensor in after.items()}) == before


def test_train_from_another_architecture_says_what_differs(
    make_estimator: Factory, predictor: MoEPredictor
) -> None:
    with pytest.raises(ValueError, match=r"predictor to train from do not fit.*instead of"):
        make_estimator(distr_output="normal").train_from(predictor, series())


def test_estimator_survives_serde(make_estimator: Factory) -> None:
    estimator = make_estimator(distr_output="laplace", aux_weight=0.5)
    copy = load_json(dump_json(estimator))
    assert equals(copy, estimator)
    assert type(copy) is type(estimator)
    assert copy.window == estimator.window
    assert copy.trainer_kwargs == estimator.trainer_kwargs
    assert not equals(make_estimator(distr_output="normal", aux_weight=0.5), estimator)
    assert same_weights(copy.train(series()).network, estimator.train(series()).network)


def test_settings_can_be_strings(make_estimator: Factory) -> None:
    given = make_estimator(lr=0.02, batch_size=4)
    names = inspect.signature(type(given).__init__).parameters
    assert {"freq", "lr", "batch_size", "trainer_kwargs", "patch_size"} <= set(names)
    strings = make_estimator(lr="0.02", batch_size="4", prediction_length=str(HORIZON))
    assert strings.optimizer_config == given.optimizer_config
    assert strings.batch_size == 4
    assert strings.window == given.window


@pytest.mark.parametrize("features", [{}, FEATURES])
def test_traced_network_equals_eager(make_estimator: Factory, features: dict) -> None:
    network = untrained(make_estimator(**features)).network
    torch.manual_seed(1)
    inputs = []
    for name, spec in network.describe_inputs(batch_size=5).items():
        high = 2 if name == "feat_static_cat" else 0
        shape = spec.shape
        inputs.append(torch.randint(high, shape) if high else torch.randn(shape))
        assert inputs[-1].dtype == spec.dtype
    names = list(network.input_names)
    observed = names.index("past_observed_values")
    inputs[observed] = torch.ones_like(inputs[observed])
    other = [tensor if tensor.dtype == torch.long else 2 * tensor + 1 for tensor in inputs]
    other[observed] = torch.ones_like(inputs[observed])
    with torch.no_grad():
        traced = torch.jit.trace(network, tuple(inputs))
        for arguments in (inputs, other):
            torch.testing.assert_close(traced(*arguments), network(*arguments))


@pytest.mark.parametrize("lead_time", [0, 1, 5])
def test_forecast_starts_after_the_lead_time(make_estimator: Factory, lead_time: int) -> None:
    predictor = make_estimator(lead_time=lead_time).train(series(), series())
    assert predictor.lead_time == lead_time
    for entry, forecast in zip(series(), predictor.predict(series())):
        assert forecast.start_date == entry["start"] + len(entry["target"]) + lead_time
        assert forecast.start_date.freqstr == FREQ
        assert forecast.mean.shape == (HORIZON,)


@pytest.mark.parametrize("lead_time", [0, 3])
def test_known_covariate_is_used_at_its_own_step(
    model: str, make_estimator: Factory, lead_time: int
) -> None:
    """The target is the covariate, which is noise: only the right step of it can tell."""
    generator = np.random.default_rng(2)
    length = 200
    covariates = generator.normal(size=(6, length + lead_time + HORIZON))
    entries = [
        {
            "start": pd.Period("2024-01-01", freq=FREQ),
            "target": covariate[:length],
            "feat_dynamic_real": covariate[np.newaxis],
        }
        for covariate in covariates
    ]
    estimator = make_estimator(
        num_feat_dynamic_real=1,
        lead_time=lead_time,
        batch_size=32,
        num_batches_per_epoch=80,
        lr=2e-2,
        trainer_kwargs={**QUIET, "max_epochs": 1},
    )
    predictor = estimator.train(entries)
    medians = forecast_values(predictor, entries)[:, 2]
    truth = covariates[:, length + lead_time :]
    # 80 steps teach a transformer over patches less than a linear map.
    least = 0.9 if model in STEPWISE_MODELS else 0.7
    assert np.corrcoef(medians.ravel(), truth.ravel())[0, 1] > least

    # What follows the history moves one step to the right, and the forecast with it.
    shifted = covariates.copy()
    shifted[:, length:] = np.roll(covariates[:, length:], 1, axis=1)
    moved = [
        {**entry, "feat_dynamic_real": covariate[np.newaxis]}
        for entry, covariate in zip(entries, shifted)
    ]
    medians = forecast_values(predictor, moved)[:, 2]
    truth = shifted[:, length + lead_time :]
    least = 0.9 if model in STEPWISE_MODELS else 0.7
    assert np.corrcoef(medians.ravel(), truth.ravel())[0, 1] > least


def test_gradient_reaches_every_parameter(make_estimator: Factory) -> None:
    estimator = make_estimator(**FEATURES, batch_size=64)
    network = untrained(estimator).network.train()
    windows = estimator.create_training_data_loader(
        series(features=True), estimator.create_lightning_module()
    )
    batch = next(iter(windows))
    torch.manual_seed(0)
    for patch_size in network.patch_sizes:
        losses, _ = network.window_losses(batch, patch_size)
        losses.mean().backward()
    idle = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not idle


def test_dataset_without_length(make_estimator: Factory) -> None:
    training, validation = WithoutLength(series()), WithoutLength(series())
    predictor = make_estimator().train(training, validation)
    listed = make_estimator().train(series(), series())
    assert same_weights(predictor.network, listed.network)
    np.testing.assert_array_equal(
        forecast_values(predictor, WithoutLength(series())), forecast_values(predictor, series())
    )


def test_dataset_beyond_memory_is_streamed(make_estimator: Factory) -> None:
    dataset = WithoutLength(series())
    predictor = make_estimator(max_dataset_bytes=1, batch_size=2).train(dataset)
    assert dataset.passes > 1
    assert np.isfinite(forecast_values(predictor, series())).all()


def test_cached_dataset_is_read_once(make_estimator: Factory) -> None:
    dataset = WithoutLength(series())
    make_estimator(max_dataset_bytes=1, batch_size=2).train(dataset, cache_data=True)
    assert dataset.passes == 1


def test_short_and_gappy_series_can_be_trained_on(make_estimator: Factory) -> None:
    dataset = series()
    dataset[0]["target"] = dataset[0]["target"][: HORIZON + 3]
    dataset[1]["target"][10:40] = np.nan
    dataset[2]["target"] = dataset[2]["target"][: HORIZON - 1]
    predictor = make_estimator().train(dataset, dataset)
    assert np.isfinite(forecast_values(predictor, dataset)).all()
    for parameter in predictor.network.parameters():
        assert parameter.isfinite().all()


def test_training_on_constant_series_stays_finite(make_estimator: Factory) -> None:
    dataset = series()
    for level, entry in zip((0.0, 1.0, -300.0, 1e6), dataset):
        entry["target"] = np.full_like(entry["target"], level)
    forecasts = forecast_values(make_estimator().train(dataset, dataset), dataset)
    assert np.isfinite(forecasts).all()


def test_predictor_is_of_the_models_own_class(
    make_estimator: Factory, predictor: MoEPredictor
) -> None:
    assert type(predictor) is make_estimator().predictor_class


def test_nothing_is_written_where_one_stands(
    make_estimator: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, temporary, root = tmp_path / "here", tmp_path / "temporary", tmp_path / "root"
    for folder in (here, temporary, root):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    noisy = {"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu"}
    make_estimator(trainer_kwargs=noisy).train(series())
    assert not list(here.iterdir())
    assert not list(temporary.iterdir())
    make_estimator(trainer_kwargs={**noisy, "default_root_dir": str(root)}).train(series())
    assert not list(here.iterdir())
    assert not list(temporary.iterdir())
    assert list(root.rglob("last.ckpt"))
