"""Windows cut from memory: against GluonTS's own splitter, and what must never leak."""

from __future__ import annotations

from typing import Any, Iterator, List, Optional

import numpy as np
import pandas as pd
import pytest
import torch
from gluonts.dataset.common import ListDataset
from gluonts.transform import AddObservedValuesIndicator, AddTimeFeatures, Chain, InstanceSplitter
from gluonts.transform.sampler import InstanceSampler
from hypothesis import example, given, settings
from hypothesis import strategies as st
from moecast.forecasters.fields import WindowConfig, read_entry
from moecast.forecasters.frequencies import time_features
from moecast.forecasters.series import (
    SeriesArrays,
    fill_missing,
    held_out_steps,
    history_ends,
    read_chunks,
)

ALL_FIELDS = (
    "past_target",
    "future_target",
    "feat_dynamic_real",
    "past_feat_dynamic_real",
    "feat_static_real",
    "feat_static_cat",
    "time_feat",
)


class GivenAnchors(InstanceSampler):
    anchors: List[int]

    def __call__(self, ts: np.ndarray) -> np.ndarray:
        return np.array(self.anchors)


def arrays_of(entries: list[dict], config: WindowConfig) -> SeriesArrays:
    (arrays,) = read_chunks(entries, config)
    return arrays


def full_entry(
    generator: np.random.Generator, length: int, start: pd.Period, channels: int = 1
) -> dict:
    target = generator.normal(size=(channels, length)).astype(np.float32)
    return {
        "start": start,
        "target": target[0] if channels == 1 else target,
        "feat_dynamic_real": generator.normal(size=(2, length)).astype(np.float32),
        "past_feat_dynamic_real": generator.normal(size=(1, length)).astype(np.float32),
        "feat_static_real": generator.normal(size=2).astype(np.float32),
        "feat_static_cat": generator.integers(0, 3, size=1),
    }


def full_config(freq: str = "h", **settings_: Any) -> WindowConfig:
    return WindowConfig(
        **{
            "freq": freq,
            "prediction_length": 3,
            "context_length": 5,
            "num_feat_dynamic_real": 2,
            "num_past_feat_dynamic_real": 1,
            "num_feat_static_real": 2,
            "cardinality": (3,),
            **settings_,
        }
    )


@pytest.mark.parametrize("lead_time", [0, 1, 4])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("freq", ["h", "2h", "D", "W-WED", "M", "15min"])
def test_windows_equal_gluonts_instance_splitter(freq: str, channels: int, lead_time: int) -> None:
    config = full_config(freq, lead_time=lead_time, target_dim=channels)
    generator = np.random.default_rng(0)
    lengths = (config.future_length + 1, config.future_length + 3, 30)
    entries = []
    for number, length in enumerate(lengths):
        start = pd.Period("2024-02-26 01:00", freq=freq) + 7 * number
        entry = full_entry(generator, length, start, channels)
        entry["target"][..., generator.random(length) < 0.2] = np.nan
        entry["target"][..., 0] = 1.0
        entries.append(entry)
    arrays = arrays_of(entries, config)

    for position, (entry, length) in enumerate(zip(entries, lengths)):
        anchors = list(range(1, length - config.future_length + 1))
        splitter = Chain(
            [
                AddObservedValuesIndicator(target_field="target", output_field="observed_values"),
                AddTimeFeatures("start", "target", "time_feat", time_features(freq), 0),
                InstanceSplitter(
                    target_field="target",
                    is_pad_field="is_pad",
                    start_field="start",
                    forecast_start_field="forecast_start",
                    instance_sampler=GivenAnchors(anchors=anchors),
                    past_length=config.context_length,
                    future_length=config.prediction_length,
                    lead_time=lead_time,
                    time_series_fields=[
                        "observed_values",
                        "time_feat",
                        "known",
                        "seen",
                    ],
                ),
            ]
        )
        # Under their own names, past_feat_dynamic_real would be two fields after splitting.
        features = {"known": entry["feat_dynamic_real"], "seen": entry["past_feat_dynamic_real"]}
        expected = list(splitter([{**entry, **features}], is_train=True))
        batch = arrays.cut((np.full(len(anchors), position), np.array(anchors)), ALL_FIELDS)
        assert len(expected) == len(anchors)
        for row, theirs in enumerate(expected):
            ours = {name: tensor[row].numpy() for name, tensor in batch.items()}
            inside = theirs["past_is_pad"] == 0
            for side in ("past", "future"):
                observed = theirs[f"{side}_observed_values"].reshape(-1, channels)
                np.testing.assert_array_equal(ours[f"{side}_observed_values"], observed)
                np.testing.assert_array_equal(
                    ours[f"{side}_target"][observed == 1],
                    theirs[f"{side}_target"].reshape(-1, channels)[observed == 1],
                )
                assert np.isfinite(ours[f"{side}_target"]).all()
            context = config.context_length
            for name, field in (("feat_dynamic_real", "known"), ("time_feat", "time_feat")):
                past, future = ours[name][:context], ours[name][context:]
                np.testing.assert_allclose(past[inside], theirs[f"past_{field}"][inside], rtol=1e-6)
                np.testing.assert_allclose(future, theirs[f"future_{field}"], rtol=1e-6)
            np.testing.assert_array_equal(
                ours["past_feat_dynamic_real"][inside], theirs["past_seen"][inside]
            )
            assert np.isnan(ours["past_feat_dynamic_real"][~inside]).all()
            assert np.isnan(ours["feat_dynamic_real"][:context][~inside]).all()
            for name in ("feat_static_real", "feat_static_cat"):
                np.testing.assert_array_equal(ours[name], theirs[name])


