"""Tiny trained predictors, one per model, shared by all tests that only read them."""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path
from typing import Callable

import pytest
import torch

# Tests are no package; this is where they find model_cases.
sys.path.insert(0, str(Path(__file__).parent))

from model_cases import MODELS, Factory, series
from moecast.distributions.univariate import AffineDistribution
from moecast.forecasters import MoEPredictor

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def on_the_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``device="auto"`` is the CPU on any machine, for tests that call networks themselves."""

    def resolve(device: str | torch.device) -> torch.device:
        return torch.device("cpu") if device == "auto" else torch.device(device)

    if "on_cuda" not in request.keywords:
        monkeypatch.setattr("gluonts.torch.model.predictor.resolve_device", resolve)


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> str:
    """Every model in turn."""
    return request.param


@pytest.fixture
def make_estimator(model: str) -> Factory:
    return MODELS[model]


@pytest.fixture
def make_any() -> Factory:
    """Some model, for what has nothing to do with the network."""
    return next(iter(MODELS.values()))


@pytest.fixture(scope="session")
def trained_predictor() -> Callable[[str], MoEPredictor]:
    """Trains a model on :func:`series` when it is first asked for; not to be changed."""

    @functools.cache
    def train(name: str) -> MoEPredictor:
        return MODELS[name]().train(series())

    return train


@pytest.fixture
def predictor(model: str, trained_predictor: Callable[[str], MoEPredictor]) -> MoEPredictor:
    return trained_predictor(model)


@pytest.fixture
def draws_are_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes paths depend on their own series alone, as quantiles of distributions do."""

    def sample(distribution: AffineDistribution, shape: tuple[int, ...] = ()) -> torch.Tensor:
        return distribution.icdf(torch.tensor(0.5)).expand(*shape, *distribution.batch_shape)

    monkeypatch.setattr(AffineDistribution, "sample", sample)
