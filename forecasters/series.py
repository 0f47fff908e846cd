"""Series in arrays, and windows cut from them, a batch at a time.

Series are laid end to end in one array per field. A window is then a run of rows, a batch of
windows one indexing operation, whatever the number of series.
"""

from bisect import bisect_right
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import pandas as pd
import torch
from gluonts.dataset.field_names import FieldName
from torch import Tensor
from torch.distributions import constraints

from .fields import FEAT_DYNAMIC_REAL, PAST_FEAT_DYNAMIC_REAL, TARGET, WindowConfig, read_entry
from .frequencies import parse_frequency, time_features

Batch = Dict[str, Tensor]
Anchors = Tuple[np.ndarray, np.ndarray]
"""Which windows: the series' positions ``[batch]``, and the number of steps before each window's
forecast ``[batch]``."""


class SeriesArrays:
    """Series laid end to end, from which batches of windows are cut.

    Parameters
    ----------
    entries
        Checked entries as :func:`moecast.forecasters.fields.read_entry` returns them.
    config
        What a window holds.
    future
        Whether windows may reach beyond the end of the history (as in prediction), where targets
        are unknown.
    """

    def __init__(
        self, entries: Sequence[Mapping[str, Any]], config: WindowConfig, future: bool = False
    ) -> None:
        self.config = config
        history = np.array([len(entry[TARGET]) for entry in entries])
        self.lengths = history
        self._beyond = config.future_length if future else 0
        rows = history + self._beyond
        # Space before the first series, so that a window never starts at a negative row.
        self._offsets = config.context_length + np.concatenate([[0], np.cumsum(rows)])[:-1]
        self._arrays = {
            name: self._lay_out([entry[name] for entry in entries], rows, width)
            for name, width in config.dynamic_fields.items()
        }
        self._static = {
            name: np.stack([entry[name] for entry in entries]) for name in config.static_fields
        }
        self.starts = [entry[FieldName.START] for entry in entries]
        self._calendar: Optional[Tuple[np.ndarray, np.ndarray]] = None
        self._views: Dict[Tuple[str, int], np.ndarray] = {}

    def _lay_out(self, arrays: List[np.ndarray], rows: np.ndarray, width: int) -> np.ndarray:
        laid_out = np.full(
            (self.config.context_length + int(rows.sum()), width), np.nan, dtype=np.float32
        )
        for offset, length, array in zip(self._offsets, rows, arrays):
            usable = array[:length]
            laid_out[offset : offset + len(usable)] = usable
        return laid_out

    def __len__(self) -> int:
        return len(self.lengths)

    def target_of(self, series: int) -> np.ndarray:
        """Target of one series as GluonTS has it: ``[time]`` or ``[channel, time]``."""
        offset = self._offsets[series]
        target = self._arrays[TARGET][offset : offset + self.lengths[series]].T
        return target[0] if self.config.target_dim == 1 else target

    def feature_moments(self, name: str) -> Tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation ``[feature]`` of a feature; 1 where it does not vary."""
        values = self._static[name] if name in self._static else self._arrays[name]
        observed = np.isfinite(values)
        count = np.maximum(observed.sum(axis=0), 1)
        known = np.where(observed, values, 0.0).astype(np.float64)
        mean = known.sum(axis=0) / count
        variance = (np.where(observed, values - mean, 0.0) ** 2).sum(axis=0) / count
        deviation = np.sqrt(variance)
        deviation[deviation <= 1e-6 * np.abs(mean)] = 1.0
        deviation[deviation == 0.0] = 1.0
        return mean.astype(np.float32), deviation.astype(np.float32)

    def last_anchors(self, held_out: int = 0) -> Anchors:
        """The window at the end of each series, ``held_out`` steps before its end."""
        return np.arange(len(self)), np.maximum(self.lengths - held_out, 0)

    def trainable_anchors(
        self, calibration_windows: int = 0, shortest_context: Optional[int] = None
    ) -> Anchors:
        """All windows with a full context where the series has one, and something to learn.

        A series shorter than context and horizon gives the windows with at least
        ``shortest_context`` steps of context, or else the one with the longest context it has. A
        window needs an observed value in its context and in its horizon.

        Parameters
        ----------
        calibration_windows
            Windows at the end of each series to stay clear of, see :func:`held_out_steps`.
        shortest_context
            Steps of context that are enough in a short series (default: all, so that it gives a
            single window).
        """
        config = self.config
        held_out = held_out_steps(self.lengths, config, calibration_windows)
        latest = self.lengths - held_out - config.future_length
        full = config.context_length
        enough = full if shortest_context is None else shortest_context
        earliest = np.where(latest >= full, full, np.minimum(enough, latest))
        counts = np.where(latest >= 1, latest - earliest + 1, 0)
        series = np.repeat(np.arange(len(self)), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        steps = earliest[series] + np.arange(len(series)) - first
        return self.with_observations((series, steps))

    def with_observations(self, anchors: Anchors) -> Anchors:
        """Those of the windows that have an observed value in their context and their horizon."""
        series, steps = anchors
        config = self.config
        observed = np.isfinite(self._arrays[TARGET]).any(axis=-1)
        running = np.concatenate([[0], np.cumsum(observed)])
        row = self._offsets[series] + steps
        context_start = np.maximum(row - config.context_length, self._offsets[series])
        horizon = row + config.lead_time
        in_context = running[row] - running[context_start]
        in_horizon = running[horizon + config.prediction_length] - running[horizon]
        usable = (in_context > 0) & (in_horizon > 0)
        return series[usable], steps[usable]

    def cut(self, anchors: Anchors, input_names: Iterable[str]) -> Batch:
        """A batch of windows.

        Parameters
        ----------
        anchors
            Which windows.
        input_names
            Which of the fields below to cut.

        Returns
        -------
        dict
            ``past_target`` and ``past_observed_values`` ``[batch, context, channel]``,
            ``future_target`` and ``future_observed_values`` ``[batch, horizon, channel]``,
            ``past_feat_dynamic_real`` ``[batch, context, feature]``; ``feat_dynamic_real`` and
            ``time_feat`` ``[batch, context + horizon, feature]``; ``feat_static_real`` and
            ``feat_static_cat`` ``[batch, feature]``. Missing targets are filled in (see
            :func:`fill_missing`) and marked by the observed values; missing features are NaN.
        """
        names = set(input_names)
        series, steps = anchors
        starts = self._offsets[series] + steps - self.config.context_length
        padding = self.config.context_length - steps
        context, horizon = self.config.context_length, self.config.prediction_length
        batch: Dict[str, np.ndarray] = {}
        if "past_target" in names:
            past = self._rows(TARGET, starts, context, padding)
            observed = np.isfinite(past)
            if not observed.all():
                past = fill_missing(past, observed, self._last_observed(series, steps, observed))
            batch["past_target"] = past
            batch["past_observed_values"] = observed.astype(np.float32)
        if "future_target" in names:
            future = self._rows(TARGET, starts + context + self.config.lead_time, horizon)
            observed = np.isfinite(future)
            batch["future_target"] = np.where(observed, future, np.float32(0.0))
            batch["future_observed_values"] = observed.astype(np.float32)
        if PAST_FEAT_DYNAMIC_REAL in names:
            batch[PAST_FEAT_DYNAMIC_REAL] = self._rows(
                PAST_FEAT_DYNAMIC_REAL, starts, context, padding
            )
        if FEAT_DYNAMIC_REAL in names:
            full = self._rows(
                FEAT_DYNAMIC_REAL, starts, context + self.config.future_length, padding
            )
            batch[FEAT_DYNAMIC_REAL] = self._without_lead(full)
        if "time_feat" in names:
            batch["time_feat"] = self._time_features(series, steps)
        for name, values in self._static.items():
            if name in names:
                batch[name] = values[series]
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _rows(
        self, name: str, starts: np.ndarray, length: int, padding: Optional[np.ndarray] = None
    ) -> np.ndarray:
        key = name, length
        if key not in self._views:
            view = np.lib.stride_tricks.sliding_window_view(self._arrays[name], length, axis=0)
            self._views[key] = view.swapaxes(1, 2)
        windows = self._views[key][starts]
        if padding is not None and padding.max() > 0:
            windows[np.arange(length) < padding[:, np.newaxis]] = np.nan
        return windows

    def _without_lead(self, windows: np.ndarray) -> np.ndarray:
        if self.config.lead_time == 0:
            return windows
        context = self.config.context_length
        horizon = windows[:, context + self.config.lead_time :]
        return np.concatenate([windows[:, :context], horizon], axis=1)

    def _last_observed(
        self, series: np.ndarray, steps: np.ndarray, observed: np.ndarray
    ) -> np.ndarray:
        """For contexts without any, the value ``[batch, channel]`` seen before them, or 0."""
        target = self._arrays[TARGET]
        last = np.zeros((len(series), target.shape[1]), dtype=np.float32)
        for window, channel in np.argwhere(~observed.any(axis=1)):
            offset = self._offsets[series[window]]
            earlier = target[offset : offset + steps[window], channel]
            seen = np.flatnonzero(np.isfinite(earlier))
            if len(seen):
                last[window, channel] = earlier[seen[-1]]
        return last

    def _time_features(self, series: np.ndarray, steps: np.ndarray) -> np.ndarray:
        if self._calendar is None:
            self._calendar = self._build_calendar()
        table, first_rows = self._calendar
        windows = np.arange(self.config.context_length + self.config.future_length)
        return self._without_lead(table[(first_rows[series] + steps)[:, np.newaxis] + windows])

    def _build_calendar(self) -> Tuple[np.ndarray, np.ndarray]:
        """Time features of every period that some window can touch, and each series' first row.

        Overlapping series share their rows, so that the table is as long as the time they span.
        """
        assert self.config.freq is not None
        multiple = parse_frequency(self.config.freq).n
        before, after = self.config.context_length, self.config.future_length
        # Periods of one anchor and phase lie on one grid; elsewhere a row would be another time.
        grids = [(start.freqstr, start.ordinal % multiple) for start in self.starts]
        begins = [start.ordinal // multiple - before for start in self.starts]
        lengths = self.lengths.tolist()
        spans = {
            (grid, begin, begin + before + length + after)
            for grid, begin, length in zip(grids, begins, lengths)
        }
        merged: List[Tuple[Tuple[str, int], int, int]] = []
        for grid, begin, end in sorted(spans):
            if merged and merged[-1][0] == grid and begin <= merged[-1][2]:
                merged[-1] = grid, merged[-1][1], max(merged[-1][2], end)
            else:
                merged.append((grid, begin, end))
        features = time_features(self.config.freq)
        tables, rows, total = [], [], 0
        for (freq, phase), begin, end in merged:
            first = pd.Period(ordinal=begin * multiple + phase, freq=freq)
            index = pd.period_range(first, periods=end - begin, freq=freq)
            columns = [np.asarray(feature(index), dtype=np.float32) for feature in features]
            tables.append(np.stack(columns, axis=-1) if columns else np.zeros((len(index), 0)))
            rows.append(total)
            total += len(index)
        keys = [(grid, begin) for grid, begin, _ in merged]
        positions = []
        for grid, begin in zip(grids, begins):
            span = bisect_right(keys, (grid, begin)) - 1
            positions.append(rows[span] + begin - keys[span][1])
        return np.concatenate(tables).astype(np.float32), np.array(positions)


def held_out_steps(lengths: np.ndarray, config: WindowConfig, windows: int) -> np.ndarray:
    """Steps ``[series]`` at the end of each series that are kept from training for calibration.

    As many horizons as asked for, but no more than leave one further horizon of windows with a
    full context to train on: a network trained on less would not be like the one to calibrate.
    """
    spare = lengths - config.context_length - config.future_length - config.prediction_length
    available = spare // config.prediction_length
    return np.clip(available, 0, windows) * config.prediction_length


def fill_missing(values: np.ndarray, observed: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Fill the missing values of windows.

    Gaps between observed values are interpolated, a gap at the end repeats the last value, and
    what lies before the first value (the padding of short series, too) takes the window's mean,
    which after standardisation is 0 and moves nothing.

    Parameters
    ----------
    values, observed
        ``[batch, time, channel]``, and which of them count.
    fallback
        ``[batch, channel]`` for windows without any observed value.

    Returns
    -------
    np.ndarray
        ``[batch, time, channel]`` without NaN; rows without gaps are unchanged.
    """
    gappy = ~observed.all(axis=(1, 2))
    seen = observed[gappy]
    known = np.where(seen, values[gappy], np.float32(0.0))
    time = np.arange(values.shape[1])[:, np.newaxis]
    length = values.shape[1]
    previous = np.maximum.accumulate(np.where(seen, time, -1), axis=1)
    following = np.minimum.accumulate(np.where(seen, time, length)[:, ::-1], axis=1)[:, ::-1]
    left = np.take_along_axis(known, np.maximum(previous, 0), axis=1)
    right = np.take_along_axis(known, np.minimum(following, length - 1), axis=1)
    share = (time - previous) / np.maximum(following - previous, 1)
    filled = left + (right - left) * share
    filled = np.where(following == length, left, filled)
    count = seen.sum(axis=1, keepdims=True)
    mean = known.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    mean = np.where(count == 0, fallback[gappy][:, np.newaxis], mean)
    filled = np.where(previous == -1, mean, filled)
    result = values.copy()
    result[gappy] = np.where(seen, known, filled)
    return result


