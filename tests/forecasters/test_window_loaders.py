"""The training and validation windows that the trainer is given."""

from __future__ import annotations

import copy
from typing import Any, Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from gluonts.transform.sampler import (
    ExpectedNumInstanceSampler,
    InstanceSampler,
    NumInstanceSampler,
    ValidationSplitSampler,
)
from moecast.forecasters.calibration import held_out_windows
from moecast.forecasters.fields import WindowConfig
from moecast.forecasters.series import held_out_steps
from moecast.forecasters.windows import TrainingWindows, ValidationWindows

CONFIG = WindowConfig("h", prediction_length=3, context_length=4)
NAMES = ("past_target",)


def numbered(lengths: list[int]) -> list[dict]:
    """Series whose values tell series and step: 1000 * (series + 1) + step."""
    return [
        {
            "start": pd.Period("2024", freq="h"),
            "target": 1000.0 * (number + 1) + np.arange(length),
        }
        for number, length in enumerate(lengths)
    ]


def windows_of(batches: Any) -> list[tuple[int, int]]:
    """Series and anchor of every window, which must be whole and consecutive."""
    found = []
    for batch in batches:
        for past, seen, future in zip(
            batch["past_target"][..., 0].double(),
            batch["past_observed_values"][..., 0],
            batch["future_target"][..., 0].double(),
        ):
            anchor = int(past[-1]) + 1
            series, step = divmod(anchor, 1000)
            expected = torch.arange(anchor - int(seen.sum()), anchor).double()
            assert torch.equal(past[seen == 1], expected)
            lead = int(future[0]) - anchor
            assert torch.equal(future, torch.arange(len(future)).double() + anchor + lead)
            found.append((series - 1, step))
    return found


def same_batches(ours: list, theirs: list) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a[name], b[name]) for a, b in zip(ours, theirs) for name in a
    )


class EndlessDataset:
    """Counts how often it is read, and ends a search that would never end."""

    def __init__(self, entries: list[dict], most: int = 50) -> None:
        self.entries = entries
        self.most = most
        self.reads = 0

    def __iter__(self) -> Iterator[dict]:
        self.reads += 1
        assert self.reads <= self.most, "the dataset is read again and again"
        return iter(self.entries)


@pytest.mark.parametrize("max_bytes", [None, 100])
@pytest.mark.parametrize("lead_time", [0, 2])
def test_batches_hold_whole_windows_of_the_data(max_bytes: Any, lead_time: int) -> None:
    config = WindowConfig("h", 3, 4, lead_time=lead_time)
    lengths = [30, 7 + lead_time, 5 + lead_time, 3 + lead_time, 40]
    windows = TrainingWindows(numbered(lengths), config, NAMES, 8, 40, seed=0, max_bytes=max_bytes)
    batches = list(windows)
    assert len(batches) == len(windows) == 40
    assert all(len(batch["past_target"]) == 8 for batch in batches)
    found = set(windows_of(batches))
    possible = {
        (i, step)
        for i, length in enumerate(lengths)
        for step in range(min(4, length - 3 - lead_time), length - 2 - lead_time)
        if step >= 1
    }
    assert found <= possible
    assert {series for series, _ in found} == {0, 1, 2, 4}


