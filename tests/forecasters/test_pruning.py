"""Experts that nobody uses are left out, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import numpy as np
import pytest
import torch
from gluonts.model.predictor import Predictor
from model_cases import MODELS, forecast_values, series, untrained
from moecast.forecasters import prune_experts
from moecast.forecasters.moe import (
    CentroidRouter,
    GatedExperts,
    LinearExperts,
    LinearRouter,
    MLPRouter,
    ResidualMLPExperts,
)
from moecast.forecasters.pruning import unused_experts
from torch import Tensor

ROUTERS = {
    "linear": lambda: LinearRouter(5, 4, 2),
    "centroids": lambda: CentroidRouter(5, 4, 2),
    "mlp": lambda: MLPRouter(5, 6, 4, 2),
    "mlp by channel": lambda: MLPRouter(5, 6, 4, 2, noisy=True, num_channels=3),
}


@pytest.mark.parametrize("name", list(ROUTERS))
def test_a_router_scores_the_experts_that_stay_as_before(name: str) -> None:
    router = ROUTERS[name]().eval()
    x = torch.randn(7, 5, dtype=torch.float64)
    router.double()
    before = router.logits(x)
    router.keep([1, 3])
    torch.testing.assert_close(router.logits(x), before[..., [1, 3]])
    assert router(x).scores_TE.shape[-1] == 2


def test_banks_compute_the_experts_that_stay_as_before() -> None:
    x = torch.randn(7, 5)
    for bank in (
        LinearExperts(4, 5, 3),
        LinearExperts(4, 5, 3, num_channels=1),
        ResidualMLPExperts(4, 5, 6).eval(),
    ):
        before = bank(x).detach()
        bank.keep([0, 3])
        torch.testing.assert_close(bank(x), before[..., [0, 3], :, :])
    gated = GatedExperts(4, 5, 6)
    expand, strides = gated.expand.detach(), gated.expand.stride()
    gated.keep([2, 1])
    torch.testing.assert_close(gated.expand.detach(), expand[[2, 1]])
    assert gated.expand.stride() == strides


@pytest.mark.parametrize("model", list(MODELS))
def test_pruned_forecasts_are_those_that_never_choose_the_experts_left_out(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = untrained(MODELS[model]())
    mixtures = original.network.mixtures()
    assert mixtures
    dropped = {name: [1] for name in mixtures}
    monkeypatch.setattr("moecast.forecasters.pruning.unused_experts", lambda *_: dropped)
    pruned = prune_experts(original, series())
    found = forecast_values(pruned, series())
    for name, (router, _) in pruned.network.mixtures().items():
        assert 1 not in pruned.network.kept_experts[name]
        assert router.num_experts == mixtures[name].router.num_experts - 1
        assert len(pruned.expert_usage.weight_share[name]) == router.num_experts

    pruned.serialize(tmp_path)
    again = Predictor.deserialize(tmp_path)
    np.testing.assert_array_equal(forecast_values(again, series()), found)

    def without_1(logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: logits(x).index_fill(-1, torch.tensor([1]), float("-inf"))

    for router, _ in mixtures.values():
        scoring = router.scoring
        router.logits = without_1(router.logits if scoring is None else scoring.logits)
    for router, _ in mixtures.values():
        # Scores and choice are then two steps.
        monkeypatch.setattr(type(router), "scoring", None)
    expected = forecast_values(original, series())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_pruning_again_counts_experts_as_the_network_was_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictor = untrained(MODELS["moirai-moe"](num_experts=5))
    for drop, kept in (([1], [0, 2, 3, 4]), ([3], [0, 2, 4])):
        dropped = dict.fromkeys(predictor.network.mixtures(), drop)
        monkeypatch.setattr("moecast.forecasters.pruning.unused_experts", lambda *_, d=dropped: d)
        predictor = prune_experts(predictor, series())
        assert set(map(tuple, predictor.network.kept_experts.values())) == {tuple(kept)}
    with pytest.raises(ValueError, match=r"kept_experts\['layers.0.router'\]=\[1\] must be some"):
        predictor.network.keep_experts({"layers.0.router": [1]})
    with pytest.raises(ValueError, match="published format has as many experts in every layer"):
        predictor.save_pretrained("nowhere")


def test_unused_experts_are_those_of_small_shares_but_never_the_needed() -> None:
    predictor = untrained(MODELS["moirai-moe"](num_experts=4, top_k=2))
    with pytest.raises(ValueError, match="call predict before"):
        unused_experts(predictor)
    shares = {"layers.0.router": [0.6, 0.0, 0.4, 0.0], "layers.1.router": [1.0, 0.0, 0.0, 0.0]}
    predictor.expert_usage = SimpleNamespace(
        weight_share={
            name: np.array(shares.get(name, [0.25] * 4)) for name in predictor.network.mixtures()
        }
    )
    unused = unused_experts(predictor)
    assert unused["layers.0.router"] == [1, 3]
    assert len(unused["layers.1.router"]) == 2
    assert 0 not in unused["layers.1.router"]
    assert unused.keys() == shares.keys() & predictor.network.mixtures().keys()
    assert unused_experts(predictor, 0.5)["layers.0.router"] == [1, 3]
    with pytest.raises(ValueError, match=r"least_share=1\.0 must lie in"):
        unused_experts(predictor, 1.0)
