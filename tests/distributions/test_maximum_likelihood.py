"""Training finds the parameters that the data were drawn with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from moecast.distributions import (
    GaussianCopulaOutput,
    Head,
    ParameterHead,
    resolve_head,
    window_loss,
)
from scipy import stats
from torch import Tensor

NUMBER = 4000


def fitted(head: Head, values: np.ndarray, start: Any = 0.0) -> tuple[Tensor, ...]:
    """Parameters with the least mean loss."""
    layer = ParameterHead(head)
    raw = torch.zeros(layer.in_features, dtype=torch.float64) + torch.as_tensor(start)
    raw.requires_grad_()
    target = torch.from_numpy(values).to(torch.float64)
    optimiser = torch.optim.LBFGS([raw], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = head.loss(target, layer(raw.expand(len(target), -1))).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    return tuple(parameter.detach() for parameter in layer(raw))


def nbinom(total_count: float, logits: float) -> Any:
    return stats.nbinom(total_count, 1 / (1 + np.exp(logits)))


def zero_inflated(seed: int) -> np.ndarray:
    counts = nbinom(3.0, 1.0).rvs(NUMBER, random_state=seed)
    return counts * (np.random.default_rng(seed + 1).random(NUMBER) > 0.4)


def two_parts(first: Any, second: Any, share: float, seed: int) -> np.ndarray:
    chosen = np.random.default_rng(seed).random(NUMBER) < share
    draws = (law.rvs(NUMBER, random_state=seed + i) for i, law in enumerate((first, second), 1))
    return np.where(chosen, *draws)


def truncated(loc: float, scale: float, lower: float, upper: float) -> Any:
    return stats.truncnorm((lower - loc) / scale, (upper - loc) / scale, loc, scale)


PARAMETRIC = [
    ("normal", stats.norm(3.0, 0.5), [3.0, 0.5]),
    ("normal_fixed_scale(0.5)", stats.norm(-1.0, 0.5), [-1.0]),
    ("laplace", stats.laplace(-2.0, 1.5), [-2.0, 1.5]),
    ("student_t", stats.t(4.0, 1.0, 2.0), [4.0, 1.0, 2.0]),
    ("log_normal", stats.lognorm(0.7, scale=np.exp(1.2)), [1.2, 0.7]),
    ("gamma", stats.gamma(2.5, scale=1 / 1.5), [2.5, 1.5]),
    ("beta", stats.beta(2.0, 5.0), [2.0, 5.0]),
    ("poisson", stats.poisson(4.2), [4.2]),
    ("negative_binomial", nbinom(2.0, 1.5), [2.0, 1.5]),
    ("negative_binomial(real_valued=True)", nbinom(2.0, 1.5), [2.0, 1.5]),
    ("truncated_normal", truncated(1.0, 2.0, 0.0, np.inf), [1.0, 2.0]),
    ("truncated_normal(-1, 2)", truncated(0.8, 0.9, -1.0, 2.0), [0.8, 0.9]),
]


@pytest.mark.parametrize("loss", ["nll", "crps"])
@pytest.mark.parametrize(("name", "law", "expected"), PARAMETRIC)
def test_training_recovers_the_parameters(
    name: str, law: Any, expected: list[float], loss: str
) -> None:
    separator = f"{name[:-1]}, " if name.endswith(")") else f"{name}("
    head = resolve_head(f"{separator}loss={loss})")
    found = torch.stack(fitted(head, law.rvs(NUMBER, random_state=1)))
    slack = 0.25 if "student_t" in name or "truncated" in name else 0.12
    np.testing.assert_allclose(found, expected, rtol=slack, atol=0.03)


@pytest.mark.parametrize("loss", ["nll", "crps"])
def test_training_recovers_additional_zeros(loss: str) -> None:
    head = resolve_head(f"zero_inflated_negative_binomial(loss={loss})")
    total_count, logits, gate = fitted(head, zero_inflated(1))
    assert float(total_count * logits.exp()) == pytest.approx(3 * np.e, rel=0.1)
    assert float(total_count) == pytest.approx(3.0, rel=0.2)
    assert float(gate.sigmoid()) == pytest.approx(0.4, abs=0.04)


def test_training_recovers_the_parts_of_a_mixture() -> None:
    values = two_parts(stats.norm(-5.0, 0.5), stats.norm(4.0, 1.5), 0.3, seed=1)
    head = resolve_head("mixture(normal, normal)")
    logits, *found = fitted(head, values, [0.0, 0.0, -3.0, 0.0, 3.0, 0.0])
    assert float(logits.softmax(dim=-1)[0]) == pytest.approx(0.3, abs=0.03)
    np.testing.assert_allclose(torch.stack(found), [-5.0, 0.5, 4.0, 1.5], rtol=0.06)


def test_training_recovers_counts_beside_densities() -> None:
    values = two_parts(stats.t(5.0, -4.0, 1.0), nbinom(4.0, 1.0), 0.5, seed=1)
    head = resolve_head("mixture(student_t, negative_binomial)")
    logits, df, loc, scale, total_count, count_logits = fitted(head, values)
    assert float(logits.softmax(dim=-1)[0]) == pytest.approx(0.5, abs=0.03)
    assert float(loc) == pytest.approx(-4.0, abs=0.1)
    assert float(scale) == pytest.approx(1.0, rel=0.1)
    assert 3.0 < float(df) < 9.0
    assert float(total_count * count_logits.exp()) == pytest.approx(4 * np.e, rel=0.05)


def test_training_recovers_tails() -> None:
    law = stats.norm(2.0, 1.0)
    levels = np.random.default_rng(1).random(4 * NUMBER)
    lower, upper = law.ppf([0.05, 0.95])
    scale_of_tails = 0.05 / law.pdf(lower)
    low, high = (
        stats.genpareto(0.1, scale=scale_of_tails),
        stats.genpareto(0.35, scale=scale_of_tails),
    )
    values = np.select(
        [levels < 0.05, levels > 0.95],
        [
            lower - low.isf(np.clip(levels / 0.05, 1e-12, 1)),
            upper + high.isf(np.clip((1 - levels) / 0.05, 1e-12, 1)),
        ],
        law.ppf(levels),
    )
    found = fitted(resolve_head("pareto_tails"), values)
    lower_shape, upper_shape, loc, scale = (float(f) for f in found)
    assert lower_shape == pytest.approx(0.1, abs=0.08)
    assert upper_shape == pytest.approx(0.35, abs=0.1)
    assert loc == pytest.approx(2.0, abs=0.05)
    assert scale == pytest.approx(1.0, rel=0.05)


SKEWED = stats.gamma(1.5, loc=-2.0, scale=2.0)


@pytest.mark.parametrize(
    "name",
    [
        "quantile_spline",
        "implicit_quantiles(num_levels=16)",
        "implicit_quantiles(loss=nll)",
    ],
)
def test_training_recovers_quantiles_of_any_shape(name: str) -> None:
    head = resolve_head(name)
    layer = ParameterHead(head)
    values = torch.from_numpy(SKEWED.rvs(NUMBER, random_state=1))
    torch.manual_seed(0)
    raw = torch.zeros(layer.in_features, dtype=torch.float64, requires_grad=True)
    steps = 150
    optimiser = torch.optim.Adam([raw], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        batch = values[(step % 4) :: 4]
        optimiser.zero_grad()
        head.loss(batch, layer(raw.expand(len(batch), -1))).mean().backward()
        optimiser.step()
        schedule.step()
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    with torch.no_grad():
        found = head.distribution(layer(raw)).icdf(levels)
    error = np.abs(found.numpy() - SKEWED.ppf(levels.numpy()))
    assert error.max() < 0.15 * SKEWED.std()


def test_training_recovers_the_correlation_of_low_rank_paths() -> None:
    factors = torch.tensor(
        [[1.5, 0.0], [1.0, -1.0], [0.0, 2.0], [-1.0, 1.0], [0.5, 0.5]], dtype=torch.float64
    )
    covariance = factors @ factors.T + torch.eye(5, dtype=torch.float64)
    found = copula_correlation(covariance, rank=2)
    deviation = covariance.diagonal().sqrt()
    expected = covariance / deviation / deviation.unsqueeze(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.07)


def test_training_recovers_the_correlation_of_autoregressive_paths() -> None:
    lag = (torch.arange(6)[:, None] - torch.arange(6)).abs().to(torch.float64)
    expected = 0.8**lag
    torch.testing.assert_close(copula_correlation(expected, rank=5), expected, rtol=0, atol=0.07)


def copula_correlation(covariance: Tensor, rank: int) -> Tensor:
    """Correlation of samples of a copula trained on normal paths of this covariance."""
    torch.manual_seed(0)
    steps = len(covariance)
    paths = torch.distributions.MultivariateNormal(torch.zeros(steps).double(), covariance)
    target = paths.sample((1000,)).unsqueeze(-1)
    target = 3 * target + 5
    loc, scale = torch.full((1000, 1, 1), 5.0).double(), torch.full((1000, 1, 1), 3.0).double()
    head = GaussianCopulaOutput("normal", rank=rank)
    layer = ParameterHead(head)
    raw = 0.3 * torch.randn(1, steps, 1, layer.in_features, dtype=torch.float64)
    raw.requires_grad_()
    optimiser = torch.optim.Adam([raw], lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        parameters = layer(raw.expand(1000, -1, -1, -1))
        window_loss(head, target, torch.ones_like(target), parameters, loc, scale).mean().backward()
        optimiser.step()
    with torch.no_grad():
        distribution = head.distribution(layer(raw), loc=loc[:1], scale=scale[:1])
    samples = distribution.sample((20_000,))[:, 0, :, 0]
    return torch.corrcoef(samples.T)
