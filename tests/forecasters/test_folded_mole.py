"""MoLE as a few matrices is MoLE layer by layer."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from model_cases import FEATURES, mole, untrained
from moecast.backends import TorchBackend


class FoldingBackend(TorchBackend):
    folds = True


def outputs_of(folds: bool, **settings: Any) -> list[torch.Tensor]:
    predictor = untrained(mole(moving_average=5)(**settings))
    network = predictor.network
    if folds:
        network.use_backend(FoldingBackend())
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(spec.shape, generator=generator)
        for name, spec in network.describe_inputs(3).items()
    }
    inputs["past_observed_values"] = torch.ones_like(inputs["past_observed_values"])
    if "feat_static_cat" in inputs:
        inputs["feat_static_cat"] = torch.arange(3)[:, None] % torch.tensor([[3, 2]])
    with torch.no_grad():
        found = network.outputs(inputs, settings["patch_size"])
    routing = found.routings["router"]
    return [*found.distr_args, found.loc, found.scale, routing.dense_weights(), routing.scores_TE]


@pytest.mark.parametrize("features", [False, True], ids=["alone", "covariates"])
@pytest.mark.parametrize("patch_size", [1, 3])
@pytest.mark.parametrize(
    ("expert", "router"),
    itertools.product(("dlinear", "rlinear", "rmlp"), ("window", "statistics", "calendar")),
)
def test_folding_changes_no_output(
    expert: str, router: str, patch_size: int, features: bool
) -> None:
    for channels, individual, top_k in ((1, False, 2), (2, False, None), (2, True, 2)):
        settings: dict[str, Any] = {
            "expert": expert,
            "router": router,
            "patch_size": patch_size,
            "target_dim": channels,
            "individual": individual,
            "top_k": top_k,
            **(FEATURES if features else {}),
        }
        expected, found = (outputs_of(folds, **settings) for folds in (False, True))
        for mine, theirs in zip(found, expected):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_single_expert_needs_no_router() -> None:
    settings = {"num_experts": 1, "expert": "rmlp", "patch_size": 1}
    for mine, theirs in zip(outputs_of(True, **settings), outputs_of(False, **settings)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_matrices_are_made_anew_when_a_weight_changed() -> None:
    network = untrained(mole()(expert="dlinear")).network.eval()
    network.use_backend(FoldingBackend())
    inputs = {name: torch.randn(s.shape) for name, s in network.describe_inputs(2).items()}
    inputs["past_observed_values"] = torch.ones_like(inputs["past_observed_values"])
    with torch.no_grad():
        network.outputs(inputs)
        for parameter in network.parameters():
            parameter.mul_(1.5)
        found = network.outputs(inputs).distr_args
        network.use_backend(TorchBackend())
        expected = network.outputs(inputs).distr_args
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
