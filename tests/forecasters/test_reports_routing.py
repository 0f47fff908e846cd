"""Which experts made which forecast, told by the forecast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_cases import EQUAL_TOKENS_MODELS, HEADS, MODELS, series, untrained
from moecast.forecasters import MoEPredictor
from moecast.forecasters.moe import Routing, window_shares


def weights_of(predictor: MoEPredictor, entries: list[dict]) -> list[dict[str, np.ndarray]]:
    predictor.reports_routing = True
    try:
        return [forecast.info["expert_weights"] for forecast in predictor.predict(entries)]
    finally:
        # The trained predictors are shared between tests.
        predictor.reports_routing = False


def test_shares_of_a_window_by_hand() -> None:
    # Two windows of two tokens; the weights of the last token do not sum to 1.
    routing = Routing(
        torch.tensor([[[0.75, 0.25], [1.0, 0.0]], [[0.5, 0.5], [0.1, 0.3]]]),
        torch.tensor([[[2, 0], [1, 0]], [[0, 1], [0, 2]]]),
        torch.full((2, 2, 3), 1 / 3),
    )
    shares = window_shares({"r": routing})["r"]
    expected = [[0.125, 0.5, 0.375], [0.375, 0.25, 0.375]]
    np.testing.assert_allclose(shares.numpy(), expected, atol=1e-6)
    single = Routing(torch.tensor([[1.0]]), torch.tensor([[1]]), torch.tensor([[0.2, 0.8]]))
    assert window_shares({"r": single})["r"].tolist() == [[0.0, 1.0]]


def test_each_forecast_tells_its_own_routing(model: str, predictor: MoEPredictor) -> None:
    entries = series(number=7)
    alone = [weights_of(predictor, [entry])[0] for entry in entries]
    batched = type(predictor)(network=predictor.network, batch_size=4)
    together = weights_of(batched, entries)
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys() != set()
        for router, share in one.items():
            np.testing.assert_allclose(share, other[router], atol=1e-5)
            assert share.sum() == pytest.approx(1, abs=1e-5)
    if model in EQUAL_TOKENS_MODELS:
        for router, share in batched.expert_usage.weight_share.items():
            mean = np.mean([told[router] for told in together], axis=0)
            np.testing.assert_allclose(mean, share, atol=1e-5)
    if "calendar" not in model:
        some = next(iter(together[0]))
        assert len({told[some].round(6).tobytes() for told in together}) > 1


def test_nothing_is_told_unless_asked_for() -> None:
    predictor = untrained(MODELS["mole rmlp"]())
    entry = {**series(number=1)[0], "info": "a note"}
    assert next(iter(predictor.predict([entry]))).info == "a note"
    predictor.reports_routing = True
    info = next(iter(predictor.predict([entry]))).info
    assert set(info) == {"info", "expert_weights"}
    assert info["info"] == "a note"


def test_a_head_that_draws_as_it_computes_tells_each_series_once() -> None:
    head = HEADS["gluonts implicit quantiles"][0]
    predictor = untrained(MODELS["mole rmlp"](distr_output=head))
    predictor.num_samples = 3
    entries = series(number=3)
    told = weights_of(predictor, entries)
    assert len(told) == 3
    expected = np.mean([share["router"] for share in told], axis=0)
    np.testing.assert_allclose(predictor.expert_usage.weight_share["router"], expected, atol=1e-5)