def test_only_the_fields_asked_for_are_cut() -> None:
    entries = [full_entry(np.random.default_rng(0), 20, pd.Period("2024", freq="h"))]
    arrays = arrays_of(entries, full_config())
    anchors = np.array([0]), np.array([9])
    assert set(arrays.cut(anchors, ["past_target"])) == {"past_target", "past_observed_values"}
    assert set(arrays.cut(anchors, ["time_feat", "feat_static_cat"])) == {
        "time_feat",
        "feat_static_cat",
    }


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 2), st.data())
def test_no_window_reaches_into_a_neighbouring_series(
    lengths: list[int], lead_time: int, data: st.DataObject
) -> None:
    """Every value tells its series and step: 1000 * series + step."""
    config = WindowConfig(
        "h", 3, 4, lead_time=lead_time, num_feat_dynamic_real=1, num_past_feat_dynamic_real=1
    )
    entries = []
    for number, length in enumerate(lengths):
        values = 1000.0 * (number + 1) + np.arange(length + config.future_length)
        entries.append(
            {
                "start": pd.Period("2024", freq="h"),
                "target": values[:length],
                "feat_dynamic_real": values[None],
                "past_feat_dynamic_real": values[None, :length],
            }
        )
    names = ("past_target", "feat_dynamic_real", "past_feat_dynamic_real")
    for arrays, anchors, future in _training_and_prediction(entries, config):
        series, steps = anchors
        if not len(series):
            continue
        batch = arrays.cut(anchors, (*names, "future_target") if future else names)
        for row, (number, step) in enumerate(zip(series, steps)):
            base = 1000.0 * (number + 1)
            context = base + np.arange(step - 4, step)
            horizon = base + step + lead_time + np.arange(3)
            inside = context >= base
            np.testing.assert_array_equal(batch["past_observed_values"][row, :, 0], inside)
            np.testing.assert_array_equal(batch["past_target"][row, inside, 0], context[inside])
            feature = batch["feat_dynamic_real"][row, :, 0].numpy()
            np.testing.assert_array_equal(
                feature, np.concatenate([np.where(inside, context, np.nan), horizon])
            )
            np.testing.assert_array_equal(
                batch["past_feat_dynamic_real"][row, :, 0], np.where(inside, context, np.nan)
            )
            # The padding takes the mean of what the window has of its own series.
            np.testing.assert_allclose(
                batch["past_target"][row, ~inside, 0], context[inside].mean(), rtol=1e-6
            )
            if future:
                np.testing.assert_array_equal(batch["future_target"][row, :, 0], horizon)


