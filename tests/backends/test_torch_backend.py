"""The reference backend against loops over experts and tokens."""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecast.backends import BACKEND_NAMES, TorchBackend, get_backend
from moecast.backends.ttnn import what_is_missing
from torch import Tensor

BACKEND = TorchBackend()


class Problem(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    mixture: Tensor


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Random experts, with or without a channel dimension, one input or one per expert."""
    tokens, experts = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    features, outputs = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    groups = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    one_each = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*groups, *shape, generator=generator, dtype=torch.float64)

    return Problem(
        normal(experts, tokens, features) if one_each else normal(tokens, features),
        normal(experts, features, outputs),
        normal(experts, outputs),
        normal(tokens, experts).softmax(dim=-1),
    )


def expert_outputs(problem: Problem) -> np.ndarray:
    """``[*, E, T, O]``, one scalar product at a time."""
    x, weight, bias = problem.x.numpy(), problem.weight.numpy(), problem.bias.numpy()
    *groups, experts, _, outputs = weight.shape
    tokens = x.shape[-2]
    result = np.empty((*groups, experts, tokens, outputs))
    for group in np.ndindex(*groups):
        for e in range(experts):
            for t in range(tokens):
                token = x[group][e][t] if x.ndim == weight.ndim else x[group][t]
                for o in range(outputs):
                    result[(*group, e, t, o)] = token @ weight[group][e][:, o] + bias[group][e][o]
    return result


@settings(deadline=None, max_examples=60)
@given(problems())
def test_expert_linear_applies_each_experts_own_matrix(problem: Problem) -> None:
    outputs = BACKEND.expert_linear(problem.x, problem.weight, problem.bias)
    np.testing.assert_allclose(outputs.numpy(), expert_outputs(problem), atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(problems())
def test_mix_linear_is_the_weighted_sum_of_the_experts(problem: Problem) -> None:
    mixed = BACKEND.mix_linear(*problem)
    by_expert = expert_outputs(problem)
    expected = np.einsum("...eto,...te->...to", by_expert, problem.mixture.numpy())
    np.testing.assert_allclose(mixed.numpy(), expected, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.data())
def test_route_keeps_the_largest_logits_and_softmaxes_them(
    tokens: int, experts: int, channels: bool, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    shape = (tokens, 2, experts) if channels else (tokens, experts)
    logits = torch.from_numpy(
        np.random.default_rng(data.draw(st.integers(0, 2**16))).normal(size=shape)
    )
    weights, ids = BACKEND.route(logits, top_k)
    assert weights.shape == ids.shape == (*shape[:-1], top_k)
    for position in np.ndindex(*shape[:-1]):
        scores = logits[position].tolist()
        chosen = sorted(range(experts), key=lambda e: -scores[e])[:top_k]
        total = sum(np.exp(scores[e]) for e in chosen)
        expected = {e: np.exp(scores[e]) / total for e in chosen}
        routed = dict(zip(ids[position].tolist(), weights[position].tolist()))
        assert routed == pytest.approx(expected)


def test_route_gives_a_masked_expert_no_weight() -> None:
    logits = torch.tensor([[-np.inf, 1.0, -np.inf], [0.0, -np.inf, 0.0]])
    for top_k in (1, 2, 3):
        weights, ids = BACKEND.route(logits, top_k)
        dense = torch.zeros(2, 3).scatter(-1, ids, weights)
        assert torch.isfinite(weights).all()
        torch.testing.assert_close(dense.sum(dim=-1), torch.ones(2))
        assert dense[0].tolist() == [0.0, 1.0, 0.0]
        assert dense[1, 1] == 0.0


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_every_listed_backend_can_be_had(name: str) -> None:
    if name == "ttnn" and what_is_missing():
        pytest.skip("this machine has no ttnn: tests/backends/ttnn says what it is told then")
    assert get_backend(name).name in BACKEND_NAMES


@pytest.mark.parametrize(
    ("argument", "variable", "expected"),
    [(None, None, "torch"), (None, "torch", "torch"), ("torch", "nonsense", "torch")],
)
def test_an_argument_comes_before_the_environment(
    argument: Optional[str],
    variable: Optional[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MOECAST_BACKEND", raising=False)
    if variable is not None:
        monkeypatch.setenv("MOECAST_BACKEND", variable)
    assert get_backend(argument).name == expected


def test_unknown_backends_are_refused_wherever_they_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=r"backend='tpu' is unknown: choose one of auto, torch"):
        get_backend("tpu")
    monkeypatch.setenv("MOECAST_BACKEND", "gpu")
    with pytest.raises(ValueError, match="MOECAST_BACKEND='gpu' is unknown"):
        get_backend()
