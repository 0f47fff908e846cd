from __future__ import annotations

import math
from typing import Optional

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecast.forecasters.moe import (
    CentroidRouter,
    LinearExperts,
    LinearRouter,
    MLPRouter,
    Router,
    Routing,
)
from torch import Tensor


class GivenLogits(Router):
    """Its features are its logits."""

    def logits(self, features_TF: Tensor) -> Tensor:
        return features_TF


def test_hand_computed_top_2() -> None:
    router = GivenLogits(4, top_k=2)
    logits = torch.tensor([[0.0, math.log(3.0), math.log(2.0), -5.0]])
    routing = router(logits)
    assert routing.is_sparse
    assert routing.num_experts == 4
    torch.testing.assert_close(routing.dense_weights(), torch.tensor([[0.0, 0.6, 0.4, 0.0]]))
    total = 1 + 3 + 2 + math.exp(-5.0)
    expected = torch.tensor([[1 / total, 3 / total, 2 / total, math.exp(-5.0) / total]])
    torch.testing.assert_close(routing.scores_TE, expected)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 7), st.integers(1, 5), st.booleans(), st.booleans(), st.data())
def test_weights_sum_to_one(
    experts: int, tokens: int, noisy: bool, training: bool, data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    router = MLPRouter(
        3,
        5,
        experts,
        top_k=data.draw(st.none() | st.integers(1, experts)),
        noisy=noisy,
        head_dropout=data.draw(st.sampled_from([0.0, 0.5, 0.95])),
        num_channels=data.draw(st.none() | st.integers(1, 3)),
    ).train(training)
    routing = router(torch.randn(tokens, 3))
    for weights in (routing.weights_TK, routing.dense_weights(), routing.scores_TE):
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
        assert (weights >= 0).all()


def test_keeping_all_experts_is_the_dense_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 5)
    for top_k in (None, 5):
        routing = GivenLogits(5, top_k=top_k)(logits)
        torch.testing.assert_close(routing.dense_weights(), logits.softmax(dim=-1))
        assert not routing.is_sparse


def test_head_dropout_never_drops_all_and_drops_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    router = GivenLogits(4, head_dropout=0.5)
    weights = router(torch.zeros(20000, 4)).dense_weights()
    kept = weights > 0
    assert kept.any(dim=-1).all()
    # Where chance would drop all four, none is.
    expected = 0.5 - 0.5**4
    assert (~kept).float().mean().item() == pytest.approx(expected, abs=0.01)
    # The survivors, of equal logits, share equally.
    torch.testing.assert_close(weights, kept.float() / kept.sum(dim=-1, keepdim=True))


def test_head_dropout_leaves_scores_and_evaluation_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 4)
    router = GivenLogits(4, top_k=2, head_dropout=0.9)
    trained = router(logits)
    torch.testing.assert_close(trained.scores_TE, logits.softmax(dim=-1))
    evaluated = router.eval()(logits)
    expected = GivenLogits(4, top_k=2)(logits)
    for ours, theirs in zip(evaluated[:3], expected[:3]):
        assert torch.equal(ours, theirs)
    assert not torch.equal(trained.dense_weights(), expected.dense_weights())


def test_noise_is_gaussian_of_learned_size_and_only_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    router = MLPRouter(3, 8, 4, top_k=2, noisy=True)
    assert router.noise is not None
    features = torch.randn(10, 3)
    plain = MLPRouter(3, 8, 4, top_k=2)
    plain.load_state_dict(
        {k: v for k, v in router.state_dict().items() if not k.startswith("noise")}
    )
    for ours, theirs in zip(router.eval()(features)[:3], plain.eval()(features)[:3]):
        assert torch.equal(ours, theirs)

    # Shazeer et al. 2017, equation 4, with every draw equal to 2.
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.full_like(like, 2.0))
    size = torch.log1p(router.noise(features).exp())
    noisy_logits = router.logits(features) + 2.0 * size
    expected = noisy_logits.topk(2, dim=-1)
    routing = router.train()(features)
    assert torch.equal(routing.ids_TK, expected.indices)
    torch.testing.assert_close(routing.weights_TK, expected.values.softmax(dim=-1))
    torch.testing.assert_close(routing.scores_TE, router.logits(features).softmax(dim=-1))


