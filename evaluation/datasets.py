"""Loaders: each gives GluonTS entries with a `pandas.Period` start, float32 target and item id."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Iterator, Literal, Mapping, Optional, Sequence, Union

import numpy as np
import pandas as pd
from gluonts.dataset.common import FileDataset
from gluonts.dataset.field_names import FieldName
from gluonts.dataset.jsonl import JsonLinesFile
from gluonts.exceptions import GluonTSDataError

from .errors import DataWarning, EvaluationError
from .frames import as_pandas
from .tables import (
    Grid,
    Irregular,
    PathLike,
    TimeZone,
    infer_freq,
    numeric,
    parse_times,
    period_freq,
    read_csv,
    read_regular_csv,
    regular_table,
    require_columns,
)

Entry = dict[str, Any]
Duplicates = Literal["raise", "first", "last", "mean"]

_ITEMS_TO_INFER_FREQ = 20
_STEPS_TO_TELL_FREQ = 5
_JSON_SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz")


def series_entries(
    start: pd.Period,
    columns: Sequence[str],
    values: np.ndarray,
    *,
    name: Optional[str] = None,
) -> list[Entry]:
    """Entries of a table `values` [T, D]: one per column, or with `name` one multivariate entry.

    Returns
    -------
    list of dict
        D entries with targets float32 [T], or one entry `name` with a target float32 [D, T].
    """
    target = np.ascontiguousarray(values.T, dtype=np.float32)
    if name is not None:
        return [{FieldName.ITEM_ID: name, FieldName.START: start, FieldName.TARGET: target}]
    return [
        {FieldName.ITEM_ID: column, FieldName.START: start, FieldName.TARGET: target[index]}
        for index, column in enumerate(columns)
    ]


def load_wide(
    path: PathLike,
    *,
    timestamp: str = "date",
    columns: Optional[Sequence[str]] = None,
    freq: Optional[str] = None,
    multivariate: bool = False,
    missing_values: Sequence[float] = (-9999.0,),
    irregular: Irregular = "reindex",
    time_zone: TimeZone = "local",
) -> list[Entry]:
    """Load a CSV file with a timestamp column and one column per series.

    Parameters
    ----------
    path
        The file; its header may be badly encoded and its lines may end in CRLF.
    timestamp
        Name of the timestamp column.
    columns
        Names of the series' columns; all others by default.
    freq
        pandas frequency; inferred from the timestamps by default.
    multivariate
        Give one entry with a target [D, T] instead of D entries.
    missing_values
        Numbers that stand for a missing value (−9999 in the Weather data).
    irregular
        What to do where timestamps repeat or are missing: `"reindex"` completes the grid with NaN
        and keeps the first of repeated rows, `"keep"` takes the rows as if they were evenly spaced;
        both warn with one sentence. `"raise"` refuses.
    time_zone
        What to do with time zones: `"local"` keeps the wall time and warns, `"utc"` converts,
        `"raise"` refuses.

    Raises
    ------
    EvaluationError
        The file, a column, a value or the time grid is unusable.
    """
    table = read_regular_csv(
        path,
        timestamp=timestamp,
        columns=columns,
        freq=freq,
        missing_values=missing_values,
        irregular=irregular,
        time_zone=time_zone,
    )
    name = Path(path).stem if multivariate else None
    return series_entries(table.start, table.columns, table.values, name=name)


def from_wide_frame(
    frame: Any,
    *,
    timestamp: Optional[str] = None,
    columns: Optional[Sequence[str]] = None,
    freq: Optional[str] = None,
    multivariate: bool = False,
    missing_values: Sequence[float] = (),
    irregular: Irregular = "reindex",
    time_zone: TimeZone = "local",
) -> list[Entry]:
    """Entries of a wide frame: one row per timestamp, one column per series.

    Parameters
    ----------
    frame
        A pandas frame, or one that `moecast.evaluation.frames.as_pandas` converts, such as a
        Polars frame; it is not changed.
    timestamp
        Name of the timestamp column; by default the frame's index.
    columns, freq, multivariate, missing_values, irregular, time_zone
        As for `load_wide`; the entry of a multivariate series is named `"frame"`.

    Raises
    ------
    EvaluationError
        A column, a value or the time grid is unusable, or there are no timestamps.
    """
    frame = as_pandas(frame)
    if timestamp is None:
        index = frame.index
        if isinstance(index, pd.PeriodIndex):
            index = index.to_timestamp()
        if not isinstance(index, pd.DatetimeIndex):
            raise EvaluationError(
                f"frame: its index is of {index.dtype}, not of timestamps; name the column of "
                "timestamps, as in timestamp='date'."
            )
        timestamp = "timestamp" if index.name is None else str(index.name)
        frame = frame.set_axis(index.rename(timestamp)).reset_index()
    table = regular_table(
        frame,
        "frame",
        timestamp=timestamp,
        columns=columns,
        freq=freq,
        missing_values=missing_values,
        irregular=irregular,
        time_zone=time_zone,
    )
    return series_entries(
        table.start, table.columns, table.values, name="frame" if multivariate else None
    )


def load_monash(
    path: PathLike,
    *,
    freq: str,
    item_id: str = "series_name",
    timestamp: str = "start_timestamp",
) -> list[Entry]:
    """Load a wide file of the Monash archive: one series per row.

    Parameters
    ----------
    path
        CSV file with a column of names, one of start timestamps and the values `V1`, `V2`, … of
        each series, padded with blanks at the end.
    freq
        pandas frequency of the series, which the file does not state.
    item_id, timestamp
        Names of the first two columns.

    Raises
    ------
    EvaluationError
        The file, a column or a value is unusable, or a series has no value.
    """
    where = Path(path).name
    frame = read_csv(path, text_columns=[item_id, timestamp])
    require_columns(frame, [item_id, timestamp], where)
    starts = parse_times(frame[timestamp], where).to_period(period_freq(freq))
    rows = _value_rows(frame.drop(columns=[item_id, timestamp]), frame[item_id], where)
    return [
        {FieldName.ITEM_ID: name, FieldName.START: start, FieldName.TARGET: row}
        for name, start, row in zip(frame[item_id], starts, rows)
    ]


def load_m4(
    train: PathLike,
    test: Optional[PathLike] = None,
    *,
    freq: str,
    start: str = "2000-01-03",
) -> list[Entry]:
    """Load M4's wide files: one series per row, its name first.

    Parameters
    ----------
    train, test
        CSV files `V1, V2, …` whose rows are padded with blanks at the end. The test file's values
        follow the training file's, series matched by name, so that a backtest with one window of
        the test file's length forecasts exactly the test file.
    freq
        pandas frequency of the series.
    start
        Timestamp of every series' first value; these files state none.

    Raises
    ------
    EvaluationError
        A file or value is unusable, a series has no value, or the two files name different series.
    """
    first = pd.Period(start, freq=period_freq(freq))
    series = _read_m4(train)
    if test is not None:
        future = _read_m4(test)
        odd = sorted(series.keys() ^ future.keys())
        if odd:
            raise EvaluationError(
                f"{Path(test).name}: series {odd[0]!r} is in only one of the two files; give the "
                "training and test file of the same frequency."
            )
        series = {name: np.concatenate([past, future[name]]) for name, past in series.items()}
    return [
        {FieldName.ITEM_ID: name, FieldName.START: first, FieldName.TARGET: target}
        for name, target in series.items()
    ]


def _read_m4(path: PathLike) -> dict[str, np.ndarray]:
    frame = read_csv(path)
    names = frame.iloc[:, 0].astype("str")
    return dict(zip(names, _value_rows(frame.iloc[:, 1:], names, Path(path).name)))


def _value_rows(values: pd.DataFrame, names: pd.Series, where: str) -> list[np.ndarray]:
    """The rows of `values` [series, T] as float32 without the blanks that pad their ends."""
    if names.duplicated().any():
        raise EvaluationError(
            f"{where}: series {names[names.duplicated()].iloc[0]!r} occurs twice; name each once."
        )
    table = np.stack([numeric(values[name], where) for name in values.columns], axis=1)
    rows = []
    for name, row in zip(names, table):
        observed = np.flatnonzero(~np.isnan(row))
        if not len(observed):
            raise EvaluationError(f"{where}: series {name!r} has no value; remove its row.")
        rows.append(row[: observed[-1] + 1].astype(np.float32))
    return rows


def from_long_frame(
    frame: Any,
    *,
    timestamp: str = "timestamp",
    target: str = "target",
    item_id: Optional[str] = "item_id",
    freq: Optional[str] = None,
    feat_dynamic_real: Sequence[str] = (),
    past_feat_dynamic_real: Sequence[str] = (),
    feat_static_cat: Sequence[str] = (),
    feat_static_real: Sequence[str] = (),
    future_length: Union[int, Literal["empty"]] = 0,
    fill_features: Optional[float] = None,
    categories: Optional[Mapping[str, Sequence[Any]]] = None,
    irregular: Literal["reindex", "raise"] = "reindex",
    duplicates: Duplicates = "raise",
    time_zone: TimeZone = "local",
) -> list[Entry]:
    """Entries of a long frame: one row per item and timestamp.

    Rows are sorted by time and each item's grid is completed: a gap is a missing target (NaN).
    `gluonts.dataset.pandas.PandasDataset` refuses gaps, keeps float64 and names neither item nor
    timestamp where a frame is unusable, hence this function.

    Parameters
    ----------
    frame
        The rows, in any order: a pandas frame, or one that
        `moecast.evaluation.frames.as_pandas` converts, such as a Polars frame. It is not changed.
    timestamp, target, item_id
        Names of columns; `item_id=None` takes the frame as one series named `target`.
    freq
        pandas frequency; by default inferred from the longest item that is regular.
    feat_dynamic_real, past_feat_dynamic_real
        Names of columns known in the future too, and of columns known in the past only.
    feat_static_cat, feat_static_real
        Names of columns with one value per item. Categories become their rank among the column's
        sorted values.
    future_length
        Number of last rows of every item that hold only `feat_dynamic_real`: targets and past
        features end that many rows earlier. `"empty"` takes an item's last rows without a target
        as such, however many they are.
    fill_features
        Value of dynamic features where the frame has none, in gaps or as blanks; by default such a
        frame is refused, because few forecasters can take it.
    categories
        The values of each of `feat_static_cat` in the order of their ranks, as `frame_categories`
        gave them for another frame; by default of this one.
    irregular
        What to do where an item's timestamps are out of order, missing, or elsewhere within their
        period than the others: `"reindex"` sorts and completes them and warns with one sentence,
        `"raise"` refuses.
    duplicates
        Which of an item's rows of one period counts: `"first"`, `"last"`, or the `"mean"` of them;
        `"raise"` refuses.
    time_zone
        What to do with time zones: `"local"` keeps the wall time and warns, `"utc"` converts,
        `"raise"` refuses.

    Returns
    -------
    list of dict
        Entries in the order in which items first appear: target float32 [T], feat_dynamic_real
        float32 [features, T + future rows], past_feat_dynamic_real float32 [features, T],
        feat_static_cat int32 [features], feat_static_real float32 [features].

    Raises
    ------
    EvaluationError
        A column is missing, an item has two rows for one period, the items have different
        frequencies, a static column has two values for one item or one that `categories` lacks,
        or a dynamic feature has none for a row and `fill_features` is not given.
    """
    for name, value, allowed in (
        ("irregular", irregular, ("reindex", "raise")),
        ("duplicates", duplicates, ("raise", "first", "last", "mean")),
    ):
        if value not in allowed:
            raise EvaluationError(
                f"{name}={value!r} is unknown; choose among {', '.join(allowed)}."
            )
    frame = as_pandas(frame)
    if item_id is None:
        item_id = "item_id"
        frame = frame.assign(item_id=target)
    dynamic = [*feat_dynamic_real, *past_feat_dynamic_real]
    static = [*feat_static_cat, *feat_static_real]
    require_columns(frame, [timestamp, target, item_id, *dynamic, *static], "frame")
    if frame.empty:
        raise EvaluationError("frame: there are no rows; check the file or the filter.")
    if frame[item_id].isna().any():
        raise EvaluationError(f"frame: column {item_id!r} has blanks; name every row's item.")
    for name in (target, *dynamic, *feat_static_real):
        frame = frame.assign(**{name: numeric(frame[name], "frame")})
    frame = frame.assign(**{timestamp: parse_times(frame[timestamp], "frame", time_zone)})
    inferred = freq is None
    freq = _frame_freq(frame, timestamp, item_id) if freq is None else period_freq(freq)
    if categories is None:
        categories = frame_categories(frame, feat_static_cat)

    entries = []
    flaws = _Flaws(freq)
    for item, rows in frame.groupby(item_id, sort=False, observed=True):
        where = f"item {item!r}"
        grid = Grid.locate(pd.DatetimeIndex(rows[timestamp]), freq, where)
        if inferred:
            _refuse_other_frequency(grid, freq, where)
        if len(grid.repeated):
            if duplicates == "raise":
                raise EvaluationError(
                    f"{where}: two rows for {grid.start + int(grid.repeated[0])}; keep one of them "
                    "or pass duplicates='first', 'last' or 'mean'."
                )
            rows = _merge_repeated(rows, grid, duplicates, [target, *dynamic])
            grid = Grid.locate(pd.DatetimeIndex(rows[timestamp]), freq, where)
        flaws.add(grid, where)
        series = grid.place(rows[target].to_numpy())
        if future_length == "empty":
            observed = np.flatnonzero(~np.isnan(series))
            past = int(observed[-1]) + 1 if len(observed) else 0
        else:
            past = grid.length - future_length
        if past < 1:
            raise EvaluationError(
                f"{where}: none of its {grid.length} rows is left as past before future_length="
                f"{future_length!r}; give rows with a target."
            )

        def features(
            names: Sequence[str],
            until: Optional[int],
            rows: pd.DataFrame = rows,
            grid: Grid = grid,
            where: str = where,
        ) -> np.ndarray:
            placed = [grid.place(rows[name].to_numpy())[:until] for name in names]
            return np.stack(
                [_complete(v, n, grid, where, fill_features) for n, v in zip(names, placed)]
            ).astype(np.float32)

        entry: Entry = {
            FieldName.ITEM_ID: str(item),
            FieldName.START: grid.start,
            FieldName.TARGET: series[:past].astype(np.float32),
        }
        if feat_dynamic_real:
            entry[FieldName.FEAT_DYNAMIC_REAL] = features(feat_dynamic_real, None)
        if past_feat_dynamic_real:
            entry[FieldName.PAST_FEAT_DYNAMIC_REAL] = features(past_feat_dynamic_real, past)
        if feat_static_cat:
            codes = [_rank(rows[n], categories[n], where) for n in feat_static_cat]
            entry[FieldName.FEAT_STATIC_CAT] = np.array(codes, dtype=np.int32)
        if feat_static_real:
            reals = [_only_value(rows[name], where) for name in feat_static_real]
            entry[FieldName.FEAT_STATIC_REAL] = np.array(reals, dtype=np.float32)
        entries.append(entry)
    flaws.report(irregular)
    return entries


def frame_categories(frame: Any, columns: Sequence[str]) -> dict[str, list[Any]]:
    """The sorted values of each of `columns`, which `from_long_frame` ranks categories by."""
    frame = as_pandas(frame)
    require_columns(frame, columns, "frame")
    return {name: sorted(frame[name].dropna().unique().tolist()) for name in columns}


class _Flaws:
    """What is irregular in the items of a frame, told in one sentence."""

    def __init__(self, freq: str) -> None:
        self._freq = freq
        self._items: Counter[str] = Counter()
        self._steps: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, grid: Grid, where: str) -> None:
        for flaw, positions in (
            ("missing", grid.missing),
            ("off the grid", grid.positions[grid.moved]),
        ):
            if len(positions):
                self._items[flaw] += 1
                self._steps[flaw] += len(positions)
                first = (grid.start + int(positions[0])).start_time
                self._first.setdefault(flaw, f"first {first} in {where}")
        if not grid.sorted:
            self._items["unsorted"] += 1

    def report(self, irregular: str) -> None:
        """Warn, or refuse if `irregular` is `"raise"`."""
        found = list(self._sentences())
        if not found:
            return
        flaws = " and ".join(found)
        if irregular == "raise":
            raise EvaluationError(
                f"frame: the rows are not a regular grid of freq={self._freq!r}: {flaws}; correct "
                "them, or pass irregular='reindex' to sort and complete them with missing values."
            )
        warnings.warn(
            f"frame: {flaws}; sorted and completed with missing values (irregular='reindex').",
            DataWarning,
            stacklevel=3,
        )

    def _sentences(self) -> Iterator[str]:
        for flaw, steps in self._steps.items():
            yield f"{steps} timestamps {flaw} in {self._items[flaw]} items ({self._first[flaw]})"
        if self._items["unsorted"]:
            yield f"rows out of order in {self._items['unsorted']} items"


def _merge_repeated(
    rows: pd.DataFrame, grid: Grid, duplicates: Duplicates, numbers: Sequence[str]
) -> pd.DataFrame:
    """One row per period; the `"mean"` is that of the columns `numbers`."""
    positions = pd.Series(grid.positions, index=rows.index)
    if duplicates == "mean":
        means = rows[list(numbers)].groupby(positions.to_numpy()).mean()
        rows = rows.assign(**{name: means[name].loc[positions].to_numpy() for name in numbers})
    keep: Literal["first", "last"] = "last" if duplicates == "last" else "first"
    return rows[~positions.duplicated(keep=keep).to_numpy()]


def _refuse_other_frequency(grid: Grid, freq: str, where: str) -> None:
    """Refuse an item whose rows are typically several steps apart, or several in one step."""
    steps = np.diff(np.sort(grid.positions))
    typical = float(np.median(steps)) if len(steps) >= _STEPS_TO_TELL_FREQ else 1.0
    if not 1 <= typical < 2:
        apart = f"{typical:g} steps apart" if typical else "several to a step"
        raise EvaluationError(
            f"{where}: its rows are typically {apart} at freq={freq!r}, the frequency of the "
            "longest item; split items of mixed frequencies into files of their own, or give freq "
            "to fill the steps between with missing values."
        )


def _frame_freq(frame: pd.DataFrame, timestamp: str, item_id: str) -> str:
    longest_first = frame[item_id].value_counts().index[:_ITEMS_TO_INFER_FREQ]
    for item in longest_first:
        times = pd.DatetimeIndex(frame.loc[frame[item_id] == item, timestamp]).sort_values()
        freq = pd.infer_freq(times) if len(times) >= 3 else None
        if freq is not None:
            return period_freq(freq)
    longest = frame.loc[frame[item_id] == longest_first[0], timestamp]
    return infer_freq(pd.DatetimeIndex(longest), "frame")


def _rank(column: pd.Series, values: Sequence[Any], where: str) -> int:
    value = _only_value(column, where)
    if value not in values:
        known = ", ".join(map(repr, values[:8]))
        raise EvaluationError(
            f"{where}: static column {column.name!r} is {value!r}, which is none of the known "
            f"categories {known}{', …' if len(values) > 8 else ''}; leave the item out or train on "
            "data that have it."
        )
    return list(values).index(value)


def _complete(
    values: np.ndarray, name: str, grid: Grid, where: str, fill: Optional[float]
) -> np.ndarray:
    gaps = np.flatnonzero(np.isnan(values))
    if not len(gaps):
        return values
    if fill is None:
        raise EvaluationError(
            f"{where}: feature {name!r} has no value in {len(gaps)} periods, first "
            f"{grid.start + int(gaps[0])}; fill them in the data, or "
            "pass fill_features=NUMBER for all."
        )
    return np.nan_to_num(values, nan=fill)


def _only_value(column: pd.Series, where: str) -> Any:
    values = column.dropna().unique()
    if len(values) != 1:
        raise EvaluationError(
            f"{where}: static column {column.name!r} has {len(values)} values; give it exactly one "
            "per item."
        )
    return values[0]


def load_long_csv(path: PathLike, *, timestamp: str = "timestamp", **columns: Any) -> list[Entry]:
    """Load a long CSV file; `columns` are `from_long_frame`'s arguments.

    Raises
    ------
    EvaluationError
        The file is unusable, or what `from_long_frame` raises.
    """
    return from_long_frame(read_csv(path, text_columns=[timestamp]), timestamp=timestamp, **columns)


def load_jsonl(path: PathLike, *, freq: str) -> list[Entry]:
    """Load GluonTS's JSON lines through GluonTS's own `FileDataset`.

    Parameters
    ----------
    path
        A file `.json`, `.jsonl`, `.json.gz` or `.jsonl.gz`, or a folder of such files, read in
        order of their names; `metadata.json` is left out.
    freq
        pandas frequency of the series.

    Returns
    -------
    list of dict
        Entries with all fields of their lines. Targets are float32 [T], or [D, T] where the first
        line's is nested; a line without `item_id` is named by its number, from 0.

    Raises
    ------
    EvaluationError
        There is no such file, a line is no JSON, or a field is missing or malformed.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    files = [
        file
        for file in files
        if file.name.endswith(_JSON_SUFFIXES)
        and file.name != "metadata.json"
        and not file.name.startswith(".")
    ]
    if not files:
        raise EvaluationError(
            f"{path}: there is no JSON lines file ({', '.join(_JSON_SUFFIXES)}); check the path."
        )
    entries: list[Entry] = []
    for file in files:
        entries.extend(_read_jsonl(file, period_freq(freq)))
    for number, entry in enumerate(entries):
        entry[FieldName.ITEM_ID] = str(entry.get(FieldName.ITEM_ID, number))
    return entries


def _read_jsonl(file: Path, freq: str) -> list[Entry]:
    try:
        lines = JsonLinesFile(file)
        if not len(lines):
            raise EvaluationError(f"{file.name}: there is no line in it; check the file.")
        target = next(iter(lines)).get(FieldName.TARGET)
        nested = bool(target) and isinstance(target[0], list)
        return list(FileDataset(file, freq=freq, one_dim_target=not nested))
    except EvaluationError:
        raise
    except (GluonTSDataError, ValueError) as error:
        raise EvaluationError(f"{file.name}: {str(error)[:200]}; correct that line.") from error
