from __future__ import annotations

from typing import Any

import pytest
from gluonts.torch.distributions import BetaOutput as GluonTSBetaOutput
from gluonts.torch.distributions import NormalOutput as GluonTSNormalOutput
from gluonts.torch.distributions import Output
from gluonts.torch.distributions import StudentTOutput as GluonTSStudentTOutput
from moecast.distributions import (
    HEADS,
    GaussianCopulaOutput,
    LaplaceOutput,
    MixtureOutput,
    NegativeBinomialOutput,
    NormalOutput,
    ParetoTailsOutput,
    PointOutput,
    QuantileOutput,
    StudentTOutput,
    resolve_head,
)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("student_t", StudentTOutput),
        ("normal", NormalOutput),
        ("laplace", LaplaceOutput),
        ("negative_binomial", NegativeBinomialOutput),
        ("quantile", QuantileOutput),
        ("point", PointOutput),
        ("gluonts.torch.distributions.BetaOutput", GluonTSBetaOutput),
        ("gluonts.torch.distributions.distribution_output.NormalOutput", GluonTSNormalOutput),
        ("moecast.distributions.PointOutput", PointOutput),
        ("gluonts.torch.distributions.StudentTOutput", GluonTSStudentTOutput),
    ],
)
def test_heads_by_name(name: str, cls: type[Output]) -> None:
    assert type(resolve_head(name)) is cls


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"mixture"}))
def test_every_short_name_makes_a_new_head(name: str) -> None:
    assert isinstance(resolve_head(name), Output)
    assert resolve_head(name) is not resolve_head(name)


def test_a_head_is_taken_as_it_is() -> None:
    head = QuantileOutput([0.2, 0.8])
    assert resolve_head(head) is head


def test_quantile_means_deciles() -> None:
    head = resolve_head("quantile")
    assert isinstance(head, QuantileOutput)
    assert head.quantiles == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])


@pytest.mark.parametrize(
    "name", ["studentT", "", "gluonts.torch.distributions.NoSuchOutput", "no.such.module.Output"]
)
def test_a_name_that_names_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"distr_output='{name}' names no head: ") as caught:
        resolve_head(name)
    for known in HEADS:
        assert known in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "torch.distributions.Normal",
        "os.system",
        "gluonts.torch.distributions",
        "moecast.distributions.names.HEADS",
    ],
)
def test_a_path_to_something_else(name: str) -> None:
    with pytest.raises(ValueError, match=r"names no head: .*class derived from gluonts"):
        resolve_head(name)


def test_a_class_that_needs_arguments() -> None:
    path = "gluonts.torch.distributions.QuantileOutput"
    with pytest.raises(ValueError, match=r"does not take these arguments \(.*quantiles"):
        resolve_head(path)


def test_names_take_arguments_as_in_python() -> None:
    assert resolve_head("normal(loss=crps)").loss_name == "crps"
    assert resolve_head("truncated_normal(-1, upper=2.5)").upper == 2.5
    assert resolve_head("quantile(0.9, 0.1)").quantiles == [0.1, 0.9]
    mixture = resolve_head("mixture(student_t, negative_binomial)")
    assert isinstance(mixture, MixtureOutput)
    assert [type(head) for head in mixture.components] == [StudentTOutput, NegativeBinomialOutput]


def test_names_nest() -> None:
    head = resolve_head("gaussian_copula(mixture(normal, pareto_tails(laplace)), rank=3)")
    assert isinstance(head, GaussianCopulaOutput)
    assert head.rank == 3
    normal, tails = head.marginal.components
    assert type(normal) is NormalOutput
    assert isinstance(tails, ParetoTailsOutput)
    assert type(tails.body) is LaplaceOutput


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("studentT", "'student_t'"),
        ("negativ_binomial", "'negative_binomial'"),
        ("mixture(student_t, poison)", "'poisson'"),
        ("splines", "'quantile_spline'"),
    ],
)
def test_the_nearest_names_are_suggested(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean .*{nearest}"):
        resolve_head(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mixture", "at least two heads"),
        ("mixture(student_t, point)", "that loss='nll' can train, which PointOutput is not"),
        ("gaussian_copula(quantile)", "with a distribution, which QuantileOutput is not"),
        ("gaussian_copula(rank=0)", "rank=0 must be at least 1"),
        ("pareto_tails(gamma)", "must be a continuous head on the real line"),
        ("pareto_tails(tail_mass=0.5)", "tail_mass=0.5 must lie between 0 and 0.5"),
        ("truncated_normal(2, 1)", "lower=2.0 must be less than upper=1.0"),
        ("truncated_normal(None)", "nothing to truncate"),
        ("normal(loss=mse)", "loss='mse' is unknown: choose one of nll, crps"),
        ("normal(beta=-1)", "beta=-1.0 must not be negative"),
        ("mixture(normal, poisson, loss=crps)", "loss='crps' cannot train MixtureOutput"),
        ("normal_fixed_scale(0)", "scale=0.0 must be positive"),
        ("quantile(0.1, 1)", r"quantiles=\[0.1, 1.0\] must be levels between 0 and 1"),
        ("quantile(0)", r"quantiles=\[0.0\] must be levels between 0 and 1"),
        ("quantile_spline(0.9, 0.1)", "must be at least two levels, ascending"),
        ("quantile_spline(num_pieces=0)", "num_pieces=0 must be at least 1"),
        ("implicit_quantiles(num_units=0)", "num_units=0 must be at least 1"),
        ("normal(1 + 1)", r"'1 \+ 1' is neither a number nor a name"),
    ],
)
def test_arguments_out_of_bounds(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        resolve_head(name)


@pytest.mark.parametrize("head", [None, 3, StudentTOutput])
def test_what_is_neither_head_nor_name(head: Any) -> None:
    with pytest.raises(ValueError, match=r"distr_output=.* must be a head or the name of one"):
        resolve_head(head)