def read_chunks(
    dataset: Iterable[Mapping[str, Any]],
    config: WindowConfig,
    max_bytes: Optional[int] = None,
    support: constraints.Constraint = constraints.real,
) -> Iterator[SeriesArrays]:
    """Read a dataset into arrays of at most about ``max_bytes`` each (``None``: one array).

    Raises
    ------
    ValueError
        If an entry does not have the fields that the configuration expects.
    """
    entries: List[Mapping[str, Any]] = []
    size = 0
    for position, entry in enumerate(dataset):
        checked = read_entry(entry, position, config, support=support)
        entries.append(checked)
        size += sum(checked[name].nbytes for name in config.dynamic_fields)
        if max_bytes is not None and size >= max_bytes:
            yield SeriesArrays(entries, config)
            entries, size = [], 0
    if entries:
        yield SeriesArrays(entries, config)


def history_ends(
    entries: Sequence[Mapping[str, Any]],
    first_position: int,
    config: WindowConfig,
    held_out: int = 0,
) -> SeriesArrays:
    """The ends of a batch of series: all that their forecasts depend on.

    Parameters
    ----------
    entries
        GluonTS data entries.
    first_position
        The first one's place in the dataset, for messages.
    config
        What a window holds.
    held_out
        Steps before the end at which further windows will be cut.

    Raises
    ------
    ValueError
        If an entry does not have the fields that the configuration expects.
    """
    ends = []
    for position, entry in enumerate(entries, start=first_position):
        checked = read_entry(entry, position, config, forecast=True)
        length = len(checked[TARGET])
        trailing_gap = int(np.argmax(np.isfinite(checked[TARGET]).any(axis=-1)[::-1]))
        skipped = max(0, length - max(config.context_length + held_out, trailing_gap + 1))
        end = {name: checked[name][skipped:] for name in config.dynamic_fields}
        end[FieldName.START] = checked[FieldName.START] + skipped
        ends.append({**checked, **end})
    return SeriesArrays(ends, config, future=True)
