from __future__ import annotations

from typing import Any

import pytest
from gluonts.torch.distributions import (
    BetaOutput,
    LaplaceOutput,
    NegativeBinomialOutput,
    NormalOutput,
    Output,
    QuantileOutput,
)
from gluonts.torch.distributions import StudentTOutput as GluonTSStudentTOutput
from moecast.distributions import HEADS, PointOutput, StudentTOutput, resolve_head


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("student_t", StudentTOutput),
        ("normal", NormalOutput),
        ("laplace", LaplaceOutput),
        ("negative_binomial", NegativeBinomialOutput),
        ("quantile", QuantileOutput),
        ("point", PointOutput),
        ("gluonts.torch.distributions.BetaOutput", BetaOutput),
        ("gluonts.torch.distributions.distribution_output.NormalOutput", NormalOutput),
        ("moecast.distributions.PointOutput", PointOutput),
        ("gluonts.torch.distributions.StudentTOutput", GluonTSStudentTOutput),
    ],
)
def test_heads_by_name(name: str, cls: type[Output]) -> None:
    assert type(resolve_head(name)) is cls


def test_every_short_name_makes_a_new_head() -> None:
    for name in HEADS:
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
    with pytest.raises(ValueError, match=r"(?s)needs arguments .*quantiles.*'distr_output\.\(\)'"):
        resolve_head(path)


@pytest.mark.parametrize("head", [None, 3, StudentTOutput])
def test_what_is_neither_head_nor_name(head: Any) -> None:
    with pytest.raises(ValueError, match=r"distr_output=.* must be a head or the name of one"):
        resolve_head(head)