def _training_and_prediction(entries: list[dict], config: WindowConfig) -> Iterator[tuple]:
    arrays = arrays_of(entries, config)
    yield arrays, arrays.trainable_anchors(), True
    checked = [read_entry(entry, i, config) for i, entry in enumerate(entries)]
    future = SeriesArrays(checked, config, future=True)
    yield future, future.last_anchors(), False


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(0, 2), st.integers(0, 2**16))
def test_nothing_at_or_after_the_anchor_reaches_the_past(
    anchor: int, lead_time: int, seed: int
) -> None:
    config = full_config(lead_time=lead_time)
    generator = np.random.default_rng(seed)
    entry = full_entry(generator, 20, pd.Period("2024", freq="h"))
    entry["target"][generator.random(20) < 0.3] = np.nan
    entry["target"][0] = 0.0
    changed = dict(entry)
    for name in ("target", "past_feat_dynamic_real"):
        changed[name] = entry[name].copy()
        changed[name][..., anchor:] = generator.normal(size=20 - anchor)
    anchors = np.array([0]), np.array([anchor])
    before = arrays_of([entry], config).cut(anchors, ALL_FIELDS)
    after = arrays_of([changed], config).cut(anchors, ALL_FIELDS)
    for name in set(before) - {"future_target", "future_observed_values"}:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(after["future_target"], before["future_target"])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.sampled_from([1.0, 2.0, np.nan]), min_size=1, max_size=25),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 2),
    st.integers(0, 3),
    st.sampled_from([None, 1, 2, 4, 9]),
)
# A context without observations beside a neighbour's full of them.
@example([[1.0] * 12, [np.nan, 1.0, 1.0]], 0, 0, None)
# One series long enough for a full context, one a step too short, one too short for a window.
@example([[1.0] * 6, [1.0] * 5, [1.0] * 2], 0, 0, 2)
def test_trainable_anchors_follow_their_rules(
    targets: list[list[float]],
    lead_time: int,
    calibration_windows: int,
    shortest_context: Optional[int],
) -> None:
    config = WindowConfig("h", 2, 4, lead_time=lead_time)
    targets = [target for target in targets if np.isfinite(target).any()]
    if not targets:
        return
    entries = [{"start": pd.Period("2024", freq="h"), "target": np.array(t)} for t in targets]
    expected = []
    for number, target in enumerate(targets):
        length = len(target)
        # Whole horizons at the end, as long as one more horizon of full windows remains.
        held_out = 0
        while (
            held_out < calibration_windows * 2 and length - (held_out + 2) >= 4 + lead_time + 2 + 2
        ):
            held_out += 2
        last = length - held_out - lead_time - 2
        possible = list(range(4, last + 1))
        if not possible and shortest_context is not None:
            possible = list(range(shortest_context, last + 1))
        if not possible and last >= 1:
            possible = [last]
        for anchor in possible:
            context = target[max(anchor - 4, 0) : anchor]
            horizon = target[anchor + lead_time : anchor + lead_time + 2]
            if np.isfinite(context).any() and np.isfinite(horizon).any():
                expected.append((number, anchor))
    arrays = arrays_of(entries, config)
    series, steps = arrays.trainable_anchors(calibration_windows, shortest_context)
    assert list(zip(series.tolist(), steps.tolist())) == expected


def test_any_channel_makes_a_window_trainable() -> None:
    config = WindowConfig("h", 1, 2, target_dim=2)
    target = np.full((2, 6), np.nan)
    target[0, 1], target[1, 3] = 1.0, 2.0
    entry = {"start": pd.Period("2024", freq="h"), "target": target}
    _, steps = arrays_of([entry], config).trainable_anchors()
    assert steps.tolist() == [3]


