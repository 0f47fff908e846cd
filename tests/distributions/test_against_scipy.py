"""Densities, probabilities and quantiles as scipy computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from moecast.distributions import (
    Beta,
    Gamma,
    Laplace,
    LogNormal,
    Mixture,
    NegativeBinomial,
    Normal,
    ParetoTails,
    Poisson,
    StudentT,
    TruncatedNormal,
    UnivariateDistribution,
    ZeroInflated,
)
from scipy import stats
from scipy.optimize import brentq
from torch import Tensor

LEVELS = np.array([1e-8, 1e-4, 0.01, 0.2, 0.5, 0.7, 0.95, 0.9999])


def double(*numbers: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(number, dtype=torch.float64) for number in numbers)


def same(actual: Tensor, expected: Any, rtol: float = 1e-6, atol: float = 1e-12) -> None:
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual.numpy(), expected, rtol=rtol, atol=atol)


def truncated(loc: float, scale: float, lower: float, upper: float) -> Any:
    return stats.truncnorm((lower - loc) / scale, (upper - loc) / scale, loc, scale)


CONTINUOUS = [
    (Normal(*double(-2, 0.3)), stats.norm(-2, 0.3)),
    (Normal(*double(1e5, 20)), stats.norm(1e5, 20)),
    (StudentT(*double(2.1, 1.5, 0.3)), stats.t(2.1, 1.5, 0.3)),
    (StudentT(*double(40, -7, 12)), stats.t(40, -7, 12)),
    (Laplace(*double(3, 0.2)), stats.laplace(3, 0.2)),
    (LogNormal(*double(-1, 0.4)), stats.lognorm(0.4, scale=np.exp(-1))),
    (LogNormal(*double(5, 2)), stats.lognorm(2, scale=np.exp(5))),
    (Gamma(*double(0.4, 3)), stats.gamma(0.4, scale=1 / 3)),
    (Gamma(*double(80, 0.02)), stats.gamma(80, scale=50)),
    (Beta(*double(0.7, 2.5)), stats.beta(0.7, 2.5)),
    (Beta(*double(30, 12)), stats.beta(30, 12)),
    (TruncatedNormal(*double(0.5, 2), 0, np.inf), truncated(0.5, 2, 0, np.inf)),
    (TruncatedNormal(*double(-9, 2), 0, np.inf), truncated(-9, 2, 0, np.inf)),
    (TruncatedNormal(*double(7, 1), -1, 2), truncated(7, 1, -1, 2)),
    (TruncatedNormal(*double(0.3, 50), -1, 2), truncated(0.3, 50, -1, 2)),
    (TruncatedNormal(*double(4, 1), -np.inf, 1), truncated(4, 1, -np.inf, 1)),
]


@pytest.mark.parametrize(("ours", "theirs"), CONTINUOUS)
def test_continuous_distributions(ours: UnivariateDistribution, theirs: Any) -> None:
    quantiles = theirs.ppf(LEVELS)
    values = torch.from_numpy(quantiles)
    same(ours.icdf(torch.from_numpy(LEVELS)), quantiles)
    same(ours.cdf(values), theirs.cdf(quantiles))
    same(ours.log_prob(values), theirs.logpdf(quantiles))
    same(ours.mean, theirs.mean())
    same(ours.variance, theirs.var())


@pytest.mark.parametrize(("ours", "theirs"), CONTINUOUS)
def test_continuous_distributions_far_out(ours: UnivariateDistribution, theirs: Any) -> None:
    low, high = theirs.ppf([1e-6, 1 - 1e-6])
    values = np.array([low - 5 * (high - low), high + 5 * (high - low)])
    same(ours.cdf(torch.from_numpy(values)), theirs.cdf(values))
    same(ours.log_prob(torch.from_numpy(values)), theirs.logpdf(values))


def test_gammas_and_log_normals_stop_at_zero() -> None:
    zero = torch.zeros((), dtype=torch.float64)
    for distribution in (Gamma(*double(2, 3)), LogNormal(*double(0, 1))):
        assert distribution.cdf(zero) == 0
        assert distribution.icdf(zero) == 0


COUNTS = [
    (Poisson(*double(0.02)), stats.poisson(0.02)),
    (Poisson(*double(3.7)), stats.poisson(3.7)),
    (Poisson(*double(4e4)), stats.poisson(4e4)),
    (NegativeBinomial(*double(0.3, 1.2)), stats.nbinom(0.3, 1 / (1 + np.exp(1.2)))),
    (NegativeBinomial(*double(5, -2)), stats.nbinom(5, 1 / (1 + np.exp(-2)))),
    (NegativeBinomial(*double(2.5, 7)), stats.nbinom(2.5, 1 / (1 + np.exp(7)))),
    (NegativeBinomial(*double(2.5, 1), real_valued=True), stats.nbinom(2.5, 1 / (1 + np.e))),
]


@pytest.mark.parametrize(("ours", "theirs"), COUNTS)
def test_counts(ours: UnivariateDistribution, theirs: Any) -> None:
    quantiles = theirs.ppf(LEVELS)
    same(ours.icdf(torch.from_numpy(LEVELS)), quantiles, rtol=0)
    values = np.unique(np.concatenate([quantiles, quantiles + 1, [0, 1, 2]]))
    same(ours.log_prob(torch.from_numpy(values)), theirs.logpmf(values))
    same(ours.cdf(torch.from_numpy(values)), theirs.cdf(values))
    same(ours.cdf(torch.from_numpy(values + 0.5)), theirs.cdf(values))
    same(ours.cdf_below(torch.from_numpy(values)), theirs.cdf(values - 1))
    same(ours.cdf_below(torch.from_numpy(values + 0.5)), theirs.cdf(values))
    same(ours.cdf(torch.tensor([-1.0, -0.5], dtype=torch.float64)), [0, 0], rtol=0, atol=0)
    same(ours.mean, theirs.mean())
    same(ours.variance, theirs.var())


def test_additional_zeros() -> None:
    total_count, logits, gate = double(2.5, 1, -0.4)
    ours = ZeroInflated(NegativeBinomial(total_count, logits), gate)
    theirs = stats.nbinom(2.5, 1 / (1 + np.e))
    share = 1 / (1 + np.exp(0.4))
    counts = np.arange(40.0)
    mass = (1 - share) * theirs.pmf(counts) + share * (counts == 0)
    same(ours.log_prob(torch.from_numpy(counts)).exp(), mass)
    same(ours.cdf(torch.from_numpy(counts)), mass.cumsum())
    levels = np.array([0.01, share / 2, 0.5, 0.6, 0.9, 0.99])
    same(ours.icdf(torch.from_numpy(levels)), np.searchsorted(mass.cumsum(), levels), rtol=0)
    mean, second = (1 - share) * theirs.mean(), (1 - share) * theirs.moment(2)
    same(ours.mean, mean)
    same(ours.variance, second - mean**2)


@pytest.mark.parametrize("mass", [0.05, 0.2])
def test_pareto_tails(mass: float) -> None:
    ours = ParetoTails(StudentT(*double(5, 2, 3)), *double(0.4, 0.1), mass)
    body = stats.t(5, 2, 3)
    lower, upper = body.ppf([mass, 1 - mass])
    scale = mass / body.pdf(lower)
    low, high = stats.genpareto(0.4, scale=scale), stats.genpareto(0.1, scale=scale)
    excess = np.array([1e-3, 0.1, 1.0, 10.0, 1e4])
    below, above = torch.from_numpy(lower - excess), torch.from_numpy(upper + excess)
    same(ours.log_prob(below), np.log(mass) + low.logpdf(excess))
    same(ours.log_prob(above), np.log(mass) + high.logpdf(excess))
    same(ours.cdf(below), mass * low.sf(excess))
    same(ours.cdf(above), 1 - mass * high.sf(excess))
    levels = np.array([1e-6, 1e-3, 0.5, 0.99])
    same(ours.icdf(torch.from_numpy(mass * levels)), lower - low.isf(levels))
    same(ours.icdf(torch.from_numpy(1 - mass * levels)), upper + high.isf(levels))
    inner = np.linspace(mass * 1.01, 1 - mass * 1.01, 7)
    same(ours.icdf(torch.from_numpy(inner)), body.ppf(inner))
    same(ours.cdf(torch.from_numpy(body.ppf(inner))), inner)
    same(ours.log_prob(torch.from_numpy(body.ppf(inner))), body.logpdf(body.ppf(inner)))
    first = body.expect(lambda x: x, lb=lower, ub=upper, epsabs=1e-12)
    mean = first + mass * (lower - low.mean() + upper + high.mean())
    same(ours.mean, mean)
    second = body.expect(lambda x: (x - mean) ** 2, lb=lower, ub=upper, epsabs=1e-12)
    tails = (lower - low.mean() - mean) ** 2 + low.var() + (upper + high.mean() - mean) ** 2
    same(ours.variance, second + mass * (tails + high.var()))


MIXTURES = [
    (
        [Normal(*double(-3, 0.5)), StudentT(*double(3, 4, 2))],
        [stats.norm(-3, 0.5), stats.t(3, 4, 2)],
    ),
    (
        [Gamma(*double(2, 3)), LogNormal(*double(1, 0.5))],
        [stats.gamma(2, scale=1 / 3), stats.lognorm(0.5, scale=np.e)],
    ),
    (
        [Normal(*double(0, 1e-3)), Normal(*double(0, 5))],
        [stats.norm(0, 1e-3), stats.norm(0, 5)],
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), MIXTURES)
def test_mixtures(ours: list[UnivariateDistribution], theirs: list[Any]) -> None:
    weights = np.array([0.3, 0.7])
    mixture = Mixture(torch.from_numpy(np.log(weights)), ours)

    def average(name: str, *arguments: Any) -> Any:
        return sum(w * getattr(part, name)(*arguments) for w, part in zip(weights, theirs))

    for level in (1e-6, 0.01, 0.299, 0.35, 0.5, 0.77, 0.999):
        ends = [part.ppf(level) for part in theirs]
        expected = brentq(
            lambda x, level=level: average("cdf", x) - level, min(ends), max(ends), xtol=1e-14
        )
        quantile = mixture.icdf(torch.tensor(level, dtype=torch.float64))
        same(quantile, expected, atol=1e-9)
        same(mixture.cdf(quantile), level)
        same(mixture.log_prob(quantile), np.log(average("pdf", float(quantile))))
    mean = average("mean")
    same(mixture.mean, mean)
    same(mixture.variance, average("moment", 2) - mean**2)


def test_a_mixture_of_counts_and_densities() -> None:
    weights = np.array([0.4, 0.6])
    ours = Mixture(
        torch.from_numpy(np.log(weights)),
        [StudentT(*double(4, 1, 2)), NegativeBinomial(*double(3, 0.2))],
    )
    body, counts = stats.t(4, 1, 2), stats.nbinom(3, 1 / (1 + np.exp(0.2)))
    values = np.array([-3.0, -0.5, 0.0, 0.5, 1.0, 2.0, 2.9, 30.0])
    whole = values == np.round(values)
    density = weights[0] * body.pdf(values)
    density = density + weights[1] * np.where(whole, counts.pmf(np.round(values)), 0)
    same(ours.log_prob(torch.from_numpy(values)), np.log(density))
    same(
        ours.cdf(torch.from_numpy(values)),
        weights[0] * body.cdf(values) + weights[1] * counts.cdf(values),
    )
    below = weights[0] * body.cdf(values) + weights[1] * counts.cdf(np.ceil(values) - 1)
    same(ours.cdf_below(torch.from_numpy(values)), below)
    at_jump = torch.from_numpy(below[whole] + 0.3 * weights[1] * counts.pmf(values[whole]))
    jumps = values[whole] >= 0
    same(ours.icdf(at_jump)[jumps], values[whole][jumps], rtol=0, atol=0)
