"""What every head promises, whatever a network puts out."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from moecast.distributions import (
    HEADS,
    AffineDistribution,
    GaussianCopula,
    Head,
    Mixture,
    NegativeBinomialOutput,
    ParameterHead,
    QuantileSpline,
    UnivariateDistribution,
    probability_transform,
    resolve_head,
    scaling_for,
)
from scipy import stats
from torch import Tensor

CONTINUOUS = [
    "normal",
    "normal_fixed_scale",
    "student_t",
    "laplace",
    "log_normal",
    "gamma",
    "beta",
    "truncated_normal",
    "truncated_normal(-1, 2)",
    "truncated_normal(None, 1)",
    "pareto_tails",
    "pareto_tails(student_t)",
    "mixture(student_t, normal)",
    "mixture(gamma, log_normal)",
    "quantile_spline",
    "implicit_quantiles",
    "gaussian_copula(normal)",
]
COUNTS = [
    "poisson",
    "negative_binomial",
    "zero_inflated_negative_binomial",
    "mixture(poisson, negative_binomial)",
]
MIXED = "mixture(student_t, negative_binomial)"
MOIRAI = "moirai_mixture"
ALL = [*CONTINUOUS, *COUNTS, MIXED, MOIRAI]
BY_QUADRATURE = ("truncated_normal", "pareto_tails", "mixture", "implicit_quantiles")
WIDEST = 40

raws = arrays(np.float64, (2, 3, WIDEST), elements=st.floats(-3, 3))
windows = st.none() | st.tuples(st.floats(-10, 10), st.floats(0.1, 10))
few = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)


def window_of(head: Head, window: Any, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    if window is None:
        return {"loc": None, "scale": None}
    loc = window[0] if scaling_for(head) == "std" else 0.0
    return {
        "loc": torch.full((2, 1), loc, dtype=dtype),
        "scale": torch.full((2, 1), window[1], dtype=dtype),
    }


def distribution_of(name: str, raw: Any, window: Any) -> UnivariateDistribution:
    head = resolve_head(name)
    assert isinstance(head, Head)
    layer = ParameterHead(head)
    parameters = layer(torch.as_tensor(raw)[..., : layer.in_features])
    return head.distribution(parameters, **window_of(head, window))


def with_loss(name: str, loss: str) -> Head:
    if name == MOIRAI:
        return resolve_head(name)
    if name == "gaussian_copula(normal)":
        return resolve_head(f"gaussian_copula(normal(loss={loss}))")
    separator = f"{name[:-1]}, " if name.endswith(")") else f"{name}("
    return resolve_head(f"{separator}loss={loss})")


def losses() -> list[tuple[str, str]]:
    return [(name, loss) for name in ALL for loss in resolve_head(name).losses]


def edges_of(distribution: UnivariateDistribution) -> Tensor:
    """Points between which the density is smooth, so dense that quadrature is exact."""
    if isinstance(distribution, GaussianCopula):
        return edges_of(distribution.marginals)
    if isinstance(distribution, AffineDistribution):
        return edges_of(distribution.base) * distribution.scale + distribution.loc
    if isinstance(distribution, Mixture):
        parts = [edges_of(c) for c in distribution.components if not c.has_jumps]
        return torch.cat([part.expand(-1, 2, 3) for part in parts]).sort(dim=0).values
    levels = torch.linspace(-24, 24, 241, dtype=torch.float64).sigmoid()
    edges = distribution.icdf(torch.cat([levels, levels.new_tensor([0.05, 0.95])])[:, None, None])
    for side in ("lower_bound", "upper_bound"):
        bound = float(getattr(distribution.support, side, np.inf))
        if np.isfinite(bound):
            edges = torch.cat([edges, torch.full_like(edges[:1], bound)])
    if isinstance(distribution, QuantileSpline):
        edges = torch.cat([edges, distribution.heights.movedim(-1, 0)])
    return edges.sort(dim=0).values


def with_far_edges(edges: Tensor, reach: float) -> Tensor:
    growth = torch.linspace(0, reach, int(2 * reach), dtype=torch.float64).exp()[:, None, None]
    spread = edges[-1] - edges[0]
    return torch.cat([edges[0] - growth.flip(0) * spread, edges, edges[-1] + growth * spread])


def integrals(function: Callable[[Tensor], Tensor], edges: Tensor) -> Tensor:
    """Of a function between neighbouring edges."""
    points, weights = np.polynomial.legendre.leggauss(12)
    points = torch.from_numpy(0.5 * points + 0.5)[:, None, None, None]
    weights = torch.from_numpy(0.5 * weights)[:, None, None, None]
    values = function(edges[:-1] + edges.diff(dim=0) * points)
    return (weights * values).sum(dim=0) * edges.diff(dim=0)


def counts_of(distribution: UnivariateDistribution) -> Tensor:
    last = distribution.icdf(torch.tensor(1 - 1e-12, dtype=torch.float64)).max()
    return torch.arange(int(last) + 2, dtype=torch.float64)[:, None, None]


def close(actual: Tensor, expected: Any, rtol: float, atol: float = 0.0) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand(actual.shape)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def test_every_head_is_tested() -> None:
    known = {name for name in set(HEADS) - {"mixture"} if isinstance(resolve_head(name), Head)}
    assert known == {name.split("(")[0] for name in ALL} - {"mixture"}


@pytest.mark.parametrize("name", [*CONTINUOUS, *COUNTS, MIXED, MOIRAI])
@given(raw=raws, window=windows)
@few
def test_quantiles_invert_the_cdf(name: str, raw: np.ndarray, window: Any) -> None:
    distribution = distribution_of(name, raw, window)
    levels = torch.tensor([1e-5, 0.001, 0.03, 0.2, 0.5, 0.77, 0.96, 0.999, 1 - 1e-5])
    levels = levels.to(torch.float64)[:, None, None]
    quantiles = distribution.icdf(levels)
    # A value is known up to its rounding, over which the cdf may rise steeply.
    offset = 0.0 if window is None or distribution.is_discrete else abs(window[0])
    rounding = 1e-14 * (quantiles.abs() + offset)
    if name == MOIRAI:
        rounding = 1e-9 * (quantiles.abs() + offset + 1)
    tolerance = 1e-12 if distribution.has_jumps else 1e-5
    rounding = torch.zeros_like(rounding) if name in COUNTS else rounding
    assert (distribution.cdf(quantiles + rounding) >= levels - tolerance).all()
    assert (distribution.cdf_below(quantiles - rounding) <= levels + tolerance).all()


@given(raw=raws)
@few
def test_quantiles_at_jumps_are_the_whole_numbers_themselves(raw: np.ndarray) -> None:
    distribution = distribution_of(MIXED, raw, None)
    counts = torch.arange(4, dtype=torch.float64)[:, None, None]
    below, up_to = distribution.cdf_below(counts), distribution.cdf(counts)
    wide = up_to - below > 1e-6
    quantiles = distribution.icdf(0.5 * (below + up_to))
    assert wide.any()
    torch.testing.assert_close(quantiles[wide], counts.expand(4, 2, 3)[wide], rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
@given(raw=raws, window=windows, level=st.floats(0.001, 0.999))
@few
def test_quantiles_never_cross(name: str, raw: np.ndarray, window: Any, level: float) -> None:
    distribution = distribution_of(name, raw, window)
    levels = torch.linspace(-15, 15, 61, dtype=torch.float64).sigmoid()
    levels = torch.cat([levels, level + 1e-9 * torch.arange(5, dtype=torch.float64)]).sort().values
    quantiles = distribution.icdf(levels[:, None, None])
    assert quantiles.isfinite().all()
    assert (quantiles.diff(dim=0) >= -1e-12 * quantiles[1:].abs()).all()


@pytest.mark.parametrize("name", [name for name in CONTINUOUS if name != "gaussian_copula(normal)"])
@given(raw=raws, window=windows)
@few
def test_densities_are_slopes_of_the_cdf_and_integrate_to_1(
    name: str, raw: np.ndarray, window: Any
) -> None:
    if name == "beta":  # Its density is capped within a rounding of 0 and 1.
        raw = np.maximum(raw, -0.5)
    distribution = distribution_of(name, raw, window)
    edges = edges_of(distribution)
    masses = integrals(lambda x: distribution.log_prob(x).exp(), edges)
    up_to = distribution.cdf(edges)
    # Near 0 a gamma distribution's density may be infinite, which the integral here is not for.
    atol = 2e-4 if "gamma" in name else 2e-5
    close(masses.cumsum(dim=0), up_to[1:] - up_to[0], rtol=0, atol=atol)
    close(masses.sum(dim=0), 1.0, rtol=0, atol=2 * atol)


@pytest.mark.parametrize("name", COUNTS)
@given(raw=raws, window=windows)
@few
def test_probabilities_are_jumps_of_the_cdf_and_sum_to_1(
    name: str, raw: np.ndarray, window: Any
) -> None:
    distribution = distribution_of(name, raw, window)
    counts = counts_of(distribution)
    probabilities = distribution.log_prob(counts).exp()
    jumps = distribution.cdf(counts) - distribution.cdf_below(counts)
    close(probabilities, jumps, rtol=0, atol=1e-10)
    close(probabilities.sum(dim=0), 1.0, rtol=1e-8)


@given(raw=raws, window=windows)
@few
def test_likelihoods_of_all_non_negative_numbers_sum_to_1_over_the_counts(
    raw: np.ndarray, window: Any
) -> None:
    head = NegativeBinomialOutput(real_valued=True)
    parameters = ParameterHead(head)(torch.from_numpy(raw)[..., :2])
    counts = counts_of(head.distribution(parameters))
    close(head.distribution(parameters).log_prob(counts).exp().sum(dim=0), 1.0, rtol=1e-8)
    between = head.distribution(parameters).log_prob(counts + 0.5)
    assert between.isfinite().all()
    if window is not None:
        scale = torch.full((2, 1), window[1], dtype=torch.float64)
        scaled = head.distribution(parameters, scale=scale)
        close(scaled.log_prob(scale * (counts + 0.5)), between - scale.log(), rtol=1e-9, atol=1e-9)


@given(raw=raws, window=windows)
@few
def test_a_mixture_of_densities_and_counts_has_each_at_its_weight(
    raw: np.ndarray, window: Any
) -> None:
    distribution = distribution_of(MIXED, raw, window)
    assert isinstance(distribution, Mixture)
    continuous, discrete = torch.from_numpy(raw)[..., :2].softmax(dim=-1).unbind(dim=-1)
    masses = integrals(lambda x: distribution.log_prob(x).exp(), edges_of(distribution))
    close(masses.sum(dim=0), continuous, rtol=0, atol=5e-5)
    counts = counts_of(distribution)
    jumps = distribution.cdf(counts) - distribution.cdf_below(counts)
    close(jumps.sum(dim=0), discrete, rtol=0, atol=1e-8)
    first = counts[:20]
    density = distribution.log_prob(first + 1e-9).exp()
    close(distribution.log_prob(first).exp(), density + jumps[:20], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("window", [None, (3.3, 0.7)])
@pytest.mark.parametrize("name", ALL)
def test_samples_follow_the_cdf(name: str, window: Any) -> None:
    torch.manual_seed(0)
    raw = torch.randn(2, 3, WIDEST, dtype=torch.float64)
    distribution = distribution_of(name, raw, window)
    samples = distribution.sample((2000,))
    assert samples.shape == (2000, 2, 3)
    assert samples.dtype == torch.float64
    transform = probability_transform(distribution, samples).flatten(1)
    for levels in transform.T:
        assert stats.kstest(levels, "uniform").pvalue > 1e-4
    error = (distribution.variance / 2000).sqrt()
    assert ((samples.mean(dim=0) - distribution.mean).abs() <= 6 * error).all()


@pytest.mark.parametrize("name", [*CONTINUOUS, MIXED])
@given(raw=raws, window=windows)
@few
def test_moments_are_those_of_the_density(name: str, raw: np.ndarray, window: Any) -> None:
    lowest = -0.5 if name in ("beta", "student_t", MIXED) or "(student_t" in name else -3
    distribution = distribution_of(name, np.maximum(raw, lowest), window)
    edges = edges_of(distribution)
    if "student_t" in name or "pareto" in name:
        edges = with_far_edges(edges, 80)
    elif name != "beta":
        short = name == "implicit_quantiles" or "truncated" in name
        edges = with_far_edges(edges, 12 if short else 40)

    def integral(function: Callable[[Tensor], Tensor]) -> Tensor:
        total = integrals(lambda x: function(x) * distribution.log_prob(x).exp(), edges).sum(dim=0)
        if distribution.has_jumps:
            counts = counts_of(distribution)
            jumps = distribution.cdf(counts) - distribution.cdf_below(counts)
            total = total + (function(counts) * jumps).sum(dim=0)
        return total

    mean = integral(lambda x: x)
    variance = integral(lambda x: (x - distribution.mean).square())
    rtol = 1e-3 if name in ("beta", "implicit_quantiles") else 1e-5
    spread = variance.sqrt()
    close(distribution.mean / spread, mean / spread, rtol=rtol, atol=rtol)
    close(distribution.variance, variance, rtol=2 * rtol)


@pytest.mark.parametrize(
    "name", [name for name in CONTINUOUS if "nll" in resolve_head(name).losses]
)
def test_where_the_data_come_from_the_likelihood_has_no_slope(name: str) -> None:
    torch.manual_seed(0)
    layer = ParameterHead(resolve_head(name))
    raw = 0.5 * torch.randn(2, 3, layer.in_features, dtype=torch.float64)
    raw.requires_grad_()
    distribution = layer.distr_output.distribution(layer(raw))
    with torch.no_grad():
        edges = edges_of(distribution)

    def losses(x: Tensor) -> Tensor:
        logarithm = distribution.log_prob(x).clamp_min(-700.0)
        return -logarithm * logarithm.detach().exp()

    (slope,) = torch.autograd.grad(integrals(losses, edges).sum(), raw)
    close(slope, 0.0, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", COUNTS)
@given(raw=raws, window=windows)
@few
def test_moments_are_those_of_the_probabilities(name: str, raw: np.ndarray, window: Any) -> None:
    distribution = distribution_of(name, raw, window)
    counts = counts_of(distribution)
    probabilities = distribution.log_prob(counts).exp()
    mean = (counts * probabilities).sum(dim=0)
    close(distribution.mean, mean, rtol=1e-6)
    variance = ((counts - mean).square() * probabilities).sum(dim=0)
    close(distribution.variance, variance, rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
@given(raw=raws, window=st.tuples(st.floats(-10, 10), st.floats(0.1, 10)))
@few
def test_scaled_values_have_scaled_quantiles(name: str, raw: np.ndarray, window: Any) -> None:
    head = resolve_head(name)
    levels = torch.tensor([0.01, 0.3, 0.5, 0.9], dtype=torch.float64)[:, None, None]
    scaled = distribution_of(name, raw, window)
    if head.scales_parameters:
        if name in ("poisson", "negative_binomial", "zero_inflated_negative_binomial"):
            close(scaled.mean, distribution_of(name, raw, None).mean * window[1], rtol=1e-9)
        return
    quantiles = distribution_of(name, raw, None).icdf(levels)
    expected = quantiles * window[1] + (window[0] if scaling_for(head) == "std" else 0.0)
    close(scaled.icdf(levels), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["truncated_normal", "truncated_normal(-1, 2)"])
def test_bounds_stay_where_they_are_whatever_the_window(name: str) -> None:
    torch.manual_seed(0)
    raw = torch.randn(2, 3, WIDEST, dtype=torch.float64)
    head = resolve_head(name)
    scaled = distribution_of(name, raw, (3.0, 7.0))
    ends = scaled.icdf(torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None])
    close(ends[0], head.lower, rtol=0, atol=1e-12)
    if head.upper < np.inf:
        close(ends[1], head.upper, rtol=0, atol=1e-12)
    loc, scale = head.domain_map(*raw[..., :2].split(1, dim=-1))
    free = torch.distributions.Normal(7 * loc + 3, 7 * scale)
    values = torch.tensor([0.1, 1.9], dtype=torch.float64)[:, None, None]
    ratio, expected = scaled.log_prob(values).diff(dim=0), free.log_prob(values).diff(dim=0)
    close(ratio, expected, rtol=1e-9)


@pytest.mark.parametrize(
    "name", ["normal", "gamma", "truncated_normal", "mixture(student_t, normal)"]
)
def test_the_last_quantile_of_what_has_no_bound_is_infinite(name: str) -> None:
    distribution = distribution_of(name, np.zeros((2, 3, WIDEST)), None)
    assert (distribution.icdf(torch.tensor(1.0, dtype=torch.float64)) == torch.inf).all()


OUTSIDE = {
    "log_normal": [-1.0, -1e-9, 0.0],
    "gamma": [-1.0, -1e-9, 0.0],
    "mixture(gamma, log_normal)": [-1.0, 0.0],
    "beta": [-0.1, 1000.0],
    "poisson": [-1.0, 0.5, 2.25],
    "negative_binomial": [-1.0, 0.5, 2.25],
    "zero_inflated_negative_binomial": [-1.0, 0.5, 2.25],
    "mixture(poisson, negative_binomial)": [-1.0, 0.5, 2.25],
    "truncated_normal": [-1.0, -1e-9],
    "truncated_normal(-1, 2)": [-1.001, 2.001, 100.0],
    "truncated_normal(None, 1)": [1.001, 100.0],
}


@pytest.mark.parametrize("window", [None, (0.0, 3.0)])
@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_the_support_nothing_is_likely(name: str, window: Any) -> None:
    torch.manual_seed(0)
    raw = torch.randn(2, 3, WIDEST, dtype=torch.float64, requires_grad=True)
    distribution = distribution_of(name, raw, window)
    values = torch.tensor(OUTSIDE[name], dtype=torch.float64)[:, None, None]
    assert (distribution.log_prob(values) == -torch.inf).all()
    below = values[values < 0][:, None, None]
    if not name.startswith("truncated_normal(None"):
        bound = -1.0 if name == "truncated_normal(-1, 2)" else 0.0
        assert (distribution.cdf(below[below < bound][:, None, None]) <= 1e-300).all()
    inside = distribution.icdf(torch.tensor(0.5, dtype=torch.float64)).detach()
    assert distribution.log_prob(inside).isfinite().all()


TARGETS = {
    "beta": [0.0, 1e-6, 0.5, 1.0],
    "gamma": [1e-6, 1.0, 1e4],
    "log_normal": [1e-6, 1.0, 1e4],
    "mixture(gamma, log_normal)": [1e-6, 1.0, 1e4],
    "truncated_normal": [0.0, 1.0, 1e4],
    "truncated_normal(-1, 2)": [-1.0, 0.3, 2.0],
    "truncated_normal(None, 1)": [-1e4, 0.0, 1.0],
    **{name: [0.0, 1.0, 1e6] for name in COUNTS},
    MIXED: [-1e4, 0.0, 3.5, 1e6],
    MOIRAI: [-1e4, 0.0, 3.5, 1e6],
}


@pytest.mark.parametrize("window", [None, (3.0, 7.0)])
@pytest.mark.parametrize(("name", "loss"), losses())
def test_gradients_are_finite_in_the_tails(name: str, loss: str, window: Any) -> None:
    head = with_loss(name, loss)
    features = ParameterHead(head).in_features
    alternating = torch.tensor([30.0, -30.0]).repeat(features)[:features]
    torch.manual_seed(0)
    rows = [torch.full((features,), level) for level in (-30.0, 0.0, 30.0)]
    raw = torch.stack([*rows, alternating, -alternating, 10 * torch.randn(features)])
    raw = raw.reshape(2, 3, features).requires_grad_()
    target = torch.tensor(TARGETS.get(name, [-1e4, 0.0, 1e4]))
    loc, scale = window_of(head, window, torch.float32).values()
    if window is not None and not head.scales_parameters:
        target = target * window[1] + loc[0, 0]
    values = head.loss(
        target[:, None, None].expand(-1, 2, 3), ParameterHead(head)(raw), loc=loc, scale=scale
    )
    assert values.dtype == torch.float32
    for value in values.flatten():
        (gradient,) = torch.autograd.grad(value, raw, retain_graph=True)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("name", "loss"), losses())
def test_a_call_changes_none_of_its_inputs(name: str, loss: str) -> None:
    torch.manual_seed(0)
    head = with_loss(name, loss)
    layer = ParameterHead(head)
    parameters = layer(torch.randn(2, 3, layer.in_features))
    loc, scale = window_of(head, (0.0, 2.0), torch.float32).values()
    target = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    inputs = [target, *parameters, loc, scale]
    before = [(tensor.clone(), tensor._version) for tensor in inputs]
    head.loss(target, parameters, loc=loc, scale=scale)
    head.loss(target, parameters)
    distribution = head.distribution(parameters, loc=loc, scale=scale)
    levels = torch.full((2, 3), 0.3)
    distribution.icdf(levels)
    distribution.cdf(target)
    distribution.cdf_below(target)
    distribution.log_prob(target)
    distribution.sample((2,))
    assert distribution.mean.shape == distribution.variance.shape == (2, 3)
    assert (levels == 0.3).all()
    for tensor, (values, version) in zip(inputs, before, strict=True):
        torch.testing.assert_close(tensor, values, rtol=0, atol=0)
        assert tensor._version == version


def scored() -> list[str]:
    names = [name for name in [*CONTINUOUS, *COUNTS] if "crps" in resolve_head(name).losses]
    return [name for name in names if not (name.startswith("mixture") and name in COUNTS)]


def score_by_definition(
    distribution: UnivariateDistribution, target: Tensor, edges: Tensor
) -> Tensor:
    split = torch.cat([with_far_edges(edges, 2), target.expand(1, 2, 3)]).sort(dim=0).values

    def squares(x: Tensor) -> Tensor:
        return (distribution.cdf(x) - (x >= target).to(x.dtype)).square()

    return integrals(squares, split).sum(dim=0)


@pytest.mark.parametrize("name", [name for name in scored() if name not in COUNTS])
@given(raw=raws, window=windows)
@few
def test_the_score_is_the_integral_that_defines_it(name: str, raw: np.ndarray, window: Any) -> None:
    if name == "beta":
        raw = np.maximum(raw, -0.5)
    distribution = distribution_of(name, raw, window)
    edges = edges_of(distribution)
    spread = edges[-1] - edges[0]
    levels = torch.tensor([1e-4, 0.1, 0.5, 0.8, 1 - 1e-4], dtype=torch.float64)[:, None, None]
    targets = [*distribution.icdf(levels), edges[0] - 3 * spread, edges[-1] + 3 * spread]
    for target in targets:
        expected = score_by_definition(distribution, target, edges)
        rtol = 1e-3 if "log_normal)" in name else 1e-5 if name == "implicit_quantiles" else 1e-6
        close(distribution.crps(target), expected, rtol=rtol)


@pytest.mark.parametrize("name", [name for name in scored() if name in COUNTS])
@given(raw=raws, window=windows)
@few
def test_the_score_of_counts_is_the_sum_that_defines_it(
    name: str, raw: np.ndarray, window: Any
) -> None:
    distribution = distribution_of(name, raw, window)
    counts = counts_of(distribution)
    levels = torch.tensor([1e-4, 0.5, 0.8, 1 - 1e-4], dtype=torch.float64)[:, None, None]
    last = counts[-1].expand(1, 2, 3)
    for target in torch.cat([distribution.icdf(levels), last * 0, last]):
        expected = (distribution.cdf(counts) - (counts >= target).to(counts.dtype)).square()
        close(distribution.crps(target), expected.sum(dim=0), rtol=1e-6)


@pytest.mark.parametrize("name", scored())
def test_the_gradient_of_the_score_is_its_slope(name: str) -> None:
    torch.manual_seed(1)
    head = with_loss(name, "crps")
    layer = ParameterHead(head)
    raw = 0.5 * torch.randn(2, 3, layer.in_features, dtype=torch.float64)
    raw.requires_grad_()
    levels = torch.tensor([0.05, 0.35, 0.7], dtype=torch.float64)
    with torch.no_grad():
        distribution = head.distribution(layer(raw))
        target = distribution.icdf(levels)
        edges = None if name in COUNTS else edges_of(distribution)
    by_quadrature = name.startswith(BY_QUADRATURE)

    def exact(raw: Tensor) -> Tensor:
        distribution = head.distribution(layer(raw))
        if by_quadrature:
            return score_by_definition(distribution, target, edges)
        return distribution.crps(target)

    (gradient,) = torch.autograd.grad(head.distribution(layer(raw)).crps(target).sum(), raw)
    step = 1e-4 if by_quadrature else 1e-5
    steps = step * torch.eye(layer.in_features, dtype=torch.float64)
    with torch.no_grad():
        slopes = torch.stack([exact(raw + s) - exact(raw - s) for s in steps], dim=-1)
    expected = slopes / (2 * step)
    rtol = 1e-4 if by_quadrature else 1e-5
    close(gradient, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_implicit_quantiles_are_trained_by_an_estimate_of_the_score() -> None:
    torch.manual_seed(0)
    head = resolve_head("implicit_quantiles(num_levels=512)")
    layer = ParameterHead(head)
    parameters = layer(torch.randn(2, 3, layer.in_features, dtype=torch.float64))
    loc, scale = torch.full((2, 1), 3.0).double(), torch.full((2, 1), 7.0).double()
    target = torch.randn(2, 3, dtype=torch.float64) * 7 + 3
    with torch.no_grad():
        estimate = head.loss(target, parameters, loc=loc, scale=scale)
    distribution = head.distribution(parameters, loc=loc, scale=scale)
    expected = score_by_definition(distribution, target, edges_of(distribution))
    close(estimate, expected, rtol=5e-3)


@pytest.mark.parametrize("name", ["normal", "gamma", "beta", "mixture(student_t, normal)"])
def test_quantiles_have_the_gradient_of_the_inverse(name: str) -> None:
    torch.manual_seed(0)
    layer = ParameterHead(resolve_head(name))
    raw = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
    level = torch.tensor(0.3, dtype=torch.float64)

    def quantile(raw: Tensor) -> Tensor:
        return layer.distr_output.distribution(layer(raw)).icdf(level)

    assert torch.autograd.gradcheck(quantile, raw, eps=1e-5, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("level", [-0.1, 1.1, float("nan")])
def test_levels_beyond_0_and_1_are_refused(name: str, level: float) -> None:
    distribution = distribution_of(name, np.zeros((2, 3, WIDEST)), None)
    with pytest.raises(ValueError, match=r"levels of quantiles must lie in \[0, 1\]"):
        distribution.icdf(torch.tensor(level, dtype=torch.float64))
