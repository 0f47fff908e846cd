"""MoLE's network against what it stands for, written out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import CONTEXT, FEATURES, HORIZON, MODELS, forecast_values, mole, series, untrained
from moecast.distributions import PointOutput
from moecast.forecasters.moe import Routing
from moecast.forecasters.mole import EXPERTS, ROUTERS, MoLENetwork
from torch import Tensor
from torch.nn import functional as F

BATCH = 6


def network_of(**settings: Any) -> MoLENetwork:
    network = untrained(mole()(**settings)).network
    assert isinstance(network, MoLENetwork)
    return network


def inputs_of(network: MoLENetwork, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        name: torch.zeros(spec.shape, dtype=spec.dtype)
        if spec.dtype == torch.long
        else torch.randn(spec.shape, generator=generator)
        for name, spec in network.describe_inputs(BATCH).items()
    }
    inputs["past_observed_values"] = torch.ones_like(inputs["past_observed_values"])
    return inputs


def points(network: MoLENetwork, inputs: dict[str, Tensor]) -> Tensor:
    """Point forecasts ``[batch, horizon, channel]``."""
    with torch.no_grad():
        output = network.outputs(inputs)
    return output.loc + output.scale * output.distr_args[0]


class FixedRouter(torch.nn.Module):
    """Gives every token the same weights, whatever it is shown."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, features: Tensor) -> Routing:
        weights = self.weights.expand(*features.shape[:-1], -1)
        ids = torch.arange(weights.shape[-1]).expand_as(weights)
        return Routing(weights, ids, weights)


def dlinear(x: Tensor, window: int, seasonal: Tensor, trend: Tensor, bias: Tensor) -> Tensor:
    """Zeng et al. (2023) for ``[batch, time]``, the average taken one step at a time."""
    before, length = (window - 1) // 2, x.shape[1]
    averages = []
    for centre in range(length):
        steps = range(centre - before, centre - before + window)
        inside = [min(max(step, 0), length - 1) for step in steps]
        averages.append(x[:, inside].mean(dim=1))
    average = torch.stack(averages, dim=1)
    return F.linear(x - average, seasonal) + F.linear(average, trend) + bias


@pytest.mark.parametrize("window", [1, 4, 5, 25])
def test_one_dlinear_expert_is_dlinear(window: int) -> None:
    network = network_of(
        expert="dlinear",
        num_experts=1,
        scaling="none",
        moving_average=window,
        distr_output=PointOutput(),
    )
    inputs = inputs_of(network)
    linear = network.experts["1"].linear
    seasonal, trend = linear.weight[0].T.split(CONTEXT, dim=1)
    past = inputs["past_target"][..., 0]
    expected = dlinear(past, window, seasonal, trend, linear.bias[0])
    torch.testing.assert_close(points(network, inputs)[..., 0], expected, rtol=1e-4, atol=1e-5)


