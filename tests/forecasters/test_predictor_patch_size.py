"""The patch size that each series is forecast with."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from gluonts.torch.distributions import QuantileOutput
from model_cases import FREQ, HORIZON, MODELS, Factory, forecast_values, series, untrained
from moecast.forecasters.frequencies import time_features
from moecast.forecasters.network import ForecastNetwork
from torch.distributions import StudentT

AUTO = [name for name in MODELS if len(MODELS[name]().patch_sizes) > 1]


@pytest.fixture(params=AUTO)
def make_auto(request: pytest.FixtureRequest) -> Factory:
    return MODELS[request.param]


def chosen_by(predictor, entries: list[dict]) -> list[int]:
    return [forecast.info["patch_size"] for forecast in predictor.predict(entries)]


def network_inputs(network: ForecastNetwork, entry: dict, present: int) -> dict[str, torch.Tensor]:
    """What the network reads of a series of which nothing is known from ``present`` on."""
    context = network.window.context_length
    begin = present - context
    inputs = {
        "past_target": torch.from_numpy(entry["target"][begin:present])[None, :, None],
        "past_observed_values": torch.ones(1, context, 1),
    }
    if "time_feat" in network.input_names:
        steps = network.describe_inputs()["time_feat"].shape[1]
        periods = pd.period_range(entry["start"] + begin, periods=steps, freq=FREQ)
        columns = [feature(periods) for feature in time_features(FREQ)]
        inputs["time_feat"] = torch.tensor(np.stack(columns, axis=-1)[None], dtype=torch.float32)
    return inputs


def held_out_loss(predictor, entry: dict, patch_size: int, lead_time: int = 0) -> float:
    """Mean negative log-likelihood of the last horizon, on the scale of its own context."""
    network = predictor.network
    inputs = network_inputs(network, entry, len(entry["target"]) - lead_time - HORIZON)
    label = torch.from_numpy(entry["target"][-HORIZON:])
    with torch.no_grad():
        output = network.outputs(inputs, patch_size)
    degrees, loc, scale = (argument[0, :, 0] for argument in output.distr_args)
    scaled = (label - output.loc[0, :, 0]) / output.scale[0, :, 0]
    return -StudentT(degrees, loc, scale).log_prob(scaled).mean().item()


@pytest.mark.parametrize("lead_time", [0, 2])
def test_patch_size_of_smallest_held_out_loss_is_taken(make_auto: Factory, lead_time: int) -> None:
    predictor = untrained(make_auto(lead_time=lead_time))
    entries = series(number=24)
    sizes = predictor.network.patch_sizes
    expected = []
    for entry in entries:
        losses = [held_out_loss(predictor, entry, size, lead_time) for size in sizes]
        expected.append(sizes[int(np.argmin(losses))])
    assert set(expected) == set(sizes)
    assert chosen_by(predictor, entries) == expected


def test_forecast_is_that_of_the_chosen_patch_size(make_auto: Factory) -> None:
    predictor = untrained(make_auto())
    entries = series(number=24)
    medians = forecast_values(predictor, entries)[:, 2]
    network = predictor.network
    for entry, patch_size, median in zip(entries, chosen_by(predictor, entries), medians):
        inputs = network_inputs(network, entry, len(entry["target"]))
        with torch.no_grad():
            output = network.outputs(inputs, patch_size)
        # The median of Student's t is its location.
        expected = output.loc + output.scale * output.distr_args[1]
        np.testing.assert_allclose(median, expected[0, :, 0].numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("draws_are_medians")
def test_paths_of_several_patch_sizes_go_to_their_series() -> None:
    predictor = untrained(MODELS["moirai-moe paths"](patch_size=[2, 3]))
    entries = series(number=12)
    together, chosen = forecast_values(predictor, entries), chosen_by(predictor, entries)
    assert set(chosen) == {2, 3}
    assert chosen != sorted(chosen)
    alone = [forecast_values(predictor, [entry])[0] for entry in entries]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
    assert chosen == [size for entry in entries for size in chosen_by(predictor, [entry])]


def test_choice_depends_on_the_end_of_the_history(make_auto: Factory) -> None:
    predictor = untrained(make_auto())
    entries = series(number=24)
    changed = [{**entry, "target": entry["target"].copy()} for entry in entries]
    for entry in changed:
        entry["target"][-HORIZON:] = entry["target"][-HORIZON:][::-1] + 20
    assert chosen_by(predictor, changed) != chosen_by(predictor, entries)


def test_series_too_short_to_hold_out_take_the_smallest(make_auto: Factory) -> None:
    predictor = untrained(make_auto())
    smallest = min(predictor.network.patch_sizes)
    entries = [{**entry, "target": entry["target"][:HORIZON]} for entry in series(number=24)]
    assert chosen_by(predictor, entries) == [smallest] * len(entries)


def test_series_without_values_to_hold_out_take_the_smallest(make_auto: Factory) -> None:
    predictor = untrained(make_auto())
    smallest = min(predictor.network.patch_sizes)
    entries = series(number=24)
    for entry in entries:
        entry["target"][-HORIZON:] = np.nan
    assert chosen_by(predictor, entries) == [smallest] * len(entries)


def test_choice_does_not_depend_on_batch_mates(make_auto: Factory) -> None:
    predictor = untrained(make_auto())
    entries = series(number=24)
    alone = [chosen_by(predictor, [entry])[0] for entry in entries]
    for batch_size in (1, 5, 100):
        other = type(predictor)(network=predictor.network, batch_size=batch_size)
        assert chosen_by(other, entries) == alone


@pytest.mark.parametrize("head", [QuantileOutput(quantiles=[0.1, 0.5, 0.9]), "point", "normal"])
def test_other_heads_choose_too(make_auto: Factory, head: object) -> None:
    predictor = untrained(make_auto(distr_output=head))
    assert set(chosen_by(predictor, series(number=24))) == set(predictor.network.patch_sizes)


def test_training_draws_every_patch_size(make_auto: Factory) -> None:
    estimator = make_auto(num_batches_per_epoch=20)
    module = estimator.create_lightning_module()
    losses, drawn = module.network.window_losses, []

    def record(batch: dict, patch_size: int) -> object:
        drawn.append(patch_size)
        return losses(batch, patch_size)

    module.network.window_losses = record
    estimator.create_lightning_module = lambda: module
    estimator.train(series())
    assert set(drawn) == set(module.network.patch_sizes)
    shares = [drawn.count(size) / len(drawn) for size in module.network.patch_sizes]
    assert min(shares) > 0.5 / len(shares)
