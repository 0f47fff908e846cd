from __future__ import annotations

import math
from typing import Optional

import pytest
import torch
from moecast.forecasters.moe import GatedExperts, LinearExperts, ResidualMLPExperts, Routing
from torch import nn
from torch.nn import functional as F


class DoublingBackend:
    """Doubles what it is given, so that one sees who computes."""

    name = "doubling"

    def expert_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        return 2 * x

    def mix_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mixture: torch.Tensor
    ) -> torch.Tensor:
        return 2 * x

    def gated_ffn(self, x: torch.Tensor, *weights_and_stacks: torch.Tensor) -> torch.Tensor:
        return 2 * x


def random_routing(*shape: int, experts: int, top_k: int) -> Routing:
    """Of tokens of this shape, each with experts in ascending order."""
    scores = torch.randn(*shape, experts).softmax(dim=-1)
    ids = scores.topk(top_k, dim=-1).indices.sort(dim=-1).values
    weights = scores.gather(-1, ids)
    return Routing(weights / weights.sum(dim=-1, keepdim=True), ids, scores)


@pytest.mark.parametrize("num_channels", [None, 3])
def test_linear_experts_are_linear_modules_side_by_side(num_channels: Optional[int]) -> None:
    torch.manual_seed(0)
    experts = LinearExperts(4, 5, 2, num_channels)
    groups = () if num_channels is None else (num_channels,)
    x = torch.randn(*groups, 6, 5)
    mixture = torch.rand(*groups, 6, 4)
    outputs, mixed = experts(x), experts.mix(x, mixture)
    assert outputs.shape == (*groups, 4, 6, 2)
    for channel in range(num_channels or 1):
        group = () if num_channels is None else (channel,)
        expected = torch.zeros(6, 2)
        for expert in range(4):
            linear = nn.Linear(5, 2)
            linear.weight.data = experts.weight.data[group][expert].T
            linear.bias.data = experts.bias.data[group][expert]
            output = linear(x[group])
            torch.testing.assert_close(outputs[group][expert], output)
            expected = expected + mixture[group][:, expert, None] * output
        torch.testing.assert_close(mixed[group], expected)


def test_experts_start_like_linear_layers_and_differ() -> None:
    torch.manual_seed(0)
    experts = LinearExperts(3, 100, 50)
    bound = 1 / math.sqrt(100)
    for parameter in (experts.weight, experts.bias):
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.9 * bound
    assert not torch.equal(experts.weight[0], experts.weight[1])


def test_a_given_backend_computes() -> None:
    backend = DoublingBackend()
    experts = LinearExperts(2, 3, 3, backend=backend)  # type: ignore[arg-type]
    x = torch.ones(4, 3)
    assert torch.equal(experts(x), 2 * x)
    assert torch.equal(experts.mix(x, torch.ones(4, 2)), 2 * x)
    residual = ResidualMLPExperts(1, 3, 3, backend=backend)  # type: ignore[arg-type]
    assert residual.expand.backend is residual.contract.backend is backend
    gated = GatedExperts(2, 3, 3, backend=backend)  # type: ignore[arg-type]
    assert torch.equal(gated(x, random_routing(4, experts=2, top_k=1)), 2 * x)


@pytest.mark.parametrize("num_channels", [None, 2])
@pytest.mark.parametrize("one_input_each", [False, True])
def test_residual_experts_add_what_their_layers_say(
    num_channels: Optional[int], one_input_each: bool
) -> None:
    torch.manual_seed(0)
    experts = ResidualMLPExperts(3, 4, 6, num_channels=num_channels)
    groups = () if num_channels is None else (num_channels,)
    x = torch.randn(*groups, 3, 5, 4) if one_input_each else torch.randn(*groups, 5, 4)
    outputs = experts(x)
    assert outputs.shape == (*groups, 3, 5, 4)
    expand, contract = experts.expand, experts.contract
    for channel in range(num_channels or 1):
        group = () if num_channels is None else (channel,)
        for expert in range(3):
            token = x[group][expert] if one_input_each else x[group]
            hidden = F.relu(token @ expand.weight[group][expert] + expand.bias[group][expert])
            change = hidden @ contract.weight[group][expert] + contract.bias[group][expert]
            torch.testing.assert_close(outputs[group][expert], token + change)