def test_series_are_equally_likely_and_so_are_their_windows() -> None:
    windows = TrainingWindows(numbered([17, 8]), CONFIG, NAMES, 50, 100, seed=0)
    found = windows_of(windows)
    counts = {window: found.count(window) for window in sorted(set(found))}
    assert list(counts) == [(0, step) for step in range(4, 15)] + [(1, 4), (1, 5)]
    for series, number in ((0, 11), (1, 2)):
        expected = np.full(number, len(found) / 2 / number)
        drawn = np.array([count for (i, _), count in counts.items() if i == series])
        assert (np.abs(drawn - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("max_bytes", [None, 100])
def test_short_series_give_windows_of_short_contexts_where_these_are_enough(max_bytes: Any) -> None:
    config = WindowConfig("h", prediction_length=3, context_length=9)
    entries = numbered([30, 11, 5, 3])

    def found(shortest_context: Any, epoch: int = 0) -> list[tuple[int, int]]:
        windows = TrainingWindows(
            entries,
            config,
            NAMES,
            8,
            60,
            seed=0,
            max_bytes=max_bytes,
            shortest_context=shortest_context,
        )
        windows.set_epoch(epoch)
        return windows_of(windows)

    full = {(0, step) for step in range(9, 28)}
    assert set(found(None)) == full | {(1, 8), (2, 2)}
    assert set(found(4)) == full | {(1, step) for step in range(4, 9)} | {(2, 2)}
    assert found(4) == found(4)
    assert found(4) != found(4, epoch=1)


@pytest.mark.parametrize("max_bytes", [None, 100])
def test_the_same_seed_and_epoch_give_the_same_batches(max_bytes: Any) -> None:
    entries = numbered([30, 20, 25, 40, 15])

    def training(seed: int = 5) -> TrainingWindows:
        return TrainingWindows(entries, CONFIG, NAMES, 4, 5, seed=seed, max_bytes=max_bytes)

    windows = training()
    first = list(windows)
    windows.set_epoch(1)
    second = list(windows)
    assert not same_batches(first, second)
    assert not same_batches(first, list(training(seed=6)))
    assert same_batches(first, list(training()))
    # As after a crash in epoch 1, and as in a repeated epoch.
    resumed = training()
    resumed.set_epoch(1)
    assert same_batches(second, list(resumed))
    windows.set_epoch(0)
    assert same_batches(first, list(windows))


def test_gluonts_samplers_are_covered_by_the_seed_too() -> None:
    sampler = NumInstanceSampler(N=2, min_past=1, min_future=3)

    def training() -> list:
        return list(TrainingWindows(numbered([30, 20]), CONFIG, NAMES, 4, 6, 0, sampler=sampler))

    np.random.seed(0)  # noqa: NPY002 (GluonTS's samplers draw from it)
    first = training()
    assert same_batches(first, training())


def test_streaming_goes_through_the_whole_dataset_in_a_few_epochs() -> None:
    dataset = EndlessDataset(numbered([30] * 12))
    windows = TrainingWindows(dataset, CONFIG, NAMES, 4, 10, seed=0, max_bytes=200)
    seen = set()
    for epoch in range(12):
        windows.set_epoch(epoch)
        seen |= {series for series, _ in windows_of(windows)}
    assert seen == set(range(12))


def test_a_dataset_that_fits_is_read_once() -> None:
    dataset = EndlessDataset(numbered([30] * 3), most=1)
    windows = TrainingWindows(dataset, CONFIG, NAMES, 4, 10, seed=0, max_bytes=10**6)
    for epoch in range(3):
        windows.set_epoch(epoch)
        assert len(windows_of(windows)) == 40


def test_streaming_skips_chunks_without_a_window() -> None:
    dataset = EndlessDataset(numbered([2, 2, 30, 3, 2]))
    windows = TrainingWindows(dataset, CONFIG, NAMES, 4, 5, seed=0, max_bytes=1)
    assert {series for series, _ in windows_of(windows)} == {2}


@pytest.mark.parametrize("max_bytes", [None, 1])
def test_a_dataset_without_any_window_is_refused(max_bytes: Any) -> None:
    dataset = EndlessDataset(numbered([2, 3, 3]))
    with pytest.raises(ValueError, match=r"no window to train on: .* are shorter than the 4"):
        list(TrainingWindows(dataset, CONFIG, NAMES, 4, 5, seed=0, max_bytes=max_bytes))


def test_a_dataset_that_can_be_read_only_once_cannot_be_streamed() -> None:
    entries = iter(numbered([30] * 5))
    with pytest.raises(ValueError, match=r"stream|again|once"):
        list(TrainingWindows(entries, CONFIG, NAMES, 4, 50, seed=0, max_bytes=1))


def test_empty_datasets_are_refused() -> None:
    with pytest.raises(ValueError, match="the training dataset is empty"):
        TrainingWindows([], CONFIG, NAMES, 4, 5, seed=0)
    with pytest.raises(ValueError, match="the validation dataset is empty"):
        ValidationWindows([], CONFIG, NAMES, 4)


class FirstSteps(InstanceSampler):
    """Starts forecasts where the series is short of everything, too."""

    def __call__(self, ts: np.ndarray) -> np.ndarray:
        assert ts.ndim == 1
        return np.arange(ts.shape[self.axis] + 3)


@pytest.mark.parametrize("max_bytes", [None, 100])
def test_a_training_sampler_picks_the_windows(max_bytes: Any) -> None:
    sampler = NumInstanceSampler(N=1, min_past=10, min_future=5)
    windows = TrainingWindows(
        numbered([30, 16, 12]), CONFIG, NAMES, 4, 50, 0, sampler=sampler, max_bytes=max_bytes
    )
    found = windows_of(windows)
    assert len(found) == 200
    by_series = {i: {step for series, step in found if series == i} for i in range(3)}
    assert by_series[0] <= set(range(10, 26))
    assert by_series[1] == {10, 11}
    assert by_series[2] == set()


def test_a_sampler_that_picks_no_window_now_and_then_is_asked_again() -> None:
    """GluonTS's own estimators sample one window per series on average, so often none."""
    sampler = ExpectedNumInstanceSampler(num_instances=1.0, min_past=4, min_future=3)
    windows = TrainingWindows(numbered([100, 100]), CONFIG, NAMES, 16, 50, 0, sampler=sampler)
    found = windows_of(windows)
    share = sum(series == 0 for series, _ in found) / len(found)
    assert share == pytest.approx(0.5, abs=0.08)


def test_windows_that_a_sampler_starts_too_early_or_late_are_left_out() -> None:
    windows = TrainingWindows(numbered([9]), CONFIG, NAMES, 6, 3, 0, sampler=FirstSteps())
    assert windows_of(windows) == [(0, step) for step in range(1, 7)] * 3
    validation = ValidationWindows(numbered([9]), CONFIG, NAMES, 6, sampler=FirstSteps())
    assert windows_of(validation) == [(0, step) for step in range(1, 7)]


@pytest.mark.parametrize("max_bytes", [None, 1])
def test_a_training_sampler_that_picks_nothing_is_refused(max_bytes: Any) -> None:
    sampler = NumInstanceSampler(N=1, min_past=50)
    dataset = EndlessDataset(numbered([30, 20]))
    windows = TrainingWindows(dataset, CONFIG, NAMES, 4, 5, 0, sampler=sampler, max_bytes=max_bytes)
    with pytest.raises(ValueError, match=r"train_sampler=NumInstanceSampler.* picks no window"):
        next(iter(windows))


def test_streaming_skips_chunks_that_the_sampler_leaves_out() -> None:
    sampler = NumInstanceSampler(N=1, min_past=15, min_future=3)
    windows = TrainingWindows(
        numbered([12, 30, 12]), CONFIG, NAMES, 4, 6, 0, sampler=sampler, max_bytes=1
    )
    assert {series for series, _ in windows_of(windows)} == {1}


def test_validation_takes_the_last_window_of_each_series_every_time() -> None:
    lengths = [30, 3, 20, 4, 9]
    windows = ValidationWindows(numbered(lengths), CONFIG, NAMES, batch_size=3)
    batches = list(windows)
    assert len(windows) == len(batches) == 2
    expected = [(0, 27), (2, 17), (3, 1), (4, 6)]
    assert windows_of(batches) == windows_of(windows) == expected


def test_validation_leaves_out_windows_that_nothing_was_observed_in() -> None:
    """Their loss would be 0, and the mean too small."""
    entries = numbered([30, 30, 30])
    entries[0]["target"][-3:] = np.nan
    entries[1]["target"][-7:-3] = np.nan
    assert windows_of(ValidationWindows(entries, CONFIG, NAMES, batch_size=3)) == [(2, 27)]


def test_validation_respects_the_lead_time() -> None:
    config = WindowConfig("h", 3, 4, lead_time=2)
    (batch,) = ValidationWindows(numbered([30, 5, 6]), config, NAMES, batch_size=3)
    assert batch["past_target"][:, -1, 0].tolist() == [1024.0, 3000.0]
    assert batch["future_target"][:, :, 0].tolist() == [[1027, 1028, 1029], [3003, 3004, 3005]]


def test_gluonts_validation_sampler_equals_the_default() -> None:
    entries = numbered([30, 3, 20])
    sampler = ValidationSplitSampler(min_past=1, min_future=3)
    default = ValidationWindows(entries, CONFIG, NAMES, 8)
    sampled = ValidationWindows(entries, CONFIG, NAMES, 8, sampler=sampler)
    assert same_batches(list(default), list(sampled))


def test_a_validation_set_without_windows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no window to validate on.* 2 series is shorter than"):
        ValidationWindows(numbered([3, 2]), CONFIG, NAMES, 4)


@pytest.mark.parametrize("lead_time", [0, 2])
@pytest.mark.parametrize("max_bytes", [None, 100])
@pytest.mark.parametrize("sampled", [False, True])
def test_calibration_windows_are_in_no_training_window(
    lead_time: int, max_bytes: Any, sampled: bool
) -> None:
    config = WindowConfig("h", 3, 4, lead_time=lead_time)
    lengths = [60, 18, 13, 9]
    entries = numbered(lengths)
    held_out = held_out_steps(np.array(lengths), config, 3)
    assert held_out[0] == 9
    assert held_out[1] in (3, 6)
    training = TrainingWindows(
        entries,
        config,
        NAMES,
        16,
        60,
        seed=0,
        sampler=NumInstanceSampler(N=3, min_past=1, min_future=3 + lead_time) if sampled else None,
        max_bytes=max_bytes,
        calibration_windows=3,
    )
    batches = list(training)
    windows_of(batches)
    trained_on = set()
    for batch in batches:
        for name in ("past_target", "future_target"):
            trained_on |= set(batch[name].flatten().tolist())
    calibrated_on = set()
    for entry, label in held_out_windows(entries, config, 3):
        assert label.shape == (3,)
        calibrated_on |= set(label.tolist())
        # The forecast knows what comes before its window and lead time, and all of that.
        assert entry["target"][-1] == label[0] - lead_time - 1
    expected = {
        1000.0 * (i + 1) + step
        for i, length in enumerate(lengths)
        for step in range(length - held_out[i], length)
    }
    assert calibrated_on == expected
    assert not trained_on & calibrated_on
    # And nothing more is kept away: the step before the first of them is trained on.
    assert 1000.0 + 60 - 9 - 1 in trained_on


def test_held_out_windows_keep_features_and_skip_what_was_not_observed() -> None:
    config = WindowConfig("h", 2, 3, target_dim=2, num_feat_dynamic_real=1)
    target = np.arange(40.0).reshape(2, 20)
    target[:, 16:18] = np.nan
    entry = {
        "start": pd.Period("2024", freq="h"),
        "target": target,
        "feat_dynamic_real": np.arange(20.0)[None],
        "item_id": "a",
    }
    before = copy.deepcopy(entry)
    (first_entry, first), (last_entry, last) = held_out_windows([entry], config, 3)
    np.testing.assert_array_equal(first, target[:, 14:16].T)
    np.testing.assert_array_equal(last, target[:, 18:20].T)
    np.testing.assert_array_equal(first_entry["target"], target[:, :14].astype(np.float32))
    assert last_entry["target"].shape == (2, 18)
    assert first_entry["item_id"] == "a"
    np.testing.assert_array_equal(first_entry["feat_dynamic_real"], entry["feat_dynamic_real"])
    for name, value in before.items():
        np.testing.assert_array_equal(entry[name], value)