@pytest.mark.parametrize(
    ("length", "windows", "expected"),
    [(100, 0, 0), (100, 3, 9), (16, 5, 3), (13, 5, 0), (14, 5, 3), (2, 1, 0)],
)
def test_held_out_steps_leave_a_horizon_of_full_windows(
    length: int, windows: int, expected: int
) -> None:
    config = WindowConfig("h", 3, 4, lead_time=1)
    held_out = int(held_out_steps(np.array([length]), config, windows)[0])
    assert held_out == expected
    if held_out:
        full_windows = length - held_out - config.future_length - config.context_length + 1
        assert full_windows >= config.prediction_length


def calendar_of(start: pd.Period, steps: range, freq: str) -> np.ndarray:
    index = pd.PeriodIndex([start + step for step in steps])
    return np.stack([np.asarray(feature(index)) for feature in time_features(freq)], axis=-1)


def assert_right_calendar(starts: list[pd.Period], lengths: list[int], freq: str) -> None:
    config = WindowConfig(freq, 2, 3, lead_time=1)
    entries = [{"start": s, "target": np.arange(n) + 1.0} for s, n in zip(starts, lengths)]
    arrays = arrays_of(entries, config)
    for number, (start, length) in enumerate(zip(starts, lengths)):
        for step in range(length + 1):
            batch = arrays.cut((np.array([number]), np.array([step])), ["time_feat"])
            context = calendar_of(start, range(step - 3, step), freq)
            horizon = calendar_of(start, range(step + 1, step + 3), freq)
            np.testing.assert_allclose(
                batch["time_feat"][0], np.concatenate([context, horizon]), rtol=1e-6
            )


@pytest.mark.parametrize("freq", ["h", "2h", "3D", "W-WED", "M", "Q-JAN", "7min"])
def test_series_of_any_start_get_their_own_time_features(freq: str) -> None:
    # Overlapping, equal, adjoining, far apart, and, for multiples, out of phase.
    first = pd.Period("2023-12-28 01:00", freq=freq)
    unit = first.freq.base
    starts = [first + unit * k for k in (0, 1, 2, 3, 0, 11, 500, 499, -300)]
    assert_right_calendar(starts, [5, 3, 9, 1, 5, 2, 4, 6, 3], freq)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(-60, 60), st.integers(1, 6)), min_size=1, max_size=5),
    st.sampled_from(["h", "2h", "5h"]),
)
def test_time_features_of_random_starts(series: list[tuple[int, int]], freq: str) -> None:
    first = pd.Period("2024-02-28 03:00", freq=freq)
    starts = [first + first.freq.base * k for k, _ in series]
    assert_right_calendar(starts, [length for _, length in series], freq)


def test_series_of_different_anchors_get_their_own_time_features() -> None:
    starts = [pd.Period("2024-01-07", freq="W-SUN"), pd.Period("2024-01-03", freq="W-WED")]
    assert_right_calendar(starts, [6, 6], "W")


def test_time_features_before_a_short_series_are_those_of_the_time_before_it() -> None:
    start = pd.Period("2024-01-01 00:00", freq="h")
    arrays = arrays_of([{"start": start, "target": np.ones(9)}], WindowConfig("h", 1, 6))
    batch = arrays.cut((np.array([0]), np.array([2])), ["time_feat"])
    hours = (batch["time_feat"][0, :, 0] + 0.5) * 23
    assert hours.round().tolist() == [20, 21, 22, 23, 0, 1, 2]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    st.integers(0, 2**16),
)
def test_missing_values_are_filled_as_documented(
    batch: int, time: int, channels: int, missing: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(batch, time, channels)).astype(np.float32)
    observed = generator.random(values.shape) >= missing
    values[~observed] = np.nan
    fallback = generator.normal(size=(batch, channels)).astype(np.float32)
    given_values, given_observed = values.copy(), observed.copy()
    filled = fill_missing(values, observed, fallback)
    np.testing.assert_array_equal(values, given_values)
    np.testing.assert_array_equal(observed, given_observed)
    assert filled.dtype == np.float32
    np.testing.assert_array_equal(filled[observed], values[observed])
    for b in range(batch):
        for c in range(channels):
            seen = np.flatnonzero(observed[b, :, c])
            if len(seen) == 0:
                expected = np.full(time, fallback[b, c])
            else:
                known = values[b, seen, c]
                expected = np.interp(np.arange(time), seen, known)
                expected[: seen[0]] = known.mean()
            np.testing.assert_allclose(filled[b, :, c], expected, atol=1e-5)


