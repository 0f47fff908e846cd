"""How paths are drawn: what each patch depends on, how many there are, what forecasts they make."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gluonts.model.forecast import SampleForecast
from model_cases import forecast_values, series
from moecast.distributions.univariate import AffineDistribution
from moecast.forecasters import MoiraiMoEPredictor
from moecast.forecasters.forecast import BatchedDistributionForecast
from moecast.forecasters.moirai_moe import MoiraiMoENetwork, decoding
from moecast.forecasters.moirai_moe.decoding import PathSampler
from moirai_cases import (
    BATCH,
    COVARIATES,
    DECODINGS,
    FEATURES,
    LONG,
    PATCH,
    inputs_of,
    network_of,
    predictor_of,
)
from torch import Tensor

SAMPLES = 3

CASES: dict[str, dict[str, Any]] = {
    "univariate": {},
    "multivariate": {"target_dim": 3},
    "known covariates": {"num_feat_dynamic_real": 2, "covariates_ahead": False},
    "known covariates ahead": {"num_feat_dynamic_real": 2, "covariates_ahead": True},
    "past covariates": {"num_past_feat_dynamic_real": 2},
    "covariates": {**COVARIATES, "covariates_ahead": False},
    "covariates ahead": {**COVARIATES, "covariates_ahead": True},
    "covariates, multivariate": {**COVARIATES, "target_dim": 2},
    "static features": {"num_feat_static_real": 2},
    "all features, multivariate": {**FEATURES, "target_dim": 2},
    "whole patches": {"prediction_length": 3 * PATCH},
    "many patches": {"prediction_length": 7 * PATCH - 1, **COVARIATES},
    "lead time": {"lead_time": 3, **COVARIATES},
    "lead time of patches": {"lead_time": 2 * PATCH + 1, "prediction_length": 2},
    "context of no whole patches": {"context_length": 18, **COVARIATES},
    "context within a patch": {"context_length": 3, "patch_size": 3, "prediction_length": 8},
    "several patch sizes": {"patch_size": [2, 4, 8], **COVARIATES},
    "published head": {"distr_output": "moirai_mixture", "target_dim": 2},
    "counts": {"distr_output": "negative_binomial"},
    "one expert for a token": {"top_k": 1},
}


@dataclasses.dataclass
class Drawn:
    """What was drawn and the head's parameters it was drawn from.

    Attributes
    ----------
    paths
        Over lead time and horizon ``[sample, batch, time, channel]``.
    first
        Parameters of the first patch, each ``[batch, patch, channel(, …)]``.
    later
        Those of the patches after it, in the order they were computed.
    """

    paths: Tensor
    first: tuple[Tensor, ...]
    later: list[tuple[Tensor, ...]]


def draw(
    network: MoiraiMoENetwork, inputs: dict[str, Tensor], patch_size: int, num_samples: int
) -> Drawn:
    recorded = []
    compute = network.parameters_after

    def record(hidden: Tensor, size: int) -> tuple[Tensor, ...]:
        recorded.append(compute(hidden, size))
        return recorded[-1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(network, "parameters_after", record)
        torch.manual_seed(0)
        paths, _ = PathSampler(network, inputs, patch_size).sample(num_samples)
    return Drawn(paths, recorded[0], recorded[1:])


def encoded_anew(
    network: MoiraiMoENetwork, inputs: dict[str, Tensor], patch_size: int, path: Tensor
) -> tuple[Tensor, ...]:
    """Parameters of all patches to forecast, given a path, on the context's scale.

    Context and path are encoded together, without a cache.
    """
    future = network.config.num_future_patches(patch_size)
    known = path[:, : (future - 1) * patch_size]
    target, observed = network.whole_context(inputs, patch_size)
    with torch.no_grad():
        variates = network.variates_of(
            inputs,
            patch_size,
            torch.cat([target, known], dim=1),
            torch.cat([observed, torch.ones_like(known)], dim=1),
            torch.cat([observed, torch.zeros_like(known)], dim=1),
            future - 1,
        )
        context = network.variates(inputs, patch_size)
        torch.testing.assert_close(variates.loc, context.loc)
        torch.testing.assert_close(variates.scale, context.scale)
        hidden, _, _ = network.encode(variates, inputs, patch_size)
        return network.parameters_after(hidden[:, -future:], patch_size)


def assert_steps_equal_a_new_encoding(
    network: MoiraiMoENetwork, inputs: dict[str, Tensor], patch_size: int, drawn: Drawn, sizes: Any
) -> None:
    """Sample by sample, of chunks of these sizes."""
    future = network.config.num_future_patches(patch_size)
    assert len(drawn.later) == len(sizes) * (future - 1)
    sample = 0
    for chunk, size in enumerate(sizes):
        later = drawn.later[chunk * (future - 1) : (chunk + 1) * (future - 1)]
        for within in range(size):
            expected = encoded_anew(network, inputs, patch_size, drawn.paths[sample])
            sample += 1
            steps = [drawn.first]
            for arguments in later:
                assert all(len(argument) == BATCH * size for argument in arguments)
                steps.append(tuple(a.unflatten(0, (BATCH, size))[:, within] for a in arguments))
            for patch, arguments in enumerate(steps):
                rows = slice(patch * patch_size, (patch + 1) * patch_size)
                for found, wanted in zip(arguments, expected, strict=True):
                    torch.testing.assert_close(found, wanted[:, rows], rtol=1e-5, atol=1e-5)
    assert sample == len(drawn.paths)


# Series of mixed lengths need a context of several patches.
@pytest.mark.parametrize(
    ("case", "mixed"),
    [
        pytest.param(case, mixed, id=f"{case}, {'mixed lengths' if mixed else 'full contexts'}")
        for case in CASES
        for mixed in (False, True)
        if not mixed or case != "context within a patch"
    ],
)
def test_each_cached_step_equals_an_encoding_of_everything_before(case: str, mixed: bool) -> None:
    network = network_of(**CASES[case])
    inputs = inputs_of(network, mixed=mixed)
    for patch_size in network.patch_sizes:
        drawn = draw(network, inputs, patch_size, SAMPLES)
        assert drawn.paths.shape == (
            SAMPLES,
            BATCH,
            network.window.future_length,
            network.window.target_dim,
        )
        assert drawn.paths.isfinite().all()
        assert_steps_equal_a_new_encoding(network, inputs, patch_size, drawn, [SAMPLES])


def test_later_steps_depend_on_what_was_drawn() -> None:
    """Else the comparison above would be of constants."""
    network = network_of(target_dim=2)
    drawn = draw(network, inputs_of(network), PATCH, SAMPLES)
    for arguments in drawn.later:
        location = arguments[1].unflatten(0, (BATCH, SAMPLES))
        assert (location.std(dim=1) > 1e-4).all()


@pytest.mark.parametrize("mixed", [False, True])
def test_decodings_agree_up_to_the_first_patch(mixed: bool) -> None:
    paths = []
    for mode in DECODINGS:
        network = network_of(decoding=mode, **COVARIATES)
        paths.append(draw(network, inputs_of(network, mixed=mixed), PATCH, SAMPLES).paths)
    cached, reencoded = paths
    torch.testing.assert_close(cached[:, :, :PATCH], reencoded[:, :, :PATCH])
    assert not torch.isclose(cached[:, :, PATCH:], reencoded[:, :, PATCH:], rtol=1e-3).any()


def test_reencoding_counts_drawn_patches_as_observed() -> None:
    """Each step's parameters are those of a longer context, which moves location and scale."""
    network = network_of(decoding="reencode", target_dim=2)
    inputs = inputs_of(network)
    drawn = draw(network, inputs, PATCH, SAMPLES)
    for step, arguments in enumerate(drawn.later, start=1):
        for sample in range(SAMPLES):
            known = drawn.paths[sample, :, : step * PATCH]
            target = torch.cat([inputs["past_target"], known], dim=1)
            window = dataclasses.replace(network.window, context_length=target.shape[1])
            longer = MoiraiMoENetwork(dataclasses.replace(network.config, window=window)).eval()
            longer.load_state_dict(network.state_dict())
            with torch.no_grad():
                given = {"past_target": target, "past_observed_values": torch.ones_like(target)}
                variates = longer.variates(given, PATCH)
                hidden, _, _ = longer.encode(variates, given, PATCH, last=1)
                expected = longer.parameters_after(hidden, PATCH)
            assert not torch.isclose(variates.loc, network.variates(inputs, PATCH).loc).any()
            for found, wanted in zip(arguments, expected, strict=True):
                rows = found.unflatten(0, (SAMPLES, BATCH))[sample]
                torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-5)


