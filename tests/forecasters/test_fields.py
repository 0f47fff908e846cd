from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gluonts.core import serde
from gluonts.core.component import equals
from moecast.forecasters.fields import WindowConfig, read_entry

CONFIG = WindowConfig(
    "h",
    prediction_length=2,
    context_length=4,
    lead_time=1,
    num_feat_dynamic_real=2,
    num_past_feat_dynamic_real=1,
    num_feat_static_real=2,
    cardinality=(3, 5),
)


def entry_with(**changes: Any) -> dict:
    entry = {
        "item_id": "shop 7",
        "start": pd.Period("2024-01-01", freq="h"),
        "target": [1.0, np.nan, 3.0],
        "feat_dynamic_real": np.arange(12).reshape(2, 6),
        "past_feat_dynamic_real": [[1, 2, 3]],
        "feat_static_real": [0.5, 1.5],
        "feat_static_cat": [2, 0],
        "unknown_field": object(),
    }
    return {name: value for name, value in {**entry, **changes}.items() if value is not None}


def test_a_checked_entry_is_time_first_and_float() -> None:
    checked = read_entry(entry_with(), 0, CONFIG, forecast=True)
    assert set(checked) == {
        "start",
        "target",
        "feat_dynamic_real",
        "past_feat_dynamic_real",
        "feat_static_real",
        "feat_static_cat",
    }
    assert checked["start"] == pd.Period("2024-01-01", freq="h")
    np.testing.assert_array_equal(checked["target"], [[1.0], [np.nan], [3.0]])
    np.testing.assert_array_equal(checked["feat_dynamic_real"], np.arange(12).reshape(2, 6).T)
    np.testing.assert_array_equal(checked["past_feat_dynamic_real"], [[1], [2], [3]])
    assert checked["feat_static_cat"].tolist() == [2, 0]
    assert checked["feat_static_cat"].dtype == np.int64
    for name in ("target", "feat_dynamic_real", "past_feat_dynamic_real", "feat_static_real"):
        assert checked[name].dtype == np.float32


def test_what_is_not_configured_is_not_read() -> None:
    checked = read_entry(entry_with(), 0, WindowConfig("h", 2, 4))
    assert set(checked) == {"start", "target"}


def test_a_single_feature_may_come_without_its_dimension() -> None:
    checked = read_entry(entry_with(past_feat_dynamic_real=[1, 2, 3]), 0, CONFIG)
    np.testing.assert_array_equal(checked["past_feat_dynamic_real"], [[1], [2], [3]])


