"""The settings that a model's estimator takes from MoEEstimator, and its own defaults of them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from gluonts.core.component import equals
from gluonts.shell.sagemaker.params import decode_sagemaker_parameters
from moecast.forecasters import (
    HierarchicalAutoformerEstimator,
    MoEEstimator,
    MoiraiMoEEstimator,
    MoLEEstimator,
)
from moecast.forecasters.estimator import SharedSettings, takes_shared_settings
from typing_extensions import Unpack

SHARED = inspect.signature(MoEEstimator.__init__).parameters

DEFAULTS: dict[type[MoEEstimator], dict[str, Any]] = {
    MoLEEstimator: {},
    MoiraiMoEEstimator: {"patch_size": 16, "lr": 1e-3, "weight_decay": 0.1},
    HierarchicalAutoformerEstimator: {"patch_size": 4},
}


@pytest.fixture(params=list(DEFAULTS))
def estimator_class(request: pytest.FixtureRequest) -> type[MoEEstimator]:
    return request.param


class Inheritor(MoEEstimator):
    """What decoration adds to a constructor, and nothing else."""

    @takes_shared_settings(lr=0.25, seed=7)
    def __init__(
        self,
        freq: str,
        prediction_length: int,
        context_length: int = 12,
        own: int = 3,
        **shared: Unpack[SharedSettings],
    ) -> None:
        self.own = own
        super().__init__(freq, prediction_length, context_length, **shared)


def test_typed_settings_are_those_of_the_constructor() -> None:
    positional = ["self", "freq", "prediction_length", "context_length"]
    assert list(SHARED) == [*positional, *SharedSettings.__annotations__]


def test_signature_names_every_setting_with_the_models_default(
    estimator_class: type[MoEEstimator],
) -> None:
    parameters = inspect.signature(estimator_class).parameters
    assert list(parameters)[:3] == ["freq", "prediction_length", "context_length"]
    own = DEFAULTS[estimator_class]
    for name in SharedSettings.__annotations__:
        assert parameters[name].default == own.get(name, SHARED[name].default), name
    kinds = {parameter.kind for parameter in parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_defaults_are_what_is_used(estimator_class: type[MoEEstimator]) -> None:
    estimator = estimator_class(freq="h", prediction_length=4)
    default = {name: SHARED[name].default for name in ("patch_size", "lr", "weight_decay")}
    expected = {**default, **DEFAULTS[estimator_class]}
    assert estimator.patch_sizes == (expected["patch_size"],)
    assert estimator.optimizer_config.lr == expected["lr"]
    assert estimator.optimizer_config.weight_decay == expected["weight_decay"]


def test_what_is_given_goes_before_the_models_default(
    estimator_class: type[MoEEstimator],
) -> None:
    estimator = estimator_class(freq="h", prediction_length=4, patch_size=8, weight_decay=0.5)
    assert estimator.patch_sizes == (8,)
    assert estimator.optimizer_config.weight_decay == 0.5


def test_lengths_can_be_given_by_position(estimator_class: type[MoEEstimator]) -> None:
    by_position = estimator_class("h", 4, 32)
    by_name = estimator_class(prediction_length=4, context_length=32, freq="h")
    assert by_position.window == by_name.window
    assert (by_name.window.prediction_length, by_name.window.context_length) == (4, 32)
    assert equals(by_position, by_name)
    assert not equals(by_position, estimator_class("h", 4, 33))


def test_one_models_defaults_are_not_anothers() -> None:
    estimator = Inheritor("h", 2)
    assert (estimator.own, estimator.context_length, estimator.seed) == (3, 12, 7)
    assert estimator.optimizer_config.lr == 0.25
    assert Inheritor("h", 2, 5, 4, lr="0.5").optimizer_config.lr == 0.5
    assert Inheritor("h", 2, 5, 4).own == 4
    parameters = inspect.signature(Inheritor).parameters
    assert list(parameters)[:5] == [
        "freq",
        "prediction_length",
        "context_length",
        "own",
        "lead_time",
    ]
    assert SHARED["lr"].default == inspect.signature(MoLEEstimator).parameters["lr"].default == 2e-3


def test_a_setting_that_nobody_has_is_refused(estimator_class: type[MoEEstimator]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        estimator_class(freq="h", prediction_length=4, colour="red")


def test_hyperparameters_of_strings_are_converted() -> None:
    """As the GluonTS shell reads them: lists and dictionaries decoded, all else as it came."""
    hyperparameters = decode_sagemaker_parameters(
        {
            "freq": "h",
            "prediction_length": "6",
            "context_length": "48",
            "patch_size": "[8, 4]",
            "lr": "0.02",
            "weight_decay": "0",
            "num_experts": "6",
            "top_k": "3",
            "dropout": "0.1",
            "covariates_ahead": "false",
            "tune_routers": "true",
            "gradient_checkpointing": "true",
            "num_samples": "30",
            "decoding": "reencode",
            "distr_output": "mixture(student_t, normal)",
            "scaling": "regularised_std",
            "num_feat_static_cat": "2",
            "cardinality": "[3, 2]",
            "trainer_kwargs": '{"max_epochs": 3}',
        }
    )
    estimator = MoiraiMoEEstimator.from_hyperparameters(**hyperparameters)
    expected = MoiraiMoEEstimator(
        freq="h",
        prediction_length=6,
        context_length=48,
        patch_size=[4, 8],
        lr=0.02,
        weight_decay=0.0,
        num_experts=6,
        top_k=3,
        dropout=0.1,
        covariates_ahead=False,
        tune_routers=True,
        gradient_checkpointing=True,
        num_samples=30,
        decoding="reencode",
        distr_output="mixture(student_t, normal)",
        scaling="regularised_std",
        num_feat_static_cat=2,
        cardinality=[3, 2],
        trainer_kwargs={"max_epochs": 3},
    )
    assert equals(estimator.network_config, expected.network_config)
    assert estimator.optimizer_config == expected.optimizer_config
    assert estimator.trainer_kwargs == expected.trainer_kwargs
    assert (estimator.num_samples, estimator.tune_routers) == (30, True)
    assert estimator.network_config.patch_sizes == (4, 8)
    assert estimator.network_config.covariates_ahead is False


def test_a_default_of_no_shared_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="no shared setting is called learning_rate"):
        takes_shared_settings(learning_rate=0.1)