def test_noise_learns() -> None:
    torch.manual_seed(0)
    router = MLPRouter(3, 8, 4, top_k=2, noisy=True)
    assert router.noise is not None
    router(torch.randn(10, 3)).weights_TK[:, 0].sum().backward()
    assert router.noise.weight.grad is not None
    assert router.noise.weight.grad.abs().sum() > 0


def test_every_channel_gets_logits_of_its_own() -> None:
    torch.manual_seed(0)
    router = MLPRouter(3, 8, num_experts=4, num_channels=2)
    features = torch.randn(5, 3)
    routing = router(features)
    assert routing.scores_TE.shape == (5, 2, 4)
    hidden = (features @ router.hidden.weight.T + router.hidden.bias).clamp_min(0)
    for channel in range(2):
        rows = slice(4 * channel, 4 * channel + 4)
        logits = hidden @ router.output.weight[rows].T + router.output.bias[rows]
        torch.testing.assert_close(routing.scores_TE[:, channel], logits.softmax(dim=-1))


def distances(features: Tensor, centroids: Tensor) -> Tensor:
    """``[…, E]`` of ``[…, F]``."""
    return (features.unsqueeze(-2) - centroids).square().sum(dim=-1).sqrt()


@pytest.mark.parametrize("top_k", [1, 2, 5, None])
@pytest.mark.parametrize("shape", [(1,), (40,), (2, 3)])
def test_the_farthest_centroids_are_chosen(shape: tuple[int, ...], top_k: Optional[int]) -> None:
    torch.manual_seed(0)
    router = CentroidRouter(4, num_experts=5, top_k=top_k).double()
    features = torch.randn(*shape, 4, dtype=torch.float64)
    routing = router(features)
    assert routing.weights_TK.shape == routing.ids_TK.shape == (*shape, top_k or 5)
    far = distances(features, router.centroids_EF).detach()
    torch.testing.assert_close(routing.scores_TE, far.softmax(dim=-1))
    for at in np.ndindex(*shape):
        farthest = sorted(range(5), key=lambda expert: -far[at][expert])[: top_k or 5]
        total = sum(math.exp(far[at][expert]) for expert in farthest)
        expected = {expert: math.exp(far[at][expert]) / total for expert in farthest}
        routed = dict(zip(routing.ids_TK[at].tolist(), routing.weights_TK[at].tolist()))
        assert routed == pytest.approx(expected)


def test_hand_computed_distances() -> None:
    router = CentroidRouter(2, num_experts=3, top_k=2)
    centroids = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    router.load_state_dict({"centroids_EF": centroids.double()})
    routing = router(torch.zeros(1, 1, 2))
    assert routing.ids_TK.tolist() == [[[1, 2]]]
    far = torch.tensor([5.0, 1.0]).softmax(dim=-1)
    torch.testing.assert_close(routing.weights_TK, far.reshape(1, 1, 2))


def test_centroids_are_kept_in_double_precision_and_learn() -> None:
    torch.manual_seed(0)
    router = CentroidRouter(3, num_experts=4, top_k=2)
    features = torch.randn(2, 6, 3)
    routing = router(features)
    assert router.state_dict()["centroids_EF"].dtype == torch.float64
    assert routing.weights_TK.dtype == routing.scores_TE.dtype == torch.float32
    expected = distances(features.double(), router.centroids_EF).softmax(dim=-1)
    torch.testing.assert_close(routing.scores_TE.double(), expected, rtol=1e-4, atol=1e-5)

    routing.weights_TK[..., 0].sum().backward()
    gradient = router.centroids_EF.grad
    assert gradient is not None
    assert gradient.dtype == torch.float64
    touched = set(gradient.any(dim=-1).nonzero().flatten().tolist())
    assert touched == set(routing.ids_TK.flatten().tolist())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gradients_reach_every_chosen_expert_and_no_other(top_k: int) -> None:
    torch.manual_seed(0)
    router = MLPRouter(3, 8, num_experts=5, top_k=top_k)
    experts = LinearExperts(5, 3, 2)
    x = torch.randn(1, 3)
    routing: Routing = router(x)
    experts.mix(x, routing.dense_weights()).square().sum().backward()
    assert experts.weight.grad is not None
    assert experts.bias.grad is not None
    chosen = set(routing.ids_TK.flatten().tolist())
    assert len(chosen) == top_k
    for gradient in (experts.weight.grad, experts.bias.grad):
        touched = gradient.flatten(1).abs().sum(dim=1) > 0
        assert set(touched.nonzero().flatten().tolist()) == chosen
    router_gradient = router.output.weight.grad
    assert router_gradient is not None
    # A single chosen expert has weight 1 whatever its logit.
    touched = router_gradient.abs().sum(dim=1) > 1e-9
    assert set(touched.nonzero().flatten().tolist()) == (chosen if top_k > 1 else set())


