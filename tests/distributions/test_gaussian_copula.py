"""The copula against dense matrices, and its samples against what it says of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moecast.distributions import (
    GaussianCopula,
    GaussianCopulaOutput,
    ParameterHead,
    copula_log_density,
    resolve_head,
    window_loss,
)
from scipy import stats
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal


def doubles(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def correlation_of(factors: Tensor) -> Tensor:
    """Of ``[time, rank]``."""
    covariance = factors @ factors.T + torch.eye(len(factors), dtype=factors.dtype)
    deviation = covariance.diagonal().sqrt()
    return covariance / deviation / deviation.unsqueeze(-1)


def dense_log_density(scores: Tensor, factors: Tensor) -> Tensor:
    joint = MultivariateNormal(torch.zeros_like(scores), correlation_of(factors))
    return joint.log_prob(scores) - Normal(0.0, 1.0).log_prob(scores).sum()


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(("steps", "rank"), [(1, 1), (5, 2), (3, 8), (40, 8)])
def test_the_density_is_that_of_the_dense_matrix(steps: int, rank: int, spread: float) -> None:
    scores, factors = doubles(steps, 3, 2), spread * doubles(steps, 3, 2, rank, seed=1)
    densities = copula_log_density(scores, factors)
    assert densities.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            expected = dense_log_density(scores[:, i, j], factors[:, i, j])
            torch.testing.assert_close(densities[i, j], expected, rtol=1e-8, atol=1e-8)


def test_the_density_differentiates_like_that_of_the_dense_matrix() -> None:
    scores, factors = doubles(6), doubles(6, 2, seed=1).requires_grad_()
    (ours,) = torch.autograd.grad(copula_log_density(scores, factors), factors)
    (dense,) = torch.autograd.grad(dense_log_density(scores, factors), factors)
    torch.testing.assert_close(ours, dense, rtol=1e-8, atol=1e-8)


def test_without_factors_the_steps_are_independent() -> None:
    density = copula_log_density(doubles(6, 4), torch.zeros(6, 4, 3, dtype=torch.float64))
    torch.testing.assert_close(density, torch.zeros_like(density))


def test_steps_without_score_and_factors_leave_the_density_of_the_rest() -> None:
    scores, factors = doubles(7), doubles(7, 3, seed=1)
    known = torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    masked = copula_log_density(scores * known, factors * known.unsqueeze(-1))
    torch.testing.assert_close(masked, copula_log_density(scores[known], factors[known]))
    torch.testing.assert_close(masked, dense_log_density(scores[known], factors[known]))


def copula(shape: tuple[int, ...], marginal: str = "normal", **window: Any) -> GaussianCopula:
    head = GaussianCopulaOutput(marginal, rank=3)
    layer = ParameterHead(head)
    return head.distribution(layer(doubles(*shape, layer.in_features)), **window)


SHAPES = [(5,), (2, 5), (2, 5, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_are_correlated_along_time_only(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    distribution = copula(shape)
    samples = distribution.sample((20_000,))
    assert samples.shape == (20_000, *shape)
    scores = torch.special.ndtri(distribution.cdf(samples))
    time_dim = min(1, len(shape) - 1)
    paths = scores.movedim(1 + time_dim, -1).reshape(20_000, -1, 5)
    factors = distribution.factors.movedim(time_dim, -2).reshape(-1, 5, 3)
    measured = torch.corrcoef(paths.flatten(1).T)
    expected = torch.block_diag(*(correlation_of(window) for window in factors))
    torch.testing.assert_close(measured, expected, rtol=0, atol=0.04)
    assert expected.triu(diagonal=1).abs().max() > 0.3


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize(
    "marginal", ["student_t", "gamma", "negative_binomial", "mixture(normal, poisson)"]
)
def test_each_steps_samples_follow_its_marginal(marginal: str, window: bool) -> None:
    torch.manual_seed(0)
    scale = torch.tensor([[3.0], [0.5]], dtype=torch.float64) if window else None
    distribution = copula((2, 4), marginal, scale=scale)
    # Draws share noise along time, but not across samples.
    samples = distribution.sample((3000,))
    below, up_to = distribution.cdf_below(samples), distribution.cdf(samples)
    levels = below + torch.rand_like(below) * (up_to - below)
    for series in levels.flatten(1).T:
        assert stats.kstest(series, "uniform").pvalue > 1e-4


def test_all_but_sampling_is_that_of_the_marginals() -> None:
    torch.manual_seed(0)
    scale = torch.full((2, 1), 2.0, dtype=torch.float64)
    joint = copula((2, 4), "student_t", loc=scale, scale=scale)
    head = resolve_head("student_t")
    raw = doubles(2, 4, 6)[..., 3:]
    alone = head.distribution(ParameterHead(head)(raw), loc=scale, scale=scale)
    values, level = doubles(2, 4, seed=3), torch.tensor(0.3, dtype=torch.float64)
    for name, argument in (("log_prob", values), ("cdf", values), ("crps", values)):
        torch.testing.assert_close(getattr(joint, name)(argument), getattr(alone, name)(argument))
    torch.testing.assert_close(joint.icdf(level), alone.icdf(level))
    torch.testing.assert_close(joint.mean, alone.mean)
    torch.testing.assert_close(joint.variance, alone.variance)


@pytest.mark.parametrize(
    ("shape", "window", "time_dim"),
    [
        ((5,), (), 0),
        ((5,), (1,), 0),
        ((2, 5), (2, 1), 1),
        ((1, 5), (1, 1), 1),
        ((5, 3), (1, 3), 0),
        ((2, 5, 3), (2, 1, 3), 1),
        ((2, 5, 3), (2, 1, 1), 1),
    ],
)
def test_time_is_found_by_the_shape_of_the_window(
    shape: tuple[int, ...], window: tuple[int, ...], time_dim: int
) -> None:
    loc, scale = doubles(*window), doubles(*window, seed=1).exp()
    distribution = copula(shape, loc=loc, scale=scale)
    assert distribution.time_dim == time_dim
    assert distribution.batch_shape == shape
    assert distribution.sample((7,)).shape == (7, *shape)
    assert distribution.sample().shape == shape
    assert distribution.mean.shape == distribution.variance.shape == shape
    base = copula(shape)
    level = torch.tensor(0.2, dtype=torch.float64)
    torch.testing.assert_close(distribution.icdf(level), base.icdf(level) * scale + loc)


def windows(channels: int, head: GaussianCopulaOutput) -> tuple[Tensor, ...]:
    layer = ParameterHead(head)
    raw = doubles(4, 6, channels, layer.in_features, seed=2)
    loc, scale = doubles(4, 1, channels, seed=3), doubles(4, 1, channels, seed=4).exp()
    return raw, 2 * doubles(4, 6, channels, seed=5), loc, scale


@pytest.mark.parametrize("channels", [1, 2])
def test_the_loss_is_the_negative_joint_log_likelihood(channels: int) -> None:
    head = GaussianCopulaOutput("normal", rank=2)
    raw, standardised, loc, scale = windows(channels, head)
    parameters = ParameterHead(head)(raw)
    factors, centre, deviation = parameters
    standardised = standardised.clamp(-4, 4)
    target = (standardised * deviation + centre) * scale + loc
    losses = window_loss(head, target, torch.ones_like(target), parameters, loc, scale)
    for i in range(4):
        total = deviation[i].log().sum()
        for c in range(channels):
            joint = MultivariateNormal(
                torch.zeros(6, dtype=torch.float64), correlation_of(factors[i, :, c])
            )
            total = total - joint.log_prob(standardised[i, :, c])
        torch.testing.assert_close(losses[i], total / (6 * channels), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("marginal", ["normal", "student_t(loss=crps)", "quantile_spline"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_missing_values_have_no_influence(marginal: str, junk: float) -> None:
    head = GaussianCopulaOutput(marginal, rank=2)
    raw, target, loc, scale = windows(2, head)
    observed = (doubles(4, 6, 2, seed=6) > -0.5).to(torch.float64)
    observed[0] = 0.0
    results = []
    for filler in (0.3, junk):
        leaf = raw.clone().requires_grad_()
        filled = torch.where(observed == 0, filler, target)
        losses = window_loss(head, filled, observed, ParameterHead(head)(leaf), loc, scale)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        assert losses.isfinite().all()
        assert losses[0] == 0
        assert (gradient[observed == 0] == 0).all()
        results.append((losses.detach(), gradient))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_missing_steps_leave_the_loss_of_the_others() -> None:
    head = GaussianCopulaOutput("normal", rank=2)
    raw, target, loc, scale = windows(1, head)
    known = [0, 2, 3, 5]
    observed = torch.zeros_like(target)
    observed[:, known] = 1.0
    layer = ParameterHead(head)
    masked = window_loss(head, target, observed, layer(raw), loc, scale)
    rest = window_loss(head, target[:, known], observed[:, known], layer(raw[:, known]), loc, scale)
    torch.testing.assert_close(masked, rest)


def test_the_copula_does_not_train_the_marginals() -> None:
    head = GaussianCopulaOutput("normal", rank=2)
    raw, target, _, _ = windows(1, head)
    raw.requires_grad_()
    joint = head.joint_loss(target, torch.ones_like(target), ParameterHead(head)(raw))
    assert joint.shape == (4,)
    (gradient,) = torch.autograd.grad(joint.sum(), raw)
    assert (gradient[..., 2:] == 0).all()
    assert (gradient[..., :2] != 0).all()


def test_a_copula_needs_a_distribution_and_a_rank() -> None:
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        GaussianCopulaOutput("normal", rank=0)
    for marginal in ("point", "quantile"):
        with pytest.raises(ValueError, match=f"marginal='{marginal}' must be a head"):
            GaussianCopulaOutput(marginal)
