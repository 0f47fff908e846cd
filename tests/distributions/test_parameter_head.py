from __future__ import annotations

from typing import Callable, ContextManager

import pytest
import torch
from gluonts.torch.distributions import (
    BetaOutput,
    DistributionOutput,
    GammaOutput,
    ImplicitQuantileNetworkOutput,
    LaplaceOutput,
    NegativeBinomialOutput,
    NormalOutput,
    Output,
    PoissonOutput,
    QuantileOutput,
    StudentTOutput,
)
from moecast.distributions import (
    ParameterHead,
    PointOutput,
    has_cdf,
    resolve_head,
    scales_parameters,
    scaling_for,
)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 5)])
@pytest.mark.parametrize(
    ("head", "sizes"),
    [
        (StudentTOutput(), (1, 1, 1)),
        (NormalOutput(), (1, 1)),
        (LaplaceOutput(), (1, 1)),
        (NegativeBinomialOutput(), (1, 1)),
        (PoissonOutput(), (1,)),
        (GammaOutput(), (1, 1)),
        (BetaOutput(), (1, 1)),
        (PointOutput(), (1,)),
        (QuantileOutput([0.1, 0.5, 0.9]), (3,)),
    ],
)
def test_parameters_are_the_heads_own_domain_map(
    head: Output, sizes: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = ParameterHead(head)
    assert layer.in_features == sum(sizes)
    assert list(layer.parameters()) == []
    raw = torch.randn(*shape, sum(sizes))
    columns, first = [], 0
    for size in sizes:
        columns.append(raw[..., first : first + size])
        first += size
    expected = head.domain_map(*columns)
    parameters = layer(raw)
    assert len(parameters) == len(expected)
    for ours, theirs in zip(parameters, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert ours.shape[: len(shape)] == shape


def test_parameters_lie_in_the_distributions_domain() -> None:
    raw = 3 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    for head in (StudentTOutput(), NegativeBinomialOutput(), NormalOutput()):
        layer = ParameterHead(head)
        arguments = layer(raw[:, : layer.in_features])
        distribution = head.distribution(arguments, scale=torch.ones(500))
        assert torch.isfinite(distribution.log_prob(torch.ones(500))).all()


def test_a_head_with_a_projection_of_its_own_gets_features() -> None:
    layer = ParameterHead(ImplicitQuantileNetworkOutput())
    outputs, taus = layer(torch.randn(2, 5, layer.in_features))
    assert outputs.shape == taus.shape == (2, 5)
    assert len(list(layer.parameters())) > 0


@pytest.mark.parametrize(
    ("head", "scaling"),
    [
        (StudentTOutput(), "std"),
        (NormalOutput(), "std"),
        (LaplaceOutput(), "std"),
        (PointOutput(), "std"),
        (QuantileOutput([0.5]), "std"),
        (ImplicitQuantileNetworkOutput(), "std"),
        (NegativeBinomialOutput(), "mean"),
        (PoissonOutput(), "mean"),
        (GammaOutput(), "mean"),
        (BetaOutput(), "none"),
    ],
)
def test_scaling_keeps_within_the_support(head: Output, scaling: str) -> None:
    assert scaling_for(head) == scaling


class HalfNormalOutput(DistributionOutput):
    args_dim = {"scale": 1}  # noqa: RUF012 (GluonTS declares it so)
    distr_cls = torch.distributions.HalfNormal

    @classmethod
    def domain_map(cls, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return (scale.exp().squeeze(-1),)

    @property
    def event_shape(self) -> tuple:
        return ()


class LogNormalOutput(NormalOutput):
    distr_cls = torch.distributions.LogNormal


def test_foreign_heads_are_known_by_their_support() -> None:
    for head in (HalfNormalOutput(), LogNormalOutput()):
        assert scaling_for(head) == "mean"
        assert not scales_parameters(head)
        assert has_cdf(head)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (NegativeBinomialOutput(), True),
        (PoissonOutput(), True),
        (StudentTOutput(), False),
        (GammaOutput(), False),
        (QuantileOutput([0.5]), False),
        (PointOutput(), False),
    ],
)
def test_counts_scale_their_parameters(head: Output, expected: bool) -> None:
    assert scales_parameters(head) == expected


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (StudentTOutput(), True),
        (NormalOutput(), True),
        (LaplaceOutput(), True),
        (NegativeBinomialOutput(), True),
        (PoissonOutput(), False),
        (GammaOutput(), False),
        (BetaOutput(), False),
        (QuantileOutput([0.5]), False),
        (PointOutput(), False),
        (ImplicitQuantileNetworkOutput(), False),
    ],
)
def test_which_heads_can_be_calibrated(head: Output, expected: bool) -> None:
    assert has_cdf(head) == expected


