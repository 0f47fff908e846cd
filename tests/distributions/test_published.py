"""Published configurations and parameters, there and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moecast.distributions import (
    Head,
    LaplaceOutput,
    LogNormalOutput,
    MixtureOutput,
    NegativeBinomialOutput,
    NormalFixedScaleOutput,
    NormalOutput,
    ParameterHead,
    StudentTOutput,
    head_from_published,
    head_to_published,
    parameters_from_published,
    parameters_to_published,
    resolve_head,
)

PACKAGE = "uni2ts.distribution"
MOIRAI = {
    "_target_": "uni2ts.distribution.MixtureOutput",
    "components": [
        {"_target_": "uni2ts.distribution.StudentTOutput"},
        {"_target_": "uni2ts.distribution.NormalFixedScaleOutput", "scale": 0.001},
        {"_target_": "uni2ts.distribution.NegativeBinomialOutput"},
        {"_target_": "uni2ts.distribution.LogNormalOutput"},
    ],
}


def test_the_published_mixture_is_known() -> None:
    head = head_from_published(MOIRAI)
    assert isinstance(head, MixtureOutput)
    kinds = [StudentTOutput, NormalFixedScaleOutput, NegativeBinomialOutput, LogNormalOutput]
    assert [type(component) for component in head.components] == kinds
    assert head.components[1].scale == 0.001
    assert head.components[2].real_valued
    assert not head.scales_parameters
    assert head_to_published(head) == MOIRAI
    assert head_to_published(resolve_head("moirai_mixture")) == MOIRAI


@pytest.mark.parametrize(
    "config",
    [
        MOIRAI,
        {"_target_": f"{PACKAGE}.StudentTOutput"},
        {"_target_": f"{PACKAGE}.NormalOutput"},
        {"_target_": f"{PACKAGE}.LaplaceOutput"},
        {"_target_": f"{PACKAGE}.LogNormalOutput"},
        {"_target_": f"{PACKAGE}.NegativeBinomialOutput"},
        {"_target_": f"{PACKAGE}.NormalFixedScaleOutput", "scale": 0.5},
        {
            "_target_": f"{PACKAGE}.MixtureOutput",
            "components": [
                {"_target_": f"{PACKAGE}.NormalOutput"},
                {
                    "_target_": f"{PACKAGE}.MixtureOutput",
                    "components": [
                        {"_target_": f"{PACKAGE}.LaplaceOutput"},
                        {"_target_": f"{PACKAGE}.NormalOutput"},
                    ],
                },
            ],
        },
    ],
)
def test_heads_and_parameters_come_back_as_they_were(config: dict[str, Any]) -> None:
    head = head_from_published(config)
    assert head_to_published(head) == config
    layer = ParameterHead(head)
    parameters = layer(torch.randn(2, 3, layer.in_features))
    nested = parameters_to_published(head, parameters)
    returned = parameters_from_published(head, nested)
    assert len(returned) == len(parameters)
    assert all(there is back for there, back in zip(parameters, returned))


def test_parameters_are_nested_as_published() -> None:
    head = head_from_published(MOIRAI)
    names = list(head.args_dim)
    values = [torch.tensor(float(i)) for i in range(len(names))]
    nested = parameters_to_published(head, values)
    assert list(nested) == ["weights_logits", "components"]
    assert [list(part) for part in nested["components"]] == [
        ["df", "loc", "scale"],
        ["loc"],
        ["total_count", "logits"],
        ["loc", "scale"],
    ]
    assert nested["weights_logits"] is values[0]
    assert nested["components"][0]["df"] is values[names.index("components.0.df")]
    assert nested["components"][3]["scale"] is values[names.index("components.3.scale")]


def test_the_order_of_nested_parameters_does_not_matter() -> None:
    head = head_from_published(MOIRAI)
    values = [torch.tensor(float(i)) for i in range(len(head.args_dim))]
    nested = parameters_to_published(head, values)
    shuffled = {
        "components": [dict(reversed(part.items())) for part in nested["components"]],
        "weights_logits": nested["weights_logits"],
    }
    for found, value in zip(parameters_from_published(head, shuffled), values, strict=True):
        assert found is value


def test_missing_parameters_are_named() -> None:
    head = head_from_published(MOIRAI)
    values = [torch.tensor(float(i)) for i in range(len(head.args_dim))]
    nested = parameters_to_published(head, values)
    del nested["components"][3]["scale"]
    with pytest.raises(ValueError, match=r"lack 'components\.3\.scale'"):
        parameters_from_published(head, nested)
    del nested["components"][2:]
    with pytest.raises(ValueError, match=r"lack 'components\.2\.total_count'"):
        parameters_from_published(head, nested)
    with pytest.raises(ValueError, match="lack 'weights_logits'"):
        parameters_from_published(head, {})


@pytest.mark.parametrize(
    "target",
    [
        f"{PACKAGE}.ParetoFixedAlphaOutput",
        f"{PACKAGE}.NoSuchOutput",
        "os.system",
        "builtins.StudentTOutput",
        "uni2ts.distributionx.StudentTOutput",
        f"{PACKAGE}",
        "StudentTOutput",
        "",
        None,
    ],
)
def test_unknown_classes_are_refused(target: str | None) -> None:
    for config in (
        {"_target_": target},
        {"_target_": f"{PACKAGE}.MixtureOutput", "components": [{"_target_": target}] * 2},
    ):
        with pytest.raises(ValueError, match=r"has _target_=.* none of the known heads") as caught:
            head_from_published(config)
        assert f"{PACKAGE}.StudentTOutput" in str(caught.value)


def test_a_configuration_without_a_class_is_refused() -> None:
    with pytest.raises(ValueError, match="has _target_=None"):
        head_from_published({})


@pytest.mark.parametrize(
    ("config", "extra"),
    [
        ({"_target_": f"{PACKAGE}.StudentTOutput", "df": 3}, "df"),
        ({"_target_": f"{PACKAGE}.NegativeBinomialOutput", "real_valued": False}, "real_valued"),
        ({"_target_": f"{PACKAGE}.NormalFixedScaleOutput", "scale": 1.0, "loss": "crps"}, "loss"),
        ({**MOIRAI, "beta": 0.5}, "beta"),
    ],
)
def test_arguments_beyond_the_published_ones_are_refused(config: Any, extra: str) -> None:
    with pytest.raises(ValueError, match=rf"distr_output has \['{extra}'\], which \w+ does not"):
        head_from_published(config)


@pytest.mark.parametrize(
    "head",
    [
        NormalOutput(loss="crps"),
        StudentTOutput(beta=0.5),
        NegativeBinomialOutput(),
        resolve_head("gamma"),
        MixtureOutput([LaplaceOutput(), NegativeBinomialOutput()]),
        MixtureOutput([LogNormalOutput(), NormalFixedScaleOutput(loss="crps")]),
    ],
)
def test_heads_that_cannot_be_published_are_refused(head: Head) -> None:
    with pytest.raises(ValueError, match="has no published format: it knows LaplaceOutput"):
        head_to_published(head)
