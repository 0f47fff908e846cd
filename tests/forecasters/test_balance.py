from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecast.forecasters.moe import (
    ExpertUsage,
    Routing,
    balance_loss,
    total_balance_loss,
    window_shares,
)


def routing_to(ids: list, scores: list) -> Routing:
    ids_TK = torch.tensor(ids)
    weights_TK = torch.full(ids_TK.shape, 1.0 / ids_TK.shape[-1])
    return Routing(weights_TK, ids_TK, torch.tensor(scores))


@pytest.mark.parametrize("experts", [2, 3, 8])
def test_uniform_routing_costs_1_and_collapse_costs_the_number_of_experts(experts: int) -> None:
    uniform = routing_to([[e] for e in range(experts)], [[1 / experts] * experts] * experts)
    assert balance_loss(uniform).item() == pytest.approx(1.0)
    one_hot = [1.0] + [0.0] * (experts - 1)
    collapsed = routing_to([[0]] * 5, [one_hot] * 5)
    assert balance_loss(collapsed).item() == pytest.approx(experts)


def test_hand_computed_balance_loss() -> None:
    # Shares of the choices 2/4, 2/4, 0; mean scores 0.4, 0.35, 0.25.
    routing = routing_to([[0, 1], [1, 0]], [[0.5, 0.3, 0.2], [0.3, 0.4, 0.3]])
    assert balance_loss(routing).item() == pytest.approx(3 * (0.5 * 0.4 + 0.5 * 0.35))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.data())
def test_balance_loss_equals_a_loop(
    tokens: int, channels: int, experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    logits = torch.randn(tokens, channels, experts, dtype=torch.float64)
    chosen = logits.topk(top_k, dim=-1)
    scores = logits.softmax(dim=-1)
    routing = Routing(chosen.values.softmax(dim=-1), chosen.indices, scores)
    count, mean = [0] * experts, [0.0] * experts
    for t in range(tokens):
        for c in range(channels):
            for e in range(experts):
                count[e] += e in chosen.indices[t, c].tolist()
                mean[e] += scores[t, c, e].item() / (tokens * channels)
    total = tokens * channels * top_k
    expected = experts * sum(n / total * p for n, p in zip(count, mean))
    assert balance_loss(routing).item() == pytest.approx(expected)


def test_the_gradient_pushes_the_busiest_expert_down() -> None:
    logits = torch.zeros(4, 3, requires_grad=True)
    ids = torch.tensor([[0], [0], [0], [1]])
    balance_loss(Routing(torch.ones(4, 1), ids, logits.softmax(dim=-1))).backward()
    assert logits.grad is not None
    busiest, middle, idle = logits.grad.sum(dim=0).tolist()
    assert busiest > middle > idle
    assert busiest > 0 > idle


def test_dense_mixtures_have_no_balance_loss() -> None:
    sparse = routing_to([[0], [0]], [[1.0, 0.0]] * 2)
    dense = routing_to([[0, 1], [0, 1]], [[1.0, 0.0]] * 2)
    assert total_balance_loss({"a": dense}).item() == 0.0
    assert total_balance_loss({}).item() == 0.0
    both = {"a": dense, "b": sparse, "c": sparse}
    assert total_balance_loss(both).item() == pytest.approx(4.0)


def test_usage_sums_over_batches_by_router() -> None:
    usage = ExpertUsage()
    first = Routing(
        torch.tensor([[0.75, 0.25]]), torch.tensor([[2, 0]]), torch.tensor([[0.3, 0.1, 0.6]])
    )
    second = Routing(
        torch.tensor([[0.5, 0.5], [0.9, 0.1], [1.0, 0.0]]),
        torch.tensor([[0, 1], [0, 1], [0, 2]]),
        torch.full((3, 3), 1 / 3),
    )
    usage.update({"router": first, "other": second})
    usage.update({"router": second})
    np.testing.assert_allclose(
        usage.weight_share["router"], np.array([0.25 + 2.4, 0.6, 0.75]) / 4, atol=1e-6
    )
    np.testing.assert_allclose(usage.chosen_share["router"], [1.0, 0.5, 0.5])
    np.testing.assert_allclose(usage.chosen_share["other"], [1.0, 2 / 3, 1 / 3])
    for shares, total in ((usage.weight_share, 1.0), (usage.chosen_share, 2.0)):
        assert {name: pytest.approx(s.sum()) for name, s in shares.items()} == {
            "router": total,
            "other": total,
        }


def test_usage_counts_channels_as_tokens_and_keeps_no_graph() -> None:
    logits = torch.randn(5, 2, 3, requires_grad=True)
    chosen = logits.topk(1, dim=-1)
    routing = Routing(chosen.values.softmax(dim=-1), chosen.indices, logits.softmax(dim=-1))
    usage = ExpertUsage()
    usage.update({"r": routing})
    expected = np.bincount(chosen.indices.flatten().numpy(), minlength=3) / 10
    np.testing.assert_allclose(usage.weight_share["r"], expected, atol=1e-6)
    np.testing.assert_allclose(usage.chosen_share["r"], expected)


def test_every_token_counts_the_same_in_usage_whatever_its_weights_sum_to() -> None:
    """As where choices weigh their scores."""
    ids, scores = torch.tensor([[0], [1], [1], [1]]), torch.full((4, 3), 1 / 3)
    usage = ExpertUsage()
    usage.update({"r": Routing(torch.tensor([[0.9], [0.1], [0.2], [0.3]]), ids, scores)})
    np.testing.assert_allclose(usage.weight_share["r"], [0.25, 0.75, 0.0], atol=1e-6)
    two = Routing(torch.tensor([[0.1, 0.3]]), torch.tensor([[2, 0]]), scores[:1])
    usage.update({"two": two})
    np.testing.assert_allclose(usage.weight_share["two"], [0.75, 0.0, 0.25], atol=1e-6)


def test_padding_counts_in_no_loss_no_usage_and_no_share() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 4, 5).softmax(dim=-1).requires_grad_()
    chosen = scores.topk(2, dim=-1)
    counted = torch.tensor([[False, True, True, True], [True] * 4, [False, False, False, True]])
    padded = Routing(chosen.values, chosen.indices, scores, counted)
    plain = Routing(chosen.values[counted], chosen.indices[counted], scores[counted])
    torch.testing.assert_close(balance_loss(padded), balance_loss(plain))
    (gradient,) = torch.autograd.grad(balance_loss(padded), scores)
    assert (gradient[~counted] == 0).all()
    assert (gradient[counted] != 0).any(dim=-1).all()

    usage = {"padded": ExpertUsage(), "plain": ExpertUsage()}
    usage["padded"].update({"r": padded})
    usage["plain"].update({"r": plain})
    for name in ("weight_share", "chosen_share"):
        shares = [getattr(of_one, name)["r"] for of_one in usage.values()]
        np.testing.assert_allclose(*shares, rtol=1e-6)
    shares = window_shares({"r": padded})["r"]
    for window, share in enumerate(shares):
        own = (part[window : window + 1, counted[window]] for part in padded[:3])
        torch.testing.assert_close(share, window_shares({"r": Routing(*own)})["r"][0])