def test_one_dlinear_expert_gives_every_parameter_of_a_distribution() -> None:
    network = network_of(
        expert="dlinear", num_experts=1, scaling="none", moving_average=5, distr_output="normal"
    )
    inputs = inputs_of(network)
    linear = network.experts["1"].linear
    seasonal, trend = linear.weight[0].T.split(CONTEXT, dim=1)
    past = inputs["past_target"][..., 0]
    raw = dlinear(past, 5, seasonal, trend, linear.bias[0]).reshape(BATCH, 2, HORIZON)
    with torch.no_grad():
        (mean, deviation), _, _ = network(*(inputs[name] for name in network.input_names))
    torch.testing.assert_close(mean[..., 0], raw[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deviation[..., 0], F.softplus(raw[:, 1]), rtol=1e-4, atol=1e-5)


def test_one_rmlp_expert_is_a_residual_block_and_a_linear_map() -> None:
    network = network_of(num_experts=1, scaling="none", distr_output=PointOutput())
    inputs = inputs_of(network)
    experts = network.experts["1"]
    x = inputs["past_target"][..., 0]
    expand, contract = experts.residual.expand, experts.residual.contract
    hidden = F.relu(F.linear(x, expand.weight[0].T, expand.bias[0]))
    x = x + F.linear(hidden, contract.weight[0].T, contract.bias[0])
    expected = F.linear(x, experts.linear.weight[0].T, experts.linear.bias[0])
    torch.testing.assert_close(points(network, inputs)[..., 0], expected, rtol=1e-4, atol=1e-5)


def test_one_patched_expert_is_shared_along_the_patch() -> None:
    """Phase p of the horizon depends on phase p of the lookback alone, by the same weights."""
    patch = 2
    network = network_of(
        expert="rlinear",
        num_experts=1,
        scaling="none",
        patch_size=patch,
        distr_output=PointOutput(),
    )
    inputs = inputs_of(network)
    linear = network.experts[str(patch)].linear
    assert linear.weight.shape == (1, CONTEXT // patch, HORIZON // patch)
    past = inputs["past_target"][..., 0]
    expected = torch.empty(BATCH, HORIZON)
    for phase in range(patch):
        expected[:, phase::patch] = F.linear(
            past[:, phase::patch], linear.weight[0].T, linear.bias[0]
        )
    torch.testing.assert_close(points(network, inputs)[..., 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("router", ROUTERS)
def test_mixture_of_identical_experts_is_one_expert(expert: str, router: str) -> None:
    mixture = network_of(expert=expert, router=router, distr_output=PointOutput())
    single = network_of(expert=expert, router=router, num_experts=1, distr_output=PointOutput())
    with torch.no_grad():
        for name, parameter in single.named_parameters():
            source = dict(mixture.named_parameters())[name]
            if name.startswith("experts."):
                source.copy_(source[:1].expand_as(source))
                parameter.copy_(source[:1])
            elif not name.startswith("router."):
                parameter.copy_(source)
    inputs = inputs_of(mixture)
    torch.testing.assert_close(points(mixture, inputs), points(single, inputs))


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("scaling", ["std", "mean", "none"])
@pytest.mark.parametrize("patch_size", [1, 4])
def test_dense_mixture_is_the_weighted_sum_of_its_experts(
    expert: str, scaling: str, patch_size: int
) -> None:
    network = network_of(
        expert=expert, scaling=scaling, patch_size=patch_size, distr_output=PointOutput()
    )
    inputs = inputs_of(network)
    with torch.no_grad():
        weights = network.outputs(inputs).routings["router"].dense_weights()
    mixed = points(network, inputs)
    assert weights.shape == (BATCH, 1, 3)
    assert weights.std(dim=0).min() > 0
    parts = []
    for one in torch.eye(3):
        network.router = FixedRouter(one)
        parts.append(points(network, inputs)[..., 0])
    expected = (torch.stack(parts, dim=-1) * weights).sum(dim=-1)
    torch.testing.assert_close(mixed[..., 0], expected, rtol=1e-4, atol=1e-5)


def test_mixture_is_taken_before_the_domain_map() -> None:
    network = network_of(num_experts=2, scaling="none", distr_output="normal")
    inputs = inputs_of(network)
    raw = []
    for weights in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.3, 0.7])):
        network.router = FixedRouter(weights)
        with torch.no_grad():
            _, deviation = network.outputs(inputs).distr_args
        raw.append(deviation.expm1().log())  # the inverse of softplus
    torch.testing.assert_close(raw[2], 0.3 * raw[0] + 0.7 * raw[1], rtol=1e-3, atol=1e-4)


def test_top_k_leaves_the_other_experts_out() -> None:
    network = network_of(top_k=1, distr_output=PointOutput())
    inputs = inputs_of(network)
    with torch.no_grad():
        routing = network.outputs(inputs).routings["router"]
    before = points(network, inputs)
    for expert in range(3):
        spoilt = network_of(top_k=1, distr_output=PointOutput())
        spoilt.load_state_dict(network.state_dict())
        with torch.no_grad():
            spoilt.experts["1"].linear.weight[expert] += 1.0
        moved = (points(spoilt, inputs) - before).abs().amax(dim=(1, 2)) > 1e-6
        assert moved.tolist() == (routing.ids_TK[:, 0, 0] == expert).tolist()


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("router", ROUTERS)
def test_individual_weights_are_a_loop_over_channels(expert: str, router: str) -> None:
    channels = 3
    settings = {"expert": expert, "router": router, "patch_size": 2, "distr_output": "laplace"}
    together = network_of(individual=True, target_dim=channels, **settings)
    inputs = inputs_of(together)
    with torch.no_grad():
        output = together.outputs(inputs)
    for channel in range(channels):
        alone = network_of(**settings)
        weights = {
            name: tensor[channel] if name.startswith("experts.") else tensor
            for name, tensor in together.state_dict().items()
        }
        if "affine" in weights:
            weights["affine"] = weights["affine"][:, channel : channel + 1]
        if router == "calendar":
            # Its hidden layer grows with the channels; here it gets this channel's decision.
            weights = {k: v for k, v in weights.items() if not k.startswith("router.")}
            alone.load_state_dict({**alone.state_dict(), **weights})
            chosen = output.routings["router"].dense_weights()[:, channel : channel + 1]
            alone.router = DecidedRouter(chosen)
        else:
            alone.load_state_dict(weights)
        own = {
            name: tensor[..., channel : channel + 1]
            if name in ("past_target", "past_observed_values")
            else tensor
            for name, tensor in inputs.items()
        }
        with torch.no_grad():
            single = alone.outputs(own)
        for ours, theirs in zip(output.distr_args, single.distr_args):
            torch.testing.assert_close(ours[..., channel], theirs[..., 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.loc[..., channel], single.loc[..., 0])
        torch.testing.assert_close(output.scale[..., channel], single.scale[..., 0])


class DecidedRouter(torch.nn.Module):
    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, features: Tensor) -> Routing:
        ids = torch.arange(self.weights.shape[-1]).expand_as(self.weights)
        return Routing(self.weights, ids, self.weights)


def test_shared_weights_are_the_same_for_all_channels() -> None:
    network = network_of(target_dim=3, expert="dlinear", distr_output=PointOutput())
    inputs = inputs_of(network)
    inputs["past_target"] = inputs["past_target"][..., :1].expand(-1, -1, 3).clone()
    result = points(network, inputs)
    torch.testing.assert_close(result[..., 0], result[..., 1])
    torch.testing.assert_close(result[..., 0], result[..., 2])


def test_channels_do_not_look_at_each_other() -> None:
    for individual, expert in itertools.product((False, True), EXPERTS):
        network = network_of(
            target_dim=2, expert=expert, individual=individual, distr_output=PointOutput()
        )
        inputs = inputs_of(network)
        before = points(network, inputs)
        inputs["past_target"][..., 1] *= -3
        after = points(network, inputs)
        torch.testing.assert_close(after[..., 0], before[..., 0])
        assert (after[..., 1] - before[..., 1]).abs().min() > 0


def test_calendar_router_sees_the_first_timestamp_only() -> None:
    network = network_of(router="calendar", expert="dlinear")
    inputs = inputs_of(network)

    def weights() -> Tensor:
        with torch.no_grad():
            return network.outputs(inputs).routings["router"].dense_weights()

    before = weights()
    inputs["time_feat"][:, 1:] += 1.0
    inputs["past_target"] *= 5
    torch.testing.assert_close(weights(), before)
    inputs["time_feat"][:, 0] += 1.0
    assert (weights() - before).abs().max() > 1e-3


def test_calendar_router_reads_the_hour_of_the_windows_start() -> None:
    predictor = untrained(mole(router="calendar", expert="dlinear", num_experts=8)())
    (entry,) = series(number=1)

    def weights(shift: int) -> np.ndarray:
        list(predictor.predict([{**entry, "start": entry["start"] + shift}]))
        return predictor.expert_usage.weight_share["router"]

    seen = []
    router = predictor.network.router
    router.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    first = weights(0)
    assert np.abs(weights(5) - first).max() > 1e-4
    begin = (entry["start"] + len(entry["target"]) - CONTEXT).to_timestamp()
    expected = [
        begin.hour / 23 - 0.5,
        begin.dayofweek / 6 - 0.5,
        (begin.day - 1) / 30 - 0.5,
        (begin.dayofyear - 1) / 365 - 0.5,
    ]
    np.testing.assert_allclose(seen[0][0].numpy(), expected, atol=1e-6)


def test_calendar_router_decides_for_each_channel() -> None:
    network = network_of(router="calendar", expert="dlinear", target_dim=2)
    with torch.no_grad():
        weights = network.outputs(inputs_of(network)).routings["router"].dense_weights()
    assert weights.shape == (BATCH, 2, 3)
    assert (weights[:, 0] - weights[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("expert", ["rlinear", "rmlp"])
def test_affine_map_is_undone(expert: str) -> None:
    """Experts that repeat the last value do so whatever the affine map."""
    network = network_of(expert=expert, num_experts=2, distr_output=PointOutput())
    with torch.no_grad():
        experts = network.experts["1"]
        if experts.residual is not None:
            experts.residual.contract.weight.zero_()
            experts.residual.contract.bias.zero_()
        experts.linear.bias.zero_()
        experts.linear.weight.zero_()
        experts.linear.weight[:, -1] = 1.0
    inputs = inputs_of(network)
    last = inputs["past_target"][:, -1:].expand(-1, HORIZON, -1)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            network.affine.copy_(torch.randn_like(network.affine))
        torch.testing.assert_close(points(network, inputs), last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expert", ["rlinear", "rmlp"])
def test_affine_map_changes_what_the_experts_see(expert: str) -> None:
    network = network_of(expert=expert, distr_output=PointOutput())
    inputs = inputs_of(network)
    before = points(network, inputs)
    with torch.no_grad():
        network.affine += 0.5
    assert (points(network, inputs) - before).abs().max() > 1e-2


@pytest.mark.parametrize("individual", [False, True])
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("router", ROUTERS)
def test_gradient_reaches_every_parameter(expert: str, router: str, individual: bool) -> None:
    network = network_of(
        expert=expert, router=router, individual=individual, target_dim=2, **FEATURES
    )
    inputs = inputs_of(network)
    inputs["feat_static_cat"] = torch.tensor([[0, 0], [1, 1], [2, 0], [0, 1], [1, 0], [2, 1]])
    target = torch.randn(BATCH, HORIZON, 2)
    network.loss(network.outputs(inputs), target, torch.ones_like(target)).sum().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@pytest.mark.parametrize("router", ROUTERS)
def test_head_dropout_and_noise_act_in_training_only(router: str) -> None:
    network = network_of(router=router, top_k=2, noisy_routing=True, head_dropout=0.5)
    inputs = inputs_of(network)

    def weights() -> Tensor:
        with torch.no_grad():
            return network.outputs(inputs).routings["router"].dense_weights()

    torch.testing.assert_close(weights(), weights(), rtol=0, atol=0)
    network.train()
    assert not torch.equal(weights(), weights())


@pytest.mark.parametrize("num_experts", [1, 2, 16])
@pytest.mark.parametrize("router", ROUTERS)
def test_any_number_of_experts_trains(num_experts: int, router: str) -> None:
    predictor = mole(num_experts=num_experts, router=router)().train(series())
    assert np.isfinite(forecast_values(predictor, series())).all()
    (share,) = predictor.expert_usage.weight_share.values()
    assert share.shape == (num_experts,)
    assert share.sum() == pytest.approx(1.0, abs=1e-5)


def test_statistics_router_does_not_depend_on_the_scale() -> None:
    predictor = untrained(mole(router="statistics")())
    entries = series("positive", number=2)
    list(predictor.predict(entries))
    before = predictor.expert_usage.weight_share["router"]
    list(predictor.predict([{**entry, "target": 40 * entry["target"]} for entry in entries]))
    np.testing.assert_allclose(predictor.expert_usage.weight_share["router"], before, atol=1e-5)
    list(predictor.predict([{**entry, "target": -entry["target"]} for entry in entries]))
    assert np.abs(predictor.expert_usage.weight_share["router"] - before).max() > 1e-4


def test_top_k_usage_counts_the_chosen() -> None:
    predictor = untrained(MODELS["mole top-2 noisy"]())
    list(predictor.predict(series()))
    chosen = predictor.expert_usage.chosen_share["router"]
    assert chosen.shape == (3,)
    assert chosen.sum() == pytest.approx(2.0)
