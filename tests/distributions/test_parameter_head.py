from __future__ import annotations

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