def test_hand_computed_weights_by_score() -> None:
    """Fedus et al. (2022), equation 2: a single choice weighs its probability."""
    logits = torch.tensor([[0.0, math.log(3.0), math.log(2.0)]])
    one = GivenLogits(3, top_k=1, weighted_by_score=True)(logits)
    assert one.ids_TK.tolist() == [[1]]
    torch.testing.assert_close(one.weights_TK, torch.tensor([[3 / 6]]))
    two = GivenLogits(3, top_k=2, weighted_by_score=True)(logits)
    torch.testing.assert_close(two.dense_weights(), torch.tensor([[0.0, 3 / 6, 2 / 6]]))
    # By default the chosen share all of the weight.
    torch.testing.assert_close(GivenLogits(3, top_k=1)(logits).weights_TK, torch.ones(1, 1))


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("top_k", [1, 2, 4, None])
def test_the_linear_router_weighs_its_choices_by_their_scores(
    top_k: Optional[int], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    router = LinearRouter(3, num_experts=4, top_k=top_k)
    assert set(router.state_dict()) == {"output.weight"}
    features = torch.randn(*shape, 3)
    routing = router(features)
    scores = (features @ router.output.weight.T).softmax(dim=-1)
    best = scores.topk(top_k or 4, dim=-1)
    torch.testing.assert_close(routing.scores_TE, scores)
    expected = torch.zeros_like(scores).scatter(-1, best.indices, best.values)
    torch.testing.assert_close(routing.dense_weights(), expected)
    if top_k in (4, None):
        ones = torch.ones(shape)
        torch.testing.assert_close(routing.dense_weights().sum(dim=-1), ones)


def test_the_choice_of_a_single_expert_by_score_learns() -> None:
    """The gradient of its score s with respect to its own logit is s (1 - s)."""
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    routing = GivenLogits(4, top_k=1, weighted_by_score=True)(logits)
    routing.weights_TK.sum().backward()
    scores = logits.detach().softmax(dim=-1)
    best = scores.max(dim=-1, keepdim=True)
    one = torch.zeros_like(scores).scatter(-1, best.indices, 1.0)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, best.values * (one - scores))


def test_dropped_experts_leave_the_weight_by_score_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 4)
    routing = GivenLogits(4, top_k=1, head_dropout=0.8, weighted_by_score=True)(logits)
    scores = logits.softmax(dim=-1)
    torch.testing.assert_close(routing.weights_TK, scores.gather(-1, routing.ids_TK))
    assert not torch.equal(routing.ids_TK[:, 0], logits.argmax(dim=-1))


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_order_of_the_experts_does_not_matter(top_k: Optional[int]) -> None:
    torch.manual_seed(0)
    router, permuted_router = (MLPRouter(3, 8, 5, top_k=top_k) for _ in range(2))
    experts, permuted_experts = LinearExperts(5, 3, 2), LinearExperts(5, 3, 2)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted_router.load_state_dict(
        {
            name: tensor[order] if name.startswith("output") else tensor
            for name, tensor in router.state_dict().items()
        }
    )
    permuted_experts.load_state_dict(
        {name: tensor[order] for name, tensor in experts.state_dict().items()}
    )
    x = torch.randn(7, 3)
    result = experts.mix(x, router(x).dense_weights())
    permuted = permuted_experts.mix(x, permuted_router(x).dense_weights())
    torch.testing.assert_close(permuted, result)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"num_experts": 3, "top_k": 4}, r"top_k=4 must lie between 1 and num_experts=3; leave"),
        ({"num_experts": 3, "top_k": 0}, "top_k=0 must lie between 1 and num_experts=3"),
        ({"num_experts": 3, "head_dropout": 1.0}, r"head_dropout=1.0 must lie in \[0, 1\)"),
        ({"num_experts": 3, "head_dropout": -0.1}, r"head_dropout=-0.1 must lie in \[0, 1\)"),
    ],
)
def test_impossible_settings_are_refused(settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GivenLogits(**settings_)