def test_features_need_no_future_in_training() -> None:
    read_entry(entry_with(feat_dynamic_real=np.zeros((2, 3))), 0, CONFIG)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"start": None}, ["has no field 'start'", "the estimator was told to expect"]),
        ({"target": None}, ["has no field 'target'"]),
        ({"feat_dynamic_real": None}, ["has no field 'feat_dynamic_real'"]),
        ({"past_feat_dynamic_real": None}, ["has no field 'past_feat_dynamic_real'"]),
        ({"feat_static_real": None}, ["has no field 'feat_static_real'"]),
        ({"feat_static_cat": None}, ["has no field 'feat_static_cat'"]),
        (
            {"start": pd.Period("2024-01-01", freq="D")},
            ["start=2024-01-01", "frequency 'D'", "freq='h'", "resample"],
        ),
        ({"start": "soon"}, ["start='soon'", "no point in time"]),
        ({"target": ["a", "b"]}, ["target does not consist of numbers", "'a'"]),
        ({"target": [[1.0], [2.0, 3.0]]}, ["target does not consist of numbers"]),
        (
            {"target": np.zeros((3, 9))},
            ["target has shape [3, 9], not [time]", "set target_dim"],
        ),
        (
            {"feat_dynamic_real": np.zeros((6, 2))},
            ["feat_dynamic_real has shape [6, 2], not [2, time]", "set num_feat_dynamic_real"],
        ),
        (
            {"past_feat_dynamic_real": np.zeros((2, 3))},
            [
                "past_feat_dynamic_real has shape [2, 3], not [time]",
                "set num_past_feat_dynamic_real",
            ],
        ),
        (
            {"feat_dynamic_real": np.zeros((2, 5))},
            [
                "feat_dynamic_real has 5 steps",
                "target (3 steps)",
                "3 steps of lead_time and prediction_length",
            ],
        ),
        (
            {"past_feat_dynamic_real": np.zeros((1, 2))},
            ["past_feat_dynamic_real has 2 steps", "as long as the target (3 steps)"],
        ),
        ({"feat_static_real": [1.0]}, ["feat_static_real has shape [1], not [2]"]),
        ({"feat_static_cat": [[1, 2]]}, ["feat_static_cat has shape [1, 2], not [2]"]),
        (
            {"feat_static_cat": [2, 5]},
            ["feat_static_cat[1]=5 must lie in 0…4", "cardinality=[3, 5]"],
        ),
        ({"feat_static_cat": [-1, 0]}, ["feat_static_cat[0]=-1 must lie in 0…2"]),
        ({"feat_static_cat": ["red", "blue"]}, ["feat_static_cat", "red"]),
        ({"feat_static_cat": [0.5, 1.0]}, ["feat_static_cat", "0.5"]),
        ({"feat_static_cat": [np.nan, 1.0]}, ["feat_static_cat", "nan"]),
        ({"feat_static_real": ["red", "blue"]}, ["feat_static_real", "red"]),
        ({"target": [np.nan] * 3}, ["no observed value among 3", "leave the item out"]),
        ({"target": []}, ["no observed value among 0", "leave the item out"]),
        ({"target": [1.0, np.inf, 2.0]}, ["infinite at step 1", "NaN"]),
        ({"target": [1.0, np.nan, -np.inf]}, ["infinite at step 2", "NaN"]),
        (
            {"feat_dynamic_real": [[0, 1, np.inf, 3, 4, 5], [0] * 6]},
            ["feat_dynamic_real", "infinite", "step 2"],
        ),
    ],
)
def test_messages_name_the_item_the_field_and_what_to_do(
    changes: dict, fragments: list[str]
) -> None:
    with pytest.raises(ValueError, match="item 'shop 7'") as caught:
        read_entry(entry_with(**changes), 3, CONFIG, forecast=True)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_an_item_without_a_name_is_called_by_its_place() -> None:
    with pytest.raises(ValueError, match="item 3 has no field 'target'"):
        read_entry(entry_with(item_id=None, target=None), 3, CONFIG)


def test_channels_of_a_multivariate_target_may_be_missing() -> None:
    config = WindowConfig("h", 2, 4, target_dim=2)
    checked = read_entry(entry_with(target=[[np.nan] * 3, [1, 2, 3]]), 0, config)
    assert checked["target"].shape == (3, 2)
    with pytest.raises(ValueError, match=r"target has shape \[3\], not \[2, time\]"):
        read_entry(entry_with(target=[1, 2, 3]), 0, config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("freq", "fortnight", "freq='fortnight' is no frequency"),
        ("prediction_length", 0, "prediction_length=0 must be at least 1"),
        ("context_length", 0, "context_length=0 must be at least 1"),
        ("target_dim", 0, "target_dim=0 must be at least 1"),
        ("lead_time", -1, "lead_time=-1 must not be negative"),
        ("num_feat_dynamic_real", -1, "num_feat_dynamic_real=-1 must not be negative"),
        ("num_past_feat_dynamic_real", -2, "num_past_feat_dynamic_real=-2 must not be negative"),
        ("num_feat_static_real", -1, "num_feat_static_real=-1 must not be negative"),
        ("cardinality", (3, 0), r"cardinality=\[3, 0\] must hold numbers of at least 1"),
    ],
)
def test_impossible_windows_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{name: value})


def test_derived_sizes() -> None:
    assert CONFIG.future_length == 3
    assert list(CONFIG.dynamic_fields.items()) == [
        ("target", 1),
        ("feat_dynamic_real", 2),
        ("past_feat_dynamic_real", 1),
    ]
    assert CONFIG.static_fields == {"feat_static_real": 2, "feat_static_cat": 2}
    bare = WindowConfig("h", 2, 4)
    assert bare.dynamic_fields == {"target": 1}
    assert bare.static_fields == {}


def test_settings_survive_gluonts_serialisation() -> None:
    copy = serde.load_json(serde.dump_json(CONFIG))
    assert copy == CONFIG
    assert isinstance(copy.cardinality, tuple)
    assert equals(copy, CONFIG)
    assert not equals(dataclasses.replace(CONFIG, lead_time=2), CONFIG)
    assert not equals(CONFIG, "something else")