def test_a_context_without_observations_takes_the_last_value_before_it() -> None:
    config = WindowConfig("h", 1, 3, target_dim=2)
    target = np.full((2, 12), np.nan)
    target[0, [0, 2, 11]] = 7.0, 5.0, 9.0
    target[1, 11] = 4.0
    start = pd.Period("2024", freq="h")
    neighbour = {"start": start, "target": np.full((2, 4), 3.0)}
    arrays = arrays_of([neighbour, {"start": start, "target": target}], config)
    batch = arrays.cut((np.array([1]), np.array([8])), ["past_target"])
    assert batch["past_target"][0].T.tolist() == [[5.0] * 3, [0.0] * 3]
    assert batch["past_observed_values"].sum() == 0


def test_missing_targets_of_the_horizon_are_zero_and_marked() -> None:
    target = np.array([1.0, 2.0, 3.0, np.nan, 5.0])
    arrays = arrays_of(
        [{"start": pd.Period("2024", freq="h"), "target": target}], WindowConfig("h", 2, 3)
    )
    batch = arrays.cut((np.array([0]), np.array([3])), ["future_target"])
    assert batch["future_target"][0, :, 0].tolist() == [0.0, 5.0]
    assert batch["future_observed_values"][0, :, 0].tolist() == [0.0, 1.0]


def test_a_batch_does_not_alias_the_series() -> None:
    entry = full_entry(np.random.default_rng(0), 20, pd.Period("2024", freq="h"))
    arrays = arrays_of([entry], full_config())
    anchors = np.array([0]), np.array([10])
    before = {name: tensor.clone() for name, tensor in arrays.cut(anchors, ALL_FIELDS).items()}
    for tensor in arrays.cut(anchors, ALL_FIELDS).values():
        tensor.fill_(77)
    for name, tensor in arrays.cut(anchors, ALL_FIELDS).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert entry["target"].max() < 77


