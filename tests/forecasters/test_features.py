from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from moecast.forecasters.features import FeatureScaler, WindowFeatures
from moecast.forecasters.fields import WindowConfig
from moecast.forecasters.series import read_chunks

CONFIG = WindowConfig(
    "h",
    prediction_length=2,
    context_length=3,
    num_feat_dynamic_real=2,
    num_past_feat_dynamic_real=1,
    num_feat_static_real=2,
    cardinality=(3, 200),
)


def entries() -> list[dict]:
    generator = np.random.default_rng(0)
    return [
        {
            "start": pd.Period("2024", freq="h"),
            "target": np.ones(20),
            "feat_dynamic_real": generator.normal([[100.0], [-3.0]], [[5.0], [0.1]], (2, 20)),
            "past_feat_dynamic_real": np.where(
                np.arange(20) % 3, generator.normal(size=20), np.nan
            ),
            "feat_static_real": [number, 7.0],
            "feat_static_cat": [number % 3, 199 - number],
        }
        for number in range(4)
    ]


@pytest.fixture
def fitted() -> WindowFeatures:
    torch.manual_seed(0)
    features = WindowFeatures(CONFIG)
    (series,) = read_chunks(entries(), CONFIG)
    features.fit(series)
    return features


def test_the_training_set_is_standardised(fitted: WindowFeatures) -> None:
    for name in ("feat_dynamic_real", "past_feat_dynamic_real"):
        values = np.concatenate([np.atleast_2d(entry[name]).T for entry in entries()])
        scaled = fitted.scalers[name](torch.from_numpy(values).float()).numpy()
        known = np.isfinite(values)
        for column in range(values.shape[1]):
            seen = scaled[known[:, column], column]
            assert seen.mean() == pytest.approx(0.0, abs=1e-4)
            assert seen.std() == pytest.approx(1.0, abs=1e-4)
        assert (scaled[~known] == 0.0).all()


def test_dynamic_features_are_scaled_under_their_names(fitted: WindowFeatures) -> None:
    inputs = {
        "feat_dynamic_real": torch.randn(2, 5, 2) * 5 + 100,
        "past_feat_dynamic_real": torch.full((2, 3, 1), math.nan),
        "feat_static_real": torch.zeros(2, 2),
    }
    scaled = fitted(inputs)
    assert set(scaled) == {"feat_dynamic_real", "past_feat_dynamic_real"}
    known = np.concatenate([entry["feat_dynamic_real"] for entry in entries()], axis=1)
    expected = (inputs["feat_dynamic_real"].numpy() - known.mean(axis=1)) / known.std(axis=1)
    np.testing.assert_allclose(scaled["feat_dynamic_real"].numpy(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(scaled["past_feat_dynamic_real"], torch.zeros(2, 3, 1))


def test_categories_are_embedded_and_real_features_scaled(fitted: WindowFeatures) -> None:
    # GluonTS's widths: min(50, (cardinality + 1) // 2).
    assert fitted.num_static == 2 + 50 + 2
    inputs = {
        "feat_static_cat": torch.tensor([[2, 5], [0, 5]]),
        "feat_static_real": torch.tensor([[3.0, 7.0], [math.nan, 8.0]]),
    }
    static = fitted.static(inputs)
    assert static is not None
    assert static.shape == (2, fitted.num_static)
    assert torch.equal(static[:, :2], fitted.embeddings[0].weight[[2, 0]])
    assert torch.equal(static[:, 2:52], fitted.embeddings[1].weight[[5, 5]])
    # Of 0, 1, 2, 3 the mean is 1.5; a feature that never varied is only centred.
    expected = [[1.5 / math.sqrt(1.25), 0.0], [0.0, 1.0]]
    torch.testing.assert_close(static[:, 52:], torch.tensor(expected))


def test_without_static_features_there_are_none() -> None:
    features = WindowFeatures(WindowConfig("h", 2, 3))
    assert features.static({}) is None
    assert features.num_static == 0
    assert features({}) == {}


def test_moments_are_saved_with_the_weights(fitted: WindowFeatures) -> None:
    copy = WindowFeatures(CONFIG)
    copy.load_state_dict(fitted.state_dict())
    values = torch.randn(1, 5, 2)
    ours, theirs = copy.scalers["feat_dynamic_real"], fitted.scalers["feat_dynamic_real"]
    assert torch.equal(ours(values), theirs(values))
    assert not torch.equal(
        ours(values), WindowFeatures(CONFIG).scalers["feat_dynamic_real"](values)
    )


def test_moments_are_not_trained() -> None:
    scaler = FeatureScaler(3)
    assert list(scaler.parameters()) == []
    torch.testing.assert_close(scaler(torch.ones(2, 3)), torch.ones(2, 3))