def turned(values: Tensor, first: int) -> Tensor:
    """One patch backwards in time, which leaves mean and deviation as they are."""
    changed = values.clone()
    changed[:, first : first + PATCH] = values[:, first : first + PATCH].flip(1)
    return changed


@pytest.mark.parametrize("mode", DECODINGS)
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("settings", [{}, {"target_dim": 2, "num_past_feat_dynamic_real": 1}])
def test_a_known_covariate_moves_no_earlier_patch(mode: str, ahead: bool, settings: dict) -> None:
    """It moves those after its own and, if read ahead, its own; its scale alone is known before."""
    network = network_of(decoding=mode, num_feat_dynamic_real=2, covariates_ahead=ahead, **settings)
    inputs = inputs_of(network)
    paths = draw(network, inputs, PATCH, SAMPLES).paths
    context, future = network.window.context_length, network.config.num_future_patches(PATCH)
    for patch in range(future):
        covariates = turned(inputs["feat_dynamic_real"], context + patch * PATCH)
        changed = draw(network, {**inputs, "feat_dynamic_real": covariates}, PATCH, SAMPLES).paths
        moved = (patch + 1 - ahead) * PATCH
        torch.testing.assert_close(changed[:, :, :moved], paths[:, :, :moved], rtol=1e-4, atol=1e-4)
        difference = (changed - paths).abs()[:, :, moved : moved + PATCH]
        assert (difference.flatten(2) > 1e-3).any(dim=-1).all() or moved >= LONG


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", ["past_target", "feat_dynamic_real", "past_feat_dynamic_real"])
def test_tokens_see_their_own_time_and_before(name: str, ahead: bool) -> None:
    """Of known covariates read ahead, the patch after, and so never the first."""
    network = network_of(target_dim=2, covariates_ahead=ahead, **COVARIATES)
    inputs = inputs_of(network)

    def hidden_of(changed: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return network.encode(network.variates(changed, PATCH), changed, PATCH)[0]

    before = hidden_of(inputs)
    back = int(ahead and name == "feat_dynamic_real")
    for patch in range(back, before.shape[1]):
        changed = {**inputs, name: turned(inputs[name], patch * PATCH)}
        difference = (hidden_of(changed) - before).abs().amax(dim=(0, 3))
        assert (difference[: patch - back] < 1e-5).all()
        assert (difference[patch - back :] > 1e-4).all()


def test_padding_and_what_is_unknown_of_the_future_are_not_seen() -> None:
    network = network_of(**COVARIATES)
    inputs = inputs_of(network, mixed=True)
    path = torch.randn(BATCH, 2 * PATCH, 1, generator=torch.Generator().manual_seed(1))
    target, observed = network.whole_context(inputs, PATCH)
    target, observed = torch.cat([target, path], 1), torch.cat([observed, torch.ones_like(path)], 1)
    variates = network.variates_of(inputs, PATCH, target, observed, observed, 2)
    patches = variates.patches.clone()
    patches[~variates.present] = 100.0
    patches[:, -2:, -1] = 100.0  # The past covariate is the last variate.
    with torch.no_grad():
        plain, _, _ = network.encode(variates, inputs, PATCH)
        changed, _, _ = network.encode(variates._replace(patches=patches), inputs, PATCH)
    assert (~variates.present).any()
    shown = variates.present
    torch.testing.assert_close(changed[shown], plain[shown], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", DECODINGS)
@pytest.mark.parametrize(
    "settings", [{}, {"target_dim": 2}, {"patch_size": [2, 4]}, {"lead_time": 3}]
)
def test_number_of_samples_is_obeyed(mode: str, settings: dict) -> None:
    channels = settings.get("target_dim")
    predictor = predictor_of(decoding=mode, num_samples=7, **settings)
    entries = series(channels=channels)
    shape = (LONG,) if channels is None else (LONG, channels)
    for told, number in ((None, 7), (3, 3), (1, 1)):
        for forecast in predictor.predict(entries, num_samples=told):
            assert isinstance(forecast, SampleForecast)
            assert forecast.samples.shape == (number, *shape)
            assert np.isfinite(forecast.samples).all()


def same_chunks(monkeypatch: pytest.MonkeyPatch, network: MoiraiMoENetwork, at_once: int) -> None:
    """Have a batch's samples drawn so many at once."""
    past = network.config.num_context_patches(PATCH)
    steps = past + network.config.num_future_patches(PATCH)
    steps = steps if network.config.decoding == "reencode" else 1
    variates = network.window.target_dim + sum(
        width for name, width in network.window.dynamic_fields.items() if name != "target"
    )
    monkeypatch.setattr(decoding, "_TOKENS_AT_ONCE", at_once * BATCH * steps * variates)


@pytest.mark.parametrize("settings", [{}, {"target_dim": 2, **COVARIATES}])
def test_every_chunk_of_samples_equals_an_encoding_anew(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of(**settings)
    inputs = inputs_of(network, mixed=True)
    same_chunks(monkeypatch, network, 3)
    drawn = draw(network, inputs, PATCH, 7)
    assert len(drawn.paths) == 7
    assert_steps_equal_a_new_encoding(network, inputs, PATCH, drawn, [3, 3, 1])


@pytest.mark.parametrize("mode", DECODINGS)
@pytest.mark.parametrize("at_once", [0, 1, 3, 5])
def test_chunks_of_samples_change_no_path(
    mode: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every draw a fixed quantile, the first sample's higher than the second's and so on."""
    network = network_of(decoding=mode, target_dim=2, **COVARIATES)
    inputs = inputs_of(network, mixed=True)
    monkeypatch.setattr(
        AffineDistribution,
        "sample",
        lambda self, shape=(): self.icdf(torch.tensor(0.7)).expand(*shape, *self.batch_shape),
    )
    whole = draw(network, inputs, PATCH, 5)
    same_chunks(monkeypatch, network, at_once)
    chunked = draw(network, inputs, PATCH, 5)
    future = network.config.num_future_patches(PATCH)
    assert len(whole.later) == future - 1
    assert len(chunked.later) == -(-5 // max(at_once, 1)) * (future - 1)
    torch.testing.assert_close(chunked.paths, whole.paths, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", DECODINGS)
def test_samples_of_different_chunks_are_different(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of(decoding=mode)
    same_chunks(monkeypatch, network, 2)
    paths = draw(network, inputs_of(network), PATCH, 6).paths
    assert len(paths.flatten(1).unique(dim=0)) == 6


@pytest.mark.parametrize("mode", DECODINGS)
def test_a_seed_makes_forecasts_equal(mode: str) -> None:
    predictor = predictor_of(decoding=mode)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(np.stack([forecast.samples for forecast in predictor.predict(series())]))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).mean() > 0.99


@pytest.mark.parametrize("mode", DECODINGS)
@pytest.mark.parametrize("lead_time", [0, 2])
@pytest.mark.parametrize("channels", [None, 2])
def test_horizons_within_a_patch_are_distributions(
    mode: str, lead_time: int, channels: int | None
) -> None:
    """Nothing is drawn, and lead time and horizon are steps of the same patch."""
    settings = {"decoding": mode, "target_dim": channels or 1}
    entries = series(channels=channels)
    horizon = PATCH - lead_time
    predictor = predictor_of(prediction_length=horizon, lead_time=lead_time, **settings)
    whole = predictor_of(prediction_length=PATCH, **settings)
    state = torch.get_rng_state()
    for forecast, full in zip(predictor.predict(entries), whole.predict(entries), strict=True):
        assert isinstance(forecast, BatchedDistributionForecast)
        shape = (horizon,) if channels is None else (horizon, channels)
        assert forecast.distribution.batch_shape == shape
        assert (forecast.quantile(0.1) < forecast.quantile(0.9)).all()
        for level in (0.1, 0.5, 0.9):
            np.testing.assert_allclose(
                forecast.distribution.icdf(torch.tensor(level)), forecast.quantile(level), rtol=1e-5
            )
            np.testing.assert_allclose(
                forecast.quantile(level), full.quantile(level)[lead_time:], rtol=1e-5
            )
        assert forecast.start_date == full.start_date + lead_time
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", DECODINGS)
def test_longer_horizons_are_samples(mode: str) -> None:
    for horizon, kind in ((PATCH, BatchedDistributionForecast), (PATCH + 1, SampleForecast)):
        predictor = predictor_of(prediction_length=horizon, decoding=mode, num_samples=5)
        for entry, forecast in zip(series(), predictor.predict(series()), strict=True):
            assert type(forecast) is kind
            assert forecast.start_date == entry["start"] + len(entry["target"])
            assert forecast.item_id == entry["item_id"]
            assert np.shape(forecast.quantile(0.5)) == (horizon,)


def test_paths_of_the_first_patch_are_drawn_from_its_distribution() -> None:
    entries = series(number=2)
    (exact, *_), (drawn, *_) = (
        list(predictor_of(prediction_length=horizon).predict(entries, num_samples=4000))
        for horizon in (PATCH, LONG)
    )
    for level in (0.1, 0.5, 0.9):
        quantile = np.quantile(drawn.samples[:, :PATCH], level, axis=0)
        probability = exact.distribution.cdf(torch.from_numpy(quantile).float()).numpy()
        np.testing.assert_allclose(probability, level, atol=0.03)


def test_steps_of_the_lead_time_are_drawn_but_not_forecast() -> None:
    """A path after a lead time is the end of one without it."""
    late = predictor_of(prediction_length=LONG - 3, lead_time=3)
    early = predictor_of(prediction_length=LONG)
    torch.manual_seed(3)
    expected = np.stack([forecast.samples[:, 3:] for forecast in early.predict(series())])
    torch.manual_seed(3)
    found = np.stack([forecast.samples for forecast in late.predict(series())])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("mode", DECODINGS)
@pytest.mark.parametrize("head", ["student_t", "moirai_mixture"])
@pytest.mark.parametrize("horizon", [PATCH, LONG])
def test_forecasts_follow_the_scale_of_the_series(mode: str, head: str, horizon: int) -> None:
    """But for the 1e-5 that is added to every variance."""
    predictor = predictor_of(
        prediction_length=horizon, decoding=mode, distr_output=head, scaling="regularised_std"
    )
    entries = series(number=3)
    larger = [{**entry, "target": 1000 * entry["target"]} for entry in entries]
    values = forecast_values(predictor, entries)
    spread = np.ptp(values, axis=(1, 2))[:, np.newaxis, np.newaxis]
    error = np.abs(forecast_values(predictor, larger) / 1000 - values)
    assert (error < 1e-3 * (spread + np.abs(values))).all()


def difficult() -> dict[str, np.ndarray]:
    plain = series(number=1)[0]["target"]
    gaps, tail, head = plain.copy(), plain.copy(), plain.copy()
    gaps[-13:-2:3] = gaps[-9:-5] = np.nan
    tail[-7:] = np.nan
    head[:-3] = np.nan
    unseen = plain.copy()
    unseen[-80:] = np.nan
    return {
        "gaps": gaps,
        "missing tail": tail,
        "missing but for the last": head,
        "missing for longer than the context": unseen,
        "constant": np.full(40, 3.0, np.float32),
        "zero": np.zeros(40, np.float32),
        "one value": np.array([5.0], np.float32),
        "large": 1e8 * plain,
        "small": 1e-8 * plain,
    }


@pytest.mark.parametrize("mode", DECODINGS)
@pytest.mark.parametrize("scaling", ["std", "regularised_std"])
@pytest.mark.parametrize("head", ["student_t", "moirai_mixture"])
def test_difficult_series_are_forecast_with_finite_numbers(
    mode: str, head: str, scaling: str
) -> None:
    entries = [{**series(number=1)[0], "target": target} for target in difficult().values()]
    for horizon in (PATCH, LONG):
        predictor = predictor_of(
            prediction_length=horizon,
            decoding=mode,
            distr_output=head,
            scaling=scaling,
            num_samples=30,
        )
        values = forecast_values(predictor, entries)
        for name, of_series in zip(difficult(), values, strict=True):
            assert np.isfinite(of_series).all(), name


@pytest.mark.parametrize("mode", DECODINGS)
def test_padding_before_a_series_does_not_matter(mode: str) -> None:
    """A series shorter than the context is forecast as with a shorter context."""
    entries = series(number=3)
    short = [{**entry, "target": entry["target"][-2 * PATCH :]} for entry in entries]
    padded = predictor_of(decoding=mode, context_length=4 * PATCH)
    exact = predictor_of(decoding=mode, context_length=2 * PATCH)
    np.testing.assert_allclose(
        forecast_values(padded, short), forecast_values(exact, short), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("mode", DECODINGS)
def test_serialised_predictors_draw_the_same(mode: str, tmp_path: Path) -> None:
    predictor = predictor_of(decoding=mode, num_samples=9, patch_size=[2, 4], **COVARIATES)
    predictor.serialize(tmp_path)
    copy = MoiraiMoEPredictor.deserialize(tmp_path)
    assert copy.network.config.decoding == mode
    assert copy.num_samples == 9
    entries = series(features=True, beyond=LONG)
    drawn = []
    for each in (predictor, copy):
        torch.manual_seed(0)
        drawn.append(np.stack([forecast.samples for forecast in each.predict(entries)]))
    assert drawn[0].shape == (len(entries), 9, LONG)
    np.testing.assert_array_equal(drawn[0], drawn[1])