@pytest.mark.parametrize("target", [[1.0, 2.0, 3.0], [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
def test_target_of_is_the_target_as_gluonts_has_it(target: list) -> None:
    config = WindowConfig("h", 1, 4, target_dim=np.atleast_2d(target).shape[0])
    entries = [{"start": pd.Period("2024", freq="h"), "target": np.array(target)}] * 2
    arrays = arrays_of(entries, config)
    assert len(arrays) == 2
    np.testing.assert_array_equal(arrays.target_of(1), target)


def test_feature_moments_are_of_all_known_values() -> None:
    config = WindowConfig("h", 1, 4, num_feat_dynamic_real=3, num_feat_static_real=1)
    first, second = np.random.default_rng(0).normal(3, 2, size=(2, 3, 10))
    first[0, 3] = np.nan
    first[1], second[1] = 1e8, 1e8
    first[2], second[2] = np.nan, np.nan
    entries = [
        {
            "start": pd.Period("2024", freq="h"),
            "target": np.ones(8),
            "feat_dynamic_real": feature,
            "feat_static_real": [static],
        }
        for feature, static in ((first, 2.0), (second, 4.0))
    ]
    (arrays,) = read_chunks(entries, config)
    mean, deviation = arrays.feature_moments("feat_dynamic_real")
    # What reaches beyond the target belongs to the future and does not count.
    known = np.concatenate([first[0, :8], second[0, :8]])
    assert mean[0] == pytest.approx(np.nanmean(known), rel=1e-5)
    assert deviation[0] == pytest.approx(np.nanstd(known), rel=1e-5)
    assert (mean[1], deviation[1]) == (1e8, 1.0)
    assert (mean[2], deviation[2]) == (0.0, 1.0)
    assert [moment.item() for moment in arrays.feature_moments("feat_static_real")] == [3.0, 1.0]


@pytest.mark.parametrize("lead_time", [0, 2])
@pytest.mark.parametrize("held_out", [0, 4])
def test_the_ends_of_series_give_the_windows_of_the_whole(lead_time: int, held_out: int) -> None:
    config = full_config(lead_time=lead_time)
    generator = np.random.default_rng(0)
    entries = []
    for number, length in enumerate((5, 9, 40, 400)):
        start = pd.Period("2024-02-27", freq="h") + number
        entry = full_entry(generator, length, start)
        entry["feat_dynamic_real"] = generator.normal(size=(2, length + config.future_length + 1))
        entries.append(entry)
    entries[2]["target"][3:] = np.nan
    entries[3]["target"][-2] = np.nan
    ends = history_ends(entries, 0, config, held_out=held_out)
    whole = SeriesArrays(
        [read_entry(entry, i, config) for i, entry in enumerate(entries)], config, future=True
    )
    assert ends.lengths[3] < 20
    names = [name for name in ALL_FIELDS if name != "future_target"]
    for back in {0, held_out}:
        ours = ends.cut(ends.last_anchors(back), names)
        theirs = whole.cut(whole.last_anchors(back), names)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)
    for entry, start, length in zip(entries, ends.starts, ends.lengths):
        assert start + length == entry["start"] + len(entry["target"])


@pytest.mark.parametrize("length", [1, 2, 6])
def test_windows_held_out_of_a_series_too_short_for_them_can_be_cut(length: int) -> None:
    """They mean nothing, but stand in one batch with those of longer series."""
    config = WindowConfig("h", 6, 3, num_feat_dynamic_real=1)
    entries = [
        {
            "start": pd.Period("2024", freq="h"),
            "target": np.arange(n) + 1.0,
            "feat_dynamic_real": np.ones((1, n + 6)),
        }
        for n in (length, 20)
    ]
    names = ["past_target", "future_target", "feat_dynamic_real", "time_feat"]

    def held_out(series: list[dict]) -> dict:
        ends = history_ends(series, 0, config, held_out=6)
        return ends.cut(ends.last_anchors(6), names)

    alone, together = held_out(entries[1:]), held_out(entries)
    for name, tensor in alone.items():
        assert torch.equal(together[name][1:], tensor)
    for batch in (together, held_out(entries[:1])):
        assert batch["past_observed_values"][0].sum() == 0
        assert batch["feat_dynamic_real"][0].shape == (9, 1)


def test_messages_count_from_the_batchs_place_in_the_dataset() -> None:
    config = WindowConfig("h", 2, 3)
    good = {"start": pd.Period("2024", freq="h"), "target": np.ones(5)}
    with pytest.raises(ValueError, match="item 12: its target has no observed value"):
        history_ends([good, good, {**good, "target": np.full(5, np.nan)}], 10, config)


@pytest.mark.parametrize("max_bytes", [None, 1, 100, 300, 10**6])
def test_chunks_hold_every_series_once(max_bytes: Optional[int]) -> None:
    config = WindowConfig("h", 2, 3)
    entries = [
        {"start": pd.Period("2024", freq="h"), "target": np.full(5 + i, i + 1.0)} for i in range(12)
    ]
    chunks = list(read_chunks(entries, config, max_bytes))
    seen = [chunk.target_of(i)[0] for chunk in chunks for i in range(len(chunk))]
    assert seen == [i + 1.0 for i in range(12)]
    if max_bytes in (None, 10**6):
        assert len(chunks) == 1
    elif max_bytes == 1:
        assert len(chunks) == 12
    else:
        assert 1 < len(chunks) < 12


def test_gluonts_datasets_are_read_like_lists() -> None:
    config = WindowConfig("h", 2, 3)
    entries = [{"start": pd.Period("2024", freq="h"), "target": np.arange(9.0)}]
    ours, theirs = arrays_of(entries, config), arrays_of(list(ListDataset(entries, "h")), config)
    np.testing.assert_array_equal(ours.target_of(0), theirs.target_of(0))
    assert ours.starts == theirs.starts