def test_hidden_units_are_dropped_in_training_only() -> None:
    torch.manual_seed(0)
    experts = ResidualMLPExperts(2, 4, 64, dropout=0.5)
    without = ResidualMLPExperts(2, 4, 64)
    without.load_state_dict(experts.state_dict())
    x = torch.randn(5, 4)
    assert not torch.equal(experts(x), experts(x))
    assert torch.equal(experts.eval()(x), without(x))
    # Dropout keeps the mean: the average over many draws is the output without it.
    average = torch.stack([experts.train()(x) for _ in range(2000)]).mean(dim=0)
    torch.testing.assert_close(average, without(x), atol=0.05, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_gated_experts_are_mixed_with_each_tokens_weights(
    shape: tuple[int, ...], top_k: int
) -> None:
    torch.manual_seed(0)
    experts = GatedExperts(4, 3, 5)
    x, routing = torch.randn(*shape, 3), random_routing(*shape, experts=4, top_k=top_k)
    outputs = experts(x, routing)
    assert outputs.shape == x.shape
    mixture = routing.dense_weights()
    expected = torch.zeros_like(x)
    for expert in range(4):
        gate, up = (x @ experts.expand[expert]).split(5, dim=-1)
        own = (gate * torch.sigmoid(gate) * up) @ experts.contract[expert]
        expected = expected + mixture[..., expert, None] * own
    torch.testing.assert_close(outputs, expected)


def test_a_single_gated_expert_needs_no_router() -> None:
    torch.manual_seed(0)
    experts = GatedExperts(1, 3, 5)
    x = torch.randn(2, 4, 3)
    ones, ids = torch.ones(2, 4, 1), torch.zeros(2, 4, 1, dtype=torch.long)
    gradients = []
    for routing in (None, Routing(ones, ids, ones)):
        outputs = experts(x, routing)
        outputs.square().sum().backward()
        gradients.append([outputs, experts.expand.grad, experts.contract.grad])
        experts.zero_grad()
    for alone, routed in zip(*gradients, strict=True):
        torch.testing.assert_close(alone, routed)


def test_a_single_gated_expert_drops_outputs_in_training_only() -> None:
    torch.manual_seed(0)
    experts = GatedExperts(1, 400, 4, dropout=0.25)
    x = torch.randn(5, 400)
    dropped = experts(x) == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert (experts.eval()(x) != 0).all()


def test_gated_experts_start_like_linear_layers_without_bias() -> None:
    torch.manual_seed(0)
    experts = GatedExperts(3, 100, 50)
    assert set(experts.state_dict()) == {"expand", "contract"}
    for weight, features in ((experts.expand, 100), (experts.contract, 50)):
        assert 0.9 < weight.abs().max() * math.sqrt(features) <= 1
        assert not torch.equal(weight[0], weight[1])


def test_gated_experts_drop_outputs_in_training_only() -> None:
    torch.manual_seed(0)
    experts = GatedExperts(2, 400, 4, dropout=0.25)
    without = GatedExperts(2, 400, 4)
    without.load_state_dict(experts.state_dict())
    x, routing = torch.randn(5, 400), random_routing(5, experts=2, top_k=1)
    outputs, expected = experts(x, routing), without(x, routing)
    kept = outputs != 0
    assert (~kept).float().mean().item() == pytest.approx(0.25, abs=0.04)
    torch.testing.assert_close(outputs[kept], expected[kept] / 0.75)
    assert torch.equal(experts.eval()(x, routing), expected)


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_reach_the_chosen_gated_experts_and_no_other(top_k: int) -> None:
    torch.manual_seed(0)
    experts = GatedExperts(5, 3, 4)
    routing = random_routing(1, experts=5, top_k=top_k)
    experts(torch.randn(1, 3), routing).square().sum().backward()
    for weight in (experts.expand, experts.contract):
        assert weight.grad is not None
        touched = weight.grad.flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert touched == sorted(routing.ids_TK.flatten().tolist())