def mean_at(head: ParameterHead, raw: torch.Tensor) -> torch.Tensor:
    return head.distr_output.distribution(head(raw)).mean


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("normal", [1.0, 0.0]),
        ("normal_fixed_scale", [1.0]),
        ("laplace", [1.0, 0.0]),
        ("student_t", [0.0, 1.0, 0.0]),
        ("student_t(loss=crps)", [0.0, 1.0, 0.0]),
        ("point", [1.0]),
        ("quantile(0.1, 0.5, 0.9)", [1.0, 1.0, 1.0]),
        ("truncated_normal(-40, 80)", [1.0, 0.0]),
        ("poisson", [0.0]),
        ("negative_binomial", [0.0, 0.0]),
        ("gamma", [0.0, 0.0]),
        ("beta", [0.0, 0.0]),
    ],
)
def test_hand_computed_directions(name: str, expected: list[float]) -> None:
    direction = ParameterHead(resolve_head(name)).location_direction()
    torch.testing.assert_close(direction, torch.tensor(expected))
    assert not direction.requires_grad


@pytest.mark.parametrize(
    "name", ["normal", "normal_fixed_scale", "laplace", "student_t", "student_t(loss=crps)"]
)
@pytest.mark.parametrize("step", [-30.0, 0.5, 4.0])
def test_a_location_is_moved_exactly_and_alone(name: str, step: float) -> None:
    """From any raw parameters: what the direction is taken at does not matter."""
    head = ParameterHead(resolve_head(name))
    raw = torch.randn(50, head.in_features, generator=torch.Generator().manual_seed(0))
    moved = raw + step * head.location_direction()
    torch.testing.assert_close(mean_at(head, moved), mean_at(head, raw) + step)
    before, after = (head.distr_output.distribution(head(x)).variance for x in (raw, moved))
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    "name", ["quantile_spline", "pareto_tails(student_t)", "mixture(student_t, normal)"]
)
def test_other_heads_are_shifted_as_a_whole(name: str) -> None:
    """Nearly: what shapes their tails moves a little, too."""
    head = ParameterHead(resolve_head(name))
    zero, direction = torch.zeros(head.in_features), head.location_direction()
    at = (
        head.distr_output.distribution(head(zero)),
        head.distr_output.distribution(head(2.0 * direction)),
    )
    for level in (0.1, 0.5, 0.9):
        before, after = (distribution.icdf(torch.tensor(level)).item() for distribution in at)
        assert after - before == pytest.approx(2.0, abs=0.1)


def test_pareto_tails_are_moved_nearly_like_their_body() -> None:
    head = ParameterHead(resolve_head("pareto_tails"))
    direction = head.location_direction()
    for step in (-3.0, 2.0):
        assert mean_at(head, step * direction).item() == pytest.approx(step, abs=1e-3)


@pytest.mark.parametrize(
    "head",
    [
        resolve_head("implicit_quantiles"),
        resolve_head("log_normal"),
        resolve_head("mixture(student_t, negative_binomial)"),
        resolve_head("zero_inflated_negative_binomial"),
        ImplicitQuantileNetworkOutput(),
    ],
)
def test_heads_that_cannot_be_shifted_have_no_direction(head: Output) -> None:
    layer = ParameterHead(head)
    direction = layer.location_direction()
    assert direction.shape == (layer.in_features,)
    assert not direction.any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_direction_does_not_depend_on_whether_gradients_are_recorded(
    mode: Callable[[], ContextManager[None]],
) -> None:
    """A network may be read from a folder in any mode, and the direction is not stored."""
    with mode():
        direction = ParameterHead(resolve_head("student_t")).location_direction()
    assert direction.tolist() == [0.0, 1.0, 0.0]
